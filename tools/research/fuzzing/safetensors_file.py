"""The parts of a safetensors file, which can hold what no writer would write."""

import json
from dataclasses import dataclass
from typing import Any

from fuzzing.json_mutations import to_text

METADATA = "__metadata__"


@dataclass
class SafetensorsFile:
    """A safetensors file, valid or not.

    Attributes:
        header: the JSON object at its beginning: tensors by name, and the metadata.
        data: the tensor data.
    """

    header: dict[str, Any]
    data: bytes

    @staticmethod
    def parse(content: bytes) -> "SafetensorsFile":
        """Take a valid file apart."""
        start = 8 + int.from_bytes(content[:8], "little")
        return SafetensorsFile(json.loads(content[8:start]), content[start:])

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata."""
        return self.header[METADATA]

    @property
    def names(self) -> list[str]:
        """The names of the tensors."""
        return [name for name in self.header if name != METADATA]

    def content(self, text: bytes | None = None, extra_length: int = 0) -> bytes:
        """Write the file.

        Args:
            text: the text of the header. Default: `header` as JSON.
            extra_length: how many more bytes the file states for its header than there are.
        """
        text = to_text(self.header) if text is None else text
        text += b" " * (-len(text) % 8)
        length = (len(text) + extra_length) % (1 << 64)
        return length.to_bytes(8, "little") + text + self.data
