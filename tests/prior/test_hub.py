"""Publishing and fetching priors, tested with a small local hub."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import glass_mlx.prior.hub as hub
from glass_mlx.models.architectures import tiny_model
from glass_mlx.prior.file import FILE_NAME, GlobalPrior
from glass_mlx.prior.hub import locate, model_card
from helpers import made_prior, save_tiny_folder

import pytest

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """The endpoints of the hub for fetching and publishing small files."""

    files: dict[str, bytes]

    def log_message(self, *_):
        pass

    def answer(self, content=b"", code=200, **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        if self.path.startswith("/api/"):
            self.answer(json.dumps({"id": "me/prior", "sha": COMMIT, "siblings": []}).encode())
            return
        content = self.files.get(self.path.rpartition("/")[2])
        if content is None or not self.path.startswith("/me/prior/resolve/"):
            self.answer(code=404, X_Error_Code="RepoNotFound")
        else:
            self.answer(content, ETag='"1"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            self.answer(json.dumps({"files": modes}).encode())
            return
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
        url = f"http://{self.headers['Host']}/me/prior"
        self.answer(json.dumps({"url": url, "commitUrl": url, "commitOid": COMMIT}).encode())


@pytest.fixture
def server():
    handler = type("Hub", (Hub,), {"files": {}})
    http_server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    yield SimpleNamespace(
        address=f"http://127.0.0.1:{http_server.server_port}", files=handler.files
    )
    http_server.shutdown()
    http_server.server_close()


def run(server, tmp_path, module, *arguments):
    environment = os.environ | {
        "HF_ENDPOINT": server.address,
        "HF_HOME": str(tmp_path / "huggingface"),
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", f"glass_mlx.{module}", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )


@pytest.mark.slow
def test_a_prior_can_be_published_with_its_card_and_fetched(server, tmp_path):
    folder = save_tiny_folder(tmp_path / "tiny")
    file = tmp_path / "measured.safetensors"
    made_prior(tiny_model("llama")).save(file)
    result = run(server, tmp_path, "calibrate", "--show", file, "--push-to-hub", "me/prior")
    assert result.returncode == 0, result.stderr
    assert f"Published at {server.address}/me/prior" in result.stdout
    assert server.files[FILE_NAME] == file.read_bytes()
    card = server.files["README.md"].decode()
    assert "--prior hub:me/prior" in card
    assert "model       tiny" in card

    arguments = ("--model", folder, "-p", "丁七丄", "-m", 3)
    result = run(server, tmp_path, "generate", *arguments, "--prior", "hub:me/prior")
    assert result.returncode == 0, result.stderr
    assert FILE_NAME in result.stdout

    result = run(server, tmp_path, "calibrate", "--show", "hub:me/prior")
    assert result.returncode == 0, result.stderr
    assert "model       tiny" in result.stdout
    assert (tmp_path / "glass_prior.png").is_file()


@pytest.mark.slow
def test_a_readme_of_somebody_else_is_kept(server, tmp_path):
    file = tmp_path / "measured.safetensors"
    made_prior(tiny_model("llama")).save(file)
    arguments = ("--show", file, "--push-to-hub", "me/prior")
    server.files["README.md"] = b"# Mine"
    result = run(server, tmp_path, "calibrate", *arguments)
    assert result.returncode == 0, result.stderr
    assert "; the README.md there was kept" in result.stdout
    assert server.files == {"README.md": b"# Mine", FILE_NAME: file.read_bytes()}

    server.files["README.md"] = b"# GLASS prior of an older model"
    (tmp_path / "again").mkdir()  # with another hub cache, which knows nothing of the first card
    result = run(server, tmp_path / "again", "calibrate", *arguments)
    assert "kept" not in result.stdout
    assert b"--prior hub:me/prior" in server.files["README.md"]


@pytest.mark.slow
def test_a_missing_prior_is_reported_in_one_sentence(server, tmp_path):
    folder = save_tiny_folder(tmp_path / "tiny")
    for name in ("hub:me/other", "hub:not a name", "hub:me/prior@main"):
        result = run(server, tmp_path, "generate", "--model", folder, "--prior", name)
        assert result.returncode == 2
        last = result.stderr.splitlines()[-1]
        assert last.startswith(f"glass-mlx: error: {FILE_NAME} cannot be fetched from {name}: ")
        assert "Traceback" not in result.stderr


def test_a_failed_upload_is_reported_in_one_sentence(tmp_path, monkeypatch):
    class Api:
        def create_repo(self, *_, **__):
            raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(hub, "HfApi", Api)
    file = tmp_path / "prior"
    made_prior(tiny_model("llama")).save(file)
    with pytest.raises(ValueError, match="cannot be published to me/prior: no network"):
        hub.publish(GlobalPrior.load(file), file, "me/prior")


def test_a_path_is_not_fetched():
    assert locate("a/b.safetensors") == Path("a/b.safetensors")
    assert locate("~/b") == Path.home() / "b"
    assert locate("~no-such-user/b") == Path("~no-such-user/b")


def test_the_card_names_the_base_model_if_it_is_on_the_hub():
    prior = made_prior(tiny_model("llama"))
    assert "base_model" not in model_card(prior, "me/prior").content
    prior.about["model"] = "mlx-community/Llama-3.2-3B-Instruct-4bit"
    card = model_card(prior, "me/prior")
    assert card.data.base_model == prior.about["model"]
    assert "--model mlx-community/Llama-3.2-3B-Instruct-4bit --prior hub:me/prior" in card.content
