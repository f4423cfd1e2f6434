"""Which tokens every shortlist of a text has."""

from glass_mlx.kept_tokens import KeptTokens, biased_tokens
from helpers import chat_tokenizer

from mlx_lm.sample_utils import make_logits_processors


def test_special_tokens_and_those_of_the_text():
    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["丰", "<unused7>"]})
    tokenizer.add_eos_token("丁")
    special = {tokenizer.convert_tokens_to_ids(token) for token in "不丰丁"}
    kept = KeptTokens(tokenizer)([])
    assert special <= kept
    assert len(kept) < 20
    assert tokenizer.convert_tokens_to_ids("<unused7>") not in kept
    assert KeptTokens(tokenizer, more=[777])([778]) >= special | {777, 778}


def test_tokens_with_a_logit_bias_are_found_in_mlx_lm_s_processor():
    processors = make_logits_processors({7: 1.5, 9: -100.0}, repetition_penalty=1.3)
    assert biased_tokens(processors) == {7, 9}
    assert biased_tokens([lambda tokens, logits: logits]) == frozenset()
