"""Sums of vectors in Triton: codes found stage after stage, and the vectors that they stand for added up again.

A token's codes are one row of bytes, and a plane's lanes are channels, all of which the same codes are of: of every
code a row of the table is read, where it lies, the lanes' channels side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvdsl.codes import Additive

from .layout import Stream
from .plan import SidePlan
from .text import Lines, plus
from .tiling import PAIR

if TYPE_CHECKING:
    from .triton_pack import Pack
    from .triton_planes import Planes


def _code(side: SidePlan) -> Additive:
    assert isinstance(side.store.code, Additive)
    return side.store.code.of(side.dim)


def _stream(side: SidePlan) -> Stream:
    (stream,) = side.layout.streams
    return stream


def tables(side: SidePlan) -> list[str]:
    """The line that says where the tables of the head begin; none of other codes."""
    if not side.alphabet.sums:
        return []
    code = _code(side)
    return [f"{side.letter}_vectors = {side.label}_table_ptr + h * {code.count * 2**code.bits * side.dim}"]


def rows(side: SidePlan, page: str, tokens: str) -> str:
    """Where the rows of a page's tokens begin; `page` is where the head's begin."""
    stream = _stream(side)
    if not stream.paired:
        return f"{page} + {tokens} * {2 * stream.row_words}"
    pair = f"({tokens} // {2 * PAIR} * {PAIR} + {tokens} % {PAIR})"
    return f"{page} + {pair} * {2 * stream.row_words} + {tokens} % {2 * PAIR} // {PAIR}"


def summed(planes: Planes, plane: int, tokens: str) -> list[str]:
    """c = the sums of one plane's channels, float32."""
    side, prefix = planes.side, planes.prefix
    token, lane = planes.grid(f"({rows(side, f'{prefix}_coded', tokens)})", planes.plane_lane(plane))
    return [f"c = sum_{side.label}({token}, {prefix}_vectors, {lane})"]


def functions(side: SidePlan) -> list[str]:
    """The texts of the functions that find codes, read one of them, and add up what they stand for."""
    turned = [_turned(side)] if _code(side).commuting else []
    return [*turned, _encode(side), _read(side), _sum(side)]


def _place(side: SidePlan, byte: str) -> str:
    """How far a byte stands behind the first one of its row."""
    width = _stream(side).row_words
    return f"2 * {byte}" if _stream(side).paired else f"{byte} % {width} * 2 + {byte} // {width}"


def _turned(side: SidePlan) -> str:
    """The text of the function that says which numbers of an entry make channels of the turned one."""
    out, rope, half = Lines(), side.store.rope, side.dim // 2
    neighbours = rope is not None and rope.interleaved
    other, first = (
        ("channel ^ 1", "channel % 2 == 0") if neighbours else (f"(channel + {half}) % {side.dim}", f"channel < {half}")
    )
    out.add("@triton.jit")
    with out.deeper(f"def turned_{side.label}(channel):"):
        out.add(
            '"""Where the numbers of these channels stand in an entry that is turned by a quarter, and their signs."""'
        )
        out.add(f"return {other}, tl.where({first}, -1.0, 1.0)")
    return str(out)


def _encode(side: SidePlan) -> str:
    """The text of the function that finds codes and stores them: x0, x1, ... are planes of numbers over the scale."""
    code, out, planes = _code(side), Lines(), range(side.layout.planes)
    numbers = [f"x{j}" for j in planes]
    out.add("@triton.jit")
    with out.deeper(f"def encode_{side.label}({', '.join(numbers)}, row, vectors, lane, inside):"):
        out.add('"""The codes of the nearest entries, the first of several, stage by stage, as bytes of every row."""')
        out.add("held = tl.zeros(row.shape, tl.int32)  # bits that fill no byte yet", "count = 0", "byte = 0")
        with out.deeper(f"for turn in range({code.codes}):"):
            stage = "turn // 2" if code.commuting else "turn"
            out.add(f"table = vectors + {stage} * {2**code.bits * side.dim}")
            for j in planes:
                channel = f"lane{plus(side.layout.spans[j].start)}"
                out.add(f"at{j} = {channel}")
                if code.commuting:
                    out.add(
                        f"other, sign = turned_{side.label}(at{j})", f"at{j} = tl.where(turn % 2 == 1, other, at{j})"
                    )
                    out.add(f"sign{j} = tl.where(turn % 2 == 1, sign, 1.0)")
            sign = [f" * sign{j}" * code.commuting for j in planes]
            out.add("least = tl.full(row.shape, float('inf'), tl.float64)", "c = tl.zeros(row.shape, tl.int32)")
            with out.deeper(f"for entry in range({2**code.bits}):"):
                for j in planes:
                    load = f"tl.load(table + entry * {side.dim} + at{j}).to(tl.float32){sign[j]}"
                    out.add(f"apart = (x{j} - ({load})[None, :]).to(tl.float64)")
                    out.add(f"far = {'far + ' if j else ''}apart * apart")
                out.add("far = tl.sum(far, 1)", "c = tl.where(far < least, entry, c)")
                out.add("least = tl.minimum(far, least)")
            for j in planes:
                load = f"tl.load(table + c[:, None] * {side.dim} + at{j}[None, :]).to(tl.float32)"
                out.add(f"x{j} = x{j} - {load}" + f" * sign{j}[None, :]" * code.commuting)
            out.add("held = held | (c << count)", f"count += {code.bits}")
            out.add(f"tl.store(row + {_place(side, 'byte')}, (held & 255).to(tl.uint8), mask=inside)")
            out.add("held = held >> count // 8 * 8", "byte += count // 8", "count = count % 8")
        if code.bits * code.codes % 8:
            out.add(f"tl.store(row + {_place(side, 'byte')}, held.to(tl.uint8), mask=inside)")
    return str(out)


def _read(side: SidePlan) -> str:
    """The text of the function that reads a code of every row."""
    code, out = _code(side), Lines()
    out.add("@triton.jit")
    with out.deeper(f"def code_{side.label}(row, turn):"):
        out.add('"""Code number `turn` of every row, int32."""')
        if code.bits == 8:
            out.add(f"return tl.load(row + {_place(side, 'turn')}).to(tl.int32)")
            return str(out)
        out.add(f"byte = turn * {code.bits} // 8", f"after = tl.minimum(byte + 1, {code.row - 1})")
        out.add(f"low = tl.load(row + {_place(side, 'byte')}).to(tl.int32)")
        out.add(f"high = tl.load(row + {_place(side, 'after')}).to(tl.int32)")
        out.add(f"return ((low | (high << 8)) >> (turn * {code.bits} % 8)) & {2**code.bits - 1}")
    return str(out)


def _sum(side: SidePlan) -> str:
    """The text of the function that adds up what the codes of rows stand for."""
    code, out = _code(side), Lines()
    out.add("@triton.jit")
    with out.deeper(f"def sum_{side.label}(row, vectors, channel):"):
        out.add(
            '"""The sums of the vectors of every row in some channels, float32; one axis is of rows, one of them."""'
        )
        out.add("x = tl.zeros(row.shape, tl.float32) + tl.zeros(channel.shape, tl.float32)")
        out.add(*[f"other, sign = turned_{side.label}(channel)"] * code.commuting)
        with out.deeper(f"for stage in range({code.count}):"):
            out.add(f"table = vectors + stage * {2**code.bits * side.dim}")
            read = f"tl.load(table + code_{side.label}(row, {{}}) * {side.dim} + {{}}).to(tl.float32)"
            turn = "2 * stage" if code.commuting else "stage"
            out.add(f"x = x + {read.format(turn, 'channel')}")
            out.add(*[f"x = x + {read.format('2 * stage + 1', 'other')} * sign"] * code.commuting)
        out.add("return x")
    return str(out)


def coded(pack: Pack, members: Sequence[int], lines: list[str], body: Lines) -> None:
    """Lines from planes of numbers to codes in their rows; `lines` put the numbers over the scale."""
    side, layout = pack.side, pack.plan.layout
    body.extend(lines)
    page = f"pool8_ptr + page * {layout.page_bytes} + h * {layout.head_bytes}{plus(_stream(side).offset)}"
    body.add(f"out = {rows(side, page, 't')}")
    numbers = ", ".join(f"x{j}" for j in members)
    body.add(f"encode_{side.label}({numbers}, out, {pack.prefix}_vectors, {pack.lane}, inside)")
