"""Packing results for docs/data."""

import json
from pathlib import Path

import pack_results

import pytest

DATA = Path(__file__).resolve().parents[2] / "docs" / "data"


def test_long_descriptions_and_folders_are_left_out(tmp_path, run_command):
    row = {
        "method": "default",
        "kl": 0.1,
        "prior": {"model": "m", "tokens": 9, "stability": [0] * 1000},
        "arguments": {
            "json": "/home/user/out.jsonl",
            "files": ["/tmp/a"],
            "seed": "0",
            "model": "org/name",
        },
    }
    other = {"method": "3 bits", "kl": 1.0}
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in (row, other)))
    out = tmp_path / "out.jsonl"
    options = [tmp_path / "in.jsonl", "--output", out, "--leave-out", "3 bits"]
    assert run_command(pack_results.main, *options)[0] == 0
    (packed,) = map(json.loads, out.read_text().splitlines())
    assert packed == row | {
        "prior": {"model": "m", "tokens": 9},
        "arguments": {"json": "out.jsonl", "files": ["a"], "seed": "0", "model": "org/name"},
    }
    (tmp_path / "in.jsonl").write_text("[]\n")
    code, _, err = run_command(pack_results.main, *options)
    assert (code, err.count("\n")) == (2, 1)
    assert "line 1 of" in err


@pytest.mark.parametrize("file", sorted(DATA.glob("*.jsonl")), ids=lambda file: file.name)
def test_published_data_are_packed_and_listed(file):
    text = file.read_text()
    assert f"`{file.name}`" in (DATA / "README.md").read_text()
    for line in text.splitlines():
        row = json.loads(line)
        assert pack_results.packed(row) == row
        assert row.get("about", row)["versions"]["mlx"]  # tasks describe a run apart
    assert "/tmp" not in text
    assert "/home" not in text
