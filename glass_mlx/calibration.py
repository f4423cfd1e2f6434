"""Measure a model's global prior from text that the model writes itself (null-prompt stimulation).

Batch after batch, sequences are sampled from the beginning-of-sequence token alone, without
stopping at end-of-sequence tokens, and read once more densely to measure the FFNs' neurons.
"""

import argparse
import datetime
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from glass_mlx.checkpoints import DEFAULT_MODEL, add_load_arguments, load
from glass_mlx.files import replacing
from glass_mlx.models import find_ffns, fingerprint, with_taps
from glass_mlx.prior import GlobalPrior
from glass_mlx.statistics import STATISTICS, NeuronStatistics

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm


def _null_token(tokenizer: TokenizerWrapper) -> int:
    """The token that stands before any text; models without one separate documents by EOS."""
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id
    raise ValueError("the tokenizer has neither a beginning- nor an end-of-sequence token")


def _sample(
    model: nn.Module, start: int, sequences: int, length: int, temperature: float, key: mx.array
) -> mx.array:
    """Sample (sequences, 1 + length) token ids, all beginning with the token `start`."""

    def sampler(logprobs: mx.array) -> mx.array:
        nonlocal key
        key, step = mx.random.split(key)
        return mx.random.categorical(logprobs / temperature, key=step)

    generator = BatchGenerator(
        model,
        sampler=sampler,
        max_tokens=length,
        completion_batch_size=sequences,
        prefill_batch_size=sequences,
    )
    rows = {uid: [start] for uid in generator.insert([[start]] * sequences)}
    while responses := generator.next_generated():
        for response in responses:
            rows[response.uid].append(response.token)
    generator.close()
    return mx.array(list(rows.values()))


def _measure(model: nn.Module, tokens: mx.array, statistics: NeuronStatistics) -> None:
    """Read sequences (B, T) and add all tokens but the first, which decoding never sees."""
    mask = mx.ones(tokens.shape)
    mask[:, 0] = 0

    def report(path: str, hidden: mx.array) -> list[mx.array]:
        return statistics.update(path, hidden, mask)

    cache = make_prompt_cache(model)
    with_taps(model, report)(tokens, cache=cache)
    mx.eval([layer.state for layer in cache], statistics.sums)


def _dtype(model: nn.Module) -> str:
    """The first floating type among the model's arrays, which is what it computes in."""
    arrays = (array for _, array in tree_flatten(model.parameters()))
    return str(next(a.dtype for a in arrays if mx.issubdtype(a.dtype, mx.floating)))


def _save(file: Path, statistics: NeuronStatistics, identity: str, batches: int) -> None:
    with replacing(file) as temporary:
        metadata = {"identity": identity, "batches": str(batches)}
        save_file(statistics.state(), temporary, metadata)


def _resume(file: Path, statistics: NeuronStatistics, identity: str) -> int:
    """Read the sums of an interrupted calibration, and return how many batches they hold."""
    if not file.is_file():
        return 0
    try:
        with safe_open(file, "numpy") as stored:
            metadata = stored.metadata() or {}
            state = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); delete it to begin again") from error
    if metadata.get("identity") != identity:
        raise ValueError(
            f"{file} is from another calibration that was interrupted; finish that one with its "
            "own arguments, or delete the file"
        )
    statistics.restore(state)
    return int(metadata["batches"])


def calibrate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    *,
    name: str = "",
    tokens: int = 16384,
    length: int = 256,
    batch_size: int = 32,
    temperature: float = 1.0,
    seed: int = 0,
    checkpoint: Path | None = None,
) -> GlobalPrior:
    """Measure a global prior by null-prompt stimulation.

    Args:
        model: the dense model.
        tokenizer: its tokenizer.
        name: the model's name, for the record.
        tokens: how many generated tokens to measure at least.
        length: tokens generated a sequence.
        batch_size: sequences sampled at once.
        temperature: of sampling.
        seed: the same seed gives the same prior, interrupted or not.
        checkpoint: a file for the sums so far, written after every batch and read at the start
            if it belongs to the same call.

    Returns:
        A prior with every statistic in `statistics.STATISTICS`.

    Raises:
        ValueError: if the model cannot be sliced, a number is not positive, or the tokenizer has
            no token to begin with.
    """
    if min(tokens, length, batch_size, temperature) <= 0:
        raise ValueError("tokens, length, batch size and temperature must be positive")
    widths = {ffn.path: ffn.width for ffn in find_ffns(model)}
    batches = -(-tokens // (length * batch_size))
    recipe = {
        "recipe": "null prompt from the beginning-of-sequence token",
        "tokens": batches * batch_size * length,
        "length": length,
        "batch_size": batch_size,
        "temperature": temperature,
        "seed": seed,
    }
    statistics = NeuronStatistics(widths, tuple(STATISTICS))
    start = _null_token(tokenizer)
    corners = fingerprint(model)
    identity = json.dumps([name, recipe, sum(float(c.sum()) for c in corners.values())])
    done = _resume(checkpoint, statistics, identity) if checkpoint else 0
    with tqdm(total=recipe["tokens"], initial=done * batch_size * length, unit="tok") as bar:
        for batch in range(done, batches):
            key = mx.random.key(int(np.random.SeedSequence([seed, batch]).generate_state(1)[0]))
            rows = _sample(model, start, batch_size, length, temperature, key)
            _measure(model, rows, statistics)
            if checkpoint:
                _save(checkpoint, statistics, identity, batch + 1)
            bar.update(batch_size * length)
    about = recipe | {
        "model": name,
        "model_type": getattr(model, "model_type", ""),
        "dtype": _dtype(model),
        "versions": {package: version(package) for package in ("glass-mlx", "mlx", "mlx-lm")},
        "machine": f"{platform.system()} {platform.machine()}",
        "date": datetime.date.today().isoformat(),
    }
    return GlobalPrior({name: statistics.scores(name) for name in STATISTICS}, corners, about)


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(
        description="Measure the global prior of a model and write it to a file."
    )
    parser.add_argument(
        "--model", help=f"hub id, folder or GGUF file. Default: the built-in {DEFAULT_MODEL}"
    )
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    parser.add_argument(
        "--tokens", type=int, default=16384, help="tokens to generate and measure (%(default)s)"
    )
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence (%(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="sequences at once (%(default)s)"
    )
    parser.add_argument(
        "--temp", type=float, default=1.0, help="sampling temperature (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    add_load_arguments(parser)
    return parser


def main() -> None:
    """Run the command."""
    args = setup_arg_parser().parse_args()
    partial = args.output.with_name(f"{args.output.name}.partial")
    try:
        model, tokenizer = load(args.model, dtype=args.dtype, dequantize=args.dequantize)
        prior = calibrate(
            model,
            tokenizer,
            name=args.model or DEFAULT_MODEL,
            tokens=args.tokens,
            length=args.length,
            batch_size=args.batch_size,
            temperature=args.temp,
            seed=args.seed,
            checkpoint=partial,
        )
        prior.save(args.output)
    except (ValueError, OSError) as error:
        print(f"build_priors: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\nInterrupted; the same command goes on from {partial}", file=sys.stderr)
        sys.exit(130)
    partial.unlink(missing_ok=True)
    print(f"Wrote {args.output}: {prior.about['tokens']} tokens")


if __name__ == "__main__":
    main()
