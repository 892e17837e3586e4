"""The normal form: what is hoisted where, that it is proven, and that it means what the reference means."""

from __future__ import annotations

import pytest
import sympy as sp
import torch

from kvdsl import Block, Scale, Store, Uniform, per_channel, per_tensor, per_token, reference
from kvdsl.codegen import algebra
from kvdsl.codegen.algebra import clean_from_dirty, decoded, derive, planes_proof, query_of_dirty
from kvdsl.codegen.alphabet import alphabet_of
from kvdsl.codegen.layout import SideLayout, lay_out
from kvdsl.codegen.placement import When, place
from kvdsl.codegen.plan import SidePlan
from kvdsl.codegen.steps import Steps
from kvdsl.errors import ProofError
from kvdsl.scheme import Recent, Scheme
from kvdsl.shape import Shape

STORES = {
    "token": (Store(Uniform(4), scale=per_token()), When.AFTER_DOT),
    "token, 32 channels": (Store(Uniform(4), scale=per_token(channels=32)), When.AFTER_DOT),
    "token, 8 channels": (Store(Uniform(4), scale=per_token(channels=8)), When.IN_LOOP),
    "8 tokens, 32 channels": (Store(Uniform(4), scale=Scale(Block(8, 32))), When.AFTER_DOT),
    "16 tokens, 8 channels": (Store(Uniform(4), scale=Scale(Block(16, 8))), When.IN_LOOP),
    "symmetric": (Store(Uniform(8), scale=per_token(range="absmax")), When.AFTER_DOT),
    "32 tokens a channel": (Store(Uniform(2), scale=per_channel(tokens=32)), When.ONCE_PER_TILE),
    "48 tokens a channel": (Store(Uniform(2), scale=per_channel(tokens=48)), When.IN_LOOP),
    "block": (Store(Uniform(3), scale=Scale(Block(64, 16))), When.ONCE_PER_TILE),
    "tensor": (
        Store(Uniform(8), scale=per_tensor(range="absmax", dtype="fp32", when="calibrated")),
        When.ONCE_PER_QUERY,
    ),
    "zero point": (Store(Uniform(4), scale=per_token(zero="point")), When.AFTER_DOT),
    "zero in the scale": (Store(Uniform(4), scale=per_token(zero="in_scale", dtype="fp32")), When.AFTER_DOT),
    "cells": (Store(Uniform(4, grid="cells"), scale=per_token()), When.AFTER_DOT),
}


def layout_of(store: Store, side: str = "keys") -> SideLayout:
    block = store.scale.block.tokens if store.scale is not None else 1
    recent = Recent(block) if isinstance(block, int) and block > 1 else None
    return lay_out(Scheme(both=store, recent=recent), Shape(128, 2)).side(side)


@pytest.mark.parametrize("name", STORES)
def test_a_scale_is_applied_at_the_outermost_legal_place(name: str) -> None:
    store, when = STORES[name]
    assert place(store, layout_of(store)) is when


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("name", STORES)
def test_terms_multiplied_out_are_the_definition(name: str, side: str) -> None:
    store, when = STORES[name]
    form = derive(side, store, when)  # type: ignore[arg-type]
    if when is When.IN_LOOP:
        return
    outside = algebra.query if side == "keys" else algebra.weight
    back = sum(t.token_factor * t.channel_factor * (algebra.code if t.coded else 1) for t in form.terms)
    assert sp.expand(back - outside * form.definition) == 0
    assert all(step.method.startswith(("symbolic", "exhaustive")) for step in form.proof)


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("name", STORES)
def test_no_hoisted_factor_depends_on_what_it_was_hoisted_over(name: str, side: str) -> None:
    store, when = STORES[name]
    for term in derive(side, store, when).terms:  # type: ignore[arg-type]
        assert algebra.channel not in term.token_factor.free_symbols
        assert when is When.IN_LOOP or algebra.token not in term.channel_factor.free_symbols


def test_a_scale_of_token_and_channel_cannot_leave_the_loop() -> None:
    """Claiming a place that is too far out is refused, not emitted."""
    mixed = sp.IndexedBase("s")[algebra.token, algebra.channel] * algebra.code * algebra.query
    with pytest.raises(ProofError, match="cannot leave the loop"):
        algebra._split(mixed, True, When.AFTER_DOT)


def test_a_wrong_change_of_basis_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda width, position, run: ((position, sp.Rational(1, 2 ** (position * width))),)  # noqa: E731
    monkeypatch.setattr(algebra, "query_of_dirty", wrong)
    with pytest.raises(ProofError, match="change of basis"):
        planes_proof(Store(Uniform(2), scale=per_token()))


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_dirty_planes_give_every_byte_its_codes_back(width: int) -> None:
    """All 256 bytes, in exact rationals: the planes' combination is each code."""
    count = 8 // width
    for byte in range(256):
        codes = [(byte >> (i * width)) & (2**width - 1) for i in range(count)]
        dirty = [byte & (2 ** ((i + 1) * width) - 1) for i in range(count)]
        for i in range(count):
            assert sum(dirty[k] * a for k, a in clean_from_dirty(width, i, range(count))) == codes[i]
            assert query_of_dirty(width, i, range(count))[0] == (i, sp.Rational(1, 2 ** (i * width)))


@pytest.mark.parametrize("name", [n for n in STORES if n != "tensor"])
def test_the_definition_is_the_references(name: str) -> None:
    """The symbolic definition, evaluated on the reference's codes and stored numbers, is the reference's decoding."""
    store, _ = STORES[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 192, 128, generator=generator)
    coded = reference.quantize(store, x)
    assert coded.scale is not None and coded.codes is not None
    c, s, z = sp.symbols("c s z")
    decode = sp.lambdify((c, s, z), decoded(store, alphabet_of(store, 128), c, s, z), "math")
    blocks = coded.scale.shape[2:]
    for t, d in ((0, 0), (5, 17), (100, 127), (191, 64)):
        at = (0, 0, t * blocks[0] // 192, d * blocks[1] // 128)
        offset = 0.0 if coded.offset is None else float(coded.offset[at])
        assert decode(int(coded.codes[0, 0, t, d]), float(coded.scale[at]), offset) == pytest.approx(
            float(coded.decoded[0, 0, t, d]), rel=1e-6, abs=1e-6
        )


def test_all_that_is_added_to_a_blocks_score_is_added_once() -> None:
    """Cells under a minimum have two addends (half a step, and the minimum): neither may replace the other."""
    store = Store(Uniform(4, grid="cells"), scale=per_channel(tokens=32))
    side = SidePlan("keys", store, layout_of(store), When.ONCE_PER_TILE, alphabet_of(store, 1), 128)
    lines = Steps(side, sp.Integer(1), "", "").scaled(0, "x0", "k_scale", "k_offset")
    assert [line.split(" = ")[0] for line in lines] == ["y0", "b0"]
    assert "k_offset" in lines[1] and "k_scale" in lines[1] and "0.5" in lines[1]
