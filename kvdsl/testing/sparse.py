"""Single numbers that are kept as they are: what they do to other numbers, and the law that they are read as given."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvdsl.codes import SLOT_TOKENS, Sparse
from kvdsl.kernels import Params
from kvdsl.reference.quantize import links
from kvdsl.reference.spaces import without_rope
from kvdsl.reference.sparse import Picked
from kvdsl.scheme import SIDES, Block, Scheme, Side, Store

from .bounds import blocks_of, by_block
from .cases import Case, law, require, require_within
from .formats import LARGEST, OVER_BLOCK, deviation
from .rotary import partners
from .trips import roundtrip

LEAST = 2.0**-14  # of the normal numbers of float16


def _slots(side: str) -> Block:
    """What shares slots."""
    return Block(1) if side == "keys" else Block(SLOT_TOKENS, 1)


def _with_any(holds: Tensor, block: Block) -> Tensor:
    """Whether something holds of any number of the block of each of (B, H, T, D)."""
    found = by_block(block, holds)
    return found.any(2, keepdim=True).any(4, keepdim=True).any(6, keepdim=True).expand(found.shape).reshape(holds.shape)


def moved(x: Tensor, code: Sparse, side: str) -> Tensor:
    """Which numbers of x (B, H, T, D) may be taken out or not because of a NaN: those of its line, unless that has
    thresholds, and those that share slots with one of them."""
    compared = x.isnan() if code.when == "calibrated" else _with_any(x.isnan(), code.line)
    return _with_any(compared, _slots(side))


def usual(numbers: Tensor, factor: float) -> Tensor:
    """Where what is kept is neither subnormal nor saturated in float16, before and after a factor."""
    return ((numbers.abs() > LEAST) | (numbers == 0)) & (numbers.abs() * factor < LARGEST)


def _sparse(scheme: Scheme, side: Side) -> bool:
    """Whether single numbers are taken out."""
    return isinstance(scheme.side(side).outliers, Sparse)


def _inside(store: Store, line: Block) -> bool:
    """Whether every line lies inside one block of the store's own scale."""
    if store.measure is None or store.turned or store.measure.when == "calibrated":
        return False
    pairs = ((getattr(line, axis), getattr(store.measure.block, axis)) for axis in ("tokens", "channels", "heads"))
    return all(not isinstance(outer, int) or isinstance(inner, int) and outer % inner == 0 for inner, outer in pairs)


@law("P21", lambda s: any(_sparse(s, side) for side in SIDES), ("normal", "outlier_channel", "constant"))
def single_numbers_are_read_as_given(case: Case) -> None:
    """P21: of every line as many numbers are taken as the share says, or those beyond its thresholds, of which slots
    keep as many as there are; what has a slot is read as it was, but for rounding, where nothing codes what is left
    behind it; and the ranges of the codes are not larger than before."""
    k, v = case.pair(case.whole)
    params = case.params(k, v)
    for side, x, got in zip(SIDES, (k, v), roundtrip(case, k, v, params), strict=True):
        if not _sparse(case.scheme, side):
            continue
        store, given = case.scheme.side(side), x.double()
        dense, single, *behind = links(store, given, params, side, case.sinks)
        code, picked = single.store.code, single.picked
        assert isinstance(code, Sparse) and picked is not None
        given, got = (without_rope(store, part.double(), params, side, case.sinks) for part in (given, got))
        _counted(code, picked, given, params, side)
        numbers = given.clamp(-LARGEST, LARGEST)
        size = numbers.abs() + dense.kept.decoded.abs()
        if store.rope is not None:  # what is read is turned to its position and back
            size = 2 * (size + partners(store, size, params))
        off = deviation(single.given, "fp16") + 2.0**-22 * size
        off = off + (single.given.abs() - LARGEST).clamp(min=0) + (given - numbers).abs()
        if not behind:
            require_within(f"single numbers of {side}", got[picked.kept], given[picked.kept], off[picked.kept])
        if code.fill != "zero" and _inside(dense.store, code.line):
            before, after = (blocks_of(dense.store, part) for part in (numbers, dense.given))
            low, high = before.amin(OVER_BLOCK), before.amax(OVER_BLOCK)
            slack = 2.0**-23 * torch.maximum(low.abs(), high.abs())
            lower = after.amin(OVER_BLOCK) >= low - slack
            require(bool((lower & (after.amax(OVER_BLOCK) <= high + slack)).all()), f"a range of {side} grew")


def _counted(code: Sparse, picked: Picked, x: Tensor, params: Params, side: str) -> None:
    """As many are taken of x and kept as the spec says."""
    if code.when == "calibrated":
        low, high = params[f"{side}.outliers"].cpu().double()[:, :, None]
        require(torch.equal(picked.taken, (x < low) | (x > high)), f"{side}: others are taken than thresholds say")
    else:
        taken = by_block(code.line, picked.taken.double())
        size = math.prod(taken.shape[axis] for axis in OVER_BLOCK)
        right = bool((taken.sum(OVER_BLOCK) == 2 * code.taken(size)).all())
        require(right, f"{side}: another share of a line is taken")
    held, wanted = (by_block(_slots(side), part.double()).sum(OVER_BLOCK) for part in (picked.kept, picked.taken))
    require(
        bool((held == wanted.clamp(max=code.slots)).all()), f"{side}: slots are not used, or there are more of them"
    )
