"""Tiers and routers against what published implementations keep, drop and quantize anew (see published.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from published import Q_FULL, K, V, agree, fp32, published
from torch import Tensor

from kvdsl import reference
from kvdsl.codegen import build
from kvdsl.reference import RoutedStream
from kvdsl.reference.saliency import Received, importance, protected, received
from kvdsl.scheme import (
    ALL,
    DROP,
    ChannelScale,
    Recent,
    Saliency,
    Scheme,
    Store,
    Tier,
    Uniform,
    per_channel,
    per_token,
)
from kvdsl.shape import Shape
from kvdsl.tier_kernels import compiled
from kvdsl.tiered_cache import TieredCache

HEADS = tuple(x.repeat_interleave(4, 1) for x in (K, V))
"""Keys and values as every query head meets them, where each has a choice of its own."""


def kept(labels: Tensor) -> list[list[int]]:
    """The tokens of each head that were not dropped into tier 1."""
    return [row.nonzero().flatten().tolist() for row in labels[0] != 1]


# -- HF transformers: all is quantized anew ----------------------------------------------------------------------------

ANEW = Scheme(both=fp32(4, per_token(channels=64)), recent=Recent(64, "whole"), requantize="on_flush")


@pytest.mark.parametrize("engine", ["definitions", "kernels"])
def test_transformers_quantizes_the_whole_cache_anew_at_every_flush(engine: str) -> None:
    """A prompt of 128 at once, then 64 at a time; what the last step sees is what was held before it, and its own token
    exact."""
    name, arrays = "hf_quantized_cache/quanto4_streaming", published("hf_quantized_cache/quanto4_streaming")
    told = RoutedStream(ANEW)
    cache = TieredCache(compiled(ANEW, Shape(64, 2, 8, "fp32"), "torch", build), 1)
    held = {}
    for begin, end in ((0, 128), *((t, t + 1) for t in range(128, 256))):
        chunk = K[:, :, begin:end], V[:, :, begin:end]
        if engine == "definitions":
            told.append(*chunk)
            held = {side: told.rows(side) for side in ("keys", "values")} if end == 256 else {}
            told.route()
        else:
            cache.append(*chunk)
            held = {side: cache.dense(side) for side in ("keys", "values")} if end == 256 else {}
            cache.route()
    agree(name, held["keys"].double(), arrays["K_hat"])
    agree(name, held["values"].double(), arrays["V_hat"])


@pytest.mark.parametrize("vector", ["quanto4_axis0", "quanto4_axism1"])
def test_transformers_quantizes_a_prompt_at_once(vector: str) -> None:
    """Per token and 64 channels, or per channel and 64 tokens, under a policy that quantizes anew."""
    name = f"hf_quantized_cache/{vector}"
    scale = per_token(64) if vector.endswith("axis0") else per_channel(64)
    told = RoutedStream(ANEW.with_(keys=fp32(4, scale), values=fp32(4, scale)))
    told.append(K, V)
    told.route()
    agree(name, told.rows("keys"), published(name)["K_hat"])
    agree(name, told.rows("values"), published(name)["V_hat"])


# -- ZipCache: saliency, and two tiers ---------------------------------------------------------------------------------

ZIP = Scheme(
    keys=Store(Uniform(4), scale=per_channel(tokens=ALL, dtype="fp32")),
    values=Store(Uniform(4), scale=per_token(heads=ALL, dtype="fp32"), transform=ChannelScale(when="prompt")),
    tiers=(Tier(4, top=154), Tier(2)),
    router=Saliency("normalized", every="prompt"),
    requantize="on_flush",
)
"""154 of 256 tokens have 4 bits: the code takes 40 % rounded down from the others, 60 % rounded down would be 153."""


def salient(probes: list[int]) -> Tensor:
    """The importance of every token, by the attention of these queries, float64 (1, 2, 256)."""
    told = RoutedStream(ZIP)
    told.append(K, V)
    weights = told.scores(Q_FULL[:, :, probes], probes, None, None).softmax(-1)
    return importance(received(weights, 2, 256), "normalized")


@pytest.mark.parametrize("which", ["probe", "full"])
def test_zipcache_saliency(which: str) -> None:
    """Of the probes that were drawn there, one of them twice, and of all queries."""
    arrays = published("zipcache/saliency")
    found = salient(arrays["probe_ids"].tolist() if which == "probe" else list(range(256)))
    agree("zipcache/saliency", found[:, None], arrays[f"saliency_{which}"][:, None])
    low = torch.zeros(1, 2, 256, dtype=torch.bool).scatter(2, found.topk(102, largest=False).indices, True)
    assert torch.equal(low, arrays[f"low_mask_{which}"])


def test_zipcache_masks_by_the_kernels() -> None:
    """The cache's own choice by all queries, and that of the definitions."""
    cache = TieredCache(compiled(ZIP, Shape(64, 2, 8, "fp32"), "torch", build), 1)
    cache.append_and_attend(Q_FULL, K, V)
    told = RoutedStream(ZIP)
    told.step(Q_FULL, K, V)
    low = published("zipcache/saliency")["low_mask_full"]
    assert torch.equal(cache.labels == 1, low) and torch.equal(told.labels() == 1, low)


def test_zipcache_mixed_precision() -> None:
    """Under the tiers that were chosen there: keys per channel of each tier; values over each channel's size in both
    tiers, then a scale for the i-th token of a tier in all heads.

    Sizes of channels are fp16 here, so values are apart by 2^-11 of their range and by codes next to a border.
    """
    name, arrays = "zipcache/mixed42_sorted", published("zipcache/mixed42_sorted")
    labels = torch.zeros(1, 2, 256, dtype=torch.int64).scatter(2, arrays["low_ids"].long(), 1)
    assert torch.equal(labels == 1, published("zipcache/saliency")["low_mask_probe"])
    told = RoutedStream(ZIP)
    told.step(Q_FULL, K, V, labels)
    agree(name, told.rows("keys"), arrays["K_hat"])
    far = (told.rows("values") - arrays["V_hat"]).abs() > 2**-9 * arrays["V_hat"].abs().amax()
    assert far.double().mean() < 0.005
    size = V.abs().amax((0, 2)).sqrt()
    for ids, bits in (("high_ids", 4), ("low_ids", 2)):
        index = arrays[ids].long()[..., None].expand(-1, -1, -1, 64)
        store = fp32(bits, per_token(heads=ALL)).with_(transform=ChannelScale())
        got = reference.quantize(store, V.gather(2, index), {"values.transform[0]": size}, "values").decoded
        agree(name, got, arrays["V_hat"].gather(2, index))


# -- H2O: heavy hitters ------------------------------------------------------------------------------------------------


def heavy(top: int, recent: int) -> Scheme:
    """Tokens with the largest sums of weights stay, and the newest."""
    router = Saliency("accumulated", moves="down")
    return Scheme(both=Store(), recent=Recent(recent), tiers=(Tier(16, top=top), DROP), router=router)


@pytest.mark.parametrize("engine", ["definitions", "kernels"])
def test_h2o_keeps_the_same_tokens_at_every_step(engine: str) -> None:
    """24 heavy ones and the newest 40, evicted behind the attention of each step: sets and outputs."""
    name, arrays, scheme = "h2o/real_drop", published("h2o/real_drop"), heavy(24, 40)
    told, (k, v), outputs = RoutedStream(scheme), HEADS, list[Tensor]()
    cache = TieredCache(compiled(scheme, Shape(64, 8, 8, "fp32"), "torch", build), 1)
    apart = 0
    for step, (begin, end) in enumerate(((0, 192), *((t, t + 1) for t in range(192, 256)))):
        given = Q_FULL[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end]
        if engine == "definitions":
            out, labels = told.step(*given)[0], told.labels()
        else:
            out, labels = cache.append_and_attend(*given)[0], cache.labels
        right = arrays["kept"][step].long().sort(-1).values.tolist()
        apart += sum(len(set(one) ^ set(other)) for one, other in zip(kept(labels), right, strict=True))
        outputs.append(out[0, :, -1].double())
    assert apart == 0
    if engine == "definitions":
        agree(name, torch.stack(outputs[1:]), arrays["outputs"])


def test_h2o_masks() -> None:
    """19 heavy ones and the newest 18 beside the coming one, of 192 tokens.

    The released code hides the token just before its window for one step, so that its sum lacks that step: from then on
    sets may differ by tokens that are nearly as heavy as others.  Behind the prompt they do not.
    """
    arrays = published("h2o/mask_heavy10_recent10")
    shape = arrays["masks_shape"].tolist()
    bits = np.unpackbits(arrays["masks_bits"].numpy())[: int(np.prod(shape))]
    masks = torch.from_numpy(bits).view(*shape).bool()
    masks = masks if shape[0] != 8 else masks.transpose(0, 1)
    told, (k, v), common, whole = RoutedStream(heavy(19, 19)), HEADS, 0, 0
    for step, (begin, end) in enumerate(((0, 192), *((t, t + 1) for t in range(192, 255)))):
        told.step(Q_FULL[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end])
        for head, here in enumerate(kept(told.labels())):
            right = set(masks[step, head].nonzero().flatten().tolist()) - {end}
            ours = set(here) - {end - 19}
            assert step or ours == right
            common, whole = common + len(ours & right), whole + len(right)
    assert common > 0.97 * whole


# -- EasyKV: RoCo ------------------------------------------------------------------------------------------------------


def test_roco_evicts_the_same_tokens() -> None:
    """Of 49 generated tokens behind a prompt of 64, one goes: of the 34 whose weights vary least, the newest 10 set
    aside, the one with the smallest mean.

    A kv head's weights are averaged over its query heads before anything is squared there, and squares are those of
    each head here: the statistics are asked of averaged weights.  The counters there, which start at the budget and
    fall to 0, are the queries that could see a token, as here, since every token was there from its first step on.
    """
    arrays = published("easykv/roco")
    here = [[*range(64)] for _ in range(2)]
    sums = [torch.zeros(256, 2, dtype=torch.float64) for _ in range(2)]
    evicted = list[list[int]]()
    for t in range(64, 256):
        for head in range(2):
            here[head].append(t)
            scores = Q_FULL[0, 4 * head : 4 * head + 4, t].double() @ K[0, head, here[head]].double().T / 8
            weights = scores.softmax(-1).mean(0)
            sums[head][here[head]] += torch.stack([weights, weights.square()], -1)
        if t < 112:
            continue
        evicted.append([])
        for head in range(2):
            first, second = (sums[head][: t + 1, i][None, None] for i in range(2))
            found = Received(first, second, t + 1, 1)
            ranked = torch.zeros(1, 1, t + 1, dtype=torch.bool)
            ranked[..., [token for token in here[head] if 64 <= token <= t - 10]] = True
            mean = importance(found, "mean_std")
            low, _ = protected(mean, found, ranked, 48, 0.7, 0.0)
            gone = int(torch.where(ranked, low, torch.inf).argmin())
            here[head].remove(gone)
            evicted[-1].append(gone)
    same = torch.tensor(evicted) == arrays["evicted"].long()
    assert same.double().mean() > 0.97
