"""Vectors of low rank: language, definition, page, and that no channel of a token is made to read them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from law_cases import LOW_RANK, holds

import kvdsl
from kvdsl import reference
from kvdsl.codegen import render
from kvdsl.codegen.launches import launches
from kvdsl.codegen.layout import lay_out
from kvdsl.codegen.lint import faults_in
from kvdsl.codegen.plan import plan_for
from kvdsl.codegen.show import View, show
from kvdsl.errors import SchemeError
from kvdsl.reference.low_rank import factors, multiplied
from kvdsl.scheme import (
    LowRank,
    PreRope,
    Recent,
    Rotate,
    Scheme,
    Store,
    TopChannels,
    Uniform,
    per_token,
)
from kvdsl.schemes import gearl2, kivi2
from kvdsl.shape import Shape

WINDOW = Recent(64)


def of_values(store: Store, recent: Recent | None = WINDOW) -> Scheme:
    return Scheme(keys=Store(), values=store, recent=recent)


FAULTY: list[tuple[Callable[[], Scheme], str]] = [
    (
        lambda: of_values(Store(LowRank(17))),
        "values.code.rank: 17 vectors are more than 16; use 16",
    ),
    (
        lambda: of_values(Store(LowRank(4, tokens=48)), Recent(48)),
        "values.code.tokens: 48 tokens are no whole number of the 32 that are read at once; use 64",
    ),
    (
        lambda: of_values(Store(LowRank(4)), None),
        "values.code.tokens: a group of 64 tokens must wait until it is full; add recent=Recent(64)",
    ),
    (
        lambda: of_values(Store(LowRank(4), scale=per_token())),
        "values.scale: numbers of low rank are stored in fp16 and take no scale; leave scale out",
    ),
    (
        lambda: of_values(Store(LowRank(4), transform=Rotate())),
        "values.transform: of rotated vectors the best ones of low rank are the same, rotated; leave transform out",
    ),
    (
        lambda: of_values(Store(Uniform(2), scale=per_token(), outliers=TopChannels(8, store=Store(LowRank(2))))),
        "values.outliers.store.code: low rank is of a whole vector, and outlier channels part it; use Uniform(bits=2) "
        "under a scale, and residual=LowRank(4) of the outer store",
    ),
    (
        lambda: Scheme(
            keys=Store(Uniform(2), scale=per_token(), transform=PreRope(), residual=LowRank(2)),
            values=Store(),
            recent=Recent(64),
        ),
        "keys.residual: what is left of keys without RoPE would have to be turned back token by token, too; leave it "
        "out, or leave out PreRope()",
    ),
]


@pytest.mark.parametrize(("build", "sentence"), FAULTY, ids=[text.split(":")[0] for _, text in FAULTY])
def test_what_is_refused(build: Callable[[], Scheme], sentence: str) -> None:
    with pytest.raises(SchemeError) as error:
        build()
    assert str(error.value) == sentence


def test_it_stands_for_its_store_in_every_text() -> None:
    assert gearl2.keys.residual == Store(LowRank(2))
    assert kivi2.with_(residual=LowRank(rank=2)).keys.residual == Store(LowRank(2))
    assert Scheme.from_toml(gearl2.to_toml()) == Scheme.from_json(gearl2.to_json()) == gearl2
    assert "residual=Store(LowRank(2))" in repr(gearl2)


def test_a_block_of_low_rank_is_itself() -> None:
    """Rows that are sums of three vectors come back from three or more, of fewer something is lost; a fourth basis
    vector, which they do not give, is 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 64, 3, generator=generator) @ torch.randn(3, 96, generator=generator)
    for rank in (2, 3, 4):
        a, b = factors(x.double(), LowRank(rank))
        error = (multiplied(a, b) - x).norm() / x.norm()
        assert error > 0.1 if rank < 3 else error < 2**-10
    assert not bool(a[..., 3].any()) and not bool(b[..., 3, :].any())


def test_more_loops_come_near_the_best_vectors() -> None:
    """Eckart and Young: no two vectors leave less than all but the two largest values; many loops find them."""
    x = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    best = torch.linalg.svdvals(x[0, 0])[2:].norm()
    left = [float((x - multiplied(*factors(x, LowRank(2, loops=n)))).norm() / best) for n in (1, 3, 32)]
    assert left[0] > left[1] > left[2] and left[2] == pytest.approx(1, abs=2e-3)


def test_numbers_fit_float16_whatever_the_block_holds() -> None:
    x = torch.full((1, 1, 512, 256), 65504.0)
    a, b = factors(x.double(), LowRank(1, tokens=512))
    assert bool(b.isfinite().all()) and (multiplied(a, b) / 65504 - 1).abs().max() < 2**-9


def test_the_page_holds_what_is_counted() -> None:
    shape = Shape(64, 2)
    layout, counted = lay_out(LOW_RANK, shape), kvdsl.bits(LOW_RANK, 64, 2)
    assert layout.page_bytes == counted.mean * 2 * 64 * 2 * layout.page_tokens / 8
    assert layout.page_bytes == reference.page_bytes(LOW_RANK, shape)
    assert counted.formula("values").startswith("16 x 5/64 + 16 x 5/32 = 3.75 bits; of what is left 3 + ")


def test_numbers_of_a_vector_stand_side_by_side() -> None:
    """Three rows of 64 numbers a page, whatever a block is; of the second page the first half is written."""
    scheme = Scheme(keys=Store(LowRank(3, tokens=32)), values=Store(), recent=Recent(32))
    x = torch.randn(1, 1, 96, 32, generator=torch.Generator().manual_seed(2))
    kept = reference.quantize(scheme.keys, x).factors
    assert kept is not None
    first, second = torch.from_numpy(reference.pages(scheme, Shape(32, 1), x, x)[0, :, : 2 * 3 * 64]).view(torch.half)
    assert torch.equal(first.reshape(3, 64).mT.double(), kept[0][0, 0, :64])
    assert torch.equal(second.reshape(3, 64)[:, :32].mT.double(), kept[0][0, 0, 64:])
    assert not bool(second.reshape(3, 64)[:, 32:].any())


def test_every_law_holds() -> None:
    assert holds(LOW_RANK, "torch", examples=2) >= 40


def test_a_block_leaves_the_window_whole() -> None:
    """Of 63 tokens 32 are packed, whatever else the store has: the others wait until 64 have come."""
    scheme = Scheme(both=Store(LowRank(1, tokens=32)), recent=Recent(32))
    x = torch.randn(1, 1, 63, 32, generator=torch.Generator().manual_seed(0))
    got, _ = reference.roundtrip(scheme, x, x)
    assert torch.equal(got[:, :, 32:], x[:, :, 32:].double()) and not torch.equal(got[:, :, :32], x[:, :, :32].double())


def test_a_score_makes_no_channel_of_a_token() -> None:
    """The query meets the vectors of a block, and tokens meet what that gives: of two numbers each, one behind those of
    all tokens of the page, so that those of neighbours are read at once."""
    text = render(plan_for(gearl2, Shape(128, 8, 32)), "triton", "gearl2")
    loop = text.partition("def decode(")[2].partition("    else:")[0]
    lines = [line.strip() for line in loop.splitlines() if "kr_" in line or "vr_" in line]
    dots = [line.partition(" = ")[0] for line in lines if "tl.dot(" in line]
    assert dots == [*4 * ["kr_met"], "sr", "vr_sums", "or0", "or1", "or2", "or3"]
    assert "kr_rows + t[:, None] + kr_rank[None, :] * 64" in loop
    assert "vr_rows + t[None, :] + vr_rank[:, None] * 64" in loop


def test_its_kernels_are_clean_text() -> None:
    for shape in (Shape(128, 8, 32), Shape(64, 2, 4, "fp32")):
        plan = plan_for(LOW_RANK, shape)
        text = render(plan, "triton", "mine")
        assert faults_in(text, launches(plan, text)) == []


def test_its_normal_form_is_shown_and_proven() -> None:
    told = "\n".join(show(View("it", gearl2, Shape(128, 2)), "normal-form")[1])
    assert "sum_j a[t, j] * sum_d q[d]*u[b, j, d]" in told
    assert "sum_t p[t]*x[t] = sum_j (sum_t p[t]*a[t, j]) * u[b, j]   [symbolic]" in told
