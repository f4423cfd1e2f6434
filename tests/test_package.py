"""The sdist and the wheel are complete, and the wheel works outside the clone."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXPECTED = {
    "glass_mlx/py.typed",
    "glass_mlx/generate/__main__.py",
    "glass_mlx/calibration/building.py",
    "glass_mlx/fidelity/test_prompts.txt",
    "glass_mlx/models/__init__.py",
    "glass_mlx/models/ffn.py",
    "glass_mlx/server/page.html",
    "glass_mlx/priors/SmolLM2-135M-Instruct.safetensors",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """Build the sdist, and the wheel from it; return their folder."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_the_sdist_is_complete(distributions):
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert names >= EXPECTED


def test_the_wheel_is_complete_and_has_one_top_level_package(distributions):
    with zipfile.ZipFile(next(distributions.glob("*.whl"))) as archive:
        names = set(archive.namelist())
    assert names >= EXPECTED
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"glass_mlx"}


def test_the_wheel_works_outside_the_clone(distributions, tmp_path):
    wheel = next(distributions.glob("*.whl"))
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
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    location, priors = result.stdout.splitlines()
    assert location == str(tmp_path / "glass_mlx/__init__.py")
    assert priors == "['SmolLM2-135M-Instruct']"
