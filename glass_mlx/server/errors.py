"""Errors in the form of OpenAI's API: a status, and a JSON object that says what is wrong."""

from typing import Any

from glass_mlx.errors import one_line

# How long a client should wait before it tries again, in seconds.
RETRY_AFTER = 10


class RequestError(BaseException):
    """The answer to a request that cannot be served.

    It is no `Exception`, because mlx-lm's handler answers every `Exception` with its own status and
    text.

    Args:
        status: the HTTP status.
        message: one sentence that says what is wrong.
        param: the field of the request that is wrong, if it is one.
        code: a name of the error for programs.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object that the client gets."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": one_line(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that belong to the answer."""
        return {"Retry-After": str(RETRY_AFTER)} if self.status == 503 else {}


def bad_request(message: str, param: str | None = None) -> RequestError:
    """Return the error for a request that is wrong itself."""
    return RequestError(400, message, param)


def internal_error() -> RequestError:
    """Return the error for a failure that is not the client's; the log has its reason."""
    return RequestError(500, "the server failed on this request; its log says why")


class ClientGoneError(ConnectionError):
    """The client has closed the connection before it got its answer."""
