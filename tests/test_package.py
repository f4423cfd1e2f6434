"""What is built from a clone is complete and works elsewhere."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXPECTED = {
    "glass_mlx/generate.py",
    "glass_mlx/models/__init__.py",
    "glass_mlx/models/ffn.py",
    "glass_mlx/priors/SmolLM2-135M-Instruct.safetensors",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_sdist_is_complete(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert names >= EXPECTED


def test_the_wheel_is_complete_and_has_one_top_level_package(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        names = set(archive.namelist())
    assert names >= EXPECTED
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"glass_mlx"}


def test_the_wheel_works_outside_the_clone(built, tmp_path):
    wheel = next(built.glob("*.whl"))
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
    subprocess.run([*install, str(tmp_path), str(wheel)], check=True, capture_output=True)
    code = (
        "import glass_mlx.models, glass_mlx.prior.file as p\n"
        "print(glass_mlx.__file__)\n"
        "print([p.GlobalPrior.load(f).about['model'] for f in p.prior_files(p.packaged_priors())])"
    )
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path),
        "GLASS_MLX_CACHE": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    where, priors = done.stdout.splitlines()
    assert where == str(tmp_path / "glass_mlx/__init__.py")
    assert priors == "['SmolLM2-135M-Instruct']"
