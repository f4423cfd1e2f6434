"""Save a sliced model as an ordinary checkpoint, which stock mlx-lm loads and runs.

The neurons are chosen once, for what a set of prompts has in common or by the prior alone, and
every FFN keeps the same number of them, which the checkpoint's configuration then says.
"""

import argparse
import copy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from glass_mlx.checkpoints import (
    DEFAULT_MODEL,
    add_adapter_arguments,
    add_load_arguments,
    load,
    load_options,
    model_name,
)
from glass_mlx.command import ending
from glass_mlx.fidelity import Continuation, continue_in_batches, read_prompts
from glass_mlx.files import one_line, replacing
from glass_mlx.lookup import model_folder, resolve_prior
from glass_mlx.models import find_ffns, weight_bytes, with_taps
from glass_mlx.prior import GlobalPrior
from glass_mlx.provenance import made_with
from glass_mlx.selection import Selection, select
from glass_mlx.slicing import DEFAULT_DENSITY, DEFAULT_MIX, Evidence, Slicing, slice_model

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model, save
from tqdm import tqdm


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(prog="python -m glass_mlx.export", description=__doc__)
    parser.add_argument("--model", help=f"Default: the built-in {DEFAULT_MODEL}")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--prompts",
        type=Path,
        help="text with a prompt a line, or JSONL with prompt or messages, of the kind that the "
        "model is for. Default: select by the prior alone.",
    )
    parser.add_argument("--density", type=float, default=DEFAULT_DENSITY, help="(%(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=128, help="tokens that the model answers a prompt with"
    )
    parser.add_argument("--temp", type=float, default=0.7, help="temperature of the answers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32, help="prompts answered at once")
    parser.add_argument(
        "--mix",
        type=float,
        default=DEFAULT_MIX,
        help="λ, the weight of the prior's ranking against that of the answers (%(default)s)",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prior", help="Default: looked for as by glass_mlx.generate")
    source.add_argument("--no-prior", action="store_true", help="select by the answers alone")
    add_load_arguments(parser)
    add_adapter_arguments(parser)
    return parser


def observe(model: nn.Module, texts: list[Continuation]) -> Evidence:
    """Read prompts and answers densely; what is seen of the answers counts, token by token.

    Args:
        model: the dense model.
        texts: prompts and what follows them.

    Raises:
        ValueError: if there are answers, but with hardly a token.
    """
    evidence = Evidence.of(model)
    for text in tqdm(texts, desc="reading", unit="prompt", leave=False, disable=not texts):
        tokens = mx.array(text.prompt + text.written)[None]
        written = np.zeros(tokens.shape, np.float32)
        written[0, len(text.prompt) :] = 1

        def watch(path: str, hidden: mx.array, written: np.ndarray = written) -> mx.array:
            return evidence.text.update(path, hidden, written)

        with_taps(model, watch)(tokens)
        mx.eval(evidence.text.sums)
    if texts and not evidence.generated:
        raise ValueError("the model's answers to the prompts are too short to select neurons by")
    return evidence


def select_uniformly(model: nn.Module, slicing: Slicing, evidence: Evidence) -> Selection:
    """Keep the same number of neurons in every FFN.

    Raises:
        ValueError: if the FFNs have different widths.
    """
    ffns = find_ffns(model)
    widths = sorted({ffn.width for ffn in ffns})
    if len(widths) > 1:
        raise ValueError(
            f"this model's feed-forward networks have {', '.join(map(str, widths))} neurons; an "
            "ordinary checkpoint has one number for all, so that it cannot be exported"
        )
    multiple = max(ffn.multiple for ffn in ffns)
    multiples = {ffn.path: multiple for ffn in ffns}
    return select(slicing.fused(evidence), slicing.density, multiples)


def _build(model: nn.Module, config: dict[str, Any]) -> nn.Module | None:
    """A model like another by a configuration, if there is one, with weights never computed."""
    try:
        arguments = sys.modules[type(model).__module__].ModelArgs
        return type(model)(arguments.from_dict(copy.deepcopy(config)))
    except Exception:  # configurations fail in the ways of their architectures
        return None


def _with_width(config: dict[str, Any], width: int, kept: int) -> Iterator[dict[str, Any]]:
    """Configurations that might say `kept` where one says `width`, by changing one value."""
    smaller = {width: kept, 2 * width: 2 * kept}
    for key, value in config.items():
        if isinstance(value, dict):
            for inner in _with_width(value, width, kept):
                yield config | {key: inner}
        elif isinstance(value, int) and value in smaller:
            yield config | {key: smaller[value]}
    yield config | {"intermediate_size": kept}


def _shapes(model: nn.Module) -> tuple[dict[str, tuple[int, ...]], set[int]]:
    """The shapes of all arrays outside of the FFNs' projections, and the FFNs' widths."""
    ffns = find_ffns(model)
    projections = tuple(
        f"{ffn.path}.{name}." for ffn in ffns for name in (*ffn.expand, ffn.contract[0])
    )
    arrays = tree_flatten(model.parameters())
    others = {path: a.shape for path, a in arrays if not path.startswith(projections)}
    return others, {ffn.width for ffn in ffns}


def narrowed(model: nn.Module, config: dict[str, Any], width: int, kept: int) -> dict[str, Any]:
    """Find the configuration of a model whose FFNs have fewer neurons, and nothing else changed.

    Every value that may be the width is tried by building the model, so that no list of names is
    needed.

    Args:
        model: the model.
        config: its configuration.
        width: the number of neurons of each of its FFNs.
        kept: the number wanted.

    Raises:
        ValueError: if there is none.
    """
    original = _build(model, config)
    wanted = None if original is None else (_shapes(original)[0], {kept})
    for candidate in _with_width(config, width, kept):
        built = _build(model, candidate)
        try:
            if built is not None and _shapes(built) == wanted:
                return candidate
        except ValueError:  # nothing in it can be sliced
            continue
    raise ValueError(
        f"models of type {config.get('model_type')} have no configuration with {kept} instead of "
        f"{width} neurons in all feed-forward networks; this one cannot be exported"
    )


def export(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    config: dict[str, Any],
    selection: Selection,
    output: Path,
    about: dict[str, Any],
    trust: bool = False,
) -> nn.Module:
    """Write a sliced model as a checkpoint.

    Args:
        model: the dense model, loaded from a folder.
        tokenizer: its tokenizer.
        config: its configuration.
        selection: the neurons to keep, as many in every FFN.
        output: the folder to write, which must not exist.
        about: what the selection is, for the configuration's entry "glass".
        trust: whether code in the model's folder may be run.

    Returns:
        The sliced model.

    Raises:
        OSError: if it cannot be written.
        ValueError: if there is something at `output`, or no configuration for such a model.
    """
    if output.exists():
        raise ValueError(f"there is something at {output}; name a folder that does not exist yet")
    folder = model_folder(tokenizer)
    if folder is None:
        raise ValueError("the model was not loaded from a folder with its files")
    path = next(iter(selection.indices))
    width, kept = selection.widths[path], len(selection.indices[path])
    config = narrowed(model, config, width, kept) | {"glass": about}
    sliced = slice_model(model, selection, "requantize")
    with replacing(output, folder=True) as temporary:
        save(temporary, folder, sliced, tokenizer, config, donate_model=False)
        (temporary / "README.md").write_text(_card(about), encoding="utf-8")
        options = {"trust_remote_code": True} if trust else {}
        try:
            load_model(temporary, lazy=True, **options)
        except Exception as error:  # whatever mlx-lm does not like of it
            raise ValueError(f"mlx-lm does not load what was written: {one_line(error)}") from error
    return sliced


def _card(about: dict[str, Any]) -> str:
    """A model card."""
    head = ["---", "library_name: mlx", "pipeline_tag: text-generation", "tags:", "- mlx", "---"]
    facts = [f"- {key}: {value}" for key, value in about.items()]
    title = f"# {about['model']} with {about['density']:.2f} of its feed-forward neurons"
    return "\n".join([*head, title, "", "Made with glass-mlx.", "", *facts, ""])


def _run(args: argparse.Namespace) -> str:
    slicing = Slicing(density=args.density, mix=args.mix if args.prompts else 1.0)
    slicing.check()
    if args.no_prior and not args.prompts:
        raise ValueError("there is nothing to select by; give --prompts, or leave out --no-prior")
    if args.tokens < 2 or args.batch_size < 1:
        raise ValueError("--tokens must be at least 2, and --batch-size 1")
    prompts = read_prompts(args.prompts) if args.prompts else []
    options = load_options(args)
    model, tokenizer, config = load(args.model, lazy=True, return_config=True, **options)
    if args.dequantize:
        config = {k: v for k, v in config.items() if not k.startswith("quantization")}
    prior: GlobalPrior | None = None
    if not args.no_prior:
        prior = resolve_prior(model, args.prior, model_folder(tokenizer), args.model or "MODEL")
        slicing = replace(slicing, prior=prior)
        slicing.check()
    asked = (prompts, args.tokens, args.temp, args.seed, args.batch_size)
    total = args.tokens * len(prompts)
    with tqdm(total=total, desc="writing", unit="tok", leave=False, disable=not prompts) as bar:
        batches = continue_in_batches(model, tokenizer, *asked, progress=bar.update)
        texts = [text for batch in batches for text in batch]
    evidence = observe(model, texts)
    selection = select_uniformly(model, slicing, evidence)
    about = made_with() | {
        "model": model_name(args.model),
        "density": round(selection.density, 6),
        "prompts": len(texts),
        "tokens": evidence.text.tokens,
        "mix": slicing.weight(evidence),
        "prior": None if prior is None else Path(prior.source).name,
        "seed": args.seed,
    }
    sliced = export(model, tokenizer, config, selection, args.output, about, args.trust_remote_code)
    sizes = [weight_bytes(m) / 1e6 for m in (model, sliced)]
    kept = len(next(iter(selection.indices.values())))
    return (
        f"Wrote {args.output}: {kept} neurons in each of {len(selection.indices)} feed-forward "
        f"networks (density {selection.density:.3f}), weights {sizes[0]:.1f} -> {sizes[1]:.1f} MB "
        f"per token\nRun it with: mlx_lm.generate --model {args.output} --prompt ..."
    )


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    args = setup_arg_parser().parse_args()
    with ending("export"):
        print(_run(args))


if __name__ == "__main__":
    main()
