"""Which slices of a model fit into memory beside the model."""

import os
from collections.abc import Mapping

from glass_mlx.models import FFN

import mlx.core as mx

# The share of the memory that is left to prompt caches and to what a step computes.
_RESERVE = 0.05


class NoRoomError(ValueError):
    """The error that no slice of a model fits into memory beside the model.

    Args:
        model_bytes: the bytes of the model's weights.
        needed: the bytes of all slices.
    """

    def __init__(self, model_bytes: int, needed: int) -> None:
        super().__init__(
            f"slices need about {needed / 1e9:.1f} GB beside the {model_bytes / 1e9:.1f} GB of the "
            f"model, and this machine has {usable_memory() / 1e9:.1f} GB for both; free the dense "
            "weights with --release-dense (in Python reload, dense_every=0, refresh=0), keep less "
            "with --density, or save a smaller model once with glass-mlx export"
        )


def usable_memory() -> int:
    """Return the bytes that MLX's arrays can take without making this machine slow.

    On Metal that is the recommended size of the working set, about three quarters of the memory.
    """
    limit = mx.device_info().get("max_recommended_working_set_size")
    if limit:
        return int(limit)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def slice_bytes(ffn: FFN, share: float, down_policy: str) -> int:
    """Return about how many bytes the slice of an FFN holds beside its dense weights.

    Args:
        ffn: the FFN.
        share: the share of its neurons that the slice keeps. If it keeps all, there is no slice.
        down_policy: a key of `models.DOWN_POLICIES`, for quantized down projections.
    """
    if share == 1:
        return 0
    return round(share * ffn.neuron_bytes(down_policy)) + ffn.copied_bytes(down_policy)


def without_room(
    model_bytes: int,
    ffns: list[FFN],
    shares: Mapping[str, float],
    down_policy: str,
    read_shares: Mapping[str, float],
    required: bool = False,
) -> frozenset[str]:
    """Return the FFNs whose slices do not fit into memory beside the dense weights.

    Those slices are made that save the most bytes per token for a byte that they hold. Among equal
    ones, which is all in most models, the first are made.

    Args:
        model_bytes: the bytes of the model's weights.
        ffns: its FFNs.
        shares: the share of its neurons that the slice of each FFN keeps, by path.
        down_policy: a key of `models.DOWN_POLICIES`.
        read_shares: the share of its experts that a token reads, by the path of each stack.
        required: whether at least one slice must fit.

    Returns:
        The paths of the FFNs to keep whole. It is empty if all slices fit.

    Raises:
        NoRoomError: if one slice must fit, and none does.
    """
    held = {f.path: slice_bytes(f, shares[f.path], down_policy) for f in ffns}
    saved = {
        f.path: (1 - shares[f.path]) * f.neuron_bytes(down_policy) * read_shares.get(f.path, 1.0)
        for f in ffns
    }
    wanted = sorted((p for p in held if held[p]), key=lambda p: -saved[p] / held[p])
    room, left_out = (1 - _RESERVE) * usable_memory() - model_bytes, []
    for path in wanted:
        if held[path] <= room:
            room -= held[path]
        else:
            left_out.append(path)
    if required and left_out and len(left_out) == len(wanted):
        raise NoRoomError(model_bytes, sum(held.values()))
    return frozenset(left_out)
