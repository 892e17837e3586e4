"""`kvdsl generate` and `kvdsl calibrate` on a tiny model in a folder, the way a user's model comes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from kvdsl import Shape, calibrate, load
from kvdsl.codegen.cli import run
from kvdsl.hf import observed
from kvdsl.params import wanted

Captured = pytest.CaptureFixture[str]
TEXT = "The cache of a model holds keys and values; " * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with random weights whose tokens are the printable characters."""
    return tiny.saved("llama", tmp_path_factory.mktemp("model"))


def document(captured: Captured, *arguments: str) -> Any:
    assert run([*arguments, "--json"]) == 0
    return json.loads(captured.readouterr().out)


def test_generate_gives_both_texts_and_what_they_took(folder: str, capsys: Captured) -> None:
    capsys.readouterr()
    found = document(capsys, "generate", "int8_token_head", "--model", folder, "--prompt", TEXT, "--tokens", "8")
    assert found["scheme"] == "int8_token_head" and 0 <= found["agreement"] <= 1
    assert {"text", "baseline_text", "cache_bytes", "baseline_bytes"} <= found.keys()
    assert found["baseline_bytes"] == found["baseline_tokens"] * 2 * 2 * 2 * 32 * 4
    assert run(["generate", "int8_token_head", "--model", folder, "--prompt", TEXT, "--tokens", "2"]) == 0
    assert "full precision:" in capsys.readouterr().out


def test_calibrated_numbers_go_from_one_command_to_the_other(folder: str, tmp_path: Path, capsys: Captured) -> None:
    capsys.readouterr()
    text, out = tmp_path / "text.txt", tmp_path / "scales.safetensors"
    text.write_text(TEXT)
    found = document(capsys, "calibrate", "int8_tensor", "--model", folder, "--text", str(text), "--out", str(out))
    assert (found["layers"], found["tensors"], found["tokens"]) == (2, 4, len(TEXT))
    numbers = load_file(out)
    assert sorted(numbers) == [f"layers.{i}.{side}.scale" for i in range(2) for side in ("keys", "values")]
    assert all(x.shape == (1, 1) and x.dtype == torch.float32 and x.item() > 0 for x in numbers.values())

    asked = ["--model", folder, "--file", str(text), "--tokens", "4", "--params", str(out)]
    assert document(capsys, "generate", "int8_tensor", *asked)["stats"]["fallbacks"] == 0
    assert run(["generate", "kivi2", *asked]) == 2
    assert "belongs to scheme" in capsys.readouterr().err


def test_a_calibrated_scheme_without_its_numbers_is_refused(folder: str, capsys: Captured) -> None:
    capsys.readouterr()
    assert run(["generate", "int8_tensor", "--model", folder, "--prompt", TEXT]) == 2
    said = capsys.readouterr().err
    assert said.startswith("kvdsl: params: numbers of this scheme are calibrated; give --params F")
    assert said.count("\n") == 1
    assert f"`kvdsl calibrate int8_tensor --model {folder} --text FILE --out F`" in said


@pytest.mark.parametrize("name", ["smoothquant8", "omniquant4", "nvfp4", "fp8_tensor", "nuq3"])
def test_what_a_scheme_takes_from_data_is_measured(name: str, folder: str, tmp_path: Path, capsys: Captured) -> None:
    capsys.readouterr()
    text, out = tmp_path / "text.txt", tmp_path / "numbers.safetensors"
    text.write_text(TEXT)
    document(capsys, "calibrate", name, "--model", folder, "--text", str(text), "--out", str(out))
    right = {f"layers.{i}.{key}": size for i in range(2) for key, size in wanted(load(name), Shape(32, 2)).items()}
    assert {key: tuple(x.shape) for key, x in load_file(out).items()} == right
    asked = ["--model", folder, "--prompt", TEXT, "--tokens", "3", "--params", str(out)]
    assert document(capsys, "generate", name, *asked)["stats"]["fallbacks"] == 0


def test_keys_are_balanced_against_the_queries_that_read_them() -> None:
    """The queries observed are those of the attention: with the keys they give the model's own weights."""
    network, ids = tiny.plain(tiny.model("llama")), tiny.prompt(1, 13)
    layers = observed(network, ids)
    assert network.config._attn_implementation == "eager" and len(layers) == 2
    weights = network(input_ids=ids, output_attentions=True).attentions
    for (keys, _, queries), right in zip(layers, weights, strict=True):
        assert queries is not None and queries.shape == (1, 4, 13, 32) and keys.shape == (1, 2, 13, 32)
        scores = queries @ keys.repeat_interleave(2, 1).mT * 32**-0.5
        hidden = torch.ones(13, 13, dtype=torch.bool).triu(1)
        assert torch.allclose(scores.masked_fill(hidden, -torch.inf).softmax(-1), right, atol=1e-5)
    scheme = load("smoothquant8")
    keys, values, queries = layers[0]
    assert queries is not None
    size = keys.abs().amax((0, 2)) / queries.unflatten(1, (2, 2)).abs().amax((0, 2, 3))
    assert torch.allclose(calibrate(scheme, keys, values, queries)["keys.transform[0]"], size.sqrt())


def test_a_scheme_that_takes_nothing_from_data_says_so(folder: str, tmp_path: Path, capsys: Captured) -> None:
    capsys.readouterr()
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    out = str(tmp_path / "none.safetensors")
    assert run(["calibrate", "quarot4", "--model", folder, "--text", str(text), "--out", out]) == 2
    assert "it takes no number from data; there is nothing to calibrate" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, told",
    [
        ("bitdecoding4", "groups of 128 channels do not divide head_dim 32; use 32 or ALL"),
        ("vllm_3bit_nc", "of 2 layers this is layer 0, which is listed as -2, too"),
    ],
)
def test_a_scheme_that_does_not_fit_the_model_is_refused(name: str, told: str, folder: str, capsys: Captured) -> None:
    capsys.readouterr()
    assert run(["generate", name, "--model", folder, "--prompt", TEXT]) == 2
    assert told in capsys.readouterr().err
