"""The model that a server answers with, loaded once, with its prior."""

import argparse
import gc
import statistics
import sys
import threading
import time
from itertools import pairwise
from typing import Any

from glass_mlx.arguments import division_options, draft_options
from glass_mlx.calibration.first_use import find_needed_prior, find_or_measure_budget
from glass_mlx.checkpoints.loading import load, load_draft, model_name
from glass_mlx.command_model import note_advice
from glass_mlx.config import GlassConfig
from glass_mlx.errors import is_library_error, one_line
from glass_mlx.files import expand_user
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.prior.lookup import given_prior
from glass_mlx.prompt_cache import make_layers
from glass_mlx.server.errors import RequestError
from glass_mlx.session import Session
from glass_mlx.speculation import Drafting

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.server import ModelProvider
from mlx_lm.tokenizer_utils import TokenizerWrapper

# The tokens on which the speed of the dense model is measured.
_SPEED_TOKENS = 12

# The name that mlx-lm gives to the model of --model.
DEFAULT = "default_model"


class GlassModelProvider(ModelProvider):
    """Loads the model of `--model`, and finds or measures what slicing it needs.

    Args:
        cli_args: the parsed flags.
        config: how answers are sliced.

    Attributes:
        name: the model's name in `/v1/models`.
        config: how answers are sliced.
        session: the loaded model's session.
        prior: its prior, or None without one.
        dense_speed: how many tokens per second the dense model generated when it was loaded.
        ready: set once the model is loaded, or once that has failed.
        failure: why the model could not be loaded, or None.
    """

    model: Any
    tokenizer: Any
    model_key: Any
    draft_model: Any

    def __init__(self, cli_args: argparse.Namespace, config: GlassConfig) -> None:
        super().__init__(cli_args)
        self.name, self.config = model_name(cli_args.model), config
        self.session: Session | None = None
        self.prior: GlobalPrior | None = None
        self.dense_speed = 0.0
        self.ready = threading.Event()
        self.failure: BaseException | None = None
        draft = cli_args.draft_model
        self._names = {DEFAULT, *_names(cli_args.model)}
        self._draft_names = {DEFAULT, *(() if draft is None else _names(draft))}

    def reset(self) -> None:
        """Forget the loaded model."""
        super().reset()
        self.session = self.prior = None

    def is_default(self, name: str) -> bool:
        """Return whether a request that gives this name means the model of `--model`."""
        return name in self._names

    def check(self, model: str, adapter: str | None, draft: str) -> None:
        """Check which model a request names.

        Raises:
            RequestError: if it is not served.
        """
        may_load = self.cli_args.allow_model_requests
        if not self.is_default(model) and not may_load:
            raise RequestError(
                404,
                f"the model {model} is not served here; this server has {self.name}",
                "model",
                "model_not_found",
            )
        if adapter is not None and not may_load:
            raise RequestError(404, "this server loads no adapters on request", "adapters")
        if draft not in self._draft_names and not may_load:
            message = f"the draft model {draft} is not served here"
            raise RequestError(404, message, "draft_model", "model_not_found")

    def load_default(self) -> None:
        """Load the model of `--model`. A failure is kept in `failure`."""
        try:
            self.load(DEFAULT, None, DEFAULT)
        except BaseException as error:
            if not is_library_error(error):
                raise
            self.failure = error
        finally:
            self.ready.set()

    def load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> tuple[nn.Module, TokenizerWrapper]:
        """Load a model unless it is loaded already; return it and its tokenizer.

        The draft model of `--draft-model` goes with the model of `--model` alone.
        """
        if self.is_default(model_path):
            model_path = DEFAULT
        if draft_model_path in self._draft_names:
            draft_model_path = DEFAULT if model_path == DEFAULT else None
        if adapter_path is None or model_path != DEFAULT:
            return super().load(model_path, adapter_path, draft_model_path)
        # mlx-lm has no adapters but those of --adapter-path for the model of --model.
        return super().load(self.cli_args.model, adapter_path, draft_model_path)

    def _load(
        self,
        model_path: str | None,
        adapter_path: str | None = None,
        draft_model_path: str | None = None,
    ) -> None:
        args = self.cli_args
        self.reset()
        gc.collect()
        mx.clear_cache()
        model, tokenizer = load(
            model_path,
            tokenizer_config=self._tokenizer_config,
            adapter_path=adapter_path,
            trust_remote_code=args.trust_remote_code,
            dtype=args.dtype,
            dequantize=args.dequantize,
            **division_options(args),
        )
        if args.use_default_chat_template and tokenizer.chat_template is None:
            tokenizer.chat_template = tokenizer.default_chat_template
        if args.kv_bits is not None:
            check_quantized_cache(model, args.kv_bits, args.kv_group_size)
        draft_model = load_draft(draft_model_path, tokenizer, **draft_options(args))
        if draft_model is not None:
            drafting = Drafting(draft_model, args.num_draft_tokens)
            drafting.check_cache(model, make_layers(model, args.max_kv_size, draft_model), 1)
        self._prepare(model, tokenizer, model_path)
        self.model, self.tokenizer, self.draft_model = model, tokenizer, draft_model
        self.model_key = (model_path, adapter_path, draft_model_path)

    def _prepare(self, model: nn.Module, tokenizer: TokenizerWrapper, name: str | None) -> None:
        """Find or measure the prior and, for a bound on KL, what slicing costs."""
        session, args = Session(model), self.cli_args
        note_advice(model)
        if not args.dense and not args.no_prior:
            given = None if args.prior is None or name != args.model else given_prior(args.prior)
            self.prior = find_needed_prior(
                session, tokenizer, given, self.config, name, _report_place
            )
        if not args.dense and self.config.bound:
            find_or_measure_budget(session, tokenizer, self.prior, self.config)
        self.session, self.dense_speed = session, dense_speed(model)


def _names(model: str | None) -> set[str | None]:
    """Return the names by which a request can name a model of the command line."""
    names = {model_name(model), model}
    if model is not None and (path := expand_user(model)).exists():
        names.add(str(path.resolve()))
    return names


def _report_place(line: str) -> None:
    print(f"prior: {line}", file=sys.stderr)


def dense_speed(model: nn.Module) -> float:
    """Return how many tokens per second a model generates, from the median over some tokens."""
    steps = generate_step(mx.array([0]), model, max_tokens=_SPEED_TOKENS)
    times = [time.perf_counter() for _ in steps]
    return 1 / statistics.median(b - a for a, b in pairwise(times))


def check_quantized_cache(model: nn.Module, bits: int, group_size: int) -> None:
    """Check that a model's cache can be quantized, which would otherwise fail within an answer.

    Raises:
        ValueError: if it cannot.
    """
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[0]]), cache=cache))
    try:
        for layer in cache:
            if hasattr(layer, "to_quantized"):
                mx.eval(layer.to_quantized(group_size=group_size, bits=bits).state)
    except (NotImplementedError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"this model's cache cannot be quantized to {bits} bits in groups of {group_size} "
            f"({one_line(error)})"
        ) from error
