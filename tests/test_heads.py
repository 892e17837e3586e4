"""Laws of schemes whose kv heads have schemes of their own."""

from __future__ import annotations

import pytest
import torch
from tiny import FP32, left_padded, model, prompt
from transformers import DynamicCache

import kvdsl
from kvdsl.errors import SchemeError
from kvdsl.hf import cache
from kvdsl.scheme import DROP, Codebook, Recent, Saliency, Scheme, Store, Tier, Uniform, per_channel, per_token
from kvdsl.shape import Shape

FOUR = Scheme(both=Store(Uniform(4), scale=per_token()))
TWO = Scheme(keys=Store(Uniform(2), scale=per_channel(tokens=8)), values=FOUR.values, recent=Recent(8))
MIXED = FOUR.with_(heads={(0, -1): TWO})


def data(heads: int = 4, tokens: int = 40) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, n, tokens, 32, generator=generator) for n in (2 * heads, heads, heads))


def test_every_head_is_stored_by_its_own_scheme() -> None:
    """Round trips, scores and attention of a group are those of its scheme alone, in the order of the layer's heads."""
    q, k, v = data()
    for ask, first in ((kvdsl.roundtrip, k), (kvdsl.attend, q)):
        given = (k, v) if first is k else (q[:, :, -3:], k, v)
        whole = ask(MIXED, *given)
        for heads, one in (((1, 2), FOUR), ((0, 3), TWO)):
            part = [x[:, [h * (x.shape[1] // 4) + i for h in heads for i in range(x.shape[1] // 4)]] for x in given]
            for got, want in zip(whole, ask(one, *part), strict=True):
                size = got.shape[1] // 4
                assert torch.equal(got[:, [h * size + i for h in heads for i in range(size)]], want)


def test_bits_are_the_mean_over_heads() -> None:
    four, two = (kvdsl.bits(one, 128, 2).mean for one in (FOUR, TWO))
    assert kvdsl.bits(MIXED, 128, 4).mean == (four + two) / 2
    assert kvdsl.bits(MIXED, 128, 8).mean == (6 * four + 2 * two) / 8


@pytest.mark.parametrize("inner", [FP32, Scheme(both=FP32.keys, recent=Recent(2), tiers=(Tier(top=0.5), Tier()),
                                                router=Saliency(every=3))], ids=["plain", "tiers"])  # fmt: skip
def test_a_model_generates_through_heads_apart(inner: Scheme) -> None:
    """Heads that keep all numbers, in whatever way, give the library's tokens; padding and beams included."""
    network = model("llama")
    ids, mask = left_padded()
    options = dict(attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, num_beams=2)
    expected = network.generate(ids, past_key_values=DynamicCache(), **options)
    packed = cache(FP32.with_(heads={1: inner.with_(source="apart")}), network)
    assert torch.equal(network.generate(ids, past_key_values=packed, **options), expected)
    stats = packed.stats()
    assert stats["fallbacks"] == 0 and [g["heads"] for g in stats["layers"][0]["groups"]] == [[0], [1]]


def test_some_heads_may_forget() -> None:
    """Retrieval heads keep all, streaming heads their newest tokens: fewer bytes, no fallback."""
    network = model("llama")
    streaming = Scheme(both=FP32.keys, recent=Recent(4), tiers=(DROP,))
    sizes = []
    for scheme in (FP32, FP32.with_(heads={0: streaming})):
        packed = cache(scheme, network)
        ids = prompt(tokens=200)
        network.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=packed, max_new_tokens=4)
        sizes.append(packed.nbytes)
        assert packed.stats()["fallbacks"] == 0
    assert sizes[1] < 0.7 * sizes[0]


def test_calibrated_numbers_of_heads_stand_behind_their_place() -> None:
    _, k, v = data()
    fixed = Scheme(both=Store(Uniform(8), scale=per_channel(range="absmax", when="calibrated")))
    scheme = FOUR.with_(heads={(2, 3): fixed})
    params = kvdsl.calibrate(scheme, k, v)
    assert {name: tuple(x.shape) for name, x in params.items()} == {
        "heads[2].keys.scale": (2, 32), "heads[2].values.scale": (2, 32)
    }  # fmt: skip
    assert (kvdsl.roundtrip(scheme, k, v, params=params)[0] - k).abs()[:, 2:].max() < 0.1


def test_heads_that_are_not_there_are_refused() -> None:
    _, k, v = data(2)
    with pytest.raises(SchemeError, match=r"heads\[2\]: a layer has 2 kv heads; use an index from -2 to 1"):
        kvdsl.roundtrip(FOUR.with_(heads={2: TWO}), k, v)
    with pytest.raises(SchemeError, match=r"heads: each group of them compiles to kernels of its own"):
        kvdsl.build(MIXED, Shape(32, 4))
    with pytest.raises(SchemeError, match="heads\\[0\\]: kv head 0 is listed twice"):
        FOUR.with_(heads=(((0,), TWO), ((0, 1), TWO)))


def test_a_loss_s_derivatives_are_given_by_heads() -> None:
    """A table weighed by them is fitted for its group as if that were the layer."""
    q, k, v = data()
    table = Store(Codebook(2, "calibrated", weights="fisher"), scale=per_token())
    weighed = Scheme(keys=table, values=FOUR.values)
    scheme = FOUR.with_(heads={(1, 2): weighed})
    found = kvdsl.calibrate(scheme, k, v, q, gradients=(k.square(), v))
    part = [x[:, 1:3] for x in (k, v, k.square(), v)]
    alone = kvdsl.calibrate(weighed, *part[:2], q[:, 2:6], gradients=(part[2], part[3]))
    assert list(found) == ["heads[1].keys.code"] and torch.equal(found["heads[1].keys.code"], alone["keys.code"])
