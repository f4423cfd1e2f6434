"""What an answer's slicing was like, for `usage`, and what is kept, for the page."""

from typing import Any

from glass_mlx.generation_report import Report

import numpy as np

# The number of bins that the neurons of each FFN, and the tokens of the vocabulary, are counted in.
BINS = 64

# The digits of a bin's share, from none to all.
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def glass_usage(report: Report, tokens: int) -> dict[str, Any]:
    """Return the object `glass` in an answer's `usage`.

    Args:
        report: the report of the answer's last token.
        tokens: the number of tokens of the answer.
    """
    return {
        "max_kl": report.max_kl,
        "density": round(report.density_got, 4),
        "vocabulary": round(report.vocabulary_got, 4),
        "outside": round(report.outside, 6),
        "bytes_per_token": report.bytes_per_token(tokens),
        "dense_bytes_per_token": report.dense_bytes,
        "bytes_share": round(report.read_bytes / (tokens * report.dense_bytes), 4),
        "dense_tokens": report.dense_tokens,
        "checked_tokens": report.checked_tokens,
        "drafts": report.drafts,
        "selections": report.selections,
        "unsliced": len(report.unsliced),
    }


def kept_shares(report: Report) -> dict[str, Any]:
    """Return what is kept, as one digit for each bin: 0 for none, z for all.

    Args:
        report: the report after a selection.

    Returns:
        `layers`, a text of at most `BINS` digits for each FFN, and `vocabulary`, such a text or
        null if all tokens are kept.
    """
    selection, shortlist = report.selection, report.shortlist
    assert selection is not None
    layers = [_digits(kept, selection.widths[path]) for path, kept in selection.indices.items()]
    vocabulary = None if shortlist is None else _digits(shortlist.rows, len(shortlist.shares))
    return {"layers": layers, "vocabulary": vocabulary}


def _digits(kept: np.ndarray, width: int) -> str:
    """Return the share that is kept of each bin of units, a digit each.

    Args:
        kept: (..., k) indices of units below `width`, one expert after the other.
        width: the number of units, of each expert.
    """
    experts = kept.reshape(-1, kept.shape[-1]).astype(np.int64)
    units = experts + width * np.arange(len(experts))[:, None]
    size = width * len(experts)
    bins = min(BINS, size)
    totals = np.bincount(np.arange(size) * bins // size, minlength=bins)
    counts = np.bincount(units.ravel() * bins // size, minlength=bins)
    levels = np.rint(counts / totals * (len(_DIGITS) - 1)).astype(int)
    return "".join(_DIGITS[level] for level in levels)
