import json

import pytest
import safetensors.torch
import torch

from triton_sparsity.bench.measure.shapes import SETS, Shape, matrices, parse_shapes, spell_shapes


def test_shapes_are_named_spelled_out_or_of_a_file(tmp_path):
    assert parse_shapes("llama3-8b", 7)[0] == (8192, 4096, 14336)
    assert parse_shapes("16x64x128, 1x2x3,16x64x128", 7) == ((16, 64, 128), (1, 2, 3))
    path = tmp_path / "model.safetensors"
    weights = {
        "layers.0.up": torch.ones(256, 64),
        "layers.1.up": torch.ones(256, 64, dtype=torch.bfloat16),
        "layers.0.down": torch.ones(64, 512),
        "convolution": torch.ones(64, 16, 3, 3),
        "norm": torch.ones(512),
        "embed_tokens.weight": torch.ones(1000, 64),
        "classes": torch.ones(10, 64),
        "steps": torch.ones(64, 64, dtype=torch.int64),
    }
    safetensors.torch.save_file(weights, path)
    assert parse_shapes(str(path), 9) == ((9, 512, 64), (9, 64, 256), (9, 144, 64))
    names = [name for name, _ in matrices(path)]
    assert names == ["convolution", "layers.0.down", "layers.0.up", "layers.1.up"]


@pytest.mark.parametrize(
    "text", ["", "huge", "16x64", "16x64x0", "16x64x128,", "-1x2x3", "axbxc", "1x2x3x4"]
)
def test_malformed_shapes_say_what_was_expected(text):
    with pytest.raises(ValueError, match=r"^shapes must be one of llama3-8b, vit-h, square, tiny"):
        parse_shapes(text, 1)


def test_a_file_must_be_there_and_have_weights(tmp_path):
    with pytest.raises(FileNotFoundError):
        parse_shapes(str(tmp_path / "none.safetensors"), 1)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no such format")
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        parse_shapes(str(damaged), 1)
    empty = tmp_path / "empty.safetensors"
    safetensors.torch.save_file({"norm": torch.ones(512)}, empty)
    with pytest.raises(ValueError, match="must hold a float weight of at least 64x64"):
        parse_shapes(str(empty), 1)


def test_shapes_are_spelled_as_they_are_parsed():
    for shapes in SETS.values():
        assert parse_shapes(spell_shapes(shapes), 1) == shapes
    assert spell_shapes((Shape(1, 2, 3),) * 2 + (Shape(4, 5, 6),)) == "2*1x2x3,4x5x6"


def test_a_folder_has_the_shapes_of_its_shards(tmp_path):
    one = {"layers.0.up": torch.ones(256, 64), "embed.weight": torch.ones(512, 64)}
    other = {"mlp.experts.gate_up_proj": torch.ones(3, 64, 128), "narrow": torch.ones(8, 64)}
    names = {}
    for number, weights in enumerate((one, other), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        safetensors.torch.save_file(weights, tmp_path / file)
        names |= dict.fromkeys(weights, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "gpt_oss"}')
    found = {name: matrix.shape for name, matrix in matrices(tmp_path)}
    assert found == {
        "layers.0.up": (256, 64),
        **{f"mlp.experts.gate_up_proj[{i}]": (128, 64) for i in range(3)},
    }
    assert parse_shapes(str(tmp_path), 9) == ((9, 64, 256), (9, 64, 128))
    # another family stores its experts as (experts, outputs, inputs)
    config.write_text('{"model_type": "mixtral"}')
    assert parse_shapes(str(tmp_path), 9) == ((9, 64, 256), (9, 128, 64))
    config.write_text('{"model_type": "gpt2"}')
    assert parse_shapes(str(tmp_path), 9)[0] == (9, 256, 64)


def test_a_folder_must_hold_what_its_index_names(tmp_path):
    with pytest.raises(ValueError, match=r"must hold a model as save_pretrained writes it"):
        parse_shapes(str(tmp_path), 1)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "a.safetensors"}}')
    with pytest.raises(FileNotFoundError):
        parse_shapes(str(tmp_path), 1)
    index.write_text("[]")
    with pytest.raises(ValueError, match=r"must be the index of a sharded model"):
        parse_shapes(str(tmp_path), 1)
