"""The quantizer's arithmetic in Triton: from extremes to stored scales, from numbers to codes.  One function each a side.

Every operation that decides a code rounds once: no fused multiply-add (the launch forbids it), exact quotients.
"""

from __future__ import annotations

from .placement import centre, levels
from .plan import SidePlan
from .text import Lines, literal

NAN_BITS = {"fp16": 0x7E00, "bf16": 0x7FC0, "fp32": 0x7FC00000}
WHOLE = 4194304.0  # integer zero points stay within 2**22, where float32 still has halves


def _over(value: str, divisor: float) -> str:
    """An exactly rounded quotient by a constant."""
    return f"tl.div_rn({value}, tl.zeros_like({value}) + {literal(divisor)})"


def quotient(side: SidePlan, dividend: str, divisor: str) -> str:
    """An exactly rounded quotient by a stored scale: the fast form is proven for float16 scales only."""
    exact = "quotient" if side.scale.dtype == "fp16" and not side.static else "tl.div_rn"
    return f"{exact}({dividend}, {divisor})"


def results(side: SidePlan) -> list[str]:
    """What `measure_<side>` returns: the stored numbers, then the word (or two) to store."""
    meta = side.layout.meta
    assert meta is not None
    return ["scale", *(["start"] if side.has_offset else []), "word", *(["second"] if meta.kind == "words" else [])]


def measure(side: SidePlan) -> str:
    """The text of `measure_<side>`."""
    scale, code, meta = side.scale, side.code, side.layout.meta
    assert meta is not None
    out, count = Lines(), levels(code, scale)
    clip = f" * {literal(scale.clip)}" if scale.clip != 1.0 else ""
    out.add("@triton.jit")
    with out.deeper(f"def measure_{side.name}(low, high, spoilt):"):
        out.add(
            f'"""Stored {" and ".join(results(side)[: 1 + side.has_offset])} of blocks with these extremes, and as bits."""'
        )
        if scale.range == "absmax":
            out.add(f"scale = tl.maximum(tl.abs(low), tl.abs(high)){clip}")
            if code.grid == "cells":
                out.add(
                    f"scale = {_over('scale * 2.0', count)}".replace("zeros_like(scale * 2.0)", "zeros_like(scale)")
                )
            elif centre(code, scale) != 1:
                out.add(f"scale = {_over('scale', centre(code, scale))}")
        elif scale.range == "signed_absmax":
            out.add(f"scale = tl.where(high >= -low, high, low){clip}")
            out.add(f"scale = {_over('scale', -centre(code, scale))}")
        else:
            _affine(out, side, count, clip)
        if scale.zero != "in_scale" or not side.has_offset:
            _stored(out, side, "scale")
        else:
            out.add(f"bits = (scale.to(tl.int32, bitcast=True) + {2**code.bits // 2}) & {-(2**code.bits)}")  # type: ignore[operator]
            out.add("scale = bits.to(tl.float32, bitcast=True)")
        out.add(f"word = tl.where(spoilt > 0, {NAN_BITS[scale.dtype]}, bits)")
        if side.has_offset:
            _offset(out, side, count)
        if meta.kind == "half":
            out.add("word = word.to(tl.int16)")
        out.add(f"return {', '.join(results(side))}")
    return str(out)


def _affine(out: Lines, side: SidePlan, count: int, clip: str) -> None:
    if clip:
        out.add(f"low = low{clip}", f"high = high{clip}")
    if side.scale.range == "minmax_zero" or side.scale.zero == "in_scale":
        out.add("low = tl.minimum(low, 0.0)", "high = tl.maximum(high, 0.0)")
    out.add("scale = high - low")
    steps = count if side.code.grid == "cells" else count - 1
    if steps != 1:
        out.add(f"scale = {_over('scale', steps)}")
    if side.scale.zero == "point":
        out.add("constant = scale == 0.0", "scale = tl.where(constant, tl.abs(low), scale)")


def _stored(out: Lines, side: SidePlan, name: str) -> None:
    """Round `name` to the metadata's dtype: its bits, and the float32 that they stand for."""
    dtype = side.scale.dtype
    if dtype == "fp32":
        out.add(f"bits = bits_fp32({name})")
        return
    value = f"tl.minimum(tl.maximum({name}, -65504.0), 65504.0)" if dtype == "fp16" else name
    out.add(f"bits = bits_{dtype}({value})", f"{name} = low_half{'_bf16' if dtype == 'bf16' else ''}(bits)")


def _offset(out: Lines, side: SidePlan, count: int) -> None:
    """The offset, or the integer zero point, beside the scale."""
    scale, meta = side.scale, side.layout.meta
    assert meta is not None
    if scale.zero == "min":
        out.add("start = low")
    else:
        widened = scale.range == "minmax_zero" or scale.zero == "in_scale"
        least, most = (0.0, float(count - 1)) if widened else (-WHOLE, WHOLE)
        out.add("divisor = tl.where(scale == 0.0, 1.0, scale)")
        out.add(f"start = {quotient(side, '-low', 'divisor')}")
        out.add(f"start = nearest(tl.minimum(tl.maximum(start, {literal(least)}), {literal(most)}))")
        out.add("start = tl.where(scale == 0.0, 0.0, start)")
        if scale.zero == "point":
            out.add("start = tl.where(constant, tl.where(low < 0.0, 1.0, 0.0), start)")
    if scale.zero == "in_scale":
        out.add("word = word | start.to(tl.int32)")
        return
    _stored(out, side, "start")
    out.add("second = bits" if meta.kind == "words" else "word = word | (bits << 16)")


def encode(side: SidePlan) -> str:
    """The text of `encode_<side>`."""
    scale, code = side.scale, side.code
    count = levels(code, scale)
    mid = 0 if side.has_offset else centre(code, scale)
    point = side.has_offset and scale.zero != "min"
    rounding = "floor" if code.grid == "cells" else code.rounding
    out = Lines()
    out.add("@triton.jit")
    with out.deeper(f"def encode_{side.name}(x, scale{', start' if side.has_offset else ''}):"):
        out.add('"""Codes of x [tokens, lanes] under stored numbers that broadcast to it, int32."""')
        out.add("x = finite(x)")
        if side.has_offset and not point:
            out.add("x = x - start")
        out.add("scale = tl.broadcast_to(scale, x.shape)")
        out.add(f"y = {quotient(side, 'x', 'tl.where(scale == 0.0, 1.0, scale)')}")
        out.add("y = tl.where(scale == 0.0, 0.0, y)")
        # bounds of whole numbers: clamping before rounding gives the same code
        least, most = (-WHOLE, WHOLE) if point else (float(-mid), float(count - 1 - mid))
        out.add(f"y = tl.minimum(tl.maximum(y, {literal(least)}), {literal(most)})")
        out.add({"even": "y = nearest(y)", "half_up": "y = nearest_half_up(y)", "floor": "y = tl.floor(y)"}[rounding])
        if point or mid:
            out.add(f"y = y + {'start' if point else literal(mid)}")
        if point or rounding == "floor":
            out.add(f"y = tl.minimum(tl.maximum(y, 0.0), {literal(count - 1)})")
        out.add("return y.to(tl.int32)")
    return str(out)
