"""Stop words: text at which an answer ends."""

from collections.abc import Sequence


class StopWords:
    """Finds stop words in streamed text, however the text is divided into tokens.

    Args:
        words: the stop words, which are not empty.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words, self._held = words, ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Add text.

        Returns:
            The text that is no part of a stop word, and whether a stop word has come. What may be
            the beginning of a stop word is held back.
        """
        text = self._held + text
        places = [place for word in self._words if (place := text.find(word)) >= 0]
        if places:
            self._held = ""
            return text[: min(places)], True
        held = self._beginning(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def rest(self) -> str:
        """Return the text that was held back, when the text has ended."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Return how many of the last characters may begin a stop word."""
        longest = max(map(len, self._words), default=0)
        for count in range(min(longest - 1, len(text)), 0, -1):
            if any(word.startswith(text[-count:]) for word in self._words):
                return count
        return 0
