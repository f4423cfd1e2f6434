"""Save a sliced model as an ordinary checkpoint, which stock mlx-lm loads and runs.

Neurons are selected once, from the model's answers to a set of prompts or from the prior alone.
Every FFN keeps the same number of neurons, which the checkpoint's configuration states. In a
mixture of experts that holds for the routed experts; dense layers stay whole, and shared experts
only follow where the configuration states one width for both.
"""

if __name__ == "__main__":  # first, because an interrupt can also come during the imports below
    from glass_mlx.cli import run_command

    run_command("export")

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glass_mlx.arguments import (
    CommandParser,
    add_adapter_arguments,
    add_load_arguments,
    add_model_argument,
    add_prior_argument,
    load_options,
    path,
)
from glass_mlx.calibration.curves import CurveSettings, answer_prompts
from glass_mlx.calibration.first_use import find_or_measure_prior
from glass_mlx.chat_templates import Messages
from glass_mlx.checkpoints.loading import load, model_name
from glass_mlx.config import GlassConfig
from glass_mlx.errors import exit_on_error
from glass_mlx.fidelity.prompts import (
    Continuation,
    WritingSettings,
    continue_all,
    read_prompts,
)
from glass_mlx.fidelity.static import Divergence, compare, read_texts
from glass_mlx.models import Routing, check_finite, with_taps
from glass_mlx.models.precision import fuse_adapters
from glass_mlx.reporting.machine import made_with
from glass_mlx.selection import Selection, Selector, neurons_to_keep, select_counts
from glass_mlx.session import Session
from glass_mlx.sliced_checkpoint import (
    built_widths,
    check_output,
    narrowed,
    narrowed_ffns,
    without_float_layers,
    write_sliced_checkpoint,
)
from glass_mlx.statistics import LocalStatistics

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

# The texts that KL is measured on: enough to tell densities apart, and read in about a minute.
_SCORED = CurveSettings(texts=8, length=96)


def setup_arg_parser() -> CommandParser:
    """Set up and return the argument parser."""
    parser = CommandParser(description=__doc__)
    add_model_argument(parser)
    parser.add_argument("--output", type=path, required=True, help="The folder to write.")
    parser.add_argument(
        "--prompts",
        type=path,
        help="Prompts like those that the model will answer: text with one per line, or JSONL with "
        "prompt or messages. Default: select from the prior alone.",
    )
    parser.add_argument(
        "--density",
        type=float,
        default=0.75,
        help="Share of the feed-forward neurons to keep (%(default)s).",
    )
    parser.add_argument("--tokens", type=int, default=128, help="Tokens per answer (%(default)s).")
    parser.add_argument(
        "--temp", type=float, default=0.7, help="Sampling temperature of the answers (%(default)s)."
    )
    parser.add_argument("--seed", type=int, default=0, help="Sampling seed (%(default)s).")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="Prompts answered at once (%(default)s)."
    )
    parser.add_argument(
        "--prior-weight",
        type=float,
        default=GlassConfig.prior_weight,
        metavar="λ",
        help="Weight of the prior's ranks against those of the answers (%(default)s).",
    )
    source = parser.add_mutually_exclusive_group()
    add_prior_argument(source)
    source.add_argument("--no-prior", action="store_true", help="Select from the answers alone.")
    add_load_arguments(parser)
    add_adapter_arguments(parser)
    return parser


def observe_answers(session: Session, texts: list[Continuation]) -> LocalStatistics:
    """Read prompts and answers densely, and collect the statistics of the answers.

    Args:
        session: the dense model's session.
        texts: prompts and answers.

    Raises:
        ValueError: if there are answers, but too few tokens in them, or if the model computes
            values that are not finite.
    """
    statistics = session.empty_statistics()
    for text in tqdm(texts, desc="reading", unit="prompt", leave=False, disable=not texts):
        tokens = mx.array(text.prompt + text.written)[None]
        answer_mask = np.zeros(tokens.shape, np.float32)
        answer_mask[0, len(text.prompt) :] = 1

        def observe(
            path: str,
            hidden: mx.array,
            *,
            routing: Routing | None = None,
            mask: np.ndarray = answer_mask,
        ) -> mx.array:
            return statistics.text.update(path, hidden, mask, routing)

        # Some models share keys and values between layers by their caches.
        cache = make_prompt_cache(session.model)
        with_taps(session.model, observe, ffns=session.ffns)(tokens, cache=cache)
        mx.eval(statistics.text.sums)
    if texts and not statistics.has_enough_text:
        raise ValueError("the model's answers to the prompts are too short to select neurons from")
    sums = [array for by_name in statistics.text.sums.values() for array in by_name.values()]
    if not all(mx.isfinite(array).all().item() for array in sums):
        raise ValueError(
            "the model's activations are not finite in this precision; try another one with --dtype"
        )
    return statistics


def select_uniformly(
    session: Session, selector: Selector, statistics: LocalStatistics, config: dict[str, Any]
) -> tuple[Selection, dict[str, Any]]:
    """Select the same number of neurons in every FFN, or in every routed expert.

    Args:
        session: the dense model's session.
        selector: ranks the neurons.
        statistics: the local statistics.
        config: the model's configuration.

    Returns:
        The selection, and the configuration of the sliced model.

    Raises:
        ValueError: if the FFNs have different widths, or no configuration describes the result.
    """
    targets = narrowed_ffns(session.ffns)
    widths = sorted({ffn.width for ffn in targets})
    if len(widths) > 1:
        raise ValueError(
            f"this model's feed-forward networks have {', '.join(map(str, widths))} neurons; an "
            "ordinary checkpoint states one number for all of them, so this model cannot be "
            "exported"
        )
    multiple = max(ffn.multiple for ffn in targets)
    kept = neurons_to_keep(widths[0], selector.config.shares.density, multiple)
    config = narrowed(session.model, config, widths[0], kept)
    counts = built_widths(session.model, config)
    return select_counts(selector.fuse(statistics), counts), config


def _write_answers(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: list[Messages],
    args: argparse.Namespace,
) -> list[Continuation]:
    if not prompts:
        return []
    settings = WritingSettings(args.tokens, args.temp, args.seed, args.batch_size)
    with tqdm(total=args.tokens * len(prompts), desc="writing", unit="tok", leave=False) as bar:
        return continue_all(model, tokenizer, prompts, settings, bar.update)


def _check_flags(args: argparse.Namespace) -> GlassConfig:
    """Check the input before anything is loaded."""
    check_output(args.output)
    prior_weight = 1.0 if args.prompts is None else args.prior_weight
    config = GlassConfig(density=args.density, prior_weight=prior_weight)
    if args.no_prior and args.prompts is None:
        raise ValueError("there is nothing to select by; give --prompts, or leave out --no-prior")
    if args.tokens < 2 or args.batch_size < 1:
        raise ValueError("--tokens must be at least 2, and --batch-size 1")
    return config


def _scored_texts(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: list[Messages],
    args: argparse.Namespace,
) -> list[Continuation]:
    """Have the dense model write the texts to measure KL on.

    These are new answers to the given prompts, or else to prompts of many kinds.
    """
    count = min(_SCORED.texts, len(prompts) or _SCORED.texts)
    with tqdm(total=_SCORED.length * count, desc="KL: writing", unit="tok", leave=False) as bar:
        if not prompts:
            return answer_prompts(model, tokenizer, _SCORED, bar.update)
        seed = (args.seed + 1) % 2**64  # not the answers that neurons were selected by
        settings = WritingSettings(min(args.tokens, _SCORED.length), args.temp, seed)
        return continue_all(model, tokenizer, prompts[:count], settings, bar.update)


def _slice_and_score(
    session: Session,
    selection: Selection,
    texts: list[Continuation],
    reload: Callable[[], nn.Module],
) -> tuple[nn.Module, Divergence | None]:
    """Slice a model and measure its KL divergence from the dense one.

    Everything that needs the dense weights comes first. Each FFN's are freed once it is sliced, so
    that both models are never held at once.

    Args:
        session: the dense model's session.
        selection: the neurons to keep.
        texts: the texts to measure KL on.
        reload: loads the dense model once more, lazily.

    Returns:
        The sliced model, and its divergence; None without texts.
    """
    with tqdm(total=2 * len(texts), desc="KL: reading", unit="text", leave=False) as bar:
        dense = read_texts(session.model, texts, bar.update)
        slices = session.sliced_model("requantize", reload)
        slices.update(selection)
        sliced = slices.model
        own = read_texts(sliced, texts, bar.update)
        return sliced, compare(dense, own) if texts else None


def _load(args: argparse.Namespace) -> tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    """Load the model with everything in its weights, and the configuration of the result.

    Raises:
        FileNotFoundError: if the model does not exist.
        ValueError: if the model cannot be used.
    """
    options = load_options(args)
    model, tokenizer, config = load(args.model, lazy=True, return_config=True, **options)
    fuse_adapters(model)
    return model, tokenizer, without_float_layers(config, model)


def run(args: argparse.Namespace) -> str:
    """Select neurons and write the checkpoint.

    Returns:
        A summary for the user.

    Raises:
        FileNotFoundError: if the model, the prior or the prompts do not exist.
        OSError: if the checkpoint cannot be written.
        ValueError: for a bad value, or a model that cannot be exported.
    """
    # 1) Load.
    config = _check_flags(args)
    prompts = read_prompts(args.prompts) if args.prompts else []
    model, tokenizer, model_config = _load(args)
    check_finite(model)
    session, prior = Session.of(model), None
    if not args.no_prior:
        prior = find_or_measure_prior(session, tokenizer, args.prior, config, args.model)
    selector = session.selector(config, prior)

    # 2) Answer the prompts, and select from the answers and the prior.
    texts = _write_answers(model, tokenizer, prompts, args)
    statistics = observe_answers(session, texts)
    selection, model_config = select_uniformly(session, selector, statistics, model_config)

    # 3) Slice, and measure what that costs.
    scored = _scored_texts(model, tokenizer, prompts, args)
    sliced, divergence = _slice_and_score(session, selection, scored, lambda: _load(args)[0])

    # 4) Write.
    about: dict[str, Any] = made_with() | {
        "model": model_name(args.model),
        "density": round(selection.density, 6),
        "prompts": len(texts),
        "tokens": statistics.text.tokens,
        "prior_weight": selector.prior_weight(statistics),
        "prior": None if prior is None else Path(prior.source).name,
        "seed": args.seed,
    }
    if divergence is not None:
        about |= {"kl": round(divergence.kl, 6), "kl_tokens": divergence.tokens}
    write_sliced_checkpoint(
        sliced, tokenizer, model_config, args.output, about, args.trust_remote_code
    )
    return _summary(session, sliced, selection, divergence, args)


def _summary(
    session: Session,
    sliced: nn.Module,
    selection: Selection,
    divergence: Divergence | None,
    args: argparse.Namespace,
) -> str:
    """Return what was written, in three lines."""
    dense_mb, sliced_mb = session.weight_bytes / 1e6, session.bytes_of(sliced) / 1e6
    targets = narrowed_ffns(session.ffns)
    kept = selection.indices[targets[0].path].shape[-1]
    experts = targets[0].experts
    places = f"{len(targets)} feed-forward networks"
    if experts is not None:
        places = f"{experts} experts of {len(targets)} layers"
    texts = "new answers to the prompts" if args.prompts else "its own text"
    kl = "unknown, because the tokenizer knows no text to measure it on"
    if divergence is not None:
        kl = f"{divergence} nats per token ({divergence.tokens} tokens of {texts})"
    return (
        f"Wrote {args.output}: {kept} neurons in each of {places} "
        f"(density {selection.density:.3f}), weights {dense_mb:.1f} -> {sliced_mb:.1f} MB "
        f"per token\nKL to the dense model: {kl}\n"
        f"Run it with: mlx_lm.generate --model {args.output} --prompt ..."
    )


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("export"):
        print(run(setup_arg_parser().parse()))
