"""Models with multi-head latent attention: records in a packed cache, up-projections on the query and the output."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import characters, generated, left_padded, model, plain, prompt, words

from kvdsl.evaluation import Settings, evaluate
from kvdsl.hf import cache, use
from kvdsl.scheme import Bands, Float, Scheme, Shared, Store, per_token

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = dict(
    kv_lora_rank=64, q_lora_rank=None, qk_rope_head_dim=32, qk_nope_head_dim=16, v_head_dim=24, num_key_value_heads=4,
    first_k_dense_replace=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    moe_intermediate_size=32,
)  # fmt: skip
NUMBERS = Store(Float("fp32"))
EXACT = Scheme(keys=Store(Bands((NUMBERS, NUMBERS), channels=(64, 32))), values=Store(Shared()))
PACKED = EXACT.with_(stores=(Store(Float("e4m3"), scale=per_token(channels=32, dtype="fp32")), Store()))


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2"])
def test_exact_records_give_the_library_s_tokens(family: str) -> None:
    """A first prompt is expanded as the library does, padded ones and all steps meet the records themselves."""
    network = model(family, **SIZES)
    (ids, mask), one = left_padded(), prompt(2)
    for given, options in (((one, None), {}), ((ids, mask), dict(num_beams=2))):
        want = generated(plain(network), given[0], mask=given[1], **options)
        packed = cache(EXACT, network)
        assert torch.equal(generated(network, given[0], packed, given[1], **options), want)
        assert packed.stats()["fallbacks"] == packed.stats()["dense_calls"] == 0
    plain(network)


def test_a_model_is_given_back_as_it_was() -> None:
    network = plain(model("deepseek_v3", **SIZES))
    want = generated(network, prompt())
    with use(network, PACKED) as used:
        network.generate(prompt(), max_new_tokens=4, min_new_tokens=4)
        assert used.cache is not None and used.cache.stats()["packed_calls"] == 2 * 3
    assert not any("expand_kv" in vars(layer.self_attn) for layer in network.model.layers)
    assert torch.equal(generated(network, prompt()), want)


def test_a_scheme_that_does_not_fit_the_model_is_refused() -> None:
    network = model("deepseek_v3", **SIZES)
    with pytest.raises(ValueError, match="caches a record of 96 numbers a token.*shared values, as mla_fp8"):
        cache("kivi2", network)
    with pytest.raises(ValueError, match="no latent that is key and value at once"):
        cache(EXACT, model("llama"))
    with pytest.raises(ValueError, match="are 576 together, and head_dim is 96"):
        cache("mla_fp8", network)
    with pytest.raises(ValueError, match="static: layer 0 keeps latents"):
        cache(EXACT, network, static=True, capacity=64)


def test_quality_is_measured_of_records() -> None:
    """Exact ones lose nothing, 8 bits a little, and bytes add up; what compares keys and values is refused."""
    network = plain(model("deepseek_v3", **SIZES))
    asked, loaded = Settings(tasks=("perplexity",), windows=1, context=40, score=4, chunk=2), (network, characters())
    found = evaluate({"exact": EXACT, "packed": PACKED}, loaded, text=words(40), settings=asked).results
    exact, packed = (one.tasks.perplexity for one in found)
    assert exact and packed and abs(exact.kl) < 1e-6 < packed.kl < 0.1
    assert found[1].storage
    size = found[1].storage.sizes[-1]  # two layers; a token has codes of 64 bytes and 32 numbers in float16
    assert size.parts.code == size.tokens * 2 * (64 + 32 * 2)
    assert not any("expand_kv" in vars(layer.self_attn) for layer in network.model.layers)
    with pytest.raises(ValueError, match="tasks: layers compares keys and values, and this model caches latents"):
        evaluate([PACKED], loaded, text=words(40), settings=replace(asked, tasks=("layers",)))
