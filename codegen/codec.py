"""The quantizer's arithmetic: from extremes to stored scales, from numbers to codes.  One function each a side.

Both backends print the same lines; `ns` is "tl." or "torch.", and the functions without a prefix stand in device.py
and host.py under the same names.  Every operation that decides a code rounds once: no fused multiply-add (the launch
forbids it), exact quotients.
"""

from __future__ import annotations

from typing import Literal

from .placement import centre, levels
from .plan import SidePlan
from .text import Lines, literal

NAN_BITS = {"fp16": 0x7E00, "bf16": 0x7FC0, "fp32": 0x7FC00000}
WHOLE = 4194304.0  # integer zero points stay within 2**22, where float32 still has halves
Namespace = Literal["tl.", "torch."]


def quotient(side: SidePlan, dividend: str, divisor: str) -> str:
    """An exactly rounded quotient by a stored scale: the fast form is proven for float16 scales only."""
    fast = side.scale.dtype == "fp16" and not side.static
    return f"{'quotient' if fast else 'exact_quotient'}({dividend}, {divisor})"


def results(side: SidePlan) -> list[str]:
    """What `measure_<side>` returns: the stored numbers, then the word (or two) to store."""
    meta = side.layout.meta
    assert meta is not None
    return ["scale", *(["start"] if side.has_offset else []), "word", *(["second"] if meta.kind == "words" else [])]


def measure(side: SidePlan, ns: Namespace) -> list[str]:
    """The body of `measure_<side>(low, high, spoilt)`: extremes of blocks, and 1 where a block holds a NaN."""
    scale, code, meta = side.scale, side.code, side.layout.meta
    assert meta is not None
    out, count, mid = Lines(), levels(code, scale), centre(code, scale)
    clip = f" * {literal(scale.clip)}" if scale.clip != 1.0 else ""
    if scale.range == "absmax":
        out.add(f"scale = {ns}maximum({ns}abs(low), {ns}abs(high)){clip}")
        if code.grid == "cells":
            out.add(f"scale = over(scale * 2.0, {literal(count)})")
        elif mid != 1:
            out.add(f"scale = over(scale, {literal(mid)})")
    elif scale.range == "signed_absmax":
        out.add(f"scale = {ns}where(high >= -low, high, low){clip}", f"scale = over(scale, {literal(-mid)})")
    else:
        _affine(out, side, count, clip, ns)
    if scale.zero == "in_scale" and side.has_offset:
        out.add(f"bits = (as_int(scale) + {2 ** (code.bits or 0) // 2}) & {-(2 ** (code.bits or 0))}")
        out.add("scale = as_float(bits)")
    else:
        _stored(out, side, "scale", ns)
    out.add(f"word = {ns}where(spoilt > 0, {NAN_BITS[scale.dtype]}, bits)")
    if side.has_offset:
        _offset(out, side, count, ns)
    if meta.kind == "half":
        out.add("word = to_int16(word)")
    out.add(f"return {', '.join(results(side))}")
    return out.lines


def _affine(out: Lines, side: SidePlan, count: int, clip: str, ns: Namespace) -> None:
    if clip:
        out.add(f"low = low{clip}", f"high = high{clip}")
    if side.scale.range == "minmax_zero" or side.scale.zero == "in_scale":
        out.add(f"low = {ns}where(low < 0.0, low, 0.0)", f"high = {ns}where(high > 0.0, high, 0.0)")
    out.add("scale = high - low")
    steps = count if side.code.grid == "cells" else count - 1
    if steps != 1:
        out.add(f"scale = over(scale, {literal(steps)})")
    if side.scale.zero == "point":
        out.add("constant = scale == 0.0", f"scale = {ns}where(constant, {ns}abs(low), scale)")


def _stored(out: Lines, side: SidePlan, name: str, ns: Namespace) -> None:
    """Round `name` to the metadata's dtype: its bits, and the float32 that they stand for."""
    dtype = side.scale.dtype
    value = f"{ns}clamp({name}, -65504.0, 65504.0)" if dtype == "fp16" else name
    out.add(f"bits = bits_{dtype}({value})")
    if dtype != "fp32":
        out.add(f"{name} = low_half{'_bf16' if dtype == 'bf16' else ''}(bits)")


def _offset(out: Lines, side: SidePlan, count: int, ns: Namespace) -> None:
    """The offset, or the integer zero point, beside the scale."""
    scale, meta = side.scale, side.layout.meta
    assert meta is not None
    if scale.zero == "min":
        out.add("start = low")
    else:
        widened = scale.range == "minmax_zero" or scale.zero == "in_scale"
        least, most = (0.0, float(count - 1)) if widened else (-WHOLE, WHOLE)
        out.add(f"start = {quotient(side, '-low', f'{ns}where(scale == 0.0, 1.0, scale)')}")
        out.add(f"start = nearest({ns}clamp(start, {literal(least)}, {literal(most)}))")
        out.add(f"start = {ns}where(scale == 0.0, 0.0, start)")
        if scale.zero == "point":
            out.add(f"start = {ns}where(constant, {ns}where(low < 0.0, 1.0, 0.0), start)")
    if scale.zero == "in_scale":
        out.add("word = word | to_int(start)")
        return
    _stored(out, side, "start", ns)
    out.add("second = bits" if meta.kind == "words" else "word = word | (bits << 16)")


def encode(side: SidePlan, ns: Namespace) -> list[str]:
    """The body of `encode_<side>(x, scale, start)`: codes of x under stored numbers that broadcast to it."""
    scale, code = side.scale, side.code
    count = levels(code, scale)
    mid = 0 if side.has_offset else centre(code, scale)
    point = side.has_offset and scale.zero != "min"
    rounding = "floor" if code.grid == "cells" else code.rounding
    out = Lines()
    out.add("x = finite(x)")
    if side.has_offset and not point:
        out.add("x = x - start")
    out.add(f"y = {quotient(side, 'x', f'{ns}where(scale == 0.0, 1.0, scale)')}")
    out.add(f"y = {ns}where(scale == 0.0, 0.0, y)")
    # bounds of whole numbers: clamping before rounding gives the same code
    least, most = (-WHOLE, WHOLE) if point else (float(-mid), float(count - 1 - mid))
    out.add(f"y = {ns}clamp(y, {literal(least)}, {literal(most)})")
    out.add({"even": "y = nearest(y)", "half_up": "y = nearest_half_up(y)", "floor": f"y = {ns}floor(y)"}[rounding])
    if point or mid:
        out.add(f"y = y + {'start' if point else literal(mid)}")
    if point or rounding != "even":
        out.add(f"y = {ns}clamp(y, 0.0, {literal(count - 1)})")
    out.add("return to_int(y)")
    return out.lines


def functions(side: SidePlan, ns: Namespace) -> list[str]:
    """The text of both functions of a side (no `measure` where the scale is calibrated)."""
    texts = []
    decorator = ["@triton.jit"] if ns == "tl." else []
    named = " and ".join(["scale", "start"][: 1 + side.has_offset])
    if not side.static:
        lines = Lines()
        lines.extend(decorator)
        with lines.deeper(f"def measure_{side.name}(low, high, spoilt):"):
            lines.add(f'"""The stored {named} of blocks with these extremes, as numbers and as words."""')
            lines.extend(measure(side, ns))
        texts.append(str(lines))
    lines = Lines()
    lines.extend(decorator)
    with lines.deeper(f"def encode_{side.name}(x, {named.replace(' and ', ', ')}):"):
        lines.add('"""The codes of x, int32."""')
        lines.extend(encode(side, ns))
    return [*texts, str(lines)]
