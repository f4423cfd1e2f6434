"""A sampler with the filters of mlx-lm's, which samples the same token from a part of the tokens.

A draft is sampled from a shortlist, and its check from all tokens, with the same random numbers.
mlx-lm's sampler looks one random number up among cumulative probabilities, which move with every
token that is missing. This one adds Gumbel noise to each logarithm and takes the largest sum (the
Gumbel-max trick), so that the token is the same unless it is missing itself. Both sample from the
same distribution, but not the same tokens with the same seed.
"""

from collections.abc import Callable
from functools import partial

from glass_mlx.decoding import Sampler, greedy_sampler

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, apply_xtc

Filter = Callable[[mx.array], mx.array]


def make_sampler(
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    min_tokens_to_keep: int = 1,
    top_k: int = 0,
    xtc_probability: float = 0.0,
    xtc_threshold: float = 0.1,
    xtc_special_tokens: list[int] | None = None,
) -> Sampler:
    """Make a sampler, as `mlx_lm.sample_utils.make_sampler` does.

    Args:
        temp: the temperature; 0 for the most likely token.
        top_p: keep the most likely tokens of this probability together; 0 or 1 for all.
        min_p: drop tokens less likely than this part of the most likely one.
        min_tokens_to_keep: keep at least as many of them.
        top_k: keep this many tokens at most; 0 for all.
        xtc_probability: how often all but the least likely of the likely tokens are excluded.
        xtc_threshold: the probability from which a token is likely in this sense.
        xtc_special_tokens: tokens that are never excluded.

    Returns:
        A function of log-probabilities (n, vocabulary) that returns tokens (n,).
    """
    if temp == 0:
        return greedy_sampler
    filters: list[Filter] = []
    if 0 < top_p < 1:
        filters.append(partial(apply_top_p, top_p=top_p))
    if min_p != 0:
        filters.append(partial(apply_min_p, min_p=min_p, min_tokens_to_keep=min_tokens_to_keep))
    if xtc_probability > 0:
        special = xtc_special_tokens or []
        filters.append(lambda x: apply_xtc(x, xtc_probability, xtc_threshold, special))
    if top_k > 0:
        filters.append(partial(apply_top_k, top_k=top_k))

    def sample(logprobs: mx.array) -> mx.array:
        for apply in filters:
            logprobs = apply(logprobs)
        noise = mx.random.gumbel(logprobs.shape)
        return mx.argmax(logprobs.astype(mx.float32) * (1 / temp) + noise, axis=-1)

    return sample
