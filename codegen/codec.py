"""The quantizer's arithmetic: from statistics of blocks to stored numbers, from numbers to codes and levels.

Both backends print the same lines; `ns` is "tl." or "torch.", and the functions without a prefix stand in device.py
and host.py under the same names.  Every operation that decides a code rounds once: no fused multiply-add (the launch
forbids it), exact quotients; sums are taken in float64 and rounded once.

What a generated module may hold for a side, each only where the side needs it:

    measure_<side>(statistics, ...)      the stored numbers of blocks, as float32
    encode_<side>(x, numbers, ...)       codes
    levels_<side>(c, ...)                what codes stand for, float32
    products_<side>(x, numbers, ...)     what a second scale is fitted from, float64, to be summed over the block
    refit_<side>(scale, sums, ...)       the second scale, as stored
    loss_<side>(x, numbers, ...)         squared errors, float64, to be summed over the block
    words_<side>(numbers, spoilt)        the stored numbers' bits
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import sympy as sp

from .alphabet import Alphabet, single
from .placement import centre, levels
from .plan import SidePlan
from .steps import Steps
from .text import Lines, literal

NAN_BITS = {"fp16": 0x7E00, "bf16": 0x7FC0, "fp32": 0x7FC00000, "e4m3": 0x7F, "e8m0": 0xFF}
# dtype -> what reads a word of it, and the low and the high half of a word twice as wide
READ = {
    "fp16": ("half", "low_half", "high_half"),
    "bf16": ("half_bf16", "low_half_bf16", "high_half_bf16"),
    "fp32": ("as_float", "", ""),
    "e4m3": ("e4m3", "e4m3", "high_e4m3"),
    "e8m0": ("e8m0", "", ""),
}
WHOLE = 4194304.0  # integer zero points stay within 2**22, where float32 still has halves
Namespace = Literal["tl.", "torch."]
Body = Callable[[SidePlan, Namespace], list[str]]


# ---- what is asked of a side ------------------------------------------------------------------------------------------


def statistics(side: SidePlan) -> list[str]:
    """What is measured of a block's numbers: low, high (extremes), squares, sizes (sums)."""
    return {"norm": ["squares"], "absmean": ["sizes"]}.get(side.scale.range or "", ["low", "high"])


def clips(side: SidePlan) -> tuple[float, ...]:
    """The candidates of a search; one where there is none."""
    clip = side.scale.clip
    return clip if isinstance(clip, tuple) else (clip,)


def searched(side: SidePlan) -> bool:
    """Several scales are tried."""
    return len(clips(side)) > 1


def numbers(side: SidePlan) -> list[str]:
    """What is measured of a block before anything is coded."""
    return ["scale", "start"] if side.has_offset else ["scale"]


def stored_numbers(side: SidePlan) -> list[str]:
    """What is stored of a block: the second scale in place of the first, where there is one."""
    return ["fitted"] if side.scale.refit else numbers(side)


def coding(side: SidePlan) -> list[str]:
    """The numbers that codes are taken with."""
    return [] if side.sketched else numbers(side)


def tried(side: SidePlan) -> list[str]:
    """The numbers that a candidate of a search brings."""
    return [*numbers(side), *(["fitted"] if side.scale.refit else [])]


def sums(side: SidePlan) -> list[str]:
    """What a second scale is fitted from, each summed over the block."""
    return ["dots", "weights"] if side.scale.refit != "norm" else ["squared", "weights"]


def words(side: SidePlan) -> list[str]:
    """What `words_<side>` returns: a word, or two."""
    meta = side.layout.meta
    assert meta is not None
    return ["word", *(["second"] if meta.kind == "words" else [])]


def given(side: SidePlan) -> list[str]:
    """What comes with the parameters and every function of the side takes last: a table's levels, the second level."""
    table = [f"level{i}" for i in range(side.alphabet.count)] if side.alphabet.given else []
    return [*table, *(["outer"] if side.second is not None else [])]


# ---- the functions ----------------------------------------------------------------------------------------------------


def functions(side: SidePlan, ns: Namespace) -> list[str]:
    """The texts of a side's functions, those that something calls."""
    under = numbers(side) if side.store.measure and not side.sketched else []
    made = [_Function("encode", ["x", *under], "The codes of x, int32.", encode)]
    if _names_levels(side):
        made.append(_Function("levels", ["c"], "What codes stand for, float32.", levels_of))
    if not side.static and side.store.measure is not None:
        stored = " and ".join(numbers(side))
        clip = ["clip"] if searched(side) else []
        told = f"The stored {stored} of blocks with these statistics."
        made.append(_Function("measure", [*statistics(side), *clip], told, measure))
        if side.scale.refit:
            told = "What is summed over a block to fit its scale to its codes."
            made.append(_Function("products", ["x", *numbers(side)], told, products))
            made.append(_Function("refit", ["scale", *sums(side)], "The stored scale that fits these sums.", refit))
        if searched(side):
            made.append(_Function("loss", ["x", *tried(side)], "Squares of what coding takes off x, or adds.", loss))
        told = f"Stored {stored} as words: NaN where a block is spoilt."
        made.append(_Function("words", [*stored_numbers(side), "spoilt"], told, word_lines, takes_given=False))
    return [function.text(side, ns) for function in made]


def _names_levels(side: SidePlan) -> bool:
    fitted = side.store.measure is not None and side.scale.when == "online"
    return side.alphabet.looked_up or (fitted and side.scale.refit is not None)


class _Function:
    """One function: its arguments, what it says of itself, and what prints its body."""

    def __init__(self, name: str, takes: Sequence[str], told: str, body: Body, *, takes_given: bool = True) -> None:
        self.name, self.takes, self.told, self.body, self.takes_given = name, takes, told, body, takes_given

    def text(self, side: SidePlan, ns: Namespace) -> str:
        out = Lines()
        out.extend(["@triton.jit"] if ns == "tl." else [])
        body = self.body(side, ns)
        takes = [*self.takes, *(given(side) if self.takes_given else [])]
        out.extend(heading(f"{self.name}_{side.name}", takes))
        out.depth += 1
        out.add(f'"""{self.told}"""')
        out.extend(body)
        return str(out)


def heading(name: str, takes: Sequence[str]) -> list[str]:
    """The first lines of a function; long argument lists on lines of their own."""
    line = f"def {name}({', '.join(takes)}):"
    if len(line) <= 120:
        return [line]
    return [f"def {name}(", f"    {', '.join(takes)}", "):"]


def call(side: SidePlan, name: str, takes: Sequence[str]) -> str:
    """A call of one of the side's functions."""
    extra = [given_name(side, one) for one in given(side)] if name != "words" else []
    return f"{name}_{side.name}({', '.join([*takes, *extra])})"


def given_name(side: SidePlan, name: str) -> str:
    """What a kernel calls a number of the parameters."""
    return f"{side.name[0]}_{name}"


def passed(side: SidePlan) -> list[str]:
    """What a function of the side hands on to another one."""
    return given(side)


def quotient(side: SidePlan, dividend: str, divisor: str) -> str:
    """An exactly rounded quotient by a stored scale: the fast form is proven for float16 scales only."""
    fast = side.store.measure is not None and side.scale.dtype in ("fp16", "e4m3") and not side.static
    return f"{'quotient' if fast and side.second is None else 'exact_quotient'}({dividend}, {divisor})"


# ---- measuring --------------------------------------------------------------------------------------------------------


def measure(side: SidePlan, ns: Namespace) -> list[str]:
    """The stored numbers of blocks from their statistics."""
    scale, out = side.scale, Lines()
    constant = clips(side)[0]
    clip = " * clip" if searched(side) else f" * {literal(constant)}" if constant != 1.0 else ""
    if scale.dtype == "e8m0":
        out.add(f"scale = {ns}maximum({ns}abs(low), {ns}abs(high)){clip}")
        out.add(f"scale = power_of_two(scale, {math.frexp(_top(side))[1] - 1})")
    elif scale.range == "norm":
        out.add(f"scale = root(over(narrow(squares), {literal(_count(side))})){clip}")
    elif scale.range == "absmean":
        out.add(f"scale = over(narrow(sizes), {literal(_count(side))}){clip}")
    elif scale.range == "absmax":
        out.add(f"scale = {ns}maximum({ns}abs(low), {ns}abs(high)){clip}")
        _over_top(out, side, ns)
    elif scale.range == "signed_absmax":
        out.add(f"scale = {ns}where(high >= -low, high, low){clip}")
        if side.alphabet.given:
            out.add("scale = exact_quotient(scale, level0)")
        else:
            out.add(f"scale = over(scale, {literal(_lowest(side))})")
    else:
        _affine(out, side, clip, ns)
    if scale.zero == "in_scale" and side.has_offset:
        bits = side.alphabet.bits
        out.add(f"scale = as_float((as_int(scale) + {2**bits // 2}) & {-(2**bits)})")
    elif scale.dtype != "e8m0":
        _stored(out, side, "scale", ns)
    if side.has_offset:
        _offset(out, side, ns)
    out.add(f"return {', '.join(numbers(side))}")
    return out.lines


def _count(side: SidePlan) -> int:
    """Numbers of a block."""
    meta = side.layout.meta
    assert meta is not None
    if side.sketched:
        return side.channels
    return meta.tokens * meta.channels * meta.heads


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


def _affine(out: Lines, side: SidePlan, clip: str, ns: Namespace) -> None:
    """A range with two ends: Uniform levels count from the lower one, those of a table stand about the middle."""
    if clip:
        out.add(f"low = low{clip}", f"high = high{clip}")
    if side.scale.range == "minmax_zero" or side.scale.zero == "in_scale":
        out.add(f"low = {ns}where(low < 0.0, low, 0.0)", f"high = {ns}where(high > 0.0, high, 0.0)")
    out.add("scale = high - low")
    code = side.uniform
    if code is None:
        out.add("scale = scale * 0.5")
        return
    count = levels(code, side.scale)
    steps = count if code.grid == "cells" else count - 1
    if steps != 1:
        out.add(f"scale = over(scale, {literal(steps)})")
    if side.scale.zero == "point":
        out.add("constant = scale == 0.0", f"scale = {ns}where(constant, {ns}abs(low), scale)")


def _stored(out: Lines, side: SidePlan, name: str, ns: Namespace, *, divided: bool = True) -> None:
    """Round `name` to the metadata's dtype."""
    if side.second is not None and divided:
        out.add(f"{name} = exact_quotient({name}, outer)")
    out.add(f"{name} = {_rounded(side.scale.dtype, name, ns)}")


def _bits(dtype: str, name: str, ns: Namespace) -> str:
    value = f"{ns}clamp({name}, -65504.0, 65504.0)" if dtype == "fp16" else name
    return f"bits_{dtype}({value})"


def _rounded(dtype: str, name: str, ns: Namespace) -> str:
    back = {"fp16": "low_half", "bf16": "low_half_bf16", "fp32": "as_float", "e4m3": "e4m3"}[dtype]
    return f"{back}({_bits(dtype, name, ns)})"


def _offset(out: Lines, side: SidePlan, ns: Namespace) -> None:
    """The offset, or the integer zero point, beside the scale."""
    scale = side.scale
    if scale.zero == "min":
        out.add("start = low" if side.uniform is not None else "start = (high + low) * 0.5")
        _stored(out, side, "start", ns)
        return
    assert side.uniform is not None
    widened = scale.range == "minmax_zero" or scale.zero == "in_scale"
    least, most = (0.0, float(levels(side.uniform, scale) - 1)) if widened else (-WHOLE, WHOLE)
    out.add(f"start = {quotient(side, '-low', f'{ns}where(scale == 0.0, 1.0, scale)')}")
    out.add(f"start = nearest({ns}clamp(start, {literal(least)}, {literal(most)}))")
    out.add(f"start = {ns}where(scale == 0.0, 0.0, start)")
    if scale.zero == "point":
        out.add(f"start = {ns}where(constant, {ns}where(low < 0.0, 1.0, 0.0), start)")
        _stored(out, side, "start", ns, divided=False)


def word_lines(side: SidePlan, ns: Namespace) -> list[str]:
    """The words of stored numbers."""
    scale, meta, out = side.scale, side.layout.meta, Lines()
    assert meta is not None
    name = stored_numbers(side)[0]
    bits = f"power_bits({name})" if scale.dtype == "e8m0" else f"bits_{scale.dtype}({name})"
    out.add(f"word = {ns}where(spoilt > 0, {NAN_BITS[scale.dtype]}, {bits})")
    if side.has_offset and scale.zero == "in_scale":
        out.add("word = word | to_int(start)")
    elif meta.kind == "words":
        out.add(f"second = bits_{scale.dtype}(start)")
    elif side.has_offset:
        out.add(f"word = word | (bits_{scale.dtype}(start) << {8 * meta.element // 2})")
    if meta.element < 4:
        out.add(f"word = {'to_int16' if meta.element == 2 else 'to_byte'}(word)")
    out.add(f"return {', '.join(words(side))}")
    return out.lines


# ---- coding -----------------------------------------------------------------------------------------------------------


def encode(side: SidePlan, ns: Namespace) -> list[str]:
    """Codes of x under stored numbers that broadcast to it."""
    out = Lines()
    if side.sketched:
        return ["return to_int(x > 0.0)"]
    if side.store.measure is None:  # the number itself: NaN has a code
        _patterned(out, side, "finite(x)", ns)
        return out.lines
    point = side.has_offset and side.scale.zero != "min"
    out.add("x = finite(x)")
    if side.has_offset and not point:
        out.add("x = x - start * outer" if side.second is not None else "x = x - start")
    if side.second is not None:
        out.add("scale = scale * outer")
    out.add(f"y = {quotient(side, 'x', f'{ns}where(scale == 0.0, 1.0, scale)')}")
    out.add(f"y = {ns}where(scale == 0.0, 0.0, y)")
    if side.uniform is not None:
        _counted(out, side, point, ns)
    elif side.alphabet.small is not None:
        _patterned(out, side, "y", ns)
    else:
        _nearest_level(out, side.alphabet)
    return out.lines


def _counted(out: Lines, side: SidePlan, point: bool, ns: Namespace) -> None:
    """The nearest of evenly spaced levels."""
    code, scale = side.uniform, side.scale
    assert code is not None
    count = levels(code, scale)
    mid = 0 if side.has_offset else centre(code, scale)
    rounding = "floor" if code.grid == "cells" else code.rounding
    # bounds of whole numbers: clamping before rounding gives the same code
    least, most = (-WHOLE, WHOLE) if point else (float(-mid), float(count - 1 - mid))
    out.add(f"y = {ns}clamp(y, {literal(least)}, {literal(most)})")
    rounded = {"even": "nearest", "half_up": "nearest_half_up", "away": "nearest_away", "floor": f"{ns}floor"}
    out.add(f"y = {rounded[rounding]}(y)")
    if point or mid:
        out.add(f"y = y + {'start' if point else literal(mid)}")
    if point or rounding != "even":
        out.add(f"y = {ns}clamp(y, 0.0, {literal(count - 1)})")
    out.add("return to_int(y)")


def _nearest_level(out: Lines, alphabet: Alphabet) -> None:
    """How many middles of neighbouring levels a number lies above."""
    for i in range(alphabet.count - 1):
        if alphabet.given:
            middle = f"(level{i} + level{i + 1}) * 0.5"
        else:
            middle = literal(single((alphabet.levels[i] + alphabet.levels[i + 1]) / 2))
        out.add(f"c = {'c + ' if i else ''}to_int(y > {middle})")
    out.add("return c")


def _patterned(out: Lines, side: SidePlan, number: str, ns: Namespace) -> None:
    """The bits of the nearest number of a small float format."""
    small = side.alphabet.small
    assert small is not None
    coded = f"small_float({number}, {small.mantissa}, {small.least}, {literal(small.top)}, {2 ** (small.bits - 1)})"
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
        named = [f"level{min(i, alphabet.count - 1)}" for i in range(2**alphabet.bits)]
        _selected(out, named if alphabet.given else [literal(level) for level in alphabet.levels], alphabet.bits, ns)
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


# ---- fitting and choosing ---------------------------------------------------------------------------------------------


def products(side: SidePlan, ns: Namespace) -> list[str]:
    """What a second scale is fitted from, number by number: exact in float64, or nearly so."""
    out = Lines()
    rest = ", ".join(["x", *numbers(side), *passed(side)])
    out.add(f"level = wide({_level(side, f'encode_{side.name}({rest})')})", "x = wide(finite(x))")
    out.add({
        "least_squares": "return x * level, level * level",
        "weighted_least_squares": "return x * x * x * level, x * x * level * level",
        "norm": "return x * x, level * level",
    }[side.scale.refit or ""])  # fmt: skip
    return out.lines


def _level(side: SidePlan, code: str) -> str:
    return f"levels_{side.name}({', '.join([code, *passed(side)])})"


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


def loss(side: SidePlan, ns: Namespace) -> list[str]:
    """(x - decoded)**2, number by number."""
    out = Lines()
    rest = ", ".join(["x", *coding(side), *passed(side)])
    out.add(f"c = encode_{side.name}({rest})")
    out.add(f"c = {_level(side, 'c')}" if side.alphabet.looked_up else "c = to_float(c)")
    scale = "fitted" if side.scale.refit else "scale"
    if side.second is not None:
        out.add(f"{scale} = {scale} * outer")
        out.extend(["start = start * outer"] if side.has_offset else [])
    steps = Steps(side, sp.Integer(1), "", "")
    out.add(f"x = wide(finite(x)) - wide({steps.number('c', scale, 'start')})", "return x * x")
    return out.lines
