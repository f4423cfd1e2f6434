"""Find, observe and slice the FFNs and heads of mlx-lm models. Nothing here ranks neurons."""

from .adapters import base_layer
from .discovery import QUANTIZED_ACTIVATIONS, find_ffns, has_experts
from .ffn import FFN
from .fingerprints import Fingerprint, fingerprint, sample_weights
from .head import BackedOffModel, Head, ObservedLogits, SlicedHead, find_head, with_head
from .linear import DOWN_POLICIES, MeanCompensation, default_down_policy
from .modules import layer_order, named_arrays, with_modules
from .taps import Observer, tap, with_taps
from .vocabulary import check_tokens, vocabulary_size
from .weights import check_finite, weight_bytes

__all__ = [
    "DOWN_POLICIES",
    "FFN",
    "QUANTIZED_ACTIVATIONS",
    "BackedOffModel",
    "Fingerprint",
    "Head",
    "MeanCompensation",
    "ObservedLogits",
    "Observer",
    "SlicedHead",
    "base_layer",
    "check_finite",
    "check_tokens",
    "default_down_policy",
    "find_ffns",
    "find_head",
    "fingerprint",
    "has_experts",
    "layer_order",
    "named_arrays",
    "sample_weights",
    "tap",
    "vocabulary_size",
    "weight_bytes",
    "with_head",
    "with_modules",
    "with_taps",
]
