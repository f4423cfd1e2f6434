"""Atomic writes, locks, leftovers of killed processes, and the cache folder."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

from glass_mlx import files
from glass_mlx.files import (
    LockedError,
    cache_folder,
    check_writable,
    discard,
    is_locked,
    locked,
    read_tensors,
    replacing,
    write_tensors,
    write_text,
)

import numpy as np
import pytest

# Starts a write and waits, as if it were slow.
WRITER = """
import sys, time
from pathlib import Path
from glass_mlx.files import locked, replacing
target = Path(sys.argv[1])
with locked(target), replacing(target, folder=True) as temporary:
    (temporary / "half").write_text("half a file")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path):
    """Return a function that starts a slow writer of a folder; all are killed at the end."""
    processes = []

    def start(target):
        command = [sys.executable, "-c", WRITER, str(target)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "writing\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("~/cache", Path.home() / "cache"),
        ("~nobody-has-this-name/x", Path("~nobody-has-this-name/x")),
        ("relative", Path("relative")),
    ],
)
def test_the_cache_folder_may_start_with_a_tilde(monkeypatch, value, expected):
    monkeypatch.setenv("GLASS_MLX_CACHE", value)
    assert cache_folder() == expected
    monkeypatch.setenv("GLASS_MLX_CACHE", "")
    assert cache_folder().name == "glass-mlx"


@pytest.mark.parametrize("name", ["a [v2]*.txt", "mode", "writer.lock", "new", "ünïcode 丁"])
def test_a_file_with_any_name_is_replaced_and_kept_after_an_error(tmp_path, name):
    file = tmp_path / "deep" / name
    write_text(file, "λ")
    with pytest.raises(KeyboardInterrupt), replacing(file) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text(encoding="utf-8") == "λ"
    assert list(file.parent.iterdir()) == [file]


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    target, link = tmp_path / "files" / "target", tmp_path / "link"
    write_text(target, "old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    dangling = tmp_path / "dangling"
    dangling.symlink_to("files/later")
    write_text(dangling, "later")
    assert dangling.is_symlink()
    assert (tmp_path / "files" / "later").read_text() == "later"
    with replacing(tmp_path / "to-folder", folder=True) as temporary:
        (temporary / "a").touch()
    (tmp_path / "folder-link").symlink_to("to-folder")
    with replacing(tmp_path / "folder-link", folder=True) as temporary:
        (temporary / "b").touch()
    assert (tmp_path / "folder-link").is_symlink()
    assert [f.name for f in (tmp_path / "to-folder").iterdir()] == ["b"]


def test_devices_and_pipes_are_written_to_and_stay(tmp_path):
    assert files.is_device(Path("/dev/null"))
    with locked(Path("/dev/null")):
        write_text(Path("/dev/null"), "nothing")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert not list(Path("/dev").glob(".null*"))
    with pytest.raises(OSError, match="space"):
        write_text(Path("/dev/full"), "something")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    write_tensors(pipe, {"a": np.ones(3, np.float32)}, "kind", "about")
    reader.join()
    (tmp_path / "copy").write_bytes(received[0])
    assert read_tensors(tmp_path / "copy", "kind")[1] == "about"
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_folders_and_files_are_not_exchanged(tmp_path):
    (tmp_path / "file").write_text("content")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write_text(tmp_path, "x")
    with (
        pytest.raises(NotADirectoryError, match="is not a folder"),
        replacing(tmp_path / "file", folder=True),
    ):
        pass
    with (
        pytest.raises(NotADirectoryError, match="is not a folder"),
        replacing(Path("/dev/null"), folder=True),
    ):
        pass
    assert (tmp_path / "file").read_text() == "content"


@pytest.mark.parametrize(("umask", "old", "new"), [(0o77, None, 0o600), (0o22, 0o600, 0o600)])
def test_files_are_as_private_as_the_umask_and_the_old_file(tmp_path, umask, old, new):
    file = tmp_path / "file"
    if old is not None:
        file.touch()
        file.chmod(old)
    before = os.umask(umask)
    try:
        with replacing(file) as temporary:
            temporary.touch()
            temporary.chmod(0o644)  # as writers do that ignore the umask
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == new


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_folder_is_replaced_and_the_old_one_survives_errors(tmp_path, monkeypatch, in_one_step):
    if not in_one_step:  # a file system that cannot exchange folders
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    folder = tmp_path / "folder"

    def write(content):
        with replacing(folder, folder=True) as temporary:
            (temporary / content).touch()

    write("first")
    write("second")
    assert [f.name for f in folder.iterdir()] == ["second"]
    rename = Path.rename

    def fail_at_the_last_step(path, target):
        if Path(target) == folder and path.suffix != ".old":
            raise OSError("no space")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_at_the_last_step)
    if in_one_step:
        write("third")  # which renames nothing in between
        assert [f.name for f in folder.iterdir()] == ["third"]
    else:
        with pytest.raises(OSError, match="no space"):
            write("third")
        assert [f.name for f in folder.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [folder]
    discard(folder)
    discard(folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_writers_files_are_removed_and_a_living_ones_are_kept(tmp_path, writer):
    killed, alive = writer(tmp_path / "killed [1]"), writer(tmp_path / "alive")
    (tmp_path / ".hidden.glass").mkdir()
    kill(killed)
    assert len(list(tmp_path.glob(".killed*"))) == 2  # a folder and a lock
    assert not (tmp_path / "killed [1]").exists()
    write_text(tmp_path / "another", "file")
    assert not list(tmp_path.glob(".killed*"))
    assert len(list(tmp_path.glob(".alive.glass*"))) == 2
    assert is_locked(tmp_path / "alive")
    with pytest.raises(LockedError, match="another run is writing"), locked(tmp_path / "alive"):
        pass
    kill(alive)
    with locked(tmp_path / "alive"):
        assert not list(tmp_path.glob(".alive.glass-*"))
    assert {f.name for f in tmp_path.iterdir()} == {"another", ".hidden.glass"}


@pytest.mark.slow
def test_a_second_writer_waits_if_it_is_told_to(tmp_path, writer, capsys):
    first = writer(tmp_path / "folder")
    timer = threading.Timer(0.2, kill, [first])
    timer.start()
    with locked(tmp_path / "folder", waiting="Waiting for the other one"):
        assert first.poll() is not None
    assert capsys.readouterr().err == "Waiting for the other one\n"
    timer.join()


@pytest.mark.parametrize("path", ["/dev/null", "pipe"])
def test_what_is_not_a_regular_file_is_not_read(tmp_path, path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a regular file"):
        read_tensors(tmp_path / path, "kind")
    with pytest.raises(ValueError, match="is not a regular file"):
        files.read_about(tmp_path / path, "kind")


def test_metadata_is_json(tmp_path):
    write_tensors(tmp_path / "a", {"x": np.zeros(2, np.float32)}, "kind", {"b": 1, "a": 2})
    write_tensors(tmp_path / "b", {"x": np.zeros(2, np.float32)}, "kind", {"a": 2, "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert json.dumps(read_tensors(tmp_path / "a", "kind")[1]) == '{"a": 2, "b": 1}'


def test_files_that_cannot_be_written_are_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for target in (None, tmp_path / "a", tmp_path / "b/c/d", tmp_path / "file", Path("/dev/null")):
        check_writable(target)
    for folder in (tmp_path, tmp_path / "a/b"):
        check_writable(folder, folder=True)
    for target, is_folder, reason in (
        (tmp_path, False, "is a folder; give the name of a file"),
        (tmp_path / "file/a", False, "file/a cannot be written in .*file; give another name"),
        (tmp_path / "file", True, "file cannot be written in .*file; give another name"),
        (tmp_path / "file/a", True, "cannot be written"),
        (Path("/dev/null"), True, "/dev/null cannot be written in /dev/null"),
        (tmp_path / ("x" * 300), False, "File name too long"),
    ):
        with pytest.raises(OSError, match=reason):
            check_writable(target, folder=is_folder)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OSError, match="a cannot be written in"):
        check_writable(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
