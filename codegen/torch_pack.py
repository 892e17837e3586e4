"""The torch functions that pack: whole pages of numbers to the bytes of every section."""

from __future__ import annotations

from collections.abc import Iterable

import sympy as sp

from kvdsl.scheme import Additive, LowRank

from .codec import (
    call,
    clips,
    coding,
    counted,
    counted_numbers,
    given,
    given_name,
    in_steps,
    numbers,
    searched,
    statistics,
    stored_numbers,
    sums,
    tried,
    words,
)
from .layout import Stream
from .plan import Plan, SidePlan
from .steps import Steps
from .text import Lines, bare, listed


class TorchPack:
    """Prints `pack_<side>`, and what reading takes, too."""

    def __init__(self, plan: Plan, side: SidePlan) -> None:
        self.plan, self.side = plan, side
        self.width = side.layout.code_width
        planes = side.layout.planes // side.layout.coupled
        self.planes = range(side.layout.row // self.width if side.layout.row else planes)
        self.prefix = side.letter
        self.steps = Steps(side, sp.Integer(1), "..., ", "")

    @property
    def _split(self) -> str:
        """The call that splits channels into planes."""
        if self.side.layout.row:
            return f"chunk({len(self.planes)}, -1)"
        sizes = [span.high - span.low for span in self.side.layout.spans[:: self.side.layout.coupled]]
        return f"split(({listed(map(str, sizes))}), -1)" if len(set(sizes)) > 1 else f"chunk({len(sizes)}, -1)"

    # ---- what a function takes ------------------------------------------------------------------------------------

    def inputs(self) -> list[str]:
        """The arguments that say where codes and scales are."""
        meta = self.side.layout.meta
        extra = ["shared"] if meta is not None and meta.shared else []
        return ["pages", *extra, *self.given()]

    def inputs_of_all(self) -> list[str]:
        """The same of all bands of a row."""
        if not self.side.band:
            return self.inputs()
        metas = [term.layout.meta for term in self.side.terms]
        return ["pages", *(["shared"] if any(meta is not None and meta.shared for meta in metas) else [])]

    def given(self) -> list[str]:
        """The arguments that come with the parameters."""
        side = self.side
        found = ["calibrated"] if side.static else []
        found += ["second"] if side.second is not None else []
        return found + (["table"] if side.alphabet.fitted else [])

    def _given(self, function: str) -> list[str]:
        """Lines that name the numbers of the parameters as this one of the side's functions takes them."""
        side, lines = self.side, list[str]()
        for row, kind in enumerate(("level", "decoded")):
            levels = [given_name(side, name) for name in given(side, function) if name.startswith(kind)]
            table = f"table[{row}]" if side.alphabet.matched else "table"
            lines += [f"{unpacked(levels)} = {table}.unbind()"] if levels else []
        return lines + ([f"{given_name(side, 'outer')} = second[:, None]"] if side.second is not None else [])

    # ---- packing --------------------------------------------------------------------------------------------------

    def pack(self) -> str:
        """Whole pages of numbers to the bytes of every section."""
        side, meta, out = self.side, self.side.layout.meta, Lines()
        if side.slots:
            return self._slots()
        takes = ["x", *(["squares"] if side.sketched else []), *counted(side), *self.given()]
        takes += ["start"] if side.factors else []
        with out.deeper(f"def pack_{side.label}({', '.join(takes)}):"):
            out.add(f'"""Bytes of every section that float32 x (pages, H, {self.plan.layout.page_tokens}, D) fills."""')
            if side.floats:
                if side.floats == "fp16":
                    out.add("x = torch.where(x == x, finite(x), x).to(torch.float16)")
                out.add("return (bytes_of(x.flatten(-2)),)")
                return str(out)
            if isinstance(side.store.code, LowRank):
                code = side.store.code
                how = f"tokens={code.tokens}, loops={code.loops}, factor={code.factor}"
                out.add(f"a, b = factors(x, start, {how})")
                out.add("return bytes_of(a.mT.flatten(-2)), bytes_of(b.flatten(-3))")
                return str(out)
            out.extend(self._given("loss" if side.alphabet.matched and searched(side) else "encode"))
            under: list[str] = []
            if side.store.measure is not None and not side.sketched:
                out.extend([] if side.static else [f"spoilt = nan_in(x, {self._block})"])
                out.add("x = finite(x)")
            if side.static:
                out.add(*self._calibrated("scale", "start"))
                under = numbers(side)
            elif meta is not None:
                self._measured(out)
                under = [self._spread(name) for name in coding(side)]
            coded = "nearest_vectors(x, table)" if side.alphabet.vectors else call(side, "encode", ["x", *under])
            if side.alphabet.sums:
                over = in_steps(side, "x", "torch.").replace("scale", under[0])
                coded = f"nearest_sums({over}, table, {turns(side)})"
            out.add(f"code = {coded}" if side.uniform is not None else f"code = {coded}.to(torch.uint8)")
            if side.raised:
                out.add(f"above, code = code >> {side.alphabet.bits}, code & {2**side.alphabet.bits - 1}")
            if not side.layout.digits:
                out.add(f"{unpacked(f'c{j}' for j in self.planes)} = code.{self._split}")
            sections = [self._stream(out, stream) for stream in side.layout.streams]
            if meta is not None:
                sections.append(self._metadata())
            for i, text in enumerate(sections):
                out.add(f"section{i} = {text}")
            names = [*(f"section{i}" for i in range(len(sections))), *(["above"] if side.raised else [])]
            out.add(f"return {unpacked(names)}")
        return str(out)

    def _slots(self) -> str:
        """Single numbers, already chosen, to the bytes of both sections: of keys a slot's row is of all the page."""
        out, keys = Lines(), self.side.name == "keys"
        with out.deeper(f"def pack_{self.side.label}(numbers, places):"):
            out.add(f'"""Bytes of slots (pages, H, blocks, slots, {"64 tokens" if keys else "D"}), chosen already."""')
            rows = [f"bytes_of({name}{'.transpose(2, 3)' * keys}.flatten(2))" for name in ("numbers", "places")]
            out.add(f"return {', '.join(rows)}")
        return str(out)

    @property
    def _block(self) -> str:
        meta = self.side.layout.meta
        assert meta is not None
        return f"({meta.tokens}, {meta.channels}, {meta.heads})"

    def _spread(self, name: str) -> str:
        return f"spread({name}, {self._block[1:-1]})"

    def _measured(self, out: Lines) -> None:
        """Statistics of every block, what is stored of it, its words."""
        side, block = self.side, self._block
        taken = {"low, high": "range_of(x, {})", "top": "top_of(x, {})", "squares": "summed(square(x), {})"}
        taken["sizes"] = "summed(magnitude(x), {})"
        if side.sketched:
            out.add("spoilt = nan(squares)")
        else:
            names = ", ".join(statistics(side))
            out.add(f"{names} = {taken[names].format(block)}")
            if side.scale.quantile is not None:
                out.add(f"bound = size_at(x, {block}, {side.scale.bounding(counted_numbers(side))})")
                out.add(*(f"{name} = {name}.clamp(-bound, bound)" for name in statistics(side)))
        for i, clip in enumerate(clips(side)):
            under = [*statistics(side), *counted(side), *([repr(float(clip))] if searched(side) else [])]
            measure = call(side, "measure", under)
            out.add(f"{', '.join(numbers(side))} = {measure}")
            if side.scale.refit:
                under = ["x", *(self._spread(name) for name in numbers(side))]
                out.add(f"{', '.join(sums(side))} = {call(side, 'products', under)}")
                out.add(*(f"{name} = summed({name}, {block})" for name in sums(side)))
                out.add(f"fitted = {call(side, 'refit', ['scale', *sums(side)])}")
            if not searched(side):
                continue
            under = ["x", *(self._spread(name) for name in (*tried(side), *counted(side)))]
            out.add(f"error = narrow(summed({call(side, 'loss', under)}, {block}))")
            if i == 0:
                out.add("least = error", *(f"best_{name} = {name}" for name in tried(side)))
            else:
                out.add("closer = error < least", "least = torch.where(closer, error, least)")
                out.add(*(f"best_{name} = torch.where(closer, {name}, best_{name})" for name in tried(side)))
        if searched(side):
            out.add(*(f"{name} = best_{name}" for name in tried(side)))
        out.add(f"{', '.join(words(side))} = {call(side, 'words', [*stored_numbers(side), 'spoilt'])}")

    def _calibrated(self, scale: str, offset: str) -> list[str]:
        """Lines that spread calibrated numbers (heads, groups) over (H, tokens, channels)."""
        block = self.side.scale.block
        channels = block.channels if isinstance(block.channels, int) else 1
        index = "[0]" if self.side.has_offset else ""
        lines = [f"{scale} = calibrated{index}[:, None].repeat_interleave({channels}, -1)"]
        if self.side.has_offset:
            lines.append(f"{offset} = calibrated[1][:, None].repeat_interleave({channels}, -1)")
        return lines

    def _stream(self, out: Lines, stream: Stream) -> str:
        """Add the lines that put one stream's bits into bytes; the section as an expression."""
        if stream.digits:
            return f"rows_of_bytes((digits_bytes(code, {stream.row_words}),), paired=True)"
        names = []
        for byte in (0,) if stream.paired else (0, 1):
            tiles = []
            for tile in range(stream.tiles):
                name = f"bits{stream.width}" + ("" if stream.paired else ("_low", "_high")[byte])
                name += f"_{tile}" if stream.tiles > 1 else ""
                for i, place in enumerate(p for p in stream.places if (p.tile, p.byte) == (tile, byte)):
                    bits = f"(c{place.plane} >> {stream.shift})" if stream.shift else f"c{place.plane}"
                    if len(self.side.layout.streams) > 1:
                        bits = f"({bits} & {2**stream.width - 1})"
                    out.add(f"{name} = {name} | ({bits} << {place.bit})" if i else f"{name} = {bare(bits)}")
                tiles.append(name)
            names.append(tiles[0] if len(tiles) == 1 else f"torch.cat(({listed(tiles)}), -1)")
        return f"rows_of_bytes(({listed(names)}), paired={stream.paired})"

    def _metadata(self) -> str:
        meta = self.side.layout.meta
        assert meta is not None
        order = ".mT" if meta.tokens == 1 else ""
        flat = ".flatten(1)" if meta.shared else ".flatten(-2)"
        words = [f"word{order}{flat}"] + ([f"second{order}{flat}"] if meta.kind == "words" else [])
        return f"bytes_of({words[0]})" if len(words) == 1 else f"bytes_of(torch.cat(({', '.join(words)}), -1))"


def unpacked(names: Iterable[str]) -> str:
    """Names on the left of an assignment, or returned."""
    names = list(names)
    return f"({names[0]},)" if len(names) == 1 else ", ".join(names)


def turns(side: SidePlan) -> str:
    """What a table's second entries are, as functions of sums take it: None, or how pairs lie."""
    code, rope = side.store.code, side.store.rope
    assert isinstance(code, Additive)
    if not code.commuting:
        return "turned=None"
    return f"turned={'neighbours' if rope is not None and rope.interleaved else 'halves'!r}"
