"""The small real model through the packed cache: equal tokens when nothing is lost, little loss where papers say so."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import FP32

from kvdsl import calibrate, generation
from kvdsl.hf import completed, observed, weighed
from kvdsl.models import load, text
from kvdsl.params import ROPE
from kvdsl.registry import load as scheme_of

pytestmark = pytest.mark.usefixtures("one_thread")
INT4 = scheme_of("int4_token_head")
SCHEMES = {
    "int8": scheme_of("int8_token_head"),
    "int4": INT4,
    "int2": INT4.with_(bits=2),
    "kivi4": scheme_of("kivi4"),
    "kivi2": scheme_of("kivi2"),
}


@pytest.fixture(scope="module")
def smol() -> tuple[Any, Any]:
    return load("smollm2")


@pytest.fixture(scope="module")
def measured(smol: tuple[Any, Any]) -> dict[str, dict[str, Any]]:
    novel = text.botchan()
    return {name: generation.perplexity(*smol, novel, scheme) for name, scheme in SCHEMES.items()}


def test_exact_scheme_gives_200_equal_tokens(smol: tuple[Any, Any]) -> None:
    said = generation.generate(FP32, smol, text.botchan()[:600], tokens=200)
    assert said["text"] == said["baseline_text"] and said["agreement"] == 1.0
    assert said["tokens"] == said["baseline_tokens"] > 300
    stats = said["stats"]
    assert stats["fallbacks"] == 0 and stats["fresh_calls"] == 30 and stats["packed_calls"] == 30 * 199


def test_a_named_scheme_in_two_bits(smol: tuple[Any, Any]) -> None:
    prompt = text.botchan()[:4000]
    said = generation.generate("kivi2", smol, prompt, tokens=24)
    assert said["scheme"] == "kivi2"
    assert 0 <= said["agreement"] <= 1 and said["same_tokens"] <= 24
    assert said["text"] and said["baseline_text"]
    assert said["baseline_bytes"] == said["baseline_tokens"] * 2 * 23_040
    assert said["cache_bytes"] == said["stats"]["bytes"] < said["baseline_bytes"] / 2
    assert said["stats"]["fallbacks"] == 0


@pytest.mark.parametrize("name", ["quarot4", "turboquant_prod3", "vllm_3bit_nc", "kvtq_2bit", "mxfp4", "iq4_nl"])
def test_every_kind_of_scheme_is_read_from_its_pages(name: str, smol: tuple[Any, Any]) -> None:
    said = generation.generate(name, smol, text.botchan()[:300], tokens=4)
    stats = said["stats"]
    assert (stats["fallbacks"], stats["fresh_calls"] + stats["packed_calls"], stats["dense_calls"]) == (0, 30 * 4, 0)
    assert said["tokens"] > 60 and said["text"]


def test_keys_are_balanced_on_the_real_model(smol: tuple[Any, Any]) -> None:
    """Keys after their rotation, with the queries that meet them: int8 then loses next to nothing."""
    network, tokenizer = smol
    ids = tokenizer(text.botchan()[5000:5800], add_special_tokens=False, return_tensors="pt")["input_ids"]
    scheme = scheme_of("smoothquant8")
    params = {
        f"layers.{index}.{name}": numbers
        for index, layer in enumerate(observed(network, ids))
        for name, numbers in calibrate(scheme, *layer).items()
    }
    assert len(params) == 30
    assert all((numbers > 0).all() for numbers in params.values())
    found = generation.perplexity(*smol, text.botchan(), scheme, context=128, score=16, params=params)
    assert found["kl"] < 0.005 and found["stats"]["fallbacks"] == 0


def test_tables_weighed_by_the_loss_lose_less_of_the_real_model(smol: tuple[Any, Any]) -> None:
    """KVQuant at two bits, measured on another place of the text: half the divergence of tables of plain distances."""
    network, tokenizer = smol
    ids = tokenizer(text.botchan()[5000:5800], add_special_tokens=False, return_tensors="pt")["input_ids"]
    layers, found = weighed(network, ids), list[float]()
    for scheme in (scheme_of("nuq2"), scheme_of("nuq2").with_(weights=None)):
        rope = completed(scheme, network, None)
        params = dict(rope)
        for index, (keys, values, queries, gradients) in enumerate(layers):
            own = {ROPE: rope[f"layers.{index}.{ROPE}"]}
            numbers = calibrate(scheme, keys, values, queries, params=own, gradients=gradients)
            params |= {f"layers.{index}.{name}": tensor for name, tensor in numbers.items()}
        found.append(generation.perplexity(*smol, text.botchan(), scheme, context=128, score=32, params=params)["kl"])
    assert found[0] < 0.6 * found[1]


def test_full_precision_is_the_model_s_own(measured: dict[str, dict[str, Any]]) -> None:
    assert len({round(found["baseline_perplexity"], 6) for found in measured.values()}) == 1
    assert 5 < measured["int8"]["baseline_perplexity"] < 100
    assert all(found["scored"] == 64 and found["stats"]["fallbacks"] == 0 for found in measured.values())


def test_losses_are_in_the_published_order(measured: dict[str, dict[str, Any]]) -> None:
    kl = {name: found["kl"] for name, found in measured.items()}
    assert kl["int8"] < 0.005
    assert kl["int8"] < kl["int4"] < 0.1
    assert kl["kivi4"] < kl["int4"] / 1.5
    assert kl["kivi4"] < kl["kivi2"] < 0.4
    assert kl["int2"] > 4 * kl["kivi2"]
    assert measured["int2"]["perplexity"] > 1.5 * measured["int2"]["baseline_perplexity"]
    assert measured["kivi2"]["perplexity"] < 1.3 * measured["kivi2"]["baseline_perplexity"]
    assert measured["int8"]["top1"] > 0.95 > measured["int2"]["top1"]


def test_a_short_text_is_refused(smol: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="text: .* tokens; context=384 and score=64 take 449"):
        generation.perplexity(*smol, "too short", FP32)
