"""Damaged files of a model's folder are refused before other libraries read them."""

import json

from glass_mlx import load
from glass_mlx.checkpoints.folder import check_folder
from helpers import save_tiny_folder

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    return save_tiny_folder(tmp_path / "tiny")


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_whole_folder_passes_quantized_or_not(folder, tmp_path):
    check_folder(folder)
    for options in ({"bits": 4, "group_size": 32}, {"bits": 4, "group_size": 32, "mode": "mxfp4"}):
        check_folder(save_tiny_folder(tmp_path / options.get("mode", "affine"), **options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": ...}, "does not state a model_type"),
        ({"model_type": 3}, "does not state a model_type"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000, more than the .* tensors"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "more than the .* tensors"),
        ({"intermediate_size": 1, "quantization": {}}, "intermediate_size 1, less than a quantiz"),
        ({"rope_theta": 2**63}, "rope_theta 9223372036854775808, not a positive number"),
        ({"rope_theta": -1}, "rope_theta -1, not a positive number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps 'small', not a positive number"),
        ({"rope_theta": float("nan")}, "rope_theta nan, not a positive number"),
        ({"eos_token_id": [[2]]}, r"eos_token_id \[\[2\]\], not integers"),
        ({"eos_token_id": 1.5}, "eos_token_id 1.5, not integers"),
        ({"intermediate_size": ...}, "its configuration lacks 'intermediate_size'"),
    ],
)
def test_a_damaged_configuration_is_refused(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"[1]", "is not a JSON object"),
        (b"[" * 100000, "is nested too deeply"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8 text"),
    ],
)
def test_a_file_that_is_not_json_is_refused(folder, content, message):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"config.json {message}"):
        load(str(folder))


def test_damaged_weights_are_refused(folder):
    content = (folder / WEIGHTS).read_bytes()
    for length in (5, 100, len(content) - 1):
        (folder / WEIGHTS).write_bytes(content[:length])
        with pytest.raises(ValueError, match="is not a complete safetensors file"):
            load(str(folder))


def test_weights_of_integers_are_refused(folder):
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].view(np.uint32)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"the weights {name} in .* have the data type U32"):
        load(str(folder))


def test_a_folder_without_a_configuration_is_not_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no config\.json in"):
        load(str(tmp_path))
