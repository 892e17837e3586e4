"""From statistics of blocks to what is stored of them, and its words; the same lines for both backends, but for those
that torch can say in fewer calls.

`ns` is "tl." or "torch.", and the functions without a prefix stand in device.py and host.py under the same names.
Every operation rounds once: no fused multiply-add (the launch forbids it), exact quotients; sums come in float64 and
are rounded once.
"""

from __future__ import annotations

import math

from kvdsl.scheme import Scale

from .codec import Namespace, clips, counted_numbers, in_steps, numbers, searched, stored_numbers, sums, words
from .placement import centre, levels
from .plan import SidePlan
from .text import Lines, literal

NAN_BITS = {"fp16": 0x7E00, "bf16": 0x7FC0, "fp32": 0x7FC00000, "e4m3": 0x7F, "e8m0": 0xFF}
TORCH_HALVES = {"fp16": "torch.float16", "bf16": "torch.bfloat16"}
CARRIED = {"ceil": 0x7FFFFF, "round": 0x4AFB0C}
"""What, added to a float32's bits, carries into its exponent: from the first number above a power of two on; from the
first above the root of 2 on, whose lower bits are 0x3504F4."""
WHOLE = 4194304.0  # integer zero points stay within 2**22, where float32 still has halves


def measure(side: SidePlan, ns: Namespace) -> list[str]:
    """The stored numbers of blocks from their statistics."""
    scale, out = side.scale, Lines()
    constant = clips(side)[0]
    clip = " * clip" if searched(side) else f" * {literal(constant)}" if constant != 1.0 else ""
    if scale.dtype == "e8m0":
        out.add(f"scale = top{clip}")
        if scale.exponent == "floor":
            out.add(f"scale = power_of_two(scale, {math.frexp(_top(side))[1] - 1})")
        else:
            out.add(f"scale = power_of_two(over(scale, {literal(_top(side))}), 0, {CARRIED[scale.exponent]})")
    elif scale.range == "norm":
        out.add(f"scale = root(over(narrow(squares), {literal(counted_numbers(side))})){clip}")
    elif scale.range == "absmean":
        out.add(f"scale = over(narrow(sizes), {literal(counted_numbers(side))}){clip}")
    elif scale.range == "absmax":
        out.add(f"scale = top{clip}")
        _over_top(out, side, ns)
    elif scale.range == "signed_absmax":
        out.add(f"scale = {ns}where(high >= -low, high, low){clip}")
        if side.alphabet.given:
            out.add("scale = exact_quotient(scale, level0)")
        else:
            out.add(f"scale = over(scale, {literal(_lowest(side))})")
    else:
        _affine(out, side, clip, ns)
    if scale.zero_inside and side.has_offset:
        bits = side.alphabet.bits
        out.add(f"scale = as_float((as_int(scale) + {2**bits // 2}) & {-(2**bits)})")
    elif scale.dtype != "e8m0":
        _stored(out, side, "scale", ns, floor=scale.floor)
    if side.has_offset:
        _offset(out, side, ns)
    out.add(f"return {', '.join(numbers(side))}")
    return out.lines


def _top(side: SidePlan) -> float:
    """The largest size of a level, in steps of the scale."""
    code = side.uniform
    if code is None:
        return side.alphabet.top
    count = levels(code, side.scale)
    return count / 2 if code.grid == "cells" else (count - 1) // 2


def _lowest(side: SidePlan) -> float:
    """The lowest level."""
    return side.alphabet.levels[0] if side.uniform is None else -centre(side.uniform, side.scale)


def _over_top(out: Lines, side: SidePlan, ns: Namespace) -> None:
    if side.alphabet.given:
        last = f"level{side.alphabet.count - 1}"
        out.add(f"scale = exact_quotient(scale, {ns}maximum({ns}abs(level0), {ns}abs({last})))")
    elif side.uniform is not None and side.uniform.grid == "cells":
        out.add(f"scale = over(scale * 2.0, {literal(levels(side.uniform, side.scale))})")
    elif _top(side) != 1:
        out.add(f"scale = over(scale, {literal(_top(side))})")


def widened(scale: Scale) -> bool:
    """Whether 0 is in the range, so that an integer zero point is one of the codes."""
    return scale.range == "minmax_zero" or scale.zero == "in_scale"


def _affine(out: Lines, side: SidePlan, clip: str, ns: Namespace) -> None:
    """A range with two ends: Uniform levels count from the lower one, those of a table stand about the middle."""
    if clip:
        out.add(f"low = low{clip}", f"high = high{clip}")
    if widened(side.scale):
        out.add(f"low = {ns}where(low < 0.0, low, 0.0)", f"high = {ns}where(high > 0.0, high, 0.0)")
    out.add("scale = high - low")
    code = side.uniform
    if code is None:
        out.add("scale = scale * 0.5")
        return
    count = levels(code, side.scale)
    steps = count if code.grid == "cells" else count - 1
    if side.raised:
        out.add(f"scale = exact_quotient(scale, {'count' if code.grid == 'cells' else 'count - 1.0'})")
    elif steps != 1:
        out.add(f"scale = over(scale, {literal(steps)})")
    if side.scale.zero == "point":
        out.add("constant = scale == 0.0", f"scale = {ns}where(constant, {ns}abs(low), scale)")


def _stored(out: Lines, side: SidePlan, name: str, ns: Namespace, *, divided: bool = True, floor: float = 0.0) -> None:
    """Round `name` to the metadata's dtype."""
    if side.second is not None and divided:
        out.add(f"{name} = exact_quotient({name}, outer)")
    if floor:
        out.add(f"{name} = {ns}where({name} > {literal(floor)}, {name}, {literal(floor)})")
    out.add(f"{name} = {_rounded(side.scale.dtype, name, ns)}")


def _bits(dtype: str, name: str, ns: Namespace) -> str:
    value = f"{ns}clamp({name}, -65504.0, 65504.0)" if dtype == "fp16" else name
    return f"bits_{dtype}({value})"


def _rounded(dtype: str, name: str, ns: Namespace) -> str:
    if ns == "torch." and dtype in ("fp16", "bf16"):
        return _bits(dtype, name, ns).replace("bits_", "rounded_", 1)  # fewer calls than by way of the bits
    back = {"fp16": "low_half", "bf16": "low_half_bf16", "fp32": "as_float", "e4m3": "e4m3"}[dtype]
    return f"{back}({_bits(dtype, name, ns)})"


def below_count(name: str, ns: Namespace) -> str:
    """A number brought among the codes of a block, where blocks have more levels or fewer."""
    return f"{ns}minimum({ns}clamp({name}, 0.0, {literal(WHOLE)}), count - 1.0)"


def _offset(out: Lines, side: SidePlan, ns: Namespace) -> None:
    """The offset, or the integer zero point, beside the scale."""
    scale = side.scale
    if scale.zero == "min":
        out.add("start = low" if side.uniform is not None else "start = (high + low) * 0.5")
        _stored(out, side, "start", ns)
        return
    assert side.uniform is not None
    held = widened(scale) or scale.zero_inside
    least, most = (0.0, float(levels(side.uniform, scale) - 1)) if held else (-WHOLE, WHOLE)
    out.add(f"start = {in_steps(side, '-low', ns)}")
    if side.raised and held:
        out.add(f"start = nearest({below_count('start', ns)})")
    else:
        out.add(f"start = nearest({ns}clamp(start, {literal(least)}, {literal(most)}))")
    if scale.zero == "point":
        out.add(f"start = {ns}where(constant, {ns}where(low < 0.0, 1.0, 0.0), start)")
        _stored(out, side, "start", ns, divided=False)


def word_lines(side: SidePlan, ns: Namespace) -> list[str]:
    """The words of stored numbers."""
    scale, meta, out = side.scale, side.layout.meta, Lines()
    assert meta is not None
    name = stored_numbers(side)[0]
    paired = side.has_offset and not scale.zero_inside and meta.kind != "words" and scale.dtype in TORCH_HALVES
    if ns == "torch." and paired and side.second is None:  # both at once, in fewer calls; neither is NaN
        dtype = TORCH_HALVES[scale.dtype]
        out.add(f"return halved({name}, start, spoilt, {dtype}, {NAN_BITS[scale.dtype]})")
        return out.lines
    bits = f"power_bits({name})" if scale.dtype == "e8m0" else f"bits_{scale.dtype}({name})"
    marks = "spoilt" if ns == "torch." else "spoilt > 0"
    out.add(f"word = {ns}where({marks}, {NAN_BITS[scale.dtype]}, {bits})")
    if side.has_offset and scale.zero_inside:
        out.add("word = word | to_int(start)")
    elif meta.kind == "words":
        out.add(f"second = bits_{scale.dtype}(start)")
    elif side.has_offset:
        out.add(f"word = word | (bits_{scale.dtype}(start) << {8 * meta.element // 2})")
    if meta.element < 4:
        out.add(f"word = {'to_int16' if meta.element == 2 else 'to_byte'}(word)")
    out.add(f"return {', '.join(words(side))}")
    return out.lines


def refit(side: SidePlan, ns: Namespace) -> list[str]:
    """The stored scale from the sums; the first one where they say nothing."""
    out = Lines()
    first, second = (f"narrow({name})" for name in sums(side))
    if side.scale.refit == "norm":
        first, second = f"root({first})", f"root({second})"
    out.add(f"below = {second}")
    out.add(f"fitted = exact_quotient({first}, {ns}where(below == 0.0, 1.0, below))")
    _stored(out, side, "fitted", ns)
    out.add(f"return {ns}where(below == 0.0, scale, fitted)")
    return out.lines
