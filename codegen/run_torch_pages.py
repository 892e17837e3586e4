"""The torch backend's pages: gathered, decoded, quantized and scattered, around the generated functions."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from kvdsl.appending import pack_due, write_token
from kvdsl.codes import SLOT_TOKENS
from kvdsl.kernels import Params, Places, Room, Side
from kvdsl.params import ROPE
from kvdsl.rope import table
from kvdsl.scheme import SIDES

from .host import rows_of_bytes, saturated, section
from .host_balance import balanced
from .host_beside import Taken, level_counts, placed, rows_there
from .host_channels import among, choose
from .host_channels import given as beside
from .host_maps import cartesian, mapped, polar, rotated
from .host_slots import Split, kept, split
from .plan import Plan, SidePlan

PACK_AT_ONCE = 64  # pages quantized at a time: bounds the working memory of a long prompt


def on_host(numbers: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of all sequences, (B,) each, as integers.  Waits for the device, once."""
    return torch.stack(tuple(numbers)).tolist() if numbers[0].is_cuda else [of_all.tolist() for of_all in numbers]


class TorchPages:
    """The functions of one generated module that make pages or decode them."""

    schedule = "torch"
    """See KernelSet."""

    def __init__(self, plan: Plan, module: ModuleType) -> None:
        self.plan, self.module = plan, module

    def schedule_for(self, batch: int, tokens: int) -> str:
        """See KernelSet."""
        return self.schedule

    def _blobs(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Pages (..., page_bytes) as blobs (..., H, head_bytes), and what heads share (..., bytes)."""
        layout = self.plan.layout
        split = layout.head_bytes * layout.kv_heads
        return pages[..., :split].unflatten(-1, (layout.kv_heads, layout.head_bytes)), pages[..., split:]

    def _gather(self, pool: Tensor, table: Tensor, low: int, high: int) -> Tensor:
        """Pages `low` to `high` of every sequence: uint8 (B, pages, page_bytes)."""
        ids = table[:, low:high]
        return pool.index_select(0, ids.flatten()).unflatten(0, ids.shape)  # copies whole pages, unlike pool[ids]

    @staticmethod
    def _slices(rows: Tensor, offset: int, first: int, begin: int, end: int) -> Tensor:
        """Rows of the tokens u in [begin, end), float32 (B, H, tokens, D), where all sequences' rings begin at u =
        `first`, behind `offset` other rows."""
        ring, parts = rows.shape[2] - offset, []
        while begin < end:
            row = (begin - first) % ring
            count = min(end - begin, ring - row)
            parts.append(rows[:, :, offset + row : offset + row + count])
            begin += count
        return (torch.cat(parts, 2) if len(parts) > 1 else (parts or [rows[:, :, :0]])[0]).to(torch.float32)

    def _inputs(self, part: SidePlan, pages: Tensor, params: Params) -> list[Tensor]:
        """The arguments of a function that reads one term, or all bands, of pages (B, pages, page_bytes)."""
        blobs, shared = self._blobs(pages)
        given = [blobs.movedim(2, 1)]
        metas = [term.layout.meta for term in part.parts]
        if any(meta is not None and meta.shared for meta in metas):
            given.append(shared)
        return [*given, *self._given(part, params)]

    def _given(self, part: SidePlan, params: Params) -> list[Tensor]:
        """What comes with the parameters, in the order in which the term's functions take it."""
        wanted = (part.static, "scale"), (part.second is not None, "scale.scale"), (part.alphabet.fitted, "code")
        return [params[f"{part.path}.{name}"] for takes, name in wanted if takes]

    def _turned(self, part: SidePlan, rows: Tensor, params: Params) -> Tensor:
        """The numbers to be coded of rows (n, H, T, D) without positions, float32."""
        if not part.turned:
            return rows
        clean = saturated(rows) if part.rope is None or part.mapped else rows
        if part.mapped:
            clean = mapped(clean, params[f"{part.home}.encode"], params.get(f"{part.home}.encode_shift"))
        return polar(clean, part.store.levels) if part.polar else clean

    def _decoded(self, part: SidePlan, pages: Tensor, params: Params, span: slice) -> Tensor:
        """Tokens `span` of pages (B, pages, page_bytes) decoded, without positions: one term, (B, H, T, D)."""
        whole: Tensor = getattr(self.module, f"unpack_{part.space}")(*self._inputs(part, pages, params))
        if part.beside:
            whole = placed(whole, self._channels(part, pages), part.choice.tokens, self.plan.shape.head_dim)
        coded = whole[:, :, span]
        coded = cartesian(coded, part.store.levels) if part.polar else coded
        if not part.mapped:
            return coded
        found = mapped(coded, params[f"{part.home}.decode"], params.get(f"{part.home}.decode_shift"))
        if not part.masked:
            return found
        theirs = among(self._channels(part, pages), part.choice.tokens, found.shape[3])[:, :, span]
        return torch.where(theirs == part.store.gathers, found, 0.0)

    def _placed(
        self, x: Tensor, begin: int, params: Params, dtype: torch.dtype, places: Places | None = None
    ) -> Tensor:
        """x (B, H, T, D) at the positions of the tokens from u = begin on."""
        u = torch.arange(begin, begin + x.shape[2], device=x.device)[None]
        return self._rotated(x, self._positions(u, places), params, dtype, 1)

    def _positions(self, u: Tensor, places: Places | None, b: Tensor | None = None) -> Tensor:
        """Where the tokens at u (n or 1, T) stand, those of the sequences b (n,), or of all: (n or 1, H or 1, T).  Of
        tokens that are not there it is any position that there is."""
        t = (u + self.plan.sinks).clamp(min=0)[:, None]
        if places is None:
            return t
        at = places.at if b is None else places.at[b]
        stand = at.gather(2, t.clamp(max=at.shape[2] - 1).expand(*at.shape[:2], -1)).long() + places.origin
        return stand.clamp(0, places.end - 1)

    def _rotated(self, x: Tensor, position: Tensor, params: Params, dtype: torch.dtype, sign: int) -> Tensor:
        """Rotary positions put on x (n, H, T, D) of tokens at these (n or 1, H or 1, T), or with sign -1 taken off.

        A NaN spoils its vector."""
        channels, frequencies = x.shape[3], params[ROPE]
        rows = table(frequencies, channels, int(position.max()) + 1, x.device)[position].to(dtype)
        cos, sin = (half[..., : len(frequencies)] for half in rows.chunk(2, -1))
        rope = self.plan.keys.rope
        assert rope is not None
        spoilt = torch.isnan(x).any(-1, keepdim=True)
        return torch.where(spoilt, torch.nan, rotated(x, (cos, sign * sin), rope.interleaved))

    def pack(self, side: Side, rows: Tensor, first: Tensor, offset: int, begin: Tensor, end: Tensor,
             reach: tuple[int, int], pool: Tensor, table: Tensor, params: Params,
             places: Places | None = None) -> None:  # fmt: skip
        if self.plan.side(side).shared:  # packed with the keys
            return
        tokens = self.plan.layout.page_tokens
        low, high = reach[0] // tokens, -(-reach[1] // tokens)
        if self.plan.side(side).layout.rowwise:
            of_all = set(zip(*on_host((begin, end, first)), strict=True))
            start, stop, ring = of_all.pop() if len(of_all) == 1 else (0, 0, 0)
            if start < stop and start // tokens == (stop - 1) // tokens:
                self._pack_rows(side, rows, ring, offset, (start, stop), pool, table, params, places)
                return
        starts = torch.arange(low, max(low, high), device=pool.device) * tokens
        touched = (starts < end[:, None]) & (starts + tokens > begin[:, None])
        sequences, numbers = touched.nonzero(as_tuple=True)
        for chunk in range(0, len(sequences), PACK_AT_ONCE):
            b, page = sequences[chunk : chunk + PACK_AT_ONCE], numbers[chunk : chunk + PACK_AT_ONCE] + low
            self._pack_pages(side, rows, first, offset, begin, end, pool, table, params, b, page, places)

    @property
    def packs_at_once(self) -> None:
        """See KernelSet: sequences of which the host knows where they are take fewer calls."""

    def append(self, keys: Tensor, values: Tensor, into: Room, params: Params) -> None:
        for side, fresh in zip(SIDES, (keys, values), strict=True):
            write_token(into.rows(side), fresh, into.length, self.plan.sinks)
            pack_due(self.pack, side, into, params, self.plan.sinks, self.plan.layout.page_tokens)

    def _pack_rows(self, side: Side, rows: Tensor, first: int, offset: int, reach: tuple[int, int], pool: Tensor,
                   table: Tensor, params: Params, places: Places | None) -> None:  # fmt: skip
        """Tokens u in `reach`, of one page, of all sequences: as in most steps of decoding.  Only these are quantized,
        and what is written of them are slices."""
        page, at = divmod(reach[0], self.plan.layout.page_tokens)
        span, ids = slice(at, at + reach[1] - reach[0]), table[:, page]
        x, whole = self._slices(rows, offset, first, *reach), self.plan.side(side)
        alone = len(ids) == 1 and not pool.is_cuda  # one page is written where it lies
        pages = pool.narrow(0, int(ids), 1) if alone else pool.index_select(0, ids)
        if whole.rope is not None:
            u = torch.arange(*reach, device=pool.device)[None]
            x = self._rotated(saturated(x), self._positions(u, places), params, torch.float64, -1)
        for part in whole.spaces:
            turned = self._turned(part, x, params)
            for term in part.parts:
                numbers = turned[..., term.first : term.first + term.dim] if term.band else turned
                self._write_rows(term, self._sections(term, x, numbers, params), span, pages)
            if part.residual is not None:
                x = saturated(x) - self._decoded(part, pages[:, None], params, span)
        if not alone:
            pool.index_copy_(0, ids.long(), pages)

    def _write_rows(self, part: SidePlan, sections: list[Tensor], span: slice, pages: Tensor) -> None:
        """Write the sections of one term of the tokens in `span` into pages."""
        layout, (blobs, shared) = self.plan.layout, self._blobs(pages)
        rows = [(stream.offset, 2 * stream.row_words) for stream in part.layout.streams]
        if part.floats:
            rows = [(part.layout.float_offset, sections[0].shape[-1] // (span.stop - span.start))]
        for (offset, size), new in zip(rows, sections, strict=False):
            held = blobs[..., offset : offset + layout.page_tokens * size].unflatten(-1, (-1, size))[..., span, :]
            held.copy_(new.unflatten(-1, (-1, size)))
        meta = part.layout.meta
        if meta is None:
            return
        here = shared if meta.shared else blobs
        start = meta.offset - (layout.head_bytes * layout.kv_heads if meta.shared else 0)
        each = meta.element * (meta.groups if meta.tokens > 1 else 1)  # bytes that blocks are apart
        held = here[..., start : start + meta.size].unflatten(-1, (-1, meta.blocks, each))
        held = held[..., span.start // meta.tokens : span.stop // meta.tokens, :]
        held.copy_(sections[-1].unflatten(-1, tuple(held.shape[-3:])))

    def _pack_pages(self, side: Side, rows: Tensor, first: Tensor, offset: int, begin: Tensor, end: Tensor,
                    pool: Tensor, table: Tensor, params: Params, b: Tensor, page: Tensor,
                    places: Places | None = None) -> None:  # fmt: skip
        layout = self.plan.layout
        u = page[:, None] * layout.page_tokens + torch.arange(layout.page_tokens, device=pool.device)
        inside = (u >= begin[b, None]) & (u < end[b, None])
        ring = rows.shape[2] - offset
        row = torch.where(inside, offset + torch.remainder(u - first[b, None], ring), 0)
        x = rows[b[:, None], :, row].movedim(2, 1).to(torch.float32)
        x = torch.where(inside[:, None, :, None], x, 0.0)
        ids = table[b, page].long()
        pages = pool[ids]
        whole = self.plan.side(side)
        if whole.rope is not None:
            x = self._rotated(saturated(x), self._positions(u, places, b), params, torch.float64, -1)
        taken = split(x, whole.sparse, side, params.get(f"{side}.outliers")) if whole.sparse else None
        chosen, above = self._choose(whole, x, inside, pages) if whole.parted else None, None
        for part in whole.spaces:
            if taken is not None and part.slots:
                self._write_slots(part, x, taken, inside, pages)
            elif chosen is not None and part.beside:
                self._write_beside(part, x if above is None else above, chosen.channels, inside, pages)
            else:
                given = taken.filled if taken is not None and part is whole else x
                if chosen is not None and part.parted:
                    given = beside(part.parted, x, chosen.theirs)
                turned = self._turned(part, given, params)
                if part.layout.across:
                    turned, factors = balanced(part, turned)
                    self._write_across(part, factors, inside, pages)
                for term in part.parts:
                    numbers = turned[..., term.first : term.first + term.dim] if term.band else turned
                    above = self._write(term, given, numbers, inside, pages, params, chosen)
            if part.residual is not None:
                x = saturated(x) - self._decoded(part, pages[:, None], params, slice(None))
        pool[ids] = pages

    def _choose(self, part: SidePlan, x: Tensor, inside: Tensor, pages: Tensor) -> Taken:
        """Choose channels of x (pages, H, T, D) and write which ones they are."""
        assert part.parted is not None
        held, channels = part.choice, choose(x, part.parted.choice)
        marks = inside.unflatten(-1, (held.blocks, held.tokens)).any(-1).repeat_interleave(held.count, -1)
        self._merge(self._blobs(pages)[0], held.offset, channels.to(torch.uint8).flatten(-2), marks[:, None])
        return Taken(channels, among(channels, held.tokens, x.shape[3]))

    def _channels(self, part: SidePlan, pages: Tensor) -> Tensor:
        """Which channels are chosen in pages (B, pages, page_bytes): uint8 (B, H, blocks, count)."""
        held, blobs = part.choice, self._blobs(pages)[0].movedim(2, 1)
        return section(blobs, held.offset, held.blocks * held.count, torch.uint8).reshape(
            *blobs.shape[:2], -1, held.count
        )

    def _write_across(self, part: SidePlan, factors: Tensor, inside: Tensor, pages: Tensor) -> None:
        """Write the factors' bytes (pages, H, tiles, size) into pages, where tiles are inside."""
        assert part.layout.across is not None
        marks = inside.unflatten(-1, (-1, part.layout.across.tokens)).any(-1).repeat_interleave(factors.shape[-1], -1)
        self._merge(self._blobs(pages)[0], part.layout.across.offset, factors.flatten(-2), marks[:, None])

    def _write_slots(self, part: SidePlan, x: Tensor, taken: Split, inside: Tensor, pages: Tensor) -> None:
        """Write what stands in slots of x (pages, H, T, D) into pages, where blocks of tokens are inside."""
        slots = part.slots
        assert slots is not None
        sections = getattr(self.module, f"pack_{part.label}")(kept(x, taken, part.name), taken.places.to(torch.uint8))
        if part.name == "keys":
            marks = inside.repeat(1, slots.count)
        else:
            blocks = inside.unflatten(-1, (-1, SLOT_TOKENS)).any(-1)
            marks = blocks.repeat_interleave(slots.count * slots.width, -1)
        blobs, _ = self._blobs(pages)
        self._merge(blobs, slots.offset, sections[0], marks.repeat_interleave(2, -1)[:, None])
        self._merge(blobs, slots.places_offset, sections[1], marks[:, None])

    def _write_beside(self, part: SidePlan, x: Tensor, channels: Tensor, inside: Tensor, pages: Tensor) -> None:
        """Write what is kept of x (pages, H, T, D), numbers or codes, at chosen channels, where tokens are inside."""
        held, rows = part.beside, rows_there(part, x, channels)
        assert held is not None
        marks = inside[:, :: held.together].repeat_interleave(rows.shape[-1], -1)
        self._merge(self._blobs(pages)[0], held.offset, rows.flatten(-2), marks[:, None])

    def _write(self, part: SidePlan, x: Tensor, turned: Tensor, inside: Tensor, pages: Tensor, params: Params,
               chosen: Taken | None = None) -> Tensor | None:  # fmt: skip
        """Write one term of x (pages, H, T, D), whose numbers to be coded are given, into pages, where tokens are
        inside; the bits of codes above those that stand among the others', where some have more."""
        layout, sections = self.plan.layout, self._sections(part, x, turned, params, chosen)
        blobs, shared = self._blobs(pages)
        if part.floats:
            size = part.layout.float_offset
            width = sections[0].shape[-1] // layout.page_tokens
            self._merge(blobs, size, sections[0], inside.repeat_interleave(width, -1)[:, None])
        if (held := part.factors) is not None:
            marks = inside.repeat(1, held.rank).repeat_interleave(2, -1)[:, None]
            self._merge(blobs, held.offset, sections[0], marks)
            blocks = inside.unflatten(-1, (held.blocks, held.tokens)).any(-1)
            marks = blocks.repeat_interleave(2 * held.rank * part.dim, -1)[:, None]
            self._merge(blobs, held.vectors_offset, sections[1], marks)
        for stream in part.layout.streams:
            marks = inside[:, None, :, None].expand(-1, 1, -1, stream.row_words)
            marks = rows_of_bytes((marks,) if stream.paired else (marks, marks), paired=stream.paired)
            self._merge(blobs, stream.offset, sections.pop(0), marks)
        meta = part.layout.meta
        if meta is not None:
            blocks = inside.unflatten(-1, (meta.blocks, meta.tokens)).any(-1)
            marks = blocks[:, None, :].expand(-1, meta.groups, -1) if meta.tokens == 1 else blocks[..., None]
            marks = marks.expand(-1, -1, meta.groups) if meta.tokens > 1 else marks
            marks = marks.flatten(1)
            if meta.shared:
                marks = marks.repeat(1, meta.head_groups)
            marks = marks.repeat(1, 2) if meta.kind == "words" else marks
            marks = marks.repeat_interleave(meta.element, -1)
            if meta.shared:
                self._merge(shared, meta.offset - layout.head_bytes * layout.kv_heads, sections.pop(0), marks)
            else:
                self._merge(blobs, meta.offset, sections.pop(0), marks[:, None])
        return sections[0] if part.raised else None

    def _sections(
        self, part: SidePlan, x: Tensor, turned: Tensor, params: Params, chosen: Taken | None = None
    ) -> list[Tensor]:
        """What the generated function makes of one term of x (n, H, T, D), whose numbers to be coded are given."""
        given = [turned]
        if part.sketched:  # one sum a token, before the vector is mapped: (n, H, T, 1)
            given.append(saturated(x).to(torch.float64).square().sum(-1, keepdim=True))
        if chosen is not None and part.raised:
            given.append(level_counts(part, chosen.theirs))
        more = [params[f"{part.home}.start"]] if part.factors else []
        return list(getattr(self.module, f"pack_{part.label}")(*given, *self._given(part, params), *more))

    @staticmethod
    def _merge(target: Tensor, offset: int, new: Tensor, marks: Tensor) -> None:
        """Write the marked bytes of a section into gathered pages."""
        view = target[..., offset : offset + new.shape[-1]]
        view.copy_(torch.where(marks, new, view))

    def unpack(
        self, side: Side, pool: Tensor, table: Tensor, begin: int, end: int, params: Params,
        places: Places | None = None,
    ) -> Tensor:  # fmt: skip
        shape, tokens = self.plan.shape, self.plan.layout.page_tokens
        if end <= begin:
            return torch.empty(table.shape[0], shape.kv_heads, 0, self.plan.side(side).channels, device=pool.device)
        low, high = begin // tokens, -(-end // tokens)
        pages, span = self._gather(pool, table, low, high), slice(begin - low * tokens, end - low * tokens)
        whole = self.plan.side(side)
        *others, last = (self._decoded(part, pages, params, span) for part in whole.spaces)
        found = sum(reversed(others), last)  # each store's number plus that of all that it left
        return found if whole.rope is None else self._placed(found, begin, params, torch.float64, places)
