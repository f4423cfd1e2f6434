"""The structure of GGUF files: damaged and unsupported ones end in one sentence."""

import struct
import subprocess
import sys
import tracemalloc

from glass_mlx.checkpoints.gguf import convert
from glass_mlx.checkpoints.gguf_blocks import readable_names
from glass_mlx.checkpoints.gguf_file import read_gguf
from glass_mlx.checkpoints.gguf_metadata import GGUFError
from glass_mlx.models.architectures import tiny_model
from helpers import write_gguf

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType

U32 = struct.Struct("<I").pack
U64 = struct.Struct("<Q").pack
F32 = GGMLQuantizationType.F32


def text(value: str | bytes) -> bytes:
    """Return a string as GGUF files store it."""
    encoded = value.encode() if isinstance(value, str) else value
    return U64(len(encoded)) + encoded


def key(name: str, kind: int, payload: bytes) -> bytes:
    """Return a metadata key and its value."""
    return text(name) + U32(kind) + payload


def tensor(name: str, dims: list[int], kind: int = F32, offset: int = 0) -> bytes:
    """Return the description of a tensor."""
    return text(name) + U32(len(dims)) + b"".join(map(U64, dims)) + U32(kind) + U64(offset)


def file_of(keys=(), tensors=(), data=b"", counts=None, version=3) -> bytes:
    """Return the content of a GGUF file with the default alignment."""
    tensor_count, key_count = counts or (len(tensors), len(keys))
    header = b"GGUF" + U32(version) + U64(tensor_count) + U64(key_count)
    head = header + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def read(content: bytes, folder):
    path = folder / "a.gguf"
    path.write_bytes(content)
    return read_gguf(path)


def refusal(content: bytes, folder) -> str:
    with pytest.raises(GGUFError) as error:
        read(content, folder)
    return str(error.value)


def test_values_of_all_types(tmp_path):
    numbers = [
        (GGUFValueType.UINT8, "<B", 200),
        (GGUFValueType.INT8, "<b", -7),
        (GGUFValueType.UINT16, "<H", 60000),
        (GGUFValueType.INT16, "<h", -7),
        (GGUFValueType.UINT32, "<I", 4000000000),
        (GGUFValueType.INT32, "<i", -7),
        (GGUFValueType.FLOAT32, "<f", 0.5),
        (GGUFValueType.BOOL, "<?", True),
        (GGUFValueType.UINT64, "<Q", 2**63),
        (GGUFValueType.INT64, "<q", -7),
        (GGUFValueType.FLOAT64, "<d", 0.1),
    ]
    array = GGUFValueType.ARRAY
    keys = [key(kind.name, kind, struct.pack(form, value)) for kind, form, value in numbers]
    keys += [
        key(
            f"{kind.name}s",
            array,
            U32(kind) + U64(2) + struct.pack(form[0] + 2 * form[1], value, 0),
        )
        for kind, form, value in numbers
    ]
    keys.append(key("text", GGUFValueType.STRING, text("naïve")))
    keys.append(key("latin", GGUFValueType.STRING, text(b"na\xefve")))
    strings = U32(GGUFValueType.STRING) + U64(2) + text("a") + text("")
    keys.append(key("texts", array, strings))
    keys.append(key("none", array, U32(GGUFValueType.UINT8) + U64(0)))
    metadata = read(file_of(keys), tmp_path).metadata
    for kind, _, value in numbers:
        assert metadata.value(kind.name) == value
        assert type(metadata.value(kind.name)) is type(value)
        assert metadata.numbers(f"{kind.name}s").tolist() == [value, 0]
    assert metadata.text("text") == "naïve"
    assert metadata.text("latin") == "na\ufffdve"
    assert metadata.strings("texts") == ["a", ""]
    assert len(metadata.numbers("none")) == 0


def test_tensors_have_the_values_of_the_gguf_package(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny_model("llama"), path, GGMLQuantizationType.Q5_1)
    tensors = read_gguf(path).tensors
    reader = gguf.GGUFReader(path)
    assert list(tensors) == [t.name for t in reader.tensors]
    for expected in reader.tensors:
        found = tensors[expected.name]
        assert found.kind == expected.tensor_type
        values = gguf.dequantize(expected.data, expected.tensor_type)
        np.testing.assert_array_equal(found.dequantize(), values)


@pytest.mark.parametrize("name", readable_names())
def test_all_readable_types_are_read(name, tmp_path):
    kind = GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 60, 2 * size, np.uint8).tobytes()
    found = read(file_of(tensors=[tensor("a", [block, 2], kind)], data=data), tmp_path).tensors["a"]
    assert found.dequantize().shape == (2, block)
    expected = (
        gguf.dequantize(np.frombuffer(data, np.uint8).reshape(2, size), kind)
        if (name not in ("F32", "F16"))
        else np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[name]).reshape(2, 1)
    )
    np.testing.assert_array_equal(found.dequantize(), expected.astype(np.float32))


def test_a_truncated_file_is_refused_at_every_byte(tmp_path):
    keys = [
        key("general.architecture", GGUFValueType.STRING, text("llama")),
        key("b", GGUFValueType.ARRAY, U32(GGUFValueType.STRING) + U64(2) + text("a") + text("b")),
        key("c", GGUFValueType.ARRAY, U32(GGUFValueType.FLOAT32) + U64(2) + bytes(8)),
    ]
    content = file_of(keys, [tensor("a", [4, 3])], bytes(48))
    assert read(content, tmp_path).tensors["a"].shape == (3, 4)
    for length in range(len(content)):
        message = refusal(content[:length], tmp_path)
        assert message.startswith("it is not a complete GGUF file: it")


def test_the_converter_says_which_file_is_incomplete(tmp_path):
    write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"tiny.gguf cannot be used: it is not a complete GGUF"):
        convert(tmp_path / "tiny.gguf", tmp_path)


TWO = 2**62
STRINGS = U32(GGUFValueType.STRING)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(90), r"it is not a GGUF file: it starts with b'PK\x03\x04'"),
        (file_of(version=1), "it is of GGUF version 1; only versions 2 and 3 can be read"),
        (file_of(version=4), "it is of GGUF version 4; only versions 2 and 3 can be read"),
        (file_of(counts=(TWO, 0)), f"inside the list of its {TWO} tensors"),
        (file_of(counts=(0, TWO)), f"inside its {TWO} metadata keys"),
        (file_of([key("a", 8, U64(TWO))]), "inside the value of a"),
        (file_of([key("a", 9, STRINGS + U64(TWO))]), "inside the value of a"),
        (file_of([key("a", 9, U32(4) + U64(TWO))]), "inside the value of a"),
        (file_of([key("a", 99, U64(0))]), "the value of a is of type 99, which cannot be read"),
        (file_of([key("a", 9, U32(9) + U64(1))]), "the value of a is of type 9, which cannot be"),
        (file_of([key("a", 0, b"1")] * 2), "its metadata has a twice"),
        (file_of([key("a", 9, STRINGS + U64(1) + text(b"\xff"))]), "the value of a holds a string"),
        (file_of([text(b"\xff") + bytes(20)]), "its metadata holds a string that is not UTF-8"),
        (file_of([key("a\nb", 0, b"1")] * 2), r"its metadata has a\nb twice"),
        (file_of(tensors=[tensor("a", [4])] * 2, data=bytes(99)), "it has two tensors a"),
        (file_of(tensors=[tensor("a", [])]), "its tensor a has 0 dimensions, not 1 to 4"),
        (file_of(tensors=[tensor("a", [1] * 5)]), "its tensor a has 5 dimensions, not 1 to 4"),
        (file_of(tensors=[tensor("a", [4, 0])]), "its tensor a of shape (0, 4) is empty"),
        (file_of(tensors=[tensor("a", [TWO, TWO])]), "its tensor a goes "),
        (file_of(tensors=[tensor("a", [33], 8)]), "which are not whole blocks of 32 as Q8_0 has"),
        (file_of(tensors=[tensor("a", [4], offset=32)], data=bytes(64)), "start at byte 32 of"),
        (
            file_of(tensors=[tensor("a", [4]), tensor("b", [4])], data=bytes(64)),
            "its tensor b is said to start at byte 0 of the data, but the tensor before it ends",
        ),
        (file_of([key("general.alignment", 4, U32(24))]), "general.alignment is 24, not a power"),
        (file_of([key("general.alignment", 4, U32(0))]), "general.alignment is 0, not an integer"),
        (file_of([key("general.alignment", 6, bytes(4))]), "general.alignment is 0.0, not an int"),
    ],
)
def test_damaged_files_end_in_one_sentence(content, message, tmp_path):
    tracemalloc.start()
    found = refusal(content, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message in found
    assert "\n" not in found
    assert peak < 1 << 20


@pytest.mark.parametrize(("kind", "name"), [(77, "77"), (26, "I32 (26)"), (4, "4")])
def test_an_unknown_quantization_type_is_named_with_those_that_can_be_read(kind, name, tmp_path):
    message = refusal(file_of(tensors=[tensor("a.weight", [32], kind)], data=bytes(99)), tmp_path)
    assert message.startswith(f"its tensor a.weight has the quantization type {name}, which cannot")
    assert message.endswith(", ".join(readable_names()))
    assert {"F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS"} <= set(readable_names())


def test_alignment_of_the_file_is_used(tmp_path):
    alignment = key("general.alignment", GGUFValueType.UINT32, U32(256))
    tensors = [tensor("a", [2]), tensor("b", [2], offset=256)]
    head = file_of([alignment], tensors)
    data = struct.pack("<2f", 1, 2) + bytes(248) + struct.pack("<2f", 3, 4)
    content = head + bytes(-len(head) % 256) + data
    assert read(content, tmp_path).tensors["b"].dequantize().tolist() == [3, 4]


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_big_endian_files_are_refused_with_the_way_to_convert_them(name, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny_model("llama"), path, GGMLQuantizationType[name])
    little = read_gguf(path)
    _swap(path, "big")
    with pytest.raises(ValueError, match=r"big-endian.*gguf-convert-endian tiny.gguf little"):
        convert(path, tmp_path)
    _swap(path, "little")
    again = read_gguf(path)
    for tensor_name, original in little.tensors.items():
        np.testing.assert_array_equal(again.tensors[tensor_name].data, original.data)


def _swap(path, order: str) -> None:
    """Swap the bytes of a file in place with gguf's own command."""
    command = [sys.executable, "-m", "gguf.scripts.gguf_convert_endian", str(path), order]
    result = subprocess.run(command, input="YES\n", text=True, capture_output=True)
    if result.returncode and "Cannot handle type" in result.stderr:
        pytest.skip("this version of gguf cannot swap the format")
    assert result.returncode == 0, result.stderr
