"""Quantizing into pages and reading them back, in Triton: the pack and unpack kernels of either side.

One pack program owns one token block (or 32 single tokens) of one kv head: statistics, metadata, codes, words.
"""

from __future__ import annotations

from .codec import functions, results
from .layout import PAIR, Stream, token_block
from .plan import Plan, SidePlan
from .text import Lines, bare, fill, padded, plus
from .triton_attend import parameters, pools, tokens_name
from .triton_meta import entry, section
from .triton_planes import Planes, static_read

PACK = """
@triton.jit(do_not_specialize=["offset", "ring", "first_step"])
def pack_$side(
    $args
):
    step = tl.program_id(0) + first_step
    bh = tl.program_id(1)
    b = bh // $heads
    h = bh % $heads
    begin = tl.load(begin_ptr + b)
    end = tl.load(end_ptr + b)
    first = tl.load(first_ptr + b)
    u = step * $span + tl.arange(0, $lanes_t)
    inside = (u >= begin) & (u < end)$span_mask
    if (step * $span < end) & (step * $span + $span > begin):
        page = tl.load(table_ptr + b.to(tl.int64) * table_width + step * $span // $page).to(tl.int64)
        t = u % $page
        row = (offset + (u - first) % ring).to(tl.int64)
        $lanes
        source = $rows_ptr + (bh.to(tl.int64) * total_rows + row)[:, None] * $head_dim + $lane[None, :]
        $body
"""

UNPACK = """
@triton.jit(do_not_specialize=["begin", "end"])
def unpack_$side($args):
    step = tl.program_id(0) + begin // $tile
    bh = tl.program_id(1)
    b = bh // $heads
    h = bh % $heads
    page = tl.load(table_ptr + b.to(tl.int64) * table_width + step * $tile // $page).to(tl.int64)
    page_token = step * $tile % $page
    $lanes
    $addresses
    out = out_ptr + bh.to(tl.int64) * (end - begin) * $head_dim
    $halves
"""


class Pack(Planes):
    """Prints `pack_keys` or `pack_values`, and the functions they call; tiles lie [tokens, lanes] for both sides."""

    def __init__(self, plan: Plan, side: SidePlan) -> None:
        super().__init__(plan, side)
        self.transposed = False
        self.single = token_block(side.store) == 1
        self.span = plan.span(side.name)
        self.tokens = padded(self.span)
        meta = side.layout.meta
        self.apart = meta is not None and meta.tokens > 1 and meta.channels == 1  # each channel has its own scale
        self.inside = "inside[:, None]" + (f" & {self.lane}_in[None, :]" if self.ragged else "")

    def lane_lines(self) -> list[str]:
        """Two channels a thread where each is measured: with wide loads many threads would measure the same eight."""
        lines = super().lane_lines()
        if not self.apart:
            return lines
        return [f"{self.lane} = tl.max_contiguous(tl.arange(0, {self.lanes}), 2)", *lines[1:]]

    def text(self) -> str:
        plan, side = self.plan, self.side
        body = Lines()
        if side.floats:
            self._floats(body)
        else:
            if any(not stream.paired for stream in side.layout.streams):
                body.add(
                    f"words = pool16_ptr + page * {plan.layout.page_bytes // 2} + h * {plan.layout.head_bytes // 2}"
                )
            if side.static:
                for j in range(side.layout.planes):
                    self._load(body, j)
                    body.extend(static_read(self, j, self.lane))
                    self._encode(body, j, f"{self.prefix}_scale[None, :]", f"{self.prefix}_offset[None, :]")
            else:
                self._online(body)
            self._words(body)
        pool_args = sorted(set(pools(plan)) | ({"pool8_ptr"} if side.layout.paired else set()))
        params = [p for p in parameters(plan) if p.startswith(side.name)]
        text = str(body)
        rows = "coded_ptr" if side.turned else "rows_ptr"  # mapped by `turn_<side>`
        args = [rows, "first_ptr", "begin_ptr", "end_ptr"]
        args += [p for p in pool_args if p in text] + ["table_ptr", *params]
        args += ["total_rows", "offset", "ring", "table_width", "first_step"]
        kernel = fill(
            PACK, side=side.name, rows_ptr=rows, args=[f"{name}," for name in args], heads=plan.shape.kv_heads,
            span=self.span, lanes_t=self.tokens, page=plan.layout.page_tokens, lanes=self.lane_lines(), lane=self.lane,
            span_mask=f" & (tl.arange(0, {self.tokens}) < {self.span})" if self.tokens != self.span else "",
            head_dim=side.dim, body=body.lines,
        )  # fmt: skip
        return "\n\n".join([*([] if side.floats else functions(side, "tl.")), kernel])

    def _floats(self, body: Lines) -> None:
        layout, side = self.plan.layout, self.side
        size = 4 if side.floats == "fp32" else 2
        start = (
            f"page * {layout.page_bytes // size} + h * {layout.head_bytes // size} + {side.layout.float_offset // size}"
        )
        body.add(f"out = pool_{side.floats}_ptr + {start}")
        body.add(f"out = out + t[:, None] * {self.side.dim} + {self.lane}[None, :]")
        for j in range(side.layout.planes):
            body.add(f"x = tl.load({self.at('source', j)}, mask={self.inside}, other=0.0).to(tl.float32)")
            if side.floats == "fp16":
                body.add("x = tl.where(x == x, finite(x), x).to(tl.float16)")
            body.add(f"tl.store({self.at('out', j)}, x, mask={self.inside})")

    def _load(self, body: Lines, plane: int) -> None:
        """x<plane>: loaded just before it is needed, as a token block of all channels would fill the registers."""
        body.add(f"x{plane} = tl.load({self.at('source', plane)}, mask={self.inside}, other=0.0).to(tl.float32)")

    # ---- statistics -----------------------------------------------------------------------------------------------

    def _online(self, body: Lines) -> None:
        """Statistics of every block of the tile, its metadata, its codes."""
        side, meta, planes = self.side, self.side.layout.meta, range(self.side.layout.planes)
        assert meta is not None
        size, base = section(side, self.plan.layout.page_bytes, self.plan.layout.head_bytes)
        body.add(f"meta = {'pool16_ptr' if size == 2 else 'pool32_ptr'} + {base}")
        whole = (1,) if self.single else (1, 0)
        if meta.heads > 1:
            body.add("# extremes over all heads that share the scale")
            self._start(body, [self.tokens] if self.single else [1])
            with body.deeper(
                f"for head in range(h // {meta.heads} * {meta.heads}, (h // {meta.heads} + 1) * {meta.heads}):"
            ):
                body.add(f"other = source + (head - h) * total_rows * {self.side.dim}")
                for j in planes:
                    body.add(f"x = tl.load({self.at('other', j)}, mask={self.inside}, other=0.0).to(tl.float32)")
                    self._fold(body, "x", whole)
            for j in planes:
                self._load(body, j)
            vector = "t" if self.single else "tl.arange(0, 1)"
            self._measured(body, "0", f"({vector} * 0 + h) % {meta.heads} == 0", planes)
        elif meta.channels == 1:
            for j in planes:
                self._load(body, j)
                self._start(body, None, f"x{j}", (0,))
                self._measured(body, f"({self.lane} + {j * self.width})" if j else self.lane, "", [j])
        elif meta.channels % self.width == 0:
            per_group = len(planes) // meta.groups
            for group in range(meta.groups):
                members = planes[group * per_group : (group + 1) * per_group]
                for j in members:
                    self._load(body, j)
                self._start(body, None, f"x{members[0]}", whole)
                for j in members[1:]:
                    self._fold(body, f"x{j}", whole)
                self._measured(body, str(group), "", members)
        else:
            body.add("# groups are narrower than a plane, or cross planes: each lane walks its own group")
            for j in planes:
                lane = f"({self.lane} + {j * self.width})"
                self._start(body, [self.tokens, self.lanes] if self.single else [self.lanes])
                with body.deeper(f"for near in range(0, {meta.channels}):"):
                    near = f"({lane} // {meta.channels} * {meta.channels} + near - {self.lane})[None, :]"
                    body.add(f"x = tl.load(source + {near}, mask={self.inside}, other=0.0).to(tl.float32)")
                    self._fold(body, "x", () if self.single else (0,))
                self._load(body, j)
                self._measured(body, lane, f"{lane} % {meta.channels} == 0", [j])

    def _extreme(self, function: str, name: str, axes: tuple[int, ...]) -> str:
        text, reduce = {
            "low": (f"lowest({name}, {self.inside})", "tl.min"),
            "high": (f"highest({name}, {self.inside})", "tl.max"),
            "spoilt": (f"nan({name})", "tl.max"),
        }[function]
        for axis in axes:
            text = f"{reduce}({text}, {axis})"
        return text

    def _start(self, body: Lines, shape: list[int] | None, name: str = "", axes: tuple[int, ...] = ()) -> None:
        """low, high, spoilt of a tile, or of nothing yet."""
        if shape is not None:
            body.add(f"low = tl.full({shape}, 65504.0, tl.float32)", f"high = tl.full({shape}, -65504.0, tl.float32)")
            body.add(f"spoilt = tl.zeros({shape}, tl.int32)")
            return
        one = " + tl.zeros([1], {kind})" if axes == (1, 0) else ""
        for what, kind in (("low", "tl.float32"), ("high", "tl.float32"), ("spoilt", "tl.int32")):
            body.add(f"{what} = {self._extreme(what, name, axes)}{one.format(kind=kind)}")

    def _fold(self, body: Lines, name: str, axes: tuple[int, ...]) -> None:
        for what, function in (("low", "minimum"), ("high", "maximum"), ("spoilt", "maximum")):
            body.add(f"{what} = tl.{function}({what}, {self._extreme(what, name, axes)})")

    # ---- metadata and codes ---------------------------------------------------------------------------------------

    def _measured(self, body: Lines, group: str, only: str, members: range | list[int]) -> None:
        """Measure, store the metadata of channel group `group` where `only` holds, encode the member planes."""
        side, meta = self.side, self.side.layout.meta
        assert meta is not None
        body.add(f"{', '.join(results(side))} = measure_{side.name}(low, high, spoilt)")
        block = f"step * {self.span} % {self.plan.layout.page_tokens} // {meta.tokens}" if meta.blocks > 1 else "0"
        wide = f"{group} // {meta.channels}" if meta.channels > 1 and not group.isdigit() else group
        lane_mask = f"{self.lane} < {self.width}"
        if group.isdigit():  # one number a token, or one in all
            index, mask = (entry(side, "t", group), "inside") if self.single else (entry(side, block, group), "")
            column = "[:, None]"
            if not self.single:
                index, mask = f"{index} + tl.arange(0, 1)", "tl.arange(0, 1) == 0"
        elif self.single:  # a number for each token and lane
            index, column = entry(side, "t[:, None]", f"({wide})[None, :]"), ""
            mask, only = self.inside, f"({only})[None, :]" if only else ""
        else:
            index, mask, column = entry(side, block, wide), lane_mask, "[None, :]"
        mask = f"({mask}) & ({only})" if only else mask
        body.add(f"tl.store(meta + {index}, word, mask={mask})")
        if meta.kind == "words":
            body.add(f"tl.store(meta + {index} + {meta.total}, second, mask={mask})")
        for j in members:
            self._encode(body, j, f"scale{column}", f"start{column}")

    def _encode(self, body: Lines, plane: int, scale: str, start: str) -> None:
        """Codes of a plane, put into their words at once: they are not kept."""
        rest = f", {start}" if self.side.has_offset else ""
        body.add(f"c = encode_{self.side.name}(x{plane}, {scale}{rest})")
        for stream in self.side.layout.streams:
            place = stream.places[plane]
            bits = f"(c >> {stream.shift})" if stream.shift else "c"
            if self.side.code.bits != stream.width + stream.shift or len(self.side.layout.streams) > 1:
                bits = f"({bits} & {2**stream.width - 1})"
            shift = 8 * place.byte + place.bit
            word = self._word(stream, place.tile)
            begun = any(other.tile == place.tile for other in stream.places[:plane])
            moved = f"({bits} << {shift})" if shift else bits
            body.add(f"{word} = {word} | {moved}" if begun else f"{word} = {bare(moved)}")

    def _word(self, stream: Stream, tile: int) -> str:
        return f"word{stream.width}_{tile}"

    def _words(self, body: Lines) -> None:
        """Store the words: whole where a token has its own, else single bytes."""
        plan, lane = self.plan, self.lane
        for stream in self.side.layout.streams:
            if stream.paired:
                base = f"page * {plan.layout.page_bytes} + h * {plan.layout.head_bytes} + {stream.offset}"
                row = f"(t // {2 * PAIR} * {PAIR} + t % {PAIR}) * {2 * stream.row_words} + t % {2 * PAIR} // {PAIR}"
                body.add(f"byte = {row}")
                body.add(f"out = pool8_ptr + {base} + byte[:, None] + 2 * {lane}[None, :]")
            else:
                body.add(f"out = words + t[:, None] * {stream.row_words} + {lane}[None, :]{plus(stream.offset // 2)}")
            for tile in range(stream.tiles):
                step = tile * self.width * (2 if stream.paired else 1)
                kind = "tl.uint8" if stream.paired else "tl.int16"
                at = f"out + {step}" if step else "out"
                body.add(f"tl.store({at}, {self._word(stream, tile)}.to({kind}), mask={self.inside})")


class Unpack(Planes):
    """Prints `unpack_keys` or `unpack_values`: decoded numbers, one by one, as float32."""

    def __init__(self, plan: Plan, side: SidePlan) -> None:
        super().__init__(plan, side)
        self.transposed = False

    def text(self, addresses: list[str]) -> str:
        plan, side, halves = self.plan, self.side, Lines()
        mask = "inside[:, None]" + (f" & {self.lane}_in[None, :]" if self.ragged else "")
        for half in range(plan.halves):
            t = tokens_name(plan, half)
            shift = f" + {half * plan.half}" if half else ""
            halves.add(f"u = step * {plan.tile}{shift} + tl.arange(0, {plan.half})")
            halves.add("inside = (u >= begin) & (u < end)")
            if side.floats:
                at = f"{side.name[:-1]}_floats + {t}[:, None] * {side.dim} + {self.lane}[None, :]"
                for j in range(side.layout.planes):
                    halves.add(f"n{j} = tl.load({at} + {j * self.width}, mask={mask}, other=0.0).to(tl.float32)")
            else:
                halves.extend([*self.load(half, t), *self.decode(half, t)])
            halves.add(f"place = out + (u - begin)[:, None] * {side.dim} + {self.lane}[None, :]")
            for j in range(side.layout.planes):
                halves.add(f"tl.store({self.at('place', j)}, n{j}, mask={mask})")
        other = "k" if side.name == "values" else "v"
        keep = [a for a in addresses if not a.startswith((f"{other}_meta", "page_token"))]
        text = "\n".join([*keep, *halves.lines])
        args = [p for p in pools(plan) if p in text] + ["table_ptr"]
        args += [p for p in parameters(plan) if p.startswith(side.name)] + ["out_ptr", "begin", "end", "table_width"]
        return fill(
            UNPACK, side=side.name, args=", ".join(args), heads=plan.shape.kv_heads, tile=plan.tile,
            page=plan.layout.page_tokens, head_dim=side.dim, lanes=self.lane_lines(), addresses=keep,
            halves=halves.lines,
        )  # fmt: skip
