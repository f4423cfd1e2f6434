"""A fixture that keeps tests out of the user's cache."""

from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the cache folder of one test."""
    monkeypatch.setenv("GLASS_MLX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
