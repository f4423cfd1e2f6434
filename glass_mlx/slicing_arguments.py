"""The flags that say how a model is sliced, which several commands share."""

import argparse

from glass_mlx.config import (
    DEFAULT_MAX_KL,
    DEFAULT_REFRESH,
    DRAFT_WARMUP,
    EXACT_REFRESH,
    GlassConfig,
)
from glass_mlx.models import DOWN_POLICIES, default_down_policy
from glass_mlx.statistics import PRIOR_STATISTICS, STATISTICS


def add_slicing_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say how a model is sliced."""
    group.add_argument(
        "--max-kl",
        type=float,
        metavar="X",
        help="Keep as few feed-forward neurons as possible while KL divergence from the dense "
        "model is expected to stay within X nats per token; 0 for all, and the dense model's own "
        f"text (default: {DEFAULT_MAX_KL:g}).",
    )
    group.add_argument(
        "--density",
        type=float,
        help="Share of the feed-forward neurons to keep, instead of --max-kl.",
    )
    group.add_argument(
        "--vocabulary",
        type=float,
        metavar="SHARE",
        help="Share of the output head's rows that compute each token, instead of --max-kl. "
        "Default: a part of them drafts, and all of them check the drafts.",
    )
    group.add_argument(
        "--prior-weight",
        type=float,
        default=GlassConfig.prior_weight,
        metavar="λ",
        help="Weight of the prior's ranks against the local ranks (default: %(default)s).",
    )
    group.add_argument(
        "--warmup",
        type=int,
        default=GlassConfig.warmup,
        metavar="N",
        help="Generate N tokens densely before neurons are selected (default: %(default)s; at most "
        f"{DRAFT_WARMUP} with a bound of 0).",
    )
    group.add_argument(
        "--refresh",
        type=int,
        metavar="N",
        help="Renew the selection every N tokens, and later at longer intervals; 0 for never "
        f"(default: {DEFAULT_REFRESH}, more for mixtures of experts, {EXACT_REFRESH} at a bound "
        "of 0, 0 with --release-dense).",
    )
    group.add_argument(
        "--statistic",
        choices=STATISTICS,
        default=GlassConfig.statistic,
        help="Statistic that ranks neurons locally (default: %(default)s).",
    )
    group.add_argument(
        "--prior-statistic",
        choices=PRIOR_STATISTICS,
        default=GlassConfig.prior_statistic,
        help="Statistic that ranks neurons in the prior (default: %(default)s).",
    )
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--prior",
        metavar="FILE",
        help="The model's global prior: a file, or hub:user/repo to download. Default: "
        "glass_prior.safetensors in the model's folder, then the user's cache, then the priors in "
        "this package; if there is none, measure a small one and keep it in the cache.",
    )
    source.add_argument(
        "--no-prior", action="store_true", help="Select from the local statistics alone."
    )
    source.add_argument("--dense", action="store_true", help="Do not slice, for comparison.")
    group.add_argument(
        "--release-dense",
        action="store_true",
        help="Free the dense feed-forward weights as soon as their slices exist. Decoding then "
        "takes less memory than the dense model, and the dense model computes no tokens.",
    )
    group.add_argument(
        "--down-policy",
        choices=DOWN_POLICIES,
        default=default_down_policy(),
        help="How to slice quantized down projections: quantize the kept columns again "
        "(requantize) or take rows of a transposed copy (neuron-major), both with a small error, "
        "or keep the whole layer and set the other inputs to zero (scatter), which is exact but "
        "slower (default: neuron-major on a CPU, requantize on Metal).",
    )


def config_from(args: argparse.Namespace) -> GlassConfig:
    """Turn the parsed flags of `add_slicing_arguments` into a configuration.

    Raises:
        ValueError: for the first value that is out of range.
    """
    refresh = args.refresh
    if refresh is None and args.release_dense:
        refresh = 0  # released weights would be loaded again for every renewal
    dense_every = 0 if args.release_dense else GlassConfig.dense_every
    return GlassConfig(
        max_kl=args.max_kl,
        density=args.density,
        vocabulary=args.vocabulary,
        prior_weight=args.prior_weight,
        warmup=args.warmup,
        dense_every=dense_every,
        refresh=refresh,
        statistic=args.statistic,
        prior_statistic=args.prior_statistic,
        down_policy=args.down_policy,
    )
