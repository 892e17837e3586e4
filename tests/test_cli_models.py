"""`kvdsl generate` and `kvdsl calibrate` on a tiny model in a folder, the way a user's model comes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvdsl.codegen.cli import run

Captured = pytest.CaptureFixture[str]
TEXT = "The cache of a model holds keys and values; " * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with random weights whose tokens are the printable characters."""
    path = tmp_path_factory.mktemp("model")
    core = Tokenizer(
        models.WordLevel({chr(32 + i): i for i in range(95)} | {"[PAD]": 95, "[END]": 96}, unk_token="[PAD]")
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tiny.model("llama").save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", eos_token="[END]").save_pretrained(path)  # type: ignore[no-untyped-call]
    return str(path)


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
    assert said.startswith("kvdsl: params: numbers of this scheme are calibrated") and said.count("\n") == 1
