"""The HTTP side: mlx-lm's handler, with checked requests and with our fields in its answers."""

import io
import json
import logging
from contextlib import suppress
from email.message import Message
from http import HTTPStatus
from importlib.resources import files
from typing import Any
from urllib.parse import unquote, urlsplit

from glass_mlx.errors import one_line
from glass_mlx.server.body import check_body, parse_body
from glass_mlx.server.connection import DeadlineReader, drain, is_closed
from glass_mlx.server.errors import RequestError, bad_request, internal_error
from glass_mlx.server.generation import GlassResponseGenerator
from glass_mlx.server.glass_field import glass_field
from glass_mlx.server.job import Job, Piece, TokenLogprob
from glass_mlx.server.provider import GlassModelProvider
from glass_mlx.server.usage import glass_usage, kept_shares

from mlx_lm.server import APIHandler

_CHAT = ("/v1/chat/completions", "/chat/completions")
_TEXT = ("/v1/completions",)

# The time in seconds for a client to send its request, and to take a part of its answer.
_READ_TIME, _WRITE_TIME = 60, 30

# How long, and how many bytes, a refused client may still send.
_DRAIN_TIME, _DRAIN_BYTES = 2, 1 << 26

# The page loads nothing from elsewhere, and no other page may show it in a frame.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class GlassAPIHandler(APIHandler):
    """Serves one request.

    Args:
        response_generator: generates the answers.
        *args: those of mlx-lm's handler.
        **kwargs: those of mlx-lm's handler.
    """

    response_generator: GlassResponseGenerator
    timeout = _WRITE_TIME
    server_version, sys_version = "glass-mlx", ""

    def __init__(
        self, response_generator: GlassResponseGenerator, *args: Any, **kwargs: Any
    ) -> None:
        self._has_begun = self._is_streaming = self._is_unread = False
        self.headers = Message()  # of a request that is not even HTTP
        super().__init__(response_generator, *args, **kwargs)

    # Connection

    def setup(self) -> None:
        """Prepare the connection, with one time limit for the whole request."""
        super().setup()
        self.rfile = io.BufferedReader(DeadlineReader(self.connection, _READ_TIME))

    def finish(self) -> None:
        """Close the connection."""
        with suppress(OSError):  # the client has gone
            super().finish()
        if self._is_unread:
            drain(self.connection, _DRAIN_TIME, _DRAIN_BYTES)

    def log_message(self, format: str, *args: Any) -> None:
        """Log a line, at a level that --log-level can leave out."""
        logging.info("%s %s", self.address_string(), one_line(format % args))

    def end_headers(self) -> None:
        """Send the headers, after which the status cannot change any more."""
        self._has_begun = True
        super().end_headers()

    # Errors

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse a request that is not HTTP as it should be, in the API's form."""
        self._is_unread, self.request_version = True, "HTTP/1.0"
        self._send_failure(RequestError(int(code), message or HTTPStatus(code).phrase))

    def _send_failure(self, error: RequestError) -> None:
        """Send an error, in whatever form is still possible."""
        if self._is_streaming:
            self.wfile.write(f"data: {json.dumps(error.body)}\n\n".encode())
            return
        if self._has_begun:
            return
        self._headers_buffer: list[bytes] = []  # of an answer that was about to be sent
        self._send_json(error.body, error.status, error.headers)

    def _send_json(
        self, body: Any, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        data = json.dumps(body).encode()
        self._set_completion_headers(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _set_stream_headers(self, status_code: int = 200) -> None:
        super()._set_stream_headers(status_code)
        self._is_streaming = True

    # Requests

    def do_GET(self) -> None:
        """Answer a GET request."""
        path = urlsplit(self.path).path
        if path == "/":
            self._send_page()
        elif path == "/health":
            is_healthy = self.response_generator.is_healthy
            status = {"status": "ok" if is_healthy else "unavailable"}
            self._send_json(status, 200 if is_healthy else 503)
        elif path == "/v1/models":
            self._send_json({"object": "list", "data": [self._model()]})
        elif path.startswith("/v1/models/"):
            self._send_model(unquote(path.removeprefix("/v1/models/")))
        else:
            self._send_failure(RequestError(404, f"there is nothing at {path}"))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Answer a POST request, whatever it is."""
        try:
            self._post()
        except RequestError as error:
            self._send_failure(error)
        except OSError as error:  # the client has gone, or takes nothing
            self.close_connection = True
            logging.info("%s: a client has gone (%s)", self.address_string(), error)
        except Exception:
            logging.exception("a request failed")
            self._send_failure(internal_error())

    def _post(self) -> None:
        path = urlsplit(self.path).path
        if path not in (*_CHAT, *_TEXT):
            self._is_unread = True
            raise RequestError(404, f"there is nothing at {path}")
        body = parse_body(self._read_body())
        self._field = glass_field(body)
        data = json.dumps(check_body(body, path in _CHAT)).encode()
        # mlx-lm's handler reads the request once more, now that it is known to be good.
        self.path, self.rfile = path, io.BytesIO(data)
        self.headers.replace_header("Content-Length", str(len(data)))
        super().do_POST()

    def _read_body(self) -> bytes:
        """Read the body of the request.

        Raises:
            RequestError: if its length is not known or too large, or if it does not come.
        """
        self._is_unread = True
        limit = self.response_generator.cli_args.max_request_bytes
        length = self.headers.get("Content-Length")
        if length is None:
            raise RequestError(411, "the header Content-Length is required")
        if not (length.isascii() and length.isdigit()):
            raise bad_request("the header Content-Length is not a number")
        if len(length) > 18 or int(length) > limit:
            raise RequestError(413, f"the request's body is larger than {limit} bytes")
        try:
            data = self.rfile.read(int(length))
        except TimeoutError as error:
            raise RequestError(408, f"the request took more than {_READ_TIME} s") from error
        self._is_unread = False
        if len(data) < int(length):
            raise bad_request("the request's body is shorter than the header Content-Length says")
        return data

    def validate_model_parameters(self) -> None:
        """Check the fields as mlx-lm does, and which model they name.

        Raises:
            RequestError: for the first field that is wrong.
        """
        try:
            super().validate_model_parameters()
            if not isinstance(self.requested_draft_model, str):
                raise ValueError("draft_model must be of type str")
        except (TypeError, ValueError, OverflowError) as error:
            raise bad_request(str(error)) from error
        provider = self._provider
        provider.check(self.requested_model, self.adapter, self.requested_draft_model)
        if provider.is_default(self.requested_model):
            self.requested_model = provider.name
        self.logprobs = self.logprobs or self.top_logprobs > 0

    def handle_chat_completions(self) -> Job:
        """Return the job of a chat request."""
        return self._make_job(super().handle_chat_completions())

    def handle_text_completions(self) -> Job:
        """Return the job of a text request."""
        return self._make_job(super().handle_text_completions())

    def _make_job(self, request: Any) -> Job:
        is_dense_server = self.response_generator.cli_args.dense
        self._job = Job(
            **vars(request),
            config=self._field.config(self._provider.config, is_dense_server),
            is_dense=is_dense_server or self._field.dense,
            trace=self._field.trace,
            is_gone=lambda: is_closed(self.connection),
        )
        self._traced = 0
        return self._job

    @property
    def _provider(self) -> GlassModelProvider:
        return self.response_generator.model_provider

    # Answers

    def generate_response(
        self,
        text: str,
        finish_reason: Any,
        prompt_token_count: int | None = None,
        completion_token_count: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return an answer, or a part of one, as mlx-lm does, with our fields."""
        job = self._job
        if completion_token_count is not None:
            completion_token_count = job.tokens
        for name in ("token_logprobs", "top_tokens", "tokens"):  # our own are in the job
            kwargs.pop(name, None)
        response: dict[str, Any] = super().generate_response(
            text, finish_reason, prompt_token_count, completion_token_count, *args, **kwargs
        )
        if self.logprobs:
            is_chat = self.object_type.startswith("chat")
            form = _chat_logprobs if is_chat else _text_logprobs
            response["choices"][0]["logprobs"] = form(job.take_logprobs())
        if "usage" in response:
            self._add_usage(response)
        if self.stream and job.trace and job.latest is not None:
            response["glass"] = self._trace(job.latest)
        return response

    def completion_usage_response(
        self,
        prompt_token_count: int | None = None,
        completion_token_count: int | None = None,
        prompt_cache_count: int | None = None,
    ) -> dict[str, Any]:
        """Return the last part of a stream, with the numbers of tokens."""
        response: dict[str, Any] = super().completion_usage_response(
            prompt_token_count, self._job.tokens, prompt_cache_count
        )
        response["object"] = self.object_type
        self._add_usage(response)
        return response

    def _add_usage(self, response: dict[str, Any]) -> None:
        latest = self._job.latest
        if latest is not None:
            response["usage"]["glass"] = glass_usage(latest.report, latest.number)

    def _trace(self, latest: Piece) -> dict[str, Any]:
        """Return what the page shows: the state of the answer, and after a renewal what is kept."""
        seconds = round(latest.seconds, 4)
        trace: dict[str, Any] = {"tokens": latest.number, "seconds": seconds}
        trace |= glass_usage(latest.report, latest.number)
        if latest.report.selections > self._traced:
            self._traced = latest.report.selections
            trace["kept"] = kept_shares(latest.report)
        return trace

    # Models and the page

    def _model(self) -> dict[str, Any]:
        provider, config = self._provider, self._provider.config
        settings = {
            "max_kl": config.bound,
            "dense": provider.cli_args.dense,
            "dense_tokens_per_second": round(provider.dense_speed, 2),
        }
        return {
            "id": provider.name,
            "object": "model",
            "created": self.created,
            "owned_by": "glass-mlx",
            "glass": settings | config.shares._asdict(),
        }

    def _send_model(self, name: str) -> None:
        if self._provider.is_default(name):
            self._send_json(self._model())
        else:
            self._send_failure(RequestError(404, f"the model {name} is not served here", "model"))

    def _send_page(self) -> None:
        data = files("glass_mlx.server").joinpath("page.html").read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Security-Policy", _PAGE_POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _chat_logprobs(tokens: list[TokenLogprob]) -> dict[str, Any]:
    """Return log-probabilities in the form of chat completions."""

    def entry(token: TokenLogprob) -> dict[str, Any]:
        data = list(token.text.encode())
        return {"id": token.id, "token": token.text, "logprob": token.logprob, "bytes": data}

    return {
        "content": [
            entry(token) | {"top_logprobs": [entry(other) for other in token.top]}
            for token in tokens
        ]
    }


def _text_logprobs(tokens: list[TokenLogprob]) -> dict[str, Any]:
    """Return log-probabilities in the form of text completions."""
    tops = [{other.text: other.logprob for other in token.top} for token in tokens]
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": tops if any(tops) else None,
    }
