"""Token ids that the model does not know never reach it."""

from glass_mlx import Session, make_prompt_cache, stream_generate
from glass_mlx.models import check_tokens, vocabulary_size
from glass_mlx.models.architectures import tiny_model
from glass_mlx.prompt_cache import read_prompt
from glass_mlx.streaming import new_detokenizer
from glass_mlx.writing import Writer
from helpers import letter_tokenizer

import pytest
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.mark.parametrize("token", [-1, 256, 70000])
def test_every_way_to_the_model_checks_tokens(model, token):
    assert vocabulary_size(model) == 256
    check_tokens([0, 255], 256)
    tokens = [1, 2, token]
    reads = [
        lambda: check_tokens(tokens, 256),
        lambda: Session(model).check_tokens(tokens),
        lambda: read_prompt(model, tokens, make_prompt_cache(model)),
        lambda: Writer(model, 1.0, [0], lambda count: None)([tokens], [3], [], 0),
    ]
    if token > 0:
        reads.append(lambda: stream_generate(model, letter_tokenizer(), tokens, 3, prior=False))
    for read in reads:
        with pytest.raises(ValueError, match=f"the token {token} is not among the model's 256"):
            read()


def test_a_model_that_computes_nothing_but_nan_is_refused(model):
    model.model.norm.weight = model.model.norm.weight * float("nan")
    with pytest.raises(ValueError, match="probabilities that are not a number"):
        list(stream_generate(model, letter_tokenizer(), [1, 2, 3], 3, prior=False))


def test_ids_without_a_token_are_decoded_to_nothing():
    class Holes(BPEStreamingDetokenizer):
        def __init__(self, words):
            super().__init__(words)
            self.tokenmap = ["a", None, "b"]

    detokenizer = new_detokenizer(TokenizerWrapper(letter_tokenizer(), Holes))
    for token in (0, 1, 2):
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text == "ab"
