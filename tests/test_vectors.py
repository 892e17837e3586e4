"""The reference against what the published implementations computed on the same inputs (see published.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import ORIGINS, SIDES, K, Q, V, agree, both_sides, fp32, published

from kvdsl import reference, schemes
from kvdsl.reference.low_rank import factors, multiplied
from kvdsl.reference.quantize import encoded_rows
from kvdsl.reference.sparse import pick
from kvdsl.scheme import (
    ALL,
    Block,
    ChannelScale,
    LowRank,
    Permute,
    Recent,
    Rotate,
    Scheme,
    Sinks,
    Sparse,
    Store,
    TopChannels,
    Uniform,
    per_channel,
    per_token,
)

KIVI = Scheme(
    keys=Store(Uniform(2), scale=per_channel(32)), values=Store(Uniform(2), scale=per_token(32)), recent=Recent(96)
)
POINT: dict[str, Any] = {"zero": "point"}

SAID: dict[str, Scheme] = {
    # An integer zero point; the official code subtracts it before it rounds, so that ties may go the other way.
    "kvtuner/k4v2_asym_kivi": Scheme(
        keys=fp32(4, per_channel(32, **POINT)), values=fp32(2, per_token(32, **POINT)), recent=Recent(32)
    ),
    "kvtuner/k8v4_asym_kivi": Scheme(
        keys=fp32(8, per_channel(32, **POINT)), values=fp32(4, per_token(32, **POINT)), recent=Recent(32)
    ),
    "kvtuner/k4v4_asym_pertoken": Scheme(both=fp32(4, per_token(**POINT))),
    "omniquant/int4_asym": Scheme(both=fp32(4, per_token(**POINT))),
    # "Symmetric" with all 16 codes around code 7.
    "omniquant/int4_sym": Scheme(both=fp32(4, per_token(range="absmax"), levels=16)),
    # One scale for a token of all kv heads.
    "zipcache/baselines4": Scheme(keys=fp32(4, per_token(heads=ALL)), values=fp32(4, per_token(32))),
    # quanto's axis 0 is a token's 64 channels, its axis -1 a channel's 64 tokens.
    "hf_quantized_cache/quanto4_axis0": Scheme(both=fp32(4, per_token(64))),
    "hf_quantized_cache/quanto4_axism1": Scheme(both=fp32(4, per_channel(64)), recent=Recent(64)),
}


@pytest.mark.parametrize("name", SAID)
def test_said_by_a_scheme(name: str) -> None:
    both_sides(name, SAID[name])


def test_layers_of_a_map() -> None:
    """A layer of the shipped map is the pair that the paper's code makes of it, but for the zero: over KIVI it is the
    minimum in fp16, in the code an integer under a scale in fp32."""
    layer = schemes.ALL["kvtuner"].for_layer(1, 30).with_(layers=(), recent=Recent(32))
    both_sides("kvtuner/k4v2_asym_kivi", layer.with_(dtype="fp32", **POINT))


def test_kivi_in_half_precision() -> None:
    """The released model computes scales and quotients in fp16; here they are float32 and rounded once when stored.

    So a scale may differ by one unit in the last place, and a code next to a rounding border by one.
    """
    arrays = published("kivi/kivi2_fp16")
    shift = 2 * torch.arange(16)
    words = {side: arrays[f"{side}_packed"].long() & 0xFFFFFFFF for side in "KV"}
    packed = {
        "K": (words["K"][:, :, :, None] >> shift[:, None] & 3).reshape(1, 2, 256, 64),
        "V": (words["V"][..., None] >> shift & 3).reshape(1, 2, 256, 64),
    }
    for side, store, x in (("K", KIVI.keys, K), ("V", KIVI.values, V)):
        got = reference.quantize(store, x)
        assert got.codes is not None and got.scale is not None and got.offset is not None
        assert torch.equal(got.offset, arrays[f"{side}_min"].double())
        right = arrays[f"{side}_scale"].double()
        assert ((got.scale - right).abs() <= right * 2**-10).all()
        flipped = (got.codes - packed[side]).abs()
        assert flipped.max() == 1 and flipped.double().mean() <= ORIGINS["kivi/kivi2_fp16"]["tolerance"]["flip"]
        # Where codes agree: a scale one unit off, and product and sum rounded to fp16.
        hat = arrays[f"{side}_hat"].double()
        same = (flipped == 0)[:, :, : hat.shape[2]]
        size = (got.offset.abs() + 3 * got.scale).repeat_interleave(32, 2 if side == "K" else 3)
        assert ((got.decoded[:, :, : hat.shape[2]] - hat).abs() <= size[:, :, : hat.shape[2]] * 2**-9)[same].all()


def test_kivi_over_time() -> None:
    """Attend, then flush: keys leave 96 at a time, values one by one; 156 decoding steps after a prompt of 100."""
    name, arrays = "kivi/stream2_r96", published("kivi/stream2_r96")
    scheme = KIVI.with_(dtype="fp32")
    cache = reference.stream(scheme, K[:, :, :100], V[:, :, :100])
    outputs = []
    for t in range(100, 256):
        cache.append(K[:, :, t : t + 1], V[:, :, t : t + 1])
        outputs.append(cache.attend(Q[:, :, t : t + 1])[0][0, :, 0])
    agree(name, torch.stack(outputs), arrays["outputs"])
    agree(name, cache.rows("keys"), arrays["K_hat"])
    agree(name, cache.rows("values"), arrays["V_hat"])


@pytest.mark.parametrize("bits", [2, 4])
def test_zipcache_plain(bits: int) -> None:
    """Keys: one group for the whole sequence.  Values: over each channel's sqrt(max |v|), a scale over all heads."""
    name, arrays = f"zipcache/plain{bits}", published(f"zipcache/plain{bits}")
    keys = reference.quantize(fp32(bits, per_channel(256)), K)
    assert keys.scale is not None and torch.equal(keys.scale[0, :, 0], arrays["K_scale"].double())
    assert keys.offset is not None and torch.equal(keys.offset[0, :, 0], arrays["K_min"].double())
    agree(name, keys.decoded, arrays["K_hat"])
    values = Store(Uniform(bits), scale=per_token(heads=ALL, dtype="fp32"), transform=ChannelScale("sqrt_absmax"))
    given = {"values.transform[0]": V.abs().amax((0, 2)).sqrt()}
    agree(name, reference.quantize(values, V, given, "values").decoded, arrays["V_hat"])


GEAR = [
    ("gear/gear_kcvt4", fp32(4, per_channel(256)), fp32(4, per_token(heads=ALL))),
    ("gear/gear2", fp32(2, per_channel(64)), fp32(2, per_token(64))),
]


@pytest.mark.parametrize(("name", "keys", "values"), GEAR)
def test_gear_backbone(name: str, keys: Store, values: Store) -> None:
    """The uniform backbone: outliers are put at their vector's mean before, back after, and the sum rounded to fp16.

    The vectors' outlier masks are used; the low-rank term is left out on both sides.
    """
    arrays = published(name)
    for side, store, x, vector in (("K", keys, K, (2,)), ("V", values, V, (1, 3))):
        mask = torch.from_numpy(np.unpackbits(arrays[f"{side}_outlier_bits"].numpy())).reshape(x.shape).bool()
        filled = torch.where(mask, x.mean(vector, keepdim=True), x)
        got = torch.where(mask, x.double(), reference.quantize(store, filled).decoded)
        agree(name, got.half().double(), arrays[f"{side}_hat_no_lowrank"])


@pytest.mark.parametrize(("name", "keys", "values"), GEAR)
def test_gear_single_numbers(name: str, keys: Store, values: Store) -> None:
    """The same numbers are taken out, the largest and the smallest of 256 tokens of a channel and of a token over both
    heads, but for the choice among equal ones; where these are the same, what is read is."""
    arrays = published(name)
    lines = ("K", "keys", keys, K, Sparse(0.008, Block(256, 1), slots=32), (2,))
    rows = ("V", "values", values, V, Sparse(0.02, Block(heads=ALL), slots=32), (1, 3))
    for side, words, store, x, sparse, line in (lines, rows):
        mask = torch.from_numpy(np.unpackbits(arrays[f"{side}_outlier_bits"].numpy())).reshape(x.shape).bool()
        taken = pick(x.double(), sparse, words).taken
        for extreme, other in ((torch.amax, -torch.inf), (torch.amin, torch.inf)):
            assert torch.equal(*(extreme(torch.where(found, x, other), line) for found in (mask, taken)))
        same = (mask == taken).all(line, keepdim=True).expand(x.shape)
        assert (~same).double().mean() < 0.01
        right = arrays[f"{side}_hat_no_lowrank"]
        got = reference.quantize(store.with_(outliers=sparse), x, None, words).decoded[:, :, : right.shape[2]]
        same = same[:, :, : right.shape[2]]
        agree(name, got[same], right[same])


def test_gear_low_rank() -> None:
    """What the backbone leaves of all 256 tokens of a head, from the start that was drawn there: three steps of power
    iteration span what three steps of an orthonormal basis do."""
    name, arrays = "gear/gearl_kcvt4", published("gear/gearl_kcvt4")
    for side, store, x in (("K", fp32(4, per_channel(256)), K), ("V", fp32(4, per_token(heads=ALL)), V)):
        coarse = reference.quantize(store, x).decoded
        found = factors(x.double() - coarse, LowRank(4, tokens=256), arrays[f"start_{side}_p"][:, :, None])
        agree(name, coarse + multiplied(*found), arrays[f"{side}_hat"])


def test_skvq() -> None:
    """The shipped store with fp32 metadata, as the vector has it, under its order of all heads' channels.

    Its two groups of 9 and 119 channels, over both heads, are cut here: those of a scheme are equal and in a head.
    """
    name, arrays = "skvq/reorder_k2v2", published("skvq/reorder_k2v2")
    starts = arrays["group_starts"].tolist()
    shipped = schemes.ALL["skvq2"].with_(dtype="fp32", channels=ALL)
    for (side, words, x), store in zip(SIDES, (shipped.keys, shipped.values), strict=True):
        order = arrays[f"{side}_perm"]
        joined = x.transpose(1, 2).reshape(1, 1, 256, 128)
        given = {f"{words}.transform[0]": order[None].float()}
        gathered = encoded_rows(Store(transform=Permute("range")), joined, given, words)
        groups = zip(starts[:-1], starts[1:], strict=True)
        plain = store.with_(transform=())
        decoded = torch.cat([reference.quantize(plain, gathered[..., a:b]).decoded for a, b in groups], -1)
        back = decoded[..., torch.argsort(order)].reshape(1, 256, 2, 64).transpose(1, 2)
        agree(name, back, arrays[f"{side}_hat"])


def test_quarot() -> None:
    """Rotated by Hadamard's matrix; an integer zero point, the keys' range widened to hold 0, the values' not."""
    arrays = published("quarot/quarot4")
    for (side, _, x), kind in zip(SIDES, ("minmax_zero", "minmax"), strict=True):
        store = fp32(4, per_token(range=kind, **POINT)).with_(transform=Rotate("hadamard"))
        agree("quarot/quarot4", reference.quantize(store, x).decoded, arrays[f"{side}_hat"])


@pytest.mark.parametrize(("name", "share"), [("kitty/prefill", 0.25), ("kitty/decode", 0.125)])
def test_kitty(name: str, share: float) -> None:
    """32 sinks, a page of 128 keys, values beyond the newest 128.  Of a page's key channels the `share` with the
    largest mean have 4 bits, the others 2."""
    more = TopChannels(share, per=128, by="absmean", store=fp32(4, per_channel(64)))
    keys = fp32(2, per_channel(64)).with_(outliers=more)
    scheme = Scheme(keys=keys, values=fp32(2, per_token(64)), recent=Recent(128), sinks=Sinks(32))
    both_sides(name, scheme, window=True)


def test_every_vector_is_used() -> None:
    source = "".join(path.read_text() for path in Path(__file__).parent.glob("test_vectors*.py"))
    for name in ORIGINS:
        assert name in source or name.rstrip("1234") in source, name
