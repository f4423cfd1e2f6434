"""What the tests of several ranks compute, in one process or in each of several."""

from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from glass_mlx import GlassConfig, Session, draft_shortlist, slicing, stream_generate
from glass_mlx.calibration.building import CalibrationSettings, calibrate
from glass_mlx.models.architectures import tiny_model
from glass_mlx.prior.file import GlobalPrior
from helpers import letter_tokenizer, made_prior

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

PROMPT = [*range(40, 52)]
TOKENS, WHOLE_TOKENS, EXACT_TOKENS = 17, 4, 12

# Selections after 10 and after 14 tokens, of half of the neurons and of the vocabulary.
CONFIG = GlassConfig(density=0.5, vocabulary=0.5, warmup=10, refresh=14)

_WIDTHS = {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True)
class Case:
    """A tiny random model, and how it is divided.

    Attributes:
        architecture: its architecture.
        pipeline: whether ranks get layers.
        bits: the bits of its weights; 0 for floats.
        is_thorough: whether to generate twice, and to measure a prior.
        changes: further values of its configuration.
    """

    architecture: str
    pipeline: bool = False
    bits: int = 0
    is_thorough: bool = False
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A name for its files."""
        return f"{self.architecture}-{'layers' if self.pipeline else 'neurons'}-{self.bits}"


def build(case: Case) -> nn.Module:
    """Return the whole model, the same in every process."""
    model = tiny_model(case.architecture, **(_WIDTHS | case.changes))
    if case.bits:
        nn.quantize(model, group_size=32, bits=case.bits)
    return model


def whole_prior(case: Case) -> GlobalPrior:
    """Return a random prior of the whole model."""
    return made_prior(build(case))


def tokenizer() -> TokenizerWrapper:
    """Return a tokenizer without an end-of-sequence token."""
    return TokenizerWrapper(letter_tokenizer())


def dense_tokens(model: nn.Module, count: int = WHOLE_TOKENS) -> list[int]:
    """Return the text of mlx-lm."""
    mx.random.seed(5)
    sampler = make_sampler(temp=1.0)
    responses = mlx_lm.stream_generate(
        model, tokenizer(), PROMPT, max_tokens=count, sampler=sampler
    )
    return [response.token for response in responses]


def exact_tokens(session: Session, case: Case) -> list[int]:
    """Return the text with checked drafts, of which many are wrong."""
    prior = whole_prior(case)
    mx.random.seed(5)
    with patch.object(draft_shortlist, "_MAX_COST", np.inf):
        responses = [
            *stream_generate(
                session,
                tokenizer(),
                PROMPT,
                prior=prior,
                sampler=make_sampler(temp=1.0),
                max_tokens=EXACT_TOKENS,
            )
        ]
    assert responses[-1].glass.drafts > 0
    return [response.token for response in responses]


def generated(
    session: Session, case: Case, **options: Any
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Return tokens (T,), their log-probabilities (T, V), and the kept neurons of the last slices.

    Slices are renewed even where they have nearly all of the selected neurons, which each rank
    would decide for itself.

    Args:
        session: the model's session.
        case: the case.
        options: further options of `stream_generate`.
    """
    prior = whole_prior(case)
    mx.random.seed(5)
    with patch.object(slicing, "_MIN_OVERLAP", 2.0):
        responses = [
            *stream_generate(
                session,
                tokenizer(),
                PROMPT,
                config=CONFIG,
                prior=prior,
                sampler=make_sampler(temp=1.0),
                **({"max_tokens": TOKENS} | options),
            )
        ]
    selection = responses[-1].glass.selection
    kept = selection.indices if selection else {}
    tokens = np.array([response.token for response in responses])
    return tokens, np.stack([np.array(r.logprobs) for r in responses]), kept


def calibrated(model: nn.Module) -> GlobalPrior:
    """Measure a small prior."""
    settings = CalibrationSettings(sequences=2, length=18, batch_size=2, curve_texts=0)
    return calibrate(model, tokenizer(), settings)
