"""How many multiplications the main loop of attention does outside the tensor cores, counted from what is printed.

Those of the softmax itself (weights, and the decay of what was summed before) are the same for every scheme and not
counted.  A number that enters the tensor cores as its code, or as the level that was looked up, is multiplied by
nothing; what remains are scales behind dot products, on weights, or once a tile on the query or the sums.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

from kvdsl.codes import SLOT_TOKENS

from .placement import When
from .plan import Plan, SidePlan
from .triton_bands import lanes
from .triton_planes import Planes


@dataclass(frozen=True)
class Multiplications:
    """Of one side, for each stored number that the main loop reads.

    decoding   of the number itself, in float32, once for all query rows
    scaling    for each query row, of what numbers share: multiplications over numbers
    unpacking  of integers, to take the code out of its byte
    """

    decoding: Fraction
    scaling: Fraction
    unpacking: Fraction


def multiplications(plan: Plan, side: SidePlan) -> Multiplications:
    """What remains of one side."""
    steps, zero = Planes(plan, side).steps, Fraction(0)
    unpacking = Fraction(1, 2) if side.layout.digits else zero  # a register holds two numbers
    if side.band and side.polar:
        turned = Fraction(_inside("cartesian")) if side.depth else zero  # two channels are made with every angle
        each = _count([steps.number("c", "s", "z")]) if not side.floats else 0
        return Multiplications((each + turned) * max(1, lanes(plan.side(side.name)) // side.dim), zero, zero)
    if side.when is When.IN_LOOP:
        turned = Fraction(_inside("cartesian"), 2) if side.polar else zero  # a radius and an angle are two numbers
        turned += Fraction(side.joined - 1, side.joined) if side.butterflies else zero  # by the signs of other heads
        return Multiplications(_count([steps.number("c", "s", "z")]) + turned, zero, unpacking)
    if side.floats:
        return Multiplications(zero, zero, zero)
    if held := side.factors:  # what the query and a block's vectors give, in units of its largest, and back
        behind = Fraction(1, side.dim) + Fraction(held.rank, plan.half * side.dim)
        return Multiplications(zero, behind if side.name == "keys" else zero, zero)
    if slots := side.slots:  # each number meets one of the query, or of the weights, once
        alone = Fraction(slots.count + 1, side.dim) if side.name == "keys" else Fraction(slots.count, SLOT_TOKENS)
        return Multiplications(zero, alone, zero)
    if beside := side.beside:  # the query in units of its row, and times the scales where these are of whole sub-tiles
        meta = plan.side(side.name).layout.meta
        apart = bool(beside.below) and meta is not None and meta.tokens % plan.half > 0
        once = 1 + (bool(beside.below) and not apart)
        return Multiplications(Fraction(int(apart)), Fraction(once, plan.half), zero)
    scaled = _of_keys(plan, side) if side.name == "keys" else _of_values(plan, side)
    return Multiplications(zero, scaled, unpacking)


def _of_keys(plan: Plan, side: SidePlan) -> Fraction:
    """On the query, once for the tokens that share a scale, and behind the dot products of each token."""
    steps, layout = Planes(plan, side).steps, side.layout
    if side.when in (When.AFTER_DOT, When.NEVER):
        return Fraction(side.groups * _count([steps.assembled("dot", "total", "s", "z")]), side.dim)
    behind = Fraction(int(steps.lifted != 1), side.dim)
    if side.when is When.ONCE_PER_QUERY:
        return behind
    once = [steps.times_scale("q", "s", "z")] * (len(side.operands) if side.rescaled else 1)
    once += [line.split(" = ")[1] for line in steps.added(0, "q", "s", "z")]
    each = _count(once) * side.dim
    if side.rescaled:
        powers = {streamed.bit - side.operands[0].shift for streamed in side.operands[0].places} - {0}
        each += len(powers) * layout.plane_width * bool(steps.added(0, "q", "s", "z"))
    else:
        each += _count(line.split(" = ")[1] for line in steps.prepared("y")) * layout.plane_width
    return behind + Fraction(each, plan.half * side.dim)


def _of_values(plan: Plan, side: SidePlan) -> Fraction:
    """On the weights of each token, or on the sums, once for the tokens that share a scale."""
    steps, layout = Planes(plan, side).steps, side.layout
    if side.when is When.ONCE_PER_TILE:
        texts = [steps.clean(j) for j in range(layout.planes)]
        each = (_count(texts) + layout.planes * _count([steps.output("c", "p", "s", "z")])) * layout.plane_width
        return Fraction(each, plan.half * side.dim)
    if side.when is not When.AFTER_DOT:
        return Fraction(0)
    texts, carried = [steps.weight("p", "s")], steps.carried("p", "s", "z")
    if carried is not None and carried[0] not in texts:
        texts.append(carried[0])
    return Fraction(side.groups * _count(texts), side.dim)


def _count(expressions: Iterable[str]) -> int:
    """Products in expressions."""
    nodes = (node for text in expressions for node in ast.walk(ast.parse(text, mode="eval")))
    return sum(isinstance(node, ast.Mult) for node in nodes)


@cache
def _inside(function: str) -> int:
    """Products in a function that kernels share."""
    tree = ast.parse((Path(__file__).parent / "device.py").read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    return sum(isinstance(node, ast.Mult) for node in ast.walk(found))
