"""The global prior of a model: scores of its neurons, measured once and stored in one file.

The file is safetensors. For every FFN and statistic it has the raw scores, `<path>.<statistic>`,
float32 (m,), and for every FFN `<path>.fingerprint`, a few of the model's own weights. Its
metadata is one entry, `glass_prior`, of JSON: `format`, `digest` (over everything else) and `about`
(model, recipe, tokens, versions, ...); with one entry the same prior is the same file.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from glass_mlx.files import cache_folder, replacing

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

FORMAT = "glass-prior-1"
_METADATA = "glass_prior"
FILE_NAME = "glass_prior.safetensors"
BUILD_COMMAND = "python tools/build_priors.py --model {model} --output glass_prior.safetensors"

# The cosine of fingerprints of one model (SmolLM2-135M, requantized in groups of 64) is 0.996
# at 4 bits, 0.925 at 2 bits. Those of two models trained apart have nothing in common.
_SAME_MODEL = 0.8


@dataclass(frozen=True)
class GlobalPrior:
    """How important each neuron of a model is in general.

    Attributes:
        scores: for each statistic, the scores (m,) float32 of each FFN by its path.
        fingerprint: a sample of the weights of each FFN, see `models.fingerprint`.
        about: where the prior comes from: model, recipe, tokens, seed, versions, date.
        source: the file it was read from, for reports.
    """

    scores: dict[str, dict[str, np.ndarray]]
    fingerprint: dict[str, np.ndarray]
    about: dict[str, Any]
    source: str = ""

    def mismatch(self, widths: Mapping[str, int], weights: Mapping[str, np.ndarray]) -> str | None:
        """Say why the prior does not belong to a model, or None if it does.

        Weights are compared up to rounding, so that one prior serves a model in every precision
        and quantization.

        Args:
            widths: the number of neurons of each FFN of the model, by path.
            weights: the model's own `models.fingerprint`.
        """
        scores = next(iter(self.scores.values()))
        if scores.keys() != widths.keys():
            return f"its {len(scores)} FFNs are not the model's {len(widths)}"
        for path, width in widths.items():
            if len(scores[path]) != width:
                return f"{path} has {width} neurons in the model and {len(scores[path])} in it"
        if any(weights[path].shape != self.fingerprint[path].shape for path in widths):
            return "it was measured on a model of another hidden size"
        ours, theirs = (
            np.concatenate([sample[path].ravel() for path in widths])
            for sample in (weights, self.fingerprint)
        )
        if ours @ theirs < _SAME_MODEL * np.linalg.norm(ours) * np.linalg.norm(theirs):
            return "it was measured on a model with other weights"
        return None

    def save(self, file: Path) -> None:
        """Write the prior to a file, by way of a temporary one beside it."""
        tensors = {
            f"{path}.{name}": values
            for name, scores in self.scores.items()
            for path, values in scores.items()
        }
        tensors |= {f"{path}.fingerprint": sample for path, sample in self.fingerprint.items()}
        metadata = {"format": FORMAT, "about": self.about, "digest": _digest(tensors, self.about)}
        with replacing(file) as temporary:
            save_file(tensors, temporary, {_METADATA: json.dumps(metadata, sort_keys=True)})

    @staticmethod
    def load(file: Path) -> "GlobalPrior":
        """Read and check a prior.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a prior, damaged, or has values that are not finite.
        """
        if not file.is_file():
            raise FileNotFoundError(f"there is no prior at {file}")
        try:
            with safe_open(file, "numpy") as stored:
                metadata = dict(json.loads((stored.metadata() or {}).get(_METADATA, "{}")))
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        except Exception as error:  # a damaged header shows up in many ways
            raise ValueError(f"{file} is not a complete safetensors file ({error})") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{file} is not a prior in the format {FORMAT}")
        for key, values in tensors.items():
            if not np.isfinite(values).all():
                raise ValueError(f"{file} has values in {key} that are not finite; build it again")
        if _digest(tensors, metadata.get("about")) != metadata.get("digest"):
            raise ValueError(f"{file} was changed after it was written; build it again")
        scores: dict[str, dict[str, np.ndarray]] = {}
        for key, values in tensors.items():
            path, _, name = key.rpartition(".")
            scores.setdefault(name, {})[path] = values
        samples = scores.pop("fingerprint", {})
        return GlobalPrior(scores, samples, metadata["about"], str(file))


def _digest(tensors: dict[str, np.ndarray], about: Any) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].dtype} {tensors[key].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[key]).tobytes())
    return digest.hexdigest()


def stored_priors() -> Iterator[Path]:
    """The priors in the user's cache, then those of this package."""
    packaged = Path(str(resources.files("glass_mlx") / "priors"))
    for place in (cache_folder() / "priors", packaged):
        yield from sorted(place.glob("*.safetensors"))
