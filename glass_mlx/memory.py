"""Whether the slices of a model fit into memory beside the model."""

import os

from glass_mlx.models import FFN

import mlx.core as mx


def usable_memory() -> int:
    """Return the bytes that MLX's arrays can take without making this machine slow.

    On Metal that is the recommended size of the working set, about three quarters of the memory.
    """
    limit = mx.device_info().get("max_recommended_working_set_size")
    if limit:
        return int(limit)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def slice_bytes(ffns: list[FFN], density: float, down_policy: str) -> int:
    """Return about how many bytes the slices of some FFNs hold beside the dense weights.

    Args:
        ffns: the FFNs.
        density: the share of the neurons that the slices keep.
        down_policy: a key of `models.DOWN_POLICIES`, for quantized down projections.
    """
    if density == 1:
        return 0
    kept = density * sum(ffn.neuron_bytes(down_policy) for ffn in ffns)
    return round(kept) + sum(ffn.copied_bytes(down_policy) for ffn in ffns)


def check_room_for_slices(
    model_bytes: int, ffns: list[FFN], density: float, down_policy: str
) -> None:
    """Check that slices fit into memory beside the dense weights.

    Args:
        model_bytes: the bytes of the model's weights.
        ffns: its FFNs.
        density: the share of the neurons that the slices keep.
        down_policy: a key of `models.DOWN_POLICIES`.

    Raises:
        ValueError: if they do not fit, with what to do.
    """
    needed, usable = slice_bytes(ffns, density, down_policy), usable_memory()
    if needed and model_bytes + needed > usable:
        raise ValueError(
            f"slices need about {needed / 1e9:.1f} GB beside the {model_bytes / 1e9:.1f} GB of the "
            f"model, and this machine has {usable / 1e9:.1f} GB for both; free the dense weights "
            "with --release-dense (in Python reload, dense_every=0, refresh=0), keep less with "
            "--density, or save a smaller model once with glass-mlx export"
        )
