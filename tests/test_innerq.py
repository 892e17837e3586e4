"""Keys over sizes of their channels that are measured once: what InnerQ is made of, and where its release fails."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import kvdsl
from kvdsl.codegen import build, build_tiers
from kvdsl.making import made
from kvdsl.scheme import ChannelScale, Scheme
from kvdsl.schemes import innerq, innerq_signed
from kvdsl.shape import Shape

SHAPE = Shape(32, 1, 2, dtype="fp32")


def held(scheme: Scheme, keys: torch.Tensor, values: torch.Tensor, steps: tuple[int, ...]) -> list[torch.Tensor]:
    """What a cache holds of both sides, given so many tokens a step."""
    cache = made(scheme, SHAPE, 1, build, build_tiers, backend="torch", device=torch.device("cpu"), params={})
    ends = [sum(steps[:i]) for i in range(len(steps) + 1)]
    for begin, end in pairwise(ends):
        span = slice(begin, end)
        cache.append_and_attend(keys[:, :, span].repeat(1, 2, 1, 1), keys[:, :, span], values[:, :, span])
    return [cache.dense(side) for side in ("keys", "values")]


def normal(tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(1, 1, tokens, 32, generator=torch.Generator().manual_seed(seed))


def test_behind_a_short_prompt_sizes_are_of_all_tokens_that_there_are() -> None:
    """A prompt of 20 tokens, and the first key to leave the window has next to nothing in four channels: measured on
    it alone, as the release does, all keys behind it have these channels blown up, and lose the others."""
    keys, values, steps = normal(170, 1), normal(170, 2), (20, *[1] * 150)
    keys[:, :, 32, ::8] = 1e-4
    alone = innerq.with_(**{"keys.transform": ChannelScale("sqrt_absmax", when="prompt")})
    lost = [
        (held(scheme, keys, values, steps)[0] - keys)[:, :, 33:74].square().mean().item() for scheme in (innerq, alone)
    ]
    assert lost[0] < 0.05 and lost[1] > 4 * lost[0]


def test_the_same_tokens_in_one_step_and_in_many() -> None:
    """A prompt that fills the window: sizes are of all of it, those that wait among them, and stay as they were."""
    keys, values = normal(180, 3), normal(180, 4)
    keys[:, :, 150] *= 4  # the largest of all channels waits in the window
    whole, later = held(innerq, keys, values, (160, 20)), held(innerq, keys, values, (160, *[1] * 20))
    for one, other in zip(whole, later, strict=True):
        assert torch.equal(one, other)
    bigger = keys.clone()
    bigger[:, :, 170] *= 100  # it comes behind the prompt: no size is of it
    again = held(innerq, bigger, values, (160, 20))[0]
    assert torch.equal(again[:, :, :84], whole[0][:, :, :84])


@pytest.mark.parametrize("tokens", [1, 32, 33, 128, 129, 159, 160, 161])
def test_windows_keep_their_length(tokens: int) -> None:
    """The newest 96 tokens are exact at any length, and those behind that fill no 32: no window decays to what is left
    of a flush."""
    keys, values = normal(tokens, 5), normal(tokens, 6)
    got = held(innerq, keys, values, (tokens,))
    for x, decoded in zip((keys, values), got, strict=True):
        packed = max(0, tokens - 128) // 32 * 32
        changed = ((decoded - x).abs() > 1e-6 * x.abs()).any(-1).flatten()  # those that wait are over their sizes
        assert changed.sum() == packed and changed[32 : 32 + packed].all()


def test_zeros_stay_zeros() -> None:
    """Channels of zeros have a size of 0, groups of zeros a scale of 0: nothing is divided by either."""
    keys, values = normal(200, 7), normal(200, 8)
    keys[..., 5], keys[:, :, 60], values[..., 3] = 0, 0, 0
    for x, got in zip((keys, values), held(innerq, keys, values, (200,)), strict=True):
        assert got.isfinite().all() and (got[x == 0] == 0).all()


def test_bits_are_the_papers() -> None:
    counted = kvdsl.bits(innerq)
    assert (counted.keys, counted.values) == (3.5, 2.5)


@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_signed_scales_err_less_than_ternary_values_and_than_the_paper_s_hybrid(offset: float) -> None:
    """At the same 2.5 bits, on values around 0 and beside it.  The hybrid: of every group three levels around 0 or its
    two ends, whichever err less in the sum of sizes."""
    keys, values = normal(320, 9), normal(320, 10) + offset
    found = [kvdsl.roundtrip(s, keys, values, window=False, backend="torch")[1] for s in (innerq_signed, innerq)]
    groups = values.unflatten(2, (-1, 32))
    low, high = groups.amin(3, keepdim=True), groups.amax(3, keepdim=True)
    ends, ternary = torch.where(groups - low < high - groups, low, high), found[1].unflatten(2, (-1, 32))
    lost = [(x - groups).abs().sum(3, keepdim=True) for x in (ends, ternary)]
    found.append(torch.where(lost[0] < lost[1], ends, ternary).flatten(2, 3))
    signed, plain, hybrid = ((x - values).square().mean().item() for x in found)
    assert 2.9 * signed < hybrid <= plain
