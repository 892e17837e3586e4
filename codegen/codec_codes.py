"""From numbers to codes, from codes to levels, and what is folded over them; the same lines for both backends, but for
those that torch, to which every call is dear, can say in fewer.

`ns` is "tl." or "torch.", as in codec_scales; every operation that decides a code rounds once.
"""

from __future__ import annotations

import sympy as sp

from kvdsl.codes import Float, FloatRounding

from .alphabet import Alphabet, single
from .codec import Namespace, coding, given, in_steps, numbers, settled
from .codec_scales import WHOLE, below_count, widened
from .placement import centre, levels
from .plan import SidePlan
from .steps import Steps
from .text import Lines, literal

TIES: dict[FloatRounding, str] = {"even": "", "away": ", 1", "half_down": ", 2"}  # as `small_float` takes them last


def encode(side: SidePlan, ns: Namespace) -> list[str]:
    """Codes of x under stored numbers that broadcast to it."""
    out = Lines()
    if side.sketched:
        return ["return to_int(x > 0.0)"]
    if side.store.measure is None and side.alphabet.small is not None:  # the number itself: NaN has a code
        _patterned(out, side, "finite(x)", ns)
        return out.lines
    if side.store.measure is None:
        out.add("y = finite(x)")
        _nearest_level(out, side.alphabet, ns)
        return out.lines
    point = side.has_offset and side.scale.zero != "min"
    if ns == "tl." and not settled(side):  # torch's functions are given finite numbers
        out.add("x = finite(x)")
    if side.has_offset and not point:
        out.add("x = x - start * outer" if side.second is not None else "x = x - start")
    if side.second is not None:
        out.add("scale = scale * outer")
    out.add(f"y = {in_steps(side, 'x', ns)}")
    if side.uniform is not None:
        _counted(out, side, point, ns)
    elif side.alphabet.small is not None:
        _patterned(out, side, "y", ns)
    else:
        _nearest_level(out, side.alphabet, ns)
    return out.lines


def _counted(out: Lines, side: SidePlan, point: bool, ns: Namespace) -> None:
    """The nearest of evenly spaced levels."""
    code, scale = side.uniform, side.scale
    assert code is not None
    count = levels(code, scale)
    mid = 0 if side.has_offset else centre(code, scale)
    rounding = "floor" if code.grid == "cells" else code.rounding
    measured = scale.when == "online" and side.second is None and not side.raised
    if ns == "tl." and point and rounding == "even" and measured and widened(scale):
        out.add(f"return within(nearest_code(y) + to_int(start), {count - 1})")  # no more steps than levels
        return
    # bounds of whole numbers: clamping before rounding gives the same code
    least, most = (-WHOLE, WHOLE) if point else (float(-mid), float(count - 1 - mid))
    if side.raised and not point:
        out.add(f"y = {below_count('y', ns)}")
    else:
        out.add(f"y = {ns}clamp(y, {literal(least)}, {literal(most)})")
    rounded = {"even": "nearest", "half_up": "nearest_half_up", "away": "nearest_away", "floor": f"{ns}floor"}
    if ns == "tl." and rounding == "even" and not point:
        out.add(f"return nearest_code(y){f' + {mid}' if mid else ''}")
        return
    out.add(f"y = {rounded[rounding]}(y)")
    if point or mid:
        out.add(f"y = y + {'start' if point else literal(mid)}")
    if side.raised and (point or rounding != "even"):
        out.add(f"y = {below_count('y', ns)}")
    elif point or rounding != "even":
        out.add(f"y = {ns}clamp(y, 0.0, {literal(count - 1)})")
    out.add("return nearest_code(y)" if ns == "tl." else "return y.to(torch.uint8)")


def _nearest_level(out: Lines, alphabet: Alphabet, ns: Namespace) -> None:
    """How many middles of neighbouring levels a number lies above; of known ones, which rise, the last."""
    for i in range(alphabet.count - 1):
        if alphabet.given:
            middle = f"(level{i} + level{i + 1}) * 0.5"
        else:
            middle = literal(single((alphabet.levels[i] + alphabet.levels[i + 1]) / 2))
        if ns == "tl." and not alphabet.given:  # sums of conditions are counted in memory by some compilers
            out.add(f"c = tl.where(y > {middle}, {i + 1}, {'c' if i else 0})")
        else:
            out.add(f"c = {'c + ' if i else ''}to_int(y > {middle})")
    out.add("return c")


def _patterned(out: Lines, side: SidePlan, number: str, ns: Namespace) -> None:
    """The bits of the nearest number of a small float format."""
    small, code = side.alphabet.small, side.store.code
    assert small is not None and isinstance(code, Float)
    format_ = f"{small.mantissa}, {small.least}, {literal(small.top)}, {2 ** (small.bits - 1)}"
    coded = f"small_float({number}, {format_}{TIES[code.rounding]})"
    if side.store.measure is None:
        coded = f"{ns}where(x == x, {coded}, {small.nan})"
    out.add(f"return {coded}")


def levels_of(side: SidePlan, ns: Namespace) -> list[str]:
    """What codes stand for: without the scale."""
    alphabet, out = side.alphabet, Lines()
    if side.uniform is not None:
        steps = centre(side.uniform, side.scale) - (0.5 if side.uniform.grid == "cells" else 0.0)
        out.add(f"return to_float(c) - {literal(steps)}")
    elif alphabet.small is not None:
        out.add(f"return {alphabet.small.name}(c)")
    elif not alphabet.looked_up:
        line = f"to_float(c) * {literal(float(alphabet.step))}"
        out.add(f"return {line} + {literal(float(alphabet.first))}")
    else:
        known = [literal(level) for level in alphabet.levels]
        _selected(out, given(side, "levels")[: alphabet.count] if alphabet.given else known, alphabet.bits, ns)
    return out.lines


def _selected(out: Lines, leaves: list[str], bits: int, ns: Namespace) -> None:
    """A tree of choices, the lowest bit of the code first."""
    if ns == "torch.":
        out.add(f"return chosen(c, ({', '.join(leaves)}))")
        return
    for bit in range(bits):
        out.add(f"bit{bit} = (c & {2**bit}) != 0")
        chosen = []
        for i in range(0, len(leaves), 2):
            if leaves[i] == leaves[i + 1]:
                chosen.append(leaves[i])
                continue
            name = f"part{bit}_{i // 2}"
            out.add(f"{name} = tl.where(bit{bit}, {leaves[i + 1]}, {leaves[i]})")
            chosen.append(name)
        leaves = chosen
    out.add(f"return {leaves[0]}")


def products(side: SidePlan, ns: Namespace) -> list[str]:
    """What a second scale is fitted from, number by number: exact in float64, or nearly so."""
    out = Lines()
    rest = ", ".join(["x", *numbers(side), *given(side, "encode")])
    out.add(f"level = wide({_level(side, f'encode_{side.label}({rest})')})", "x = wide(finite(x))")
    out.add({
        "least_squares": "return x * level, level * level",
        "weighted_least_squares": "return x * x * x * level, x * x * level * level",
        "norm": "return x * x, level * level",
        "unit_gain": "return x * x, x * level",
    }[side.scale.refit or ""])  # fmt: skip
    return out.lines


def _level(side: SidePlan, code: str) -> str:
    takes = [code, *given(side, "levels")]
    return f"levels_{side.label}({', '.join(takes)})"


def loss(side: SidePlan, ns: Namespace) -> list[str]:
    """(x - decoded)**2, number by number."""
    out = Lines()
    rest = ", ".join(["x", *coding(side), *given(side, "encode")])
    out.add(f"c = encode_{side.label}({rest})")
    out.add(f"c = {_level(side, 'c')}" if side.alphabet.looked_up else "c = to_float(c)")
    scale = "fitted" if side.scale.refit else "scale"
    if side.second is not None:
        out.add(f"{scale} = {scale} * outer")
        out.extend(["start = start * outer"] if side.has_offset else [])
    steps = Steps(side, sp.Integer(1), "", "")
    out.add(f"x = wide(finite(x)) - wide({steps.number('c', scale, 'start')})", "return x * x")
    return out.lines
