"""Find, observe and slice the FFNs and heads of mlx-lm models. Nothing here ranks neurons."""

from .adapters import base_layer
from .discovery import QUANTIZED_ACTIVATIONS, find_ffns, has_experts
from .dividing import divide
from .division import Division, division_of
from .down import DOWN_POLICIES, MeanCompensation, default_down_policy
from .expert_list import ExpertList
from .ffn import FFN, membership
from .fingerprints import Fingerprint, fingerprint, sample_weights
from .head import (
    BackedOffModel,
    DraftingModel,
    Head,
    LogitsOfHidden,
    ObservedLogits,
    SlicedHead,
    find_head,
    with_head,
)
from .modules import layer_order, named_arrays, with_call, with_modules, with_replacements
from .ranks import Ranks, world
from .taps import Observer, OutputObserver, Routing, tapped, with_taps
from .vocabulary import check_tokens, vocabulary_size
from .weights import check_finite, read_shares, weight_bytes

__all__ = [
    "DOWN_POLICIES",
    "FFN",
    "QUANTIZED_ACTIVATIONS",
    "BackedOffModel",
    "Division",
    "DraftingModel",
    "ExpertList",
    "Fingerprint",
    "Head",
    "LogitsOfHidden",
    "MeanCompensation",
    "ObservedLogits",
    "Observer",
    "OutputObserver",
    "Ranks",
    "Routing",
    "SlicedHead",
    "base_layer",
    "check_finite",
    "check_tokens",
    "default_down_policy",
    "divide",
    "division_of",
    "find_ffns",
    "find_head",
    "fingerprint",
    "has_experts",
    "layer_order",
    "membership",
    "named_arrays",
    "read_shares",
    "sample_weights",
    "tapped",
    "vocabulary_size",
    "weight_bytes",
    "with_call",
    "with_head",
    "with_modules",
    "with_replacements",
    "with_taps",
    "world",
]
