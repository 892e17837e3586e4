"""The transformers cache: every way to decode, on every kind of attention, against the library and the definitions."""

from __future__ import annotations

import copy
import pickle
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import FAMILIES, FP32, generated, left_padded, model, plain, prompt
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

import kvdsl.hf
from kvdsl.errors import CacheError, ShapeError
from kvdsl.hf import attention as attention_module
from kvdsl.hf import cache, use
from kvdsl.hf.handle import Handle
from kvdsl.hf.layer import PackedLayer, Step
from kvdsl.hf.masks import padding_of
from kvdsl.reference import Stream
from kvdsl.scheme import Recent, Scheme, Sinks, Store, Uniform, per_channel, per_token

pytestmark = pytest.mark.usefixtures("one_thread")
CHANNELS = Scheme(
    keys=Store(Uniform(2), scale=per_channel(tokens=8)),
    values=Store(Uniform(2), scale=per_token(channels=16)),
    recent=Recent(8),
)
TOKENS = Scheme(both=Store(Uniform(4), scale=per_token()), sinks=Sinks(2), prefill="stored")
SCHEMES = {"channels": CHANNELS, "tokens": TOKENS, "mixed": FP32.with_(layers={0: CHANNELS, -1: TOKENS})}


@pytest.fixture(autouse=True)
def no_fallback_unsaid() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="kvdsl")
        yield


def modes() -> dict[str, tuple[Tensor, Tensor | None, dict[str, Any]]]:
    one, (ids, mask) = prompt(), left_padded()
    return {
        "greedy": (one, None, {}),
        "padded": (ids, mask, {}),
        "beam": (ids, mask, dict(num_beams=3)),
        "sampled": (one, None, dict(do_sample=True, num_return_sequences=3)),
        "lookup": (one.repeat(1, 3), None, dict(prompt_lookup_num_tokens=4)),
        "assisted": (one, None, dict(assistant_model=True)),
        "chunked": (one, None, dict(prefill_chunk_size=5)),
        "chunked padded": (ids, mask, dict(prefill_chunk_size=5)),
    }


@pytest.mark.parametrize("mode", modes())
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_scheme_gives_the_library_s_tokens(family: str, mode: str) -> None:
    network = plain(model(family))
    ids, mask, options = modes()[mode]
    if "assistant_model" in options:
        options = dict(assistant_model=plain(model(family, num_hidden_layers=1)))
    expected = generated(network, ids, mask=mask, **options)
    packed = cache(FP32, network)
    assert torch.equal(generated(network, ids, packed, mask, **options), expected)
    stats = packed.stats()
    assert stats["fallbacks"] == stats["dense_calls"] == stats["requantized_tokens"] == 0
    assert stats["packed_calls"] > 0


class Witness:
    """Stands in for the attention function and compares each result with the definitions, given the same inputs."""

    def __init__(self, scheme: Scheme, layers: int) -> None:
        self.scheme, self.layers, self.calls, self.worst = scheme, layers, 0, 0.0
        self.streams: dict[tuple[int, int], Stream] = {}

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kw: Any) -> Any:
        padding = padding_of(mask)
        out, weights = attention_module.attention(module, query, key, value, mask, **kw)
        assert isinstance(key, Handle)
        step, layer = key.step, module.layer_idx
        for b in range(query.shape[0]):
            count = query.shape[2] if padding is None else padding.counts[b]
            if not count:
                continue
            stream = self.streams.setdefault((layer, b), Stream(self.scheme.for_layer(layer, self.layers)))
            stream.append(step.keys[b : b + 1, :, -count:], step.values[b : b + 1, :, -count:])
            right, lse = stream.attend(
                query[b : b + 1, :, -count:],
                scale=kw.get("scaling"),
                sliding=kw.get("sliding_window"),
                softcap=kw.get("softcap"),
            )
            if kw.get("s_aux") is not None:
                right = right * torch.sigmoid(lse - kw["s_aux"].double()[None, :, None])[..., None]
            self.worst = max(self.worst, (out[b, -count:].transpose(0, 1) - right[0]).abs().max().item())
            self.calls += 1
        return out, weights


@pytest.mark.parametrize("options", [{}, dict(prefill_chunk_size=5)], ids=["whole", "chunked"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_is_the_definition_s(
    family: str, scheme: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = model(family)
    packed = cache(SCHEMES[scheme], network)
    witness = Witness(SCHEMES[scheme], network.config.num_hidden_layers)
    monkeypatch.setitem(AttentionInterface._global_mapping, "kvdsl", witness)
    ids, mask = left_padded()
    generated(network, ids, packed, mask, **options)
    assert witness.calls >= 10 * 2 * 3  # tokens, layers, sequences
    assert witness.worst < 2e-4
    assert packed.stats()["fallbacks"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_conversation_branch_pickle_and_reset(family: str) -> None:
    network = plain(model(family))
    first, second = prompt(), prompt(seed=4)

    def talk(start: Any) -> list[Tensor]:
        turn = generated(network, first, start)
        turn = generated(network, torch.cat([turn, second], 1), start)
        branch, stored = copy.deepcopy(start), pickle.loads(pickle.dumps(start))
        longer = torch.cat([turn, first], 1)
        return [generated(network, longer, c) for c in (start, branch, stored)]

    expected = talk(DynamicCache(config=network.config))
    packed = cache(FP32, network)
    for found, right in zip(talk(packed), expected, strict=True):
        assert torch.equal(found, right)
    packed.reset()  # type: ignore[no-untyped-call]
    assert packed.nbytes == 0 and packed.get_seq_length() == 0
    ids, mask = left_padded()
    again = generated(network, ids, packed, mask)
    assert torch.equal(again, generated(plain(network), ids, mask=mask))


def test_padding_is_never_stored_wherever_it_stands() -> None:
    """A padded batch of two turns: each sequence goes on as it would alone."""
    network = model("llama")
    ids, mask = left_padded()
    mask[1, 10:] = 0  # one of them padded on the right
    new, mask2 = prompt(3, 6, seed=7), torch.ones(3, 6, dtype=torch.int64)
    mask2[1, 1:4] = mask2[2, :2] = 0
    both = torch.cat([mask, mask2], 1)
    positions = (both.cumsum(1) - 1).clamp(min=0)
    packed = cache(CHANNELS, network)
    first = network(ids, attention_mask=mask, position_ids=positions[:, :13], past_key_values=packed).logits
    second = network(new, attention_mask=both, position_ids=positions[:, 13:], past_key_values=packed).logits
    for b in range(3):
        alone = cache(CHANNELS, network)
        for found, tokens, seen in ((first, ids, mask), (second, new, mask2)):
            right = network(tokens[b, seen[b].bool()][None], past_key_values=alone).logits[0]
            torch.testing.assert_close(found[b, seen[b].bool()], right, rtol=1e-3, atol=1e-3)
        assert packed.layers[0].packed.lengths[b] == alone.get_seq_length()
    assert packed.stats()["fallbacks"] == 0
    network.set_attn_implementation("eager")
    with pytest.warns(UserWarning), pytest.raises(CacheError, match="no longer stand where a full mask"):
        network(new, attention_mask=torch.cat([both, mask2], 1), past_key_values=packed)


def test_use_gives_fresh_caches_and_restores_the_model() -> None:
    network = plain(model("mistral"))
    ids = prompt()
    expected = generated(network, ids)
    before = network.generate
    with use(network, FP32) as used:
        assert used.cache is None
        assert torch.equal(network.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=False), expected)
        first = used.cache
        network.generate(ids, max_new_tokens=2)
        assert used.cache is not first and used.cache is not None
        own = DynamicCache(config=network.config)
        network.generate(ids, past_key_values=own, max_new_tokens=2)
        assert own.get_seq_length() == 14
        with use(network, CHANNELS) as inner:
            network.generate(ids, max_new_tokens=2)
        assert inner.cache is not None and inner.cache.scheme == CHANNELS
        assert network.config._attn_implementation == "kvdsl"
    assert network.config._attn_implementation == "eager"
    assert network.generate == before and "generate" not in vars(network)
    with pytest.raises(ZeroDivisionError), use(network, FP32):
        raise ZeroDivisionError
    assert network.config._attn_implementation == "eager" and "generate" not in vars(network)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("other", ["eager", "sdpa"])
def test_other_attention_reads_numbers_and_says_so(family: str, other: str) -> None:
    network = plain(model(family))
    ids, mask = left_padded()
    expected = generated(network, ids, mask=mask)
    packed = cache(FP32, network)
    network.set_attn_implementation(other)
    with pytest.warns(UserWarning, match=r'model.set_attn_implementation\("kvdsl"\)') as said:
        assert torch.equal(generated(network, ids, packed, mask), expected)
    assert len([w for w in said if "kvdsl" in str(w.message)]) == 1
    assert packed.stats()["fallbacks"] > 0


def test_a_model_that_computes_with_values_only() -> None:
    network = plain(model("diffllama"))
    ids, mask = left_padded()
    expected = generated(network, ids, mask=mask)
    packed = cache(FP32, network)
    with pytest.warns(UserWarning, match="kvdsl"):
        assert torch.equal(generated(network, ids, packed, mask), expected)
    assert packed.stats()["packed_calls"] == 0 < packed.stats()["fallbacks"]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_without_a_packed_cache_is_the_library_s(family: str) -> None:
    network = plain(model(family))
    ids, mask = left_padded()
    expected = network(ids, attention_mask=mask, use_cache=False).logits
    tokens = generated(network, ids, mask=mask)
    packed = cache(FP32, network)
    found = network(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    assert torch.equal(generated(network, ids, mask=mask), tokens)
    assert packed.stats()["dense_calls"] >= 2 * 11 and packed.stats()["packed_calls"] == 0


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_a_mask_that_hides_stored_tokens_falls_back_and_says_so(family: str) -> None:
    network = plain(model(family))
    ids, more = prompt(2), prompt(2, 3, seed=8)
    hidden = torch.ones(2, 16, dtype=torch.int64)
    hidden[1, 9:13] = 0
    results = []
    for name in ("eager", "kvdsl"):
        start: Any = cache(FP32, network) if name == "kvdsl" else DynamicCache(config=network.config)
        network.set_attn_implementation(name)
        network(ids, past_key_values=start)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            results.append(network(more, attention_mask=hidden, past_key_values=start).logits)
        assert any("hides stored tokens" in str(w.message) for w in said) == (name == "kvdsl")
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)
    assert start.stats()["fallbacks"] == 2


def test_a_ready_made_mask() -> None:
    network = model("llama")
    network.set_attn_implementation("sdpa")
    ids = prompt()
    seen = torch.ones(1, 1, 13, 13, dtype=torch.bool).tril()
    seen[..., :6, :6] = True  # a prefix that sees itself in both directions
    expected = network(ids, attention_mask=seen, past_key_values=DynamicCache(config=network.config)).logits
    packed = cache(CHANNELS, network)
    found = network(ids, attention_mask=seen, past_key_values=packed).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert packed.stats()["fallbacks"] == 0 and packed.stats()["fresh_calls"] == 2
    later = torch.ones(1, 1, 1, 14, dtype=torch.bool)
    with pytest.warns(UserWarning, match="neither causal"):
        network(ids[:, :1], attention_mask=later, past_key_values=packed)
    assert packed.stats()["fallbacks"] == 2


def test_what_changes_the_mathematics_is_refused() -> None:
    network = model("llama")
    packed = cache(FP32, network)
    ids = prompt()
    network(ids, past_key_values=packed)
    layer = network.model.layers[0].self_attn
    query, new = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 1, 32)
    refused: dict[str, dict[str, Any]] = {
        "position_bias": dict(position_bias=torch.zeros(1)),
        "output_attentions is not supported .*eager": dict(output_attentions=True),
        "dropout 0.5 .*eval": dict(dropout=0.5),
        "both directions": dict(is_causal=False),
    }
    for words, options in refused.items():
        keys, values = packed.layers[0].update(new, new)
        with pytest.raises(ValueError, match=words):
            attention_module.attention(layer, query, keys, values, **options)
    sliding = cache(FP32, model("mistral"))
    keys, values = sliding.layers[0].update(new, new)
    with pytest.raises(ValueError, match="a sliding window of 9 over a cache that keeps 8"):
        attention_module.attention(layer, query, keys, values, sliding_window=9)
    unequal = cache(FP32, network).layers[0]
    unequal.update(new, torch.randn(1, 2, 1, 64))
    with pytest.raises(ShapeError, match="head_dim 64 beside keys of 32"):
        unequal.settle()


def test_a_forward_that_failed_halfway_is_noticed() -> None:
    network = model("llama")
    packed = cache(FP32, network)
    ids = prompt()
    network(ids, past_key_values=packed)
    keys = torch.randn(1, 2, 1, 32)
    packed.update(keys, keys, 0)
    with pytest.raises(CacheError, match="layers hold 13 to 14 tokens.*reset"):
        network(ids[:, :1], past_key_values=packed)
    packed.reset()  # type: ignore[no-untyped-call]
    network(ids, past_key_values=packed)


def test_rollback() -> None:
    network = plain(model("mistral"))
    ids = prompt()
    packed = cache(FP32, network)
    packed.activate_past_recording()  # type: ignore[no-untyped-call]
    generated(network, ids, packed)
    packed.crop(0)
    packed.crop(-(packed.get_seq_length() - 13))
    assert packed.get_seq_length() == 13
    found = generated(network, torch.cat([ids, ids[:, :1]], 1), packed)
    assert torch.equal(found, generated(plain(network), torch.cat([ids, ids[:, :1]], 1)))
    with pytest.raises(ValueError, match="crop: 3 is positive"):
        packed.crop(3)
    batch = cache(FP32, network)
    batch.activate_past_recording()  # type: ignore[no-untyped-call]
    padded, mask = left_padded()
    generated(network, padded, batch, mask)
    batch.crop(-2)
    assert batch.get_seq_length() == 20 and batch.layers[0].packed.lengths == (15, 20, 11)


def test_batch_operations_follow_the_library_s() -> None:
    network = plain(model("llama"))
    ids, mask = left_padded()
    results = []
    for name in ("eager", "kvdsl"):
        start: Any = cache(FP32, network) if name == "kvdsl" else DynamicCache(config=network.config)
        network.set_attn_implementation(name)
        network(ids, attention_mask=mask, past_key_values=start)
        start.batch_repeat_interleave(2)
        start.reorder_cache(torch.tensor([5, 0, 1, 2, 3, 4]))
        start.batch_select_indices(torch.tensor([0, 3, 4]))
        rows = torch.tensor([2, 1, 1])
        more = torch.cat([mask[rows], torch.ones(3, 1, dtype=torch.int64)], 1)
        results.append(network(ids[rows, -1:], attention_mask=more, past_key_values=start).logits)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_stats_say_what_is_held() -> None:
    network = model("llama", num_hidden_layers=3)
    packed = cache(SCHEMES["mixed"], network)
    assert packed.stats()["bytes"] == packed.nbytes == 0
    generated(network, prompt(1, 300), packed)
    stats = packed.stats()
    assert stats["tokens"] == 309 and stats["bytes"] == packed.nbytes
    assert [layer["layer"] for layer in stats["layers"]] == [0, 1, 2]
    assert stats["layers"][0]["bits"] < stats["layers"][1]["bits"] > stats["layers"][2]["bits"]
    assert stats["bits"] == pytest.approx(8 * packed.nbytes / (3 * 2 * 2 * 32 * 309))


@pytest.mark.parametrize("name", ["int4_token_head", "kivi2", "zipcache"])
def test_the_numbers_of_a_prompt_are_let_go_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a forward no layer holds its exact keys and values; else a prompt takes an exact cache beside the packed
    one until the next step."""
    steps: list[weakref.ref[Step]] = []

    def noted(layer: PackedLayer, step: Step, *args: Any) -> Any:
        steps.append(weakref.ref(step))
        return append(layer, step, *args)

    append = PackedLayer.append
    monkeypatch.setattr(PackedLayer, "append", noted)
    llama = model("llama")
    held = cache(name, llama)
    llama(prompt(), past_key_values=held)
    assert len(steps) == llama.config.num_hidden_layers and not any(step() for step in steps)


def test_layers_that_hold_something_else_are_refused() -> None:
    from transformers import AutoConfig

    class Other:
        config = AutoConfig.for_model("zamba2")

    with pytest.raises(ValueError, match="which is no plain pair of keys and values"):
        cache(FP32, Other())
    Other.config = AutoConfig.for_model("doge")
    with pytest.raises(ValueError, match="doge makes attention masks of its own"):
        cache(FP32, Other())


def test_a_library_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import cache_utils

    monkeypatch.delattr(cache_utils, "DummyLayer")
    with pytest.raises(ImportError, match=r"pip install 'transformers>=5.23'"):
        kvdsl.hf.require()


def test_calibrated_numbers_are_asked_for_before_the_first_token() -> None:
    """Missing ones, and ones that do not fit the model, are named with their layer."""
    network = plain(model("llama"))
    with pytest.raises(ShapeError, match=r"layer 0: params\['keys.scale'\]: missing; .*kvdsl calibrate"):
        cache("int8_tensor", network)
    with pytest.raises(ShapeError, match="layer 0: .*missing"), use(network, "int8_tensor"):
        pass
    one = {f"layers.0.{side}.scale": torch.full((1, 1), 0.1) for side in ("keys", "values")}
    with pytest.raises(ShapeError, match=r"layer 1: params\['keys.scale'\]: missing"):
        cache("int8_tensor", network, params=one)
    wrong = one | {"keys.scale": torch.ones(1, 1), "values.scale": torch.ones(2, 2)}
    with pytest.raises(ShapeError, match=r"layer 1: params\['values.scale'\]: shape \(2, 2\); the right one is"):
        cache("int8_tensor", network, params=wrong)
    assert network.config._attn_implementation == "eager"
    all_layers = {"keys.scale": torch.full((1, 1), 0.1), "values.scale": torch.full((1, 1), 0.1)}
    cache("int8_tensor", network, params=all_layers)
    plain(network)
