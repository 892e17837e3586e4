"""The reference over time: what is packed when, what a step sees, and attention worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kvdsl import reference
from kvdsl.errors import ShapeError
from kvdsl.scheme import Float, Recent, Scheme, Sinks, Store, Uniform, per_channel, per_token

EXACT = Scheme(both=Store(Float("fp32")))
PER_TOKEN = Store(Uniform(2), scale=per_token(16))
WINDOWED = Scheme(keys=Store(Uniform(2), scale=per_channel(4)), values=PER_TOKEN, recent=Recent(8), sinks=Sinks(2))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_packed_tokens_by_hand() -> None:
    # sinks 2, window 4: keys leave 4 at once when 4 wait (n = 6, 10), values one by one when more than 4 wait (n = 7)
    scheme = WINDOWED.with_(recent=Recent(4))
    keys = [reference.packed_tokens(scheme, "keys", n) for n in range(12)]
    values = [reference.packed_tokens(scheme, "values", n) for n in range(12)]
    assert keys == [(0, 0), (1, 1), *[(2, 2)] * 4, *[(2, 6)] * 4, *[(2, 10)] * 2]
    assert values == [(0, 0), (1, 1), *[(2, 2)] * 5, (2, 3), (2, 4), (2, 5), (2, 6), (2, 7)]
    # whole on request for both sides; without a window every token leaves as it comes
    both = Scheme(both=PER_TOKEN, recent=Recent(4, flush="whole"))
    assert [reference.packed_tokens(both, "values", n)[1] for n in range(9)] == [0, 0, 0, 0, 4, 4, 4, 4, 8]
    assert reference.packed_tokens(Scheme(both=PER_TOKEN), "keys", 5) == (0, 5)


@pytest.mark.parametrize("tokens", [1, 2, 9, 10, 11, 18, 33])
def test_p30_window_and_sinks_are_exact(tokens: int) -> None:
    """P30: the sinks and whatever waits are exact to the bit, the rest is decoded from whole blocks."""
    k, v = normal(1, 2, tokens, 32).half(), normal(1, 2, tokens, 32, seed=1).half()
    k_hat, v_hat = reference.roundtrip(WINDOWED, k, v)
    packed = max(0, tokens - 2) // 8 * 8
    for x, x_hat, end in ((k, k_hat, 2 + packed), (v, v_hat, 2 + max(0, tokens - 2 - 8))):
        assert torch.equal(x_hat[:, :, :2], x[:, :, :2].double()) and torch.equal(
            x_hat[:, :, end:], x[:, :, end:].double()
        )
        assert end <= 2 or not torch.equal(x_hat[:, :, 2:end], x[:, :, 2:end].double())
    # blocks are counted from the first token after the sinks
    if packed:
        assert torch.equal(
            k_hat[:, :, 2 : 2 + packed], reference.quantize(WINDOWED.keys, k[:, :, 2 : 2 + packed]).decoded
        )


def test_without_the_window_everything_is_quantized() -> None:
    k, v = normal(1, 1, 8, 32), normal(1, 1, 8, 32, seed=1)
    k_hat, v_hat = reference.roundtrip(WINDOWED, k, v, window=False)
    assert torch.equal(k_hat, reference.quantize(WINDOWED.keys, k).decoded)
    assert torch.equal(v_hat, reference.quantize(WINDOWED.values, v, side="values").decoded)
    with pytest.raises(ShapeError, match=r"keys: shape \(1, 1, 7, 32\) has 7 tokens, no whole number of blocks of 4"):
        reference.roundtrip(WINDOWED, k[:, :, :7], v[:, :, :7], window=False)


def test_attention_by_hand() -> None:
    # scores 0 and ln 3: weights 1/4 and 3/4, lse = ln(1 + 3)
    k = torch.zeros(1, 1, 2, 4)
    k[0, 0, 1, 0] = 1
    v = torch.tensor([[4.0, 0, 0, 0], [0, 8, 0, 0]]).reshape(1, 1, 2, 4)
    q = torch.tensor([math.log(3), 0, 0, 0]).reshape(1, 1, 1, 4)
    out, lse = reference.attend(EXACT, q, k, v, scale=1)
    assert out.flatten().tolist() == pytest.approx([1, 6, 0, 0], rel=1e-6)
    assert lse.item() == pytest.approx(math.log(4), rel=1e-6)
    # the default scale is 1 / sqrt(4): 1 + sqrt(3)
    assert reference.attend(EXACT, q, k, v)[1].item() == pytest.approx(math.log(1 + math.sqrt(3)), rel=1e-6)
    # a cap of 1 takes ln 3 to tanh(ln 3) = (9 - 1) / (9 + 1)
    capped = reference.attend(EXACT, q, k, v, scale=1, softcap=1.0)[1].item()
    assert capped == pytest.approx(math.log(1 + math.exp(0.8)), rel=1e-6)


def test_who_sees_what() -> None:
    # q = 0: every visible token weighs the same, so lse = ln(visible); v counts the tokens
    k, v = torch.zeros(2, 1, 6, 4), torch.arange(6.0).reshape(1, 1, 6, 1).expand(2, 1, 6, 4)
    q = torch.zeros(2, 3, 4, 4)

    def seen(**how: Any) -> list[list[float]]:
        counts: list[list[float]] = reference.attend(EXACT, q, k, v, **how)[1][:, 0].exp().round().tolist()
        return counts

    assert seen() == [[3, 4, 5, 6]] * 2
    assert seen(sliding=4) == [[3, 4, 4, 4]] * 2
    assert seen(start=torch.tensor([0, 4])) == [[3, 4, 5, 6], [0, 0, 1, 2]]
    assert seen(start=4, sliding=1) == [[0, 0, 1, 1]] * 2
    out, lse = reference.attend(EXACT, q, k, v, start=4)
    assert (out[:, :, :2] == 0).all() and (lse[:, :, :2] == -math.inf).all()
    assert out[0, 0, :, 0].tolist() == [0, 0, 4, 4.5]


def test_query_heads_read_their_kv_head() -> None:
    k, q = normal(1, 2, 5, 8), normal(1, 6, 3, 8, seed=1)
    got = reference.scores(EXACT, q, k)
    for head in range(6):
        assert torch.allclose(got[0, head], q[0, head].double() @ k[0, head // 3].double().T)


def test_p12_shift_and_split() -> None:
    """P12: one vector added to all keys changes no output; chunks of tokens merge by their lse."""
    q, k, v = normal(1, 2, 1, 16), normal(1, 1, 9, 16, seed=1), normal(1, 1, 9, 16, seed=2)
    out, lse = reference.attend(EXACT, q, k, v)
    assert torch.allclose(out, reference.attend(EXACT, q, k + 0.5, v)[0], atol=1e-6)
    parts = [reference.attend(EXACT, q, k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 4), (4, 9))]
    merged = torch.stack([part[1] for part in parts]).logsumexp(0)
    assert torch.allclose(merged, lse)
    assert torch.allclose(torch.stack([part[0] * (part[1] - merged).exp()[..., None] for part in parts]).sum(0), out)


def test_a_step_sees_itself_and_the_cache_before_it() -> None:
    """The step that fills the window still sees it exactly; what it appends is seen exactly, however long."""
    k, v, q = normal(1, 1, 40, 32), normal(1, 1, 40, 32, seed=1), normal(1, 2, 40, 32, seed=2)
    for tokens, queries in ((10, 1), (11, 1), (34, 1), (40, 7), (40, 40)):
        seen = tokens - queries
        held = [
            torch.cat([old, x[:, :, seen:tokens].double()], 2)
            for old, x in zip(reference.roundtrip(WINDOWED, k[:, :, :seen], v[:, :, :seen]), (k, v), strict=True)
        ]
        step = q[:, :, seen:tokens]
        got = reference.attend(WINDOWED, step, k[:, :, :tokens], v[:, :, :tokens])
        right = reference.attend(EXACT, step, held[0], held[1])
        assert torch.allclose(got[0], right[0], atol=1e-6) and torch.allclose(got[1], right[1], atol=1e-6)
        stored = reference.attend(WINDOWED.with_(prefill="stored"), step, k[:, :, :tokens], v[:, :, :tokens])
        right = reference.attend(EXACT, step, *reference.roundtrip(WINDOWED, k[:, :, :tokens], v[:, :, :tokens]))
        assert torch.allclose(stored[0], right[0], atol=1e-6)


@pytest.mark.parametrize("chunks", [[1] * 30, [30], [13, 1, 1, 15], [8, 8, 8, 6]])
def test_a_stream_is_the_whole_sequence_cut_up(chunks: list[int]) -> None:
    k, v, q = normal(2, 1, 30, 32), normal(2, 1, 30, 32, seed=1), normal(2, 2, 30, 32, seed=2)
    cache, at = reference.Stream(WINDOWED), 0
    for m in chunks:
        cache.append(k[:, :, at : at + m], v[:, :, at : at + m])
        at += m
        got = cache.attend(q[:, :, at - m : at])
        right = reference.attend(WINDOWED, q[:, :, at - m : at], k[:, :, :at], v[:, :, :at])
        assert torch.equal(got[0], right[0]) and torch.equal(got[1], right[1])
    assert cache.tokens == 30 and cache.packed("keys") == (2, 26) and cache.packed("values") == (2, 22)
    k_hat, v_hat = reference.roundtrip(WINDOWED, k, v)
    assert torch.equal(cache.rows("keys"), k_hat) and torch.equal(cache.rows("values"), v_hat)
    cache.select(torch.tensor([1, 1, 0]))
    assert torch.equal(cache.rows("keys"), k_hat[[1, 1, 0]])
    with pytest.raises(ShapeError, match=r"keys: shape \(2, 1, 1, 32\); the right one is \(3, 1, 1, 32\)"):
        cache.append(k[:, :, :1], v[:, :, :1])


def test_wrong_shapes_are_named() -> None:
    k = torch.zeros(1, 2, 4, 32)
    calls: list[tuple[Any, str]] = [
        (lambda: reference.roundtrip(EXACT, k[0], k), r"k: shape \(2, 4, 32\) has 3 axes"),
        (lambda: reference.roundtrip(EXACT, k.int(), k), r"k: dtype torch.int32 is no float"),
        (lambda: reference.roundtrip(EXACT, k, k[:, :1]), r"v: shape \(1, 1, 4, 32\); .* is \(1, 2, 4, 32\)"),
        (
            lambda: reference.scores(EXACT, k[:, :, :, :16], k),
            r"q: shape \(1, 2, 4, 16\); .* a multiple of 2, queries, 32",
        ),
        (lambda: reference.scores(EXACT, torch.zeros(1, 3, 1, 32), k), r"q: shape \(1, 3, 1, 32\)"),
        (lambda: reference.attend(EXACT, torch.zeros(1, 2, 5, 32), k, k), r"has 5 queries for 4 tokens"),
    ]
    for call, message in calls:
        with pytest.raises(ShapeError, match=message):
            call()
