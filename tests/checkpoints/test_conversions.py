"""Converted GGUF files: made once, checked, renewed, and shared by several processes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from glass_mlx import load
from glass_mlx.checkpoints import conversions, gguf
from glass_mlx.checkpoints.conversions import converted_builtin
from glass_mlx.checkpoints.loading import resolve
from glass_mlx.models.architectures import tiny_model
from helpers import write_gguf

import mlx.core as mx
import pytest

# Converts a GGUF file, and stops before the end until a file exists, if one is named.
CONVERTER = """
import sys, time
from pathlib import Path
from glass_mlx.checkpoints import gguf
from glass_mlx.checkpoints.loading import resolve
convert = gguf.convert
def stop(source, folder, dtype):
    convert(source, folder, dtype)
    print("converting", flush=True)
    while len(sys.argv) > 2 and not Path(sys.argv[2]).exists():
        time.sleep(0.01)
gguf.convert = stop
print(resolve(sys.argv[1], "float32"))
"""


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


@pytest.fixture
def start(cache: Path) -> Iterator:
    """Return a function that starts a process that converts; all are killed at the end."""
    processes = []

    def start(*arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-c", CONVERTER, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count conversions, and digests of files."""
    counts = {"convert": 0, "sha256": 0}
    for module, name in ((gguf, "convert"), (conversions, "sha256")):
        original = getattr(module, name)

        def counted(*arguments, original=original, name=name):
            counts[name] += 1
            return original(*arguments)

        monkeypatch.setattr(module, name, counted)
    return counts


def names(cache: Path) -> list[str]:
    return sorted(file.name for file in (cache / "models").iterdir())


def test_a_file_is_converted_once_and_its_digests_compared_when_it_was_written(
    cache, gguf_file, count
):
    folder = Path(resolve(str(gguf_file), "float32"))
    assert folder.parent == cache / "models"
    written = count["sha256"]
    assert written == len([*folder.iterdir()]) - 1
    assert resolve(str(gguf_file), "float32") == str(folder)
    assert count == {"convert": 1, "sha256": written}
    os.utime(folder / "config.json")
    for _ in range(3):
        assert resolve(str(gguf_file), "float32") == str(folder)
    assert count == {"convert": 1, "sha256": written + 1}
    (folder / "glass_prior.safetensors").touch()  # a user's file
    resolve(str(gguf_file), "float32")
    assert count["convert"] == 1


def zero(folder):
    weights = folder / "model-00000.safetensors"
    status, content = weights.stat(), bytearray(weights.read_bytes())
    content[-4000:] = bytes(4000)
    weights.write_bytes(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))


def cut(folder):
    weights = folder / "model-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def remove(folder):
    (folder / "tokenizer.json").unlink()


def add_weights(folder):
    (folder / "model-00001.safetensors").write_bytes((folder / "config.json").read_bytes())


def change_config(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"rope_theta": 1', '"rope_theta": 2'))


def change_manifest(**entries):
    """Return a function that damages a manifest, but for its first entries."""

    def change(folder):
        manifest = json.loads((folder / "glass_conversion.json").read_text())
        (folder / "glass_conversion.json").write_text(json.dumps(manifest | entries))

    return change


def lose_manifest(folder):
    (folder / "glass_conversion.json").write_text("1" * 9999)


@pytest.mark.parametrize(
    "damage",
    [
        *(zero, cut, remove, add_weights, change_config, lose_manifest),
        *(change_manifest(files=files) for files in (3, {}, [], {"\0": {}}, {"config.json": 1})),
        change_manifest(converter="2"),
    ],
)
def test_a_damaged_conversion_is_made_again(cache, gguf_file, count, damage):
    folder = Path(resolve(str(gguf_file), "float32"))
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    del files["glass_conversion.json"]
    damage(folder)
    assert resolve(str(gguf_file), "float32") == str(folder)
    assert count["convert"] == 2
    assert names(cache) == [folder.name]
    for name, content in files.items():
        assert (folder / name).read_bytes() == content
    assert resolve(str(gguf_file), "float32") == str(folder)
    assert count["convert"] == 2


def test_a_new_converter_replaces_earlier_conversions(cache, gguf_file, count, monkeypatch):
    folders = [Path(resolve(str(gguf_file), dtype)) for dtype in ("float16", "float32")]
    # The first converter's manifests are the sizes of the files; a changed file had another name.
    for name in ("tiny-0123456789ab-float32", "other-0123456789ab-float32", "tiny-mine-float32"):
        (cache / "models" / name).mkdir()
        (cache / "models" / name / "glass_conversion.json").write_text('{"config.json": 2}')
    monkeypatch.setattr(gguf, "CONVERTER_VERSION", gguf.CONVERTER_VERSION + 1)
    assert resolve(str(gguf_file), "float32") == str(folders[1])
    assert count["convert"] == 3
    kept = ["other-0123456789ab-float32", folders[1].name, "tiny-mine-float32"]
    assert names(cache) == sorted(kept)
    load(str(gguf_file), dtype="float32")
    assert count["convert"] == 3


def test_a_changed_file_replaces_its_conversions_and_no_others(cache, gguf_file, tmp_path):
    (tmp_path / "folder").mkdir()
    twin = tmp_path / "folder" / "tiny.gguf"
    write_gguf(tiny_model("llama", seed=2), twin)
    kept = [Path(resolve(str(twin), "float32"))]
    stale = [Path(resolve(str(gguf_file), dtype)) for dtype in ("float16", "float32")]
    write_gguf(tiny_model("llama", seed=1), gguf_file)
    kept += [Path(resolve(str(gguf_file), dtype)) for dtype in ("float32", "bfloat16")]
    assert names(cache) == sorted(folder.name for folder in kept)
    assert not {*stale} & {*kept}
    (tmp_path / "link.gguf").symlink_to(gguf_file)
    assert resolve(str(tmp_path / "link.gguf"), "float32").endswith("-float32")


def test_file_names_may_have_brackets(cache, gguf_file, tmp_path):
    file = gguf_file.rename(tmp_path / "tiny [Q8_0]*?.gguf")
    model, tokenizer = load(str(file), dtype="float32")
    assert tokenizer.encode("ab")
    tokens = mx.array([[1, 2, 3]])
    assert mx.allclose(model(tokens), tiny_model("llama")(tokens), atol=1e-4)


def test_an_interrupted_conversion_leaves_nothing(cache, gguf_file, monkeypatch):
    def interrupt(source, folder, dtype):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "convert", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve(str(gguf_file))
    assert names(cache) == []


@pytest.mark.slow
def test_several_processes_convert_once_and_wait(cache, gguf_file, start, tmp_path):
    first = start(gguf_file, tmp_path / "go")
    assert first.stdout.readline() == "converting\n"
    others = [start(gguf_file) for _ in range(2)]
    for process in others:
        assert process.stderr.readline().startswith("Waiting for another process to convert tiny-")
    (tmp_path / "go").touch()
    results = [process.communicate()[0] for process in (first, *others)]
    assert len({*results}) == 1  # none of the others printed that it converts
    assert names(cache) == [Path(results[0].strip()).name]


@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_after_the_next(cache, gguf_file, start, tmp_path):
    write_gguf(tiny_model("llama", seed=1), tmp_path / "other.gguf")
    killed = [start(file, tmp_path / "never") for file in (gguf_file, tmp_path / "other.gguf")]
    for process in killed:
        assert process.stdout.readline() == "converting\n"
    for process in killed:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(names(cache)) == 4  # a folder and a lock of each
    folder = Path(resolve(str(gguf_file), "float32"))
    assert names(cache) == [folder.name]


def test_the_built_in_model_is_checked_like_a_file(cache, gguf_file, count):
    def convert(digest):
        folder = converted_builtin("built-in", "float32", digest, lambda: gguf_file)
        assert folder == cache / "models" / "built-in-float32"
        return folder

    zero(convert("first digest"))
    convert("first digest")
    assert count["convert"] == 2
    convert("first digest")
    assert count["convert"] == 2
    convert("another digest")
    assert count["convert"] == 3
    (convert("another digest") / "glass_conversion.json").write_text('{"config.json": 2}')
    convert("another digest")
    assert count["convert"] == 4
    assert names(cache) == ["built-in-float32"]


def test_a_cache_that_cannot_be_written_is_checked_every_time(cache, gguf_file, count, monkeypatch):
    folder = Path(resolve(str(gguf_file), "float32"))
    os.utime(folder / "config.json")
    written = count["sha256"]

    def fail(*arguments):
        raise PermissionError("read-only")

    monkeypatch.setattr(conversions, "write_text", fail)
    for _ in range(2):
        assert resolve(str(gguf_file), "float32") == str(folder)
    assert count == {"convert": 1, "sha256": written + 2}
