"""Decode with only the weights that the text at hand needs (GLASS, arXiv 2508.14302).

from glass_mlx import load, stream_generate

model, tokenizer = load("mlx-community/Llama-3.2-3B-Instruct-4bit")
for response in stream_generate(model, tokenizer, "Why is the sky blue?"):
    print(response.text, end="")

A name is imported when it is first used. So `glass-mlx --help` answers at once, and a command that
is interrupted while MLX is imported ends as quietly as later.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from glass_mlx.blas import prefer_openblas

prefer_openblas()  # must come before anything imports MLX

if TYPE_CHECKING:
    from glass_mlx.cache_file import load_prompt_cache, save_prompt_cache
    from glass_mlx.checkpoints.loading import load
    from glass_mlx.config import GlassConfig
    from glass_mlx.generation_report import GenerationResponse, Report
    from glass_mlx.prior.file import GlobalPrior
    from glass_mlx.prior.lookup import NoPriorError
    from glass_mlx.prompt_cache import PromptCache, make_prompt_cache, trim_prompt_cache
    from glass_mlx.sampling import make_sampler
    from glass_mlx.selection import Selection
    from glass_mlx.session import Session, resolve_prior
    from glass_mlx.streaming import generate, stream_generate
else:
    # Python sets a package's attribute when it first imports the submodule of that name. Later
    # imports of the command `glass_mlx.generate` do not hide the function.
    import_module("glass_mlx.generate")
    del generate

_NAMES = {
    "cache_file": ("load_prompt_cache", "save_prompt_cache"),
    "checkpoints.loading": ("load",),
    "config": ("GlassConfig",),
    "generation_report": ("GenerationResponse", "Report"),
    "prior.file": ("GlobalPrior",),
    "prior.lookup": ("NoPriorError",),
    "prompt_cache": ("PromptCache", "make_prompt_cache", "trim_prompt_cache"),
    "sampling": ("make_sampler",),
    "selection": ("Selection",),
    "session": ("Session", "resolve_prior"),
    "streaming": ("generate", "stream_generate"),
}

__all__ = [
    "GenerationResponse",
    "GlassConfig",
    "GlobalPrior",
    "NoPriorError",
    "PromptCache",
    "Report",
    "Selection",
    "Session",
    "generate",
    "load",
    "load_prompt_cache",
    "make_prompt_cache",
    "make_sampler",
    "resolve_prior",
    "save_prompt_cache",
    "stream_generate",
    "trim_prompt_cache",
]

if not TYPE_CHECKING:  # a type checker would take every name for one of the package

    def __getattr__(name: str) -> object:
        """Import a name of the package."""
        for module, names in _NAMES.items():
            if name in names:
                value = getattr(import_module(f"glass_mlx.{module}"), name)
                globals()[name] = value
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the names of the package, for interactive completion."""
    return sorted([*globals(), *__all__])
