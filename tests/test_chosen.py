"""Outlier channels that are chosen anew every few tokens, beside codes of all channels: by hand, and in pages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kvdsl
from kvdsl import reference
from kvdsl.codegen.plan import SidePlan, plan_for
from kvdsl.kernels import Backend
from kvdsl.reference.chosen import among, choose
from kvdsl.reference.quantize import quantize
from kvdsl.scheme import (
    Codebook,
    LowRank,
    Recent,
    Rotate,
    Scheme,
    Sketch,
    Store,
    TopChannels,
    Uniform,
    per_channel,
    per_token,
)
from kvdsl.schemes import kitty
from kvdsl.shape import Shape
from kvdsl.testing import LAWS, Case

FOUR, THREE = Store(Uniform(4), scale=per_channel(tokens=32)), Store(Uniform(3), scale=per_channel(tokens=16))
VALUES = Store(Uniform(2), scale=per_token())
EXACT = Scheme(
    keys=Store(Uniform(2), scale=per_channel(tokens=32), outliers=TopChannels(3, per=32)),
    values=VALUES,
    recent=Recent(64),
)
RAISED = EXACT.with_(keys=Store(Uniform(2), scale=per_channel(tokens=32), outliers=TopChannels(3, per=32, store=FOUR)))
VARIANTS = {
    "exact": EXACT,
    "raised": RAISED,
    "beside a rotated table": EXACT.with_(
        keys=Store(Codebook(2), scale=per_token(), transform=Rotate(), outliers=TopChannels(4, per=32, by="absmax"))
    ),
    "beside a sketch": EXACT.with_(keys=Store(Sketch(64), outliers=TopChannels(4, per=32))),
    "before low rank": EXACT.with_(keys=EXACT.keys.with_(residual=LowRank(2))),
    "several scales a choice": RAISED.with_(**{"keys.outliers.per": 64}),
    "scales within a sub-tile": Scheme(
        keys=Store(Uniform(1), scale=per_channel(tokens=16), outliers=TopChannels(0.25, per=32, store=THREE)),
        values=VALUES,
        recent=Recent(64),
    ),
    "cells": RAISED.with_(
        **{"keys.code": Uniform(2, grid="cells"), "keys.outliers.store.code": Uniform(4, grid="cells")}
    ),
}


def _keys(tokens: int = 64, channels: int = 32) -> Tensor:
    """Normal float16 numbers (1, 1, tokens, channels), three channels eight times as large, others from token 32 on."""
    x = torch.randn(1, 1, tokens, channels, generator=torch.Generator().manual_seed(1)).half().float()
    x[:, :, :32, [5, 9, 20]] *= 8
    x[:, :, 32:, [0, 9, 31]] *= 8
    return x


def _page(scheme: Scheme, x: Tensor) -> tuple[bytes, SidePlan]:
    shape = Shape(x.shape[3], 1, 1)
    return bytes(reference.pages(scheme, shape, x, x, {})[0, 0]), plan_for(scheme, shape).keys


def _rows(keys: SidePlan) -> int:
    """Where what is kept of chosen channels begins."""
    assert keys.rest is not None and keys.rest.beside is not None
    return keys.rest.beside.offset


def test_the_largest_channels_of_every_choice_are_listed_rising() -> None:
    x = _keys()
    found = choose(x, TopChannels(3, per=32))
    assert found.tolist() == [[[[5, 9, 20], [0, 9, 31]]]]
    for scheme in (EXACT, RAISED):
        page, keys = _page(scheme, x)
        start = keys.choice.offset
        assert list(page[start : start + 6]) == [5, 9, 20, 0, 9, 31]


def test_a_choice_is_by_norm_mean_or_largest_size_and_a_nan_is_none() -> None:
    x = torch.zeros(1, 1, 32, 4)
    x[..., 0, 0] = 8.0  # norm 8, mean 1/4
    x[..., 1] = 1.0  # norm 5.7, mean 1
    x[..., :20, 2] = 1.5  # norm 6.7, mean 15/16
    x[..., 3] = torch.nan
    sizes = ("norm", "absmean", "absmax")
    first = [choose(x, TopChannels(1, per=32, by=by)).item() for by in sizes]  # type: ignore[arg-type]
    assert first == [0, 1, 0]
    assert choose(torch.zeros(1, 1, 32, 4), TopChannels(2, per=32)).tolist() == [[[[0, 1]]]]


def test_numbers_of_chosen_channels_stand_in_rows_of_fp16() -> None:
    """Codes of all channels are of vectors that have 0 there, so that what they leave is the number itself."""
    x = _keys()
    page, keys = _page(EXACT, x)
    start = _rows(keys)
    rows = torch.frombuffer(bytearray(page[start : start + 64 * 3 * 2]), dtype=torch.float16).view(64, 3).float()
    assert torch.equal(rows[:32], x[0, 0, :32, [5, 9, 20]])
    assert torch.equal(rows[32:], x[0, 0, 32:, [0, 9, 31]])
    got, _ = reference.roundtrip(EXACT, x, x, window=False)
    theirs = among(choose(x, TopChannels(3, per=32)), TopChannels(3, per=32), 32)
    assert torch.equal(got[theirs].float(), x[theirs])


def test_four_tokens_of_higher_bits_share_a_byte_and_the_lower_ones_stand_with_all_codes() -> None:
    x = _keys()
    page, keys = _page(RAISED, x)
    own, above = quantize(RAISED.keys, x, {}, "keys").terms
    assert own.codes is not None and above.codes is not None and own.scale is not None
    whole = own.codes[0, 0, :, 9] + 4 * above.codes[0, 0, :, 1]
    low, high = x[0, 0, :32, 9].min(), x[0, 0, :32, 9].max()
    step = ((high - low) / 15).half()
    assert own.scale[0, 0, 0, 9] == step
    assert torch.equal(whole[:32], ((x[0, 0, :32, 9] - low) / step.float()).round().clamp(0, 15).long())
    start = _rows(keys)
    for row in range(16):
        bits = [int(above.codes[0, 0, 4 * row + i, 1]) for i in range(4)]
        assert page[start + 3 * row + 1] == sum(bit << 2 * i for i, bit in enumerate(bits))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_raised_channels_are_read_as_by_more_bits_and_the_others_as_before(backend: str) -> None:
    x = _keys(128)
    two, four = (RAISED.with_(keys=Store(Uniform(bits), scale=per_channel(tokens=32))) for bits in (2, 4))
    theirs = among(choose(x, TopChannels(3, per=32)), TopChannels(3, per=32), 32)

    def read(scheme: Scheme) -> Tensor:
        if backend == "reference":
            return reference.roundtrip(scheme, x, x, window=False)[0].double()
        return kvdsl.roundtrip(scheme, x, x, window=False, backend="torch")[0].double()

    want = torch.where(theirs, read(four), read(two))
    # the low bits and those above them are decoded apart, and added up: one rounding more
    assert torch.allclose(read(RAISED), want, rtol=0, atol=2.0**-22 * float(x.abs().max()))
    assert torch.equal(read(RAISED)[~theirs], want[~theirs])


def test_bits_of_both_kinds() -> None:
    assert kvdsl.bits(EXACT, 128, 1).formula("keys").endswith("together 3.39062 bits")
    assert kvdsl.bits(kitty).formula("keys") == (
        "2 + (16 + 16)/128 = 2.25 bits; of outlier channels 16/128 x (2 + 8/128) = 0.257812 bits; together 2.50781 bits"
    )


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("law", [
    "words_equal_the_reference", "decoding_equals_the_reference", "scores_are_products", "errors_stay_within_the_bound",
    "outlier_channels_and_others_do_not_meet", "a_nan_spoils_its_block_only",
])  # fmt: skip
def test_laws_of_variants(law: str, name: str) -> None:
    backend: Backend = "torch"
    if LAWS[law].applies(VARIANTS[name]):
        LAWS[law](Case(VARIANTS[name], Shape(32, 2, 4), backend, batch=1, tokens=192, kind="normal", seed=3))
