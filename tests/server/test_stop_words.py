"""Stop words in streamed text, whatever the division into tokens."""

import itertools

from glass_mlx.server.stop_words import StopWords

from hypothesis import given
from hypothesis import strategies as st


def stream(words, pieces):
    """Return what is shown of streamed text, and whether it was stopped."""
    stop_words, shown = StopWords(words), ""
    for piece in pieces:
        text, is_stopped = stop_words.feed(piece)
        shown += text
        if is_stopped:
            return shown, True
    return shown + stop_words.rest(), False


def test_a_stop_word_may_lie_within_or_across_tokens():
    for pieces in (["one two three"], ["one t", "wo three"], [*"one two three"]):
        assert stream(["two"], pieces) == ("one ", True)


def test_what_may_begin_a_stop_word_is_held_back_and_then_shown():
    stop_words = StopWords(["END"])
    assert stop_words.feed("the E") == ("the ", False)
    assert stop_words.feed("N") == ("", False)
    assert stop_words.feed("T") == ("ENT", False)
    assert stop_words.feed("EN") == ("", False)
    assert stop_words.rest() == "EN"
    assert stop_words.rest() == ""


@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 12), max_size=4),
)
def test_the_text_ends_at_the_first_stop_word(text, words, cuts):
    cuts = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
    shown, is_stopped = stream(words, pieces)
    ends = [text.find(word) + len(word) for word in words if word in text]
    assert is_stopped == bool(ends)
    if not ends:
        assert shown == text
    else:
        # The stop word that is complete first, or one that ends within the same piece.
        assert text.startswith(shown)
        assert any(text[len(shown) :].startswith(word) for word in words)
        assert not any(word in shown for word in words)
