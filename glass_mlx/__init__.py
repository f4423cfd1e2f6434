"""Decode with only the feed-forward neurons that matter for the prompt (GLASS, arXiv 2508.14302).

from glass_mlx import load, stream_generate

model, tokenizer = load("mlx-community/Llama-3.2-3B-Instruct-4bit")
for response in stream_generate(model, tokenizer, "Why is the sky blue?", density=0.5):
    print(response.text, end="")
"""

from glass_mlx.blas import prefer_openblas

prefer_openblas()  # must come before anything imports MLX

from glass_mlx.cache_file import load_prompt_cache, save_prompt_cache  # noqa: E402
from glass_mlx.checkpoints.loading import load  # noqa: E402
from glass_mlx.config import GlassConfig  # noqa: E402
from glass_mlx.generation_report import GenerationResponse, Report  # noqa: E402
from glass_mlx.prior.file import GlobalPrior  # noqa: E402
from glass_mlx.prior.lookup import NoPriorError  # noqa: E402
from glass_mlx.prompt_cache import (  # noqa: E402
    PromptCache,
    make_prompt_cache,
    trim_prompt_cache,
)
from glass_mlx.selection import Selection  # noqa: E402
from glass_mlx.session import Session, resolve_prior  # noqa: E402
from glass_mlx.streaming import generate, stream_generate  # noqa: E402

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
    "resolve_prior",
    "save_prompt_cache",
    "stream_generate",
    "trim_prompt_cache",
]
