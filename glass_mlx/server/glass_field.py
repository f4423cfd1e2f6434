"""The field `glass` of a request: how its answer is sliced."""

from dataclasses import dataclass, replace
from typing import Any

from glass_mlx.config import GlassConfig
from glass_mlx.server.errors import bad_request

_NUMBERS = ("max_kl", "density", "vocabulary")
_SWITCHES = ("dense", "trace")


@dataclass(frozen=True)
class GlassField:
    """What a request says about slicing. Without a value the server's flags decide.

    Attributes:
        max_kl: the bound on KL divergence, in nats per token.
        density: the share of the neurons to keep.
        vocabulary: the share of the output head's rows to keep.
        dense: whether the dense model answers.
        trace: whether a stream also says what is kept, after each renewal.
    """

    max_kl: float | None = None
    density: float | None = None
    vocabulary: float | None = None
    dense: bool = False
    trace: bool = False

    @staticmethod
    def parse(value: Any) -> "GlassField":
        """Return the field of a request's body.

        Raises:
            RequestError: if it is malformed.
        """
        if not isinstance(value, dict):
            raise bad_request("glass must be an object", "glass")
        known = (*_NUMBERS, *_SWITCHES)
        for name, entry in value.items():
            if name not in known:
                raise bad_request(f"glass has no {name!r}; it has {', '.join(known)}", "glass")
            is_number = isinstance(entry, int | float) and not isinstance(entry, bool)
            if name in _NUMBERS and not (entry is None or is_number):
                raise bad_request(f"glass.{name} must be a number", f"glass.{name}")
            if name in _SWITCHES and not isinstance(entry, bool):
                raise bad_request(f"glass.{name} must be true or false", f"glass.{name}")
        return GlassField(**value)

    @property
    def shares(self) -> bool:
        """Whether there is a density or a share of the vocabulary."""
        return self.density is not None or self.vocabulary is not None

    def config(self, default: GlassConfig, is_dense: bool) -> GlassConfig:
        """Return the configuration of the answer.

        Args:
            default: the server's configuration.
            is_dense: whether the server does not slice at all.

        Raises:
            RequestError: if the values are out of range, or need what the server has not measured.
        """
        is_sliced = self.max_kl is not None or self.shares
        if self.dense and is_sliced:
            raise bad_request("glass.dense cannot be combined with other shares to keep", "glass")
        if is_dense and is_sliced:
            raise bad_request("this server was started with --dense, so it cannot slice", "glass")
        if self.dense or is_dense:
            return replace(default, max_kl=None, density=1.0, vocabulary=1.0)
        if not is_sliced:
            return default
        if not self.shares and not default.has_budget:
            raise bad_request(
                "this server was started with --density or --vocabulary, so it has not measured "
                "what slicing costs; give glass.density",
                "glass.max_kl",
            )
        shares = {name: getattr(self, name) for name in _NUMBERS}
        try:
            return replace(default, **shares)
        except ValueError as error:
            raise bad_request(str(error), "glass") from error


def glass_field(body: dict[str, Any]) -> GlassField:
    """Return the field of a body, or an empty one.

    Raises:
        RequestError: if it is malformed.
    """
    return GlassField.parse(body.get("glass") or {})
