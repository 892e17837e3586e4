"""The torch backend: pages gathered and scattered, windows and masks, around the generated functions.

It runs on any device.  Working memory grows with the packed tokens that a call reads; the pool itself is never copied.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from kvdsl.codes import SLOT_TOKENS
from kvdsl.kernels import AttentionState, Params, Side
from kvdsl.params import ROPE
from kvdsl.rope import table
from kvdsl.spaces import applied

from .host import cartesian, mapped, polar, rotated, rows_of_bytes, saturated, section
from .host_beside import Taken, level_counts, met_at, placed, rows_there
from .host_channels import among, choose, queries
from .host_channels import given as beside
from .host_slots import Split, kept, split
from .plan import Plan, SidePlan

LOG2E = 1.4426950408889634
PACK_AT_ONCE = 64  # pages quantized at a time: bounds the working memory of a long prompt


class TorchModule:
    """The functions of one generated module, bound to pools and tables."""

    def __init__(self, plan: Plan, module: ModuleType) -> None:
        self.plan, self.module = plan, module

    # ---- pages ----------------------------------------------------------------------------------------------------

    def _blobs(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Pages (..., page_bytes) as blobs (..., H, head_bytes), and what heads share (..., bytes)."""
        layout = self.plan.layout
        split = layout.head_bytes * layout.kv_heads
        return pages[..., :split].unflatten(-1, (layout.kv_heads, layout.head_bytes)), pages[..., split:]

    def _gather(self, pool: Tensor, table: Tensor, low: int, high: int) -> Tensor:
        """Pages `low` to `high` of every sequence: uint8 (B, pages, page_bytes)."""
        return pool[table[:, low:high].long()]

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
        wanted = (part.static, "scale"), (part.second is not None, "scale.scale"), (part.alphabet.given, "code")
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

    def _placed(self, x: Tensor, begin: int, params: Params, dtype: torch.dtype) -> Tensor:
        """x (B, H, T, D) at the positions of the tokens from u = begin on."""
        u = torch.arange(begin, begin + x.shape[2], device=x.device)[None]
        return self._rotated(x, u, params, dtype, 1)

    def _rotated(self, x: Tensor, u: Tensor, params: Params, dtype: torch.dtype, sign: int) -> Tensor:
        """Rotary positions put on x (n, H, T, D) of the tokens at u (n or 1, T), or with sign -1 taken off.

        A NaN spoils its vector."""
        position = (u + self.plan.sinks).clamp(min=0)
        channels, frequencies = x.shape[3], params[ROPE]
        rows = table(frequencies, channels, int(position.max()) + 1, x.device)[position][:, None].to(dtype)
        cos, sin = (half[..., : len(frequencies)] for half in rows.chunk(2, -1))
        rope = self.plan.keys.rope
        assert rope is not None
        spoilt = torch.isnan(x).any(-1, keepdim=True)
        return torch.where(spoilt, torch.nan, rotated(x, (cos, sign * sin), rope.interleaved))

    def pack(self, side: Side, rows: Tensor, first: Tensor, offset: int, begin: Tensor, end: Tensor,
             reach: tuple[int, int], pool: Tensor, table: Tensor, params: Params) -> None:  # fmt: skip
        tokens = self.plan.layout.page_tokens
        low, high = reach[0] // tokens, -(-reach[1] // tokens)
        starts = torch.arange(low, max(low, high), device=pool.device) * tokens
        touched = (starts < end[:, None]) & (starts + tokens > begin[:, None])
        sequences, places = touched.nonzero(as_tuple=True)
        for chunk in range(0, len(sequences), PACK_AT_ONCE):
            b, page = sequences[chunk : chunk + PACK_AT_ONCE], places[chunk : chunk + PACK_AT_ONCE] + low
            self._pack_pages(side, rows, first, offset, begin, end, pool, table, params, b, page)

    def _pack_pages(self, side: Side, rows: Tensor, first: Tensor, offset: int, begin: Tensor, end: Tensor,
                    pool: Tensor, table: Tensor, params: Params, b: Tensor, page: Tensor) -> None:  # fmt: skip
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
            x = self._rotated(saturated(x), u, params, torch.float64, -1)
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
        layout = self.plan.layout
        given = [turned]
        if part.sketched:  # one sum a token, before the vector is mapped: (pages, H, T, 1)
            given.append(saturated(x).to(torch.float64).square().sum(-1, keepdim=True))
        if chosen is not None and part.raised:
            given.append(level_counts(part, chosen.theirs))
        more = [params[f"{part.home}.start"]] if part.factors else []
        sections = list(getattr(self.module, f"pack_{part.label}")(*given, *self._given(part, params), *more))
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

    @staticmethod
    def _merge(target: Tensor, offset: int, new: Tensor, marks: Tensor) -> None:
        """Write the marked bytes of a section into gathered pages."""
        view = target[..., offset : offset + new.shape[-1]]
        view.copy_(torch.where(marks, new, view))

    def unpack(self, side: Side, pool: Tensor, table: Tensor, begin: int, end: int, params: Params) -> Tensor:
        shape, tokens = self.plan.shape, self.plan.layout.page_tokens
        if end <= begin:
            return torch.empty(table.shape[0], shape.kv_heads, 0, shape.head_dim, device=pool.device)
        low, high = begin // tokens, -(-end // tokens)
        pages, span = self._gather(pool, table, low, high), slice(begin - low * tokens, end - low * tokens)
        whole = self.plan.side(side)
        *others, last = (self._decoded(part, pages, params, span) for part in whole.spaces)
        found = sum(reversed(others), last)  # each store's number plus that of all that it left
        return found if whole.rope is None else self._placed(found, begin, params, torch.float64)

    # ---- attention ------------------------------------------------------------------------------------------------

    def _rows(self, query: Tensor, factor: float) -> Tensor:
        """Query (B, Hq, Q, D) as columns (B, H, D, Q * group), float32, scaled."""
        batch, _, queries, dim = query.shape
        grouped = query.to(torch.float32).mul(factor).unflatten(1, (self.plan.shape.kv_heads, -1))
        return grouped.movedim(2, 3).reshape(batch, self.plan.shape.kv_heads, queries * self.plan.shape.group, dim).mT

    def _heads(self, x: Tensor, queries: int) -> Tensor:
        """(B, H, Q * group, n) back to (B, Hq, Q, n)."""
        return x.unflatten(2, (queries, self.plan.shape.group)).movedim(3, 2).flatten(1, 2)

    def scores(self, query: Tensor, pool: Tensor, table: Tensor, tokens: int, params: Params) -> Tensor:
        batch, heads, queries, _ = query.shape
        if tokens == 0:
            return torch.empty(batch, heads, queries, 0, device=query.device)
        pages = -(-tokens // self.plan.layout.page_tokens)
        score = self._scores_of_codes(self._rows(query, 1.0), self._gather(pool, table, 0, pages), 0, params)
        return self._heads(score.mT[..., :tokens], queries)

    def _scores_of_codes(self, columns: Tensor, pages: Tensor, first: int, params: Params) -> Tensor:
        """q.k of the tokens of pages (B, pages, page_bytes), packed from u = first on, for queries (B, H, D, rows): the
        query is mapped, not the keys, but for rotary positions and what is behind them."""
        if self.plan.keys.rope is not None:
            decoded, *others = (
                getattr(self.module, f"unpack_{part.space}")(*self._inputs(part, pages, params))
                for part in self.plan.keys.spaces
            )
            if self.plan.keys.mapped:
                decoded = applied(params["keys.decode"], decoded)
            if self.plan.keys.shifted:
                decoded = decoded + params["keys.decode_shift"][:, None]
            return self._placed(sum(others, decoded), first, params, torch.float32) @ columns
        first_score, *others = (self._term_scores(term, columns, pages, params) for term in self.plan.keys.spaces)
        return sum(others, first_score)

    def _term_scores(self, term: SidePlan, columns: Tensor, pages: Tensor, params: Params) -> Tensor:
        if term.masked:
            decode, channels = params[f"{term.home}.decode"], self._channels(term, pages)
            met = queries(columns, decode, channels, top=term.store.gathers)
            return getattr(self.module, term.product)(met, *self._inputs(term, pages, params))
        if term.beside:
            met = met_at(columns, self._channels(term, pages))
            return getattr(self.module, term.product)(met, *self._inputs(term, pages, params))
        met = params[f"{term.home}.decode"].mT @ columns if term.mapped else columns
        met = _by_stored(met, term.joined)
        score: Tensor = getattr(self.module, term.product)(met, *self._inputs(term, pages, params))
        score = _by_reader(score, term.joined).unflatten(2, (term.joined, -1)).sum(2)
        return score + (params[f"{term.home}.decode_shift"][:, None] @ columns) if term.shifted else score

    def _sums_of_codes(self, weights: Tensor, pages: Tensor, params: Params) -> Tensor:
        """Sums of packed values under weights (B, H, tokens, rows), as vectors of the head: (B, H, D, rows)."""
        total, *others = (self._term_sums(term, weights, pages, params) for term in self.plan.values.spaces)
        return sum(others, total)

    def _term_sums(self, term: SidePlan, weights: Tensor, pages: Tensor, params: Params) -> Tensor:
        every = _by_stored(weights.repeat(1, 1, term.joined, 1), term.joined)
        total = _by_reader(getattr(self.module, term.product)(every, *self._inputs(term, pages, params)), term.joined)
        if term.mapped:
            total = params[f"{term.home}.decode"] @ total
        if term.shifted:
            total = total + params[f"{term.home}.decode_shift"][..., None] * weights.sum(-2, keepdim=True)
        return total

    def attend(
        self, query: Tensor, state: AttentionState, params: Params, splits: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """See KernelSet; `splits` is a matter of the GPU and changes nothing here."""
        queries, tokens, sinks = query.shape[2], self.plan.layout.page_tokens, self.plan.sinks
        factor = state.scaling if state.softcap is not None else state.scaling * LOG2E
        columns = self._rows(query, factor)
        end = max(0, state.longest - sinks)
        pages = -(-min(state.packed_most, end) // tokens)
        low = self._first_page(state, queries, pages)
        exact_from = max(low * tokens, int(torch.minimum(state.packed_keys, state.packed_values).min()))
        exact_from = min(exact_from, end)
        u = torch.arange(low * tokens, end, device=query.device)
        coded = max(0, min(pages * tokens, end) - low * tokens)

        score = columns.new_full((*columns.shape[:2], len(u), columns.shape[-1]), -torch.inf)
        if coded:
            packed = self._gather(state.pool, state.table, low, pages)
            score[:, :, :coded] = self._scores_of_codes(columns, packed, low * tokens, params)[:, :, :coded]
        tail = slice(exact_from - low * tokens, len(u))
        alive = self._alive(state, u[tail], state.packed_keys)
        exact = self._exact_rows(state, state.key_rows, u[tail], alive) @ columns
        score[:, :, tail] = torch.where(
            (u[tail] >= state.packed_keys[:, None])[:, None, :, None], exact, score[:, :, tail]
        )
        first = self._exact_rows(state, state.key_rows, torch.arange(-sinks, 0, device=query.device), None) @ columns
        score = torch.cat((first, score), -2)
        if state.softcap is not None:
            score = torch.tanh(score / state.softcap) * (state.softcap * LOG2E)
        u = torch.cat((torch.arange(-sinks, 0, device=query.device), u))
        score = torch.where(self._seen(state, queries, u)[:, None], score, -torch.inf)

        most = score.amax(-2, keepdim=True) if score.shape[-2] else score.new_full((1, 1, 1, 1), -torch.inf)
        weights = torch.exp2(score - torch.where(most == -torch.inf, 0.0, most))
        mass = weights.sum(-2)
        on_sinks, weights = weights.split((sinks, score.shape[-2] - sinks), -2)
        out = self._exact_rows(state, state.value_rows, u[:sinks], None).mT @ on_sinks
        u = u[sinks:]
        on_pages = torch.where((u < state.packed_values[:, None])[:, None, :, None], weights, 0.0)
        if coded:
            rest = pages * tokens - low * tokens - coded
            on_pages = torch.nn.functional.pad(on_pages[:, :, :coded], (0, 0, 0, rest))
            out = out + self._sums_of_codes(on_pages, packed, params)
        alive = self._alive(state, u[tail], state.packed_values)
        on_rows = torch.where(alive[:, None, :, None], weights[:, :, tail], 0.0)
        out = out + self._exact_rows(state, state.value_rows, u[tail], alive).mT @ on_rows
        out = out / torch.where(mass > 0, mass, 1.0)[..., None, :]
        lse = (most[..., 0, :] + torch.log2(mass)) / LOG2E
        lse = torch.where(mass > 0, lse, -torch.inf) if score.shape[-2] else torch.full_like(mass, -torch.inf)
        return self._heads(out.mT, queries).to(query.dtype), self._heads(lse[..., None], queries)[..., 0]

    def _first_page(self, state: AttentionState, queries: int, pages: int) -> int:
        """The first page that any query of any sequence may see."""
        oldest = state.start
        if state.window is not None:
            oldest = torch.maximum(oldest, state.length - queries - state.window + 1)
        return min(pages, max(0, int(oldest.min()) - self.plan.sinks) // self.plan.layout.page_tokens)

    def _alive(self, state: AttentionState, u: Tensor, packed: Tensor) -> Tensor:
        """(B, tokens): the token at u is there, and exact."""
        return (u >= packed[:, None]) & (u < (state.length - self.plan.sinks)[:, None])

    def _exact_rows(self, state: AttentionState, rows: Tensor, u: Tensor, alive: Tensor | None) -> Tensor:
        """Exact rows of the tokens at u, float32 (B, H, tokens, D); rows of tokens that are not alive are 0."""
        if alive is None:  # sinks: rows from the first on, those beyond a short sequence 0
            sinks = self.plan.sinks
            there = (u + sinks < state.length[:, None])[:, None, :, None]
            return torch.where(there, rows[:, :, :sinks].to(torch.float32), 0.0)
        ring = rows.shape[2] - self.plan.sinks
        place = self.plan.sinks + torch.remainder(u - state.first[:, None], max(1, ring))
        index = place[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
        return torch.where(alive[:, None, :, None], rows.gather(2, index).to(torch.float32), 0.0)

    def _seen(self, state: AttentionState, queries: int, u: Tensor) -> Tensor:
        """(B, tokens, rows): does the query row see the token at u."""
        position = (state.length - queries)[:, None] + torch.arange(queries, device=u.device)
        position = position.repeat_interleave(self.plan.shape.group, -1)[:, None] - self.plan.sinks
        t = u[None, :, None]
        seen = (t <= position) & (t >= (state.start - self.plan.sinks)[:, None, None])
        return seen if state.window is None else seen & (t > position - state.window)


def _by_stored(x: Tensor, together: int) -> Tensor:
    """Columns that heads have for the numbers of all G heads that are rotated together, (B, H, G n, rows), as columns
    that each of those meets: (B, H, n, G rows).  So what is stored of a head is read once for all."""
    parts = x.unflatten(1, (-1, together)).unflatten(3, (together, -1))
    return parts.permute(0, 1, 3, 4, 2, 5).flatten(4).flatten(1, 2)


def _by_reader(x: Tensor, together: int) -> Tensor:
    """The inverse of `_by_stored`: (B, H, n, G rows) as (B, H, G n, rows)."""
    parts = x.unflatten(1, (-1, together)).unflatten(4, (together, -1))
    return parts.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)
