"""The torch functions of a side: the same steps as the Triton kernels, over all pages of a batch at once.

Arrays lead with (B, H); tokens and query rows are the last two axes of scores, lanes and rows of outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvdsl.codes import SLOT_TOKENS

from .codec import READ, call
from .codec_text import functions
from .layout import Stream
from .placement import When
from .sections import Beside, Slots
from .text import Lines, bare, listed
from .torch_pack import TorchPack, unpacked


class TorchSide(TorchPack):
    """Prints `pack_<side>`, `numbers_<side>`, `unpack_<side>`, and `score` or `weigh`."""

    def functions(self) -> list[str]:
        texts = functions(self.side, "torch.") if self.side.coded else []
        texts += [] if self.side.beside else [self.pack()]  # what is kept of chosen channels is bytes when it comes
        if self.side.layout.meta is not None:
            texts.append(self.numbers())
        texts.append(self.unpack())
        if self.side.band and self.side.depth:
            return texts
        texts += [self.whole()] if self.side.band else []
        texts.append(self.score() if self.side.name == "keys" else self.weigh())
        return texts

    # ---- reading --------------------------------------------------------------------------------------------------

    def numbers(self) -> str:
        """Stored scales and offsets of every token block and channel group."""
        side, meta, out = self.side, self.side.layout.meta, Lines()
        assert meta is not None
        kind = {1: "uint8", 2: "int16", 4: "int32"}[meta.element]
        count = meta.total * (2 if meta.kind == "words" else 1)
        result = "scale, offset" if side.has_offset else "scale"
        source = "shared" if meta.shared else "pages"
        with out.deeper(f"def numbers_{side.label}({', '.join([source, *(['second'] if side.second else [])])}):"):
            out.add(f'"""Stored {result}: each float32 (B, H, token blocks, {meta.groups} groups of channels)."""')
            start = meta.offset - (self.plan.layout.head_bytes * self.plan.layout.kv_heads if meta.shared else 0)
            out.add(f"word = section({source}, {start}, {count}, torch.{kind})")
            if meta.kind == "words":
                out.add("word, second_word = word.chunk(2, -1)")
            for name in ["word", *(["second_word"] if meta.kind == "words" else [])]:
                if meta.shared:
                    out.add(f"{name} = heads_of({name}, {meta.head_groups}, {meta.heads})")
                out.add(f"{name} = entries({name}, {meta.blocks}, {meta.groups}, token_major={meta.tokens > 1})")
            outer = " * second[:, None]" if side.second is not None else ""
            whole, low, high = READ[side.scale.dtype]
            if side.has_offset and side.scale.zero == "in_scale":
                mask = 2**side.alphabet.bits - 1
                out.add(f"return scale_over_zero_point(word, {mask}), (word & {mask}).to(torch.float32)")
            elif not side.has_offset:
                out.add(f"return {whole}(word){outer}")
            elif meta.kind == "words":
                out.add(f"return as_float(word){outer}, as_float(second_word){outer}")
            else:
                out.add(f"return {low}(word){outer}, {high}(word){outer}")
        return str(out)

    def _read(self) -> list[str]:
        """Lines that load the streams' bytes, one row a token."""
        lines = []
        for stream in self.side.layout.streams:
            name = f"{self.prefix}{stream.width}"
            names = f"({name},)" if stream.paired else f"{name}_low, {name}_high"
            call = f"byte_rows(pages, {stream.offset}, {stream.rows}, {stream.row_words}, paired={stream.paired})"
            lines.append(f"{names} = {call}")
        return lines

    def _byte(self, stream: Stream, plane: int) -> str:
        place, span = stream.places[plane], self.side.layout.spans[plane]
        if stream.digits:
            return f"{self.prefix}{stream.width}[..., {span.low}:{span.high}]"
        name = f"{self.prefix}{stream.width}" + ("" if stream.paired else ("_low", "_high")[place.byte])
        if stream.tiles == 1:
            return name
        return f"{name}[..., {place.tile * self.width}:{(place.tile + 1) * self.width}]"

    def _numbers(self) -> list[str]:
        side = self.side
        if side.static:
            return self._calibrated("scale", "offset")
        meta = side.layout.meta
        assert meta is not None
        source = "shared" if meta.shared else "pages"
        call_ = f"numbers_{side.label}({', '.join([source, *(['second'] if side.second is not None else [])])})"
        return [f"{'scale, offset' if side.has_offset else 'scale'} = {call_}"]

    def unpack(self) -> str:
        """Decoded numbers, one by one."""
        side, out = self.side, Lines()
        with out.deeper(f"def unpack_{side.label}({', '.join(self.inputs())}):"):
            what = f"The {side.dim} chosen channels of every" if side.beside else "Every"
            out.add(
                f'"""{what} token of the pages decoded: float32 (B, H, tokens, {side.dim if side.beside else "D"})."""'
            )
            head_dim, tokens = side.dim, self.plan.layout.page_tokens
            if side.floats:
                kind = {"fp16": "float16", "fp32": "float32"}[side.floats]
                start = side.layout.float_offset
                out.add(f"x = section(pages, {start}, {tokens * head_dim}, torch.{kind})")
                out.add(f"return x.reshape(*pages.shape[:2], -1, {head_dim}).to(torch.float32)")
                return str(out)
            if (held := side.factors) is not None:
                a, b = (tokens * held.rank, held.blocks * held.rank * head_dim)
                out.add(f"a = section(pages, {held.offset}, {a}, torch.float16)")
                out.add(f"a = a.unflatten(-1, ({held.rank}, {held.blocks}, {held.tokens}))")
                out.add("a = a.movedim(3, -1).flatten(2, 3)")
                out.add(f"b = section(pages, {held.vectors_offset}, {b}, torch.float16)")
                out.add(f"b = b.unflatten(-1, ({held.blocks}, {held.rank}, {head_dim})).flatten(2, 3)")
                out.add("return multiplied(a, b)")
                return str(out)
            if (slots := side.slots) is not None:
                self._from_slots(out, slots)
                return str(out)
            if (beside := side.beside) is not None:
                self._from_channels(out, beside)
                return str(out)
            out.extend([*self._given("levels"), *self._read()])
            for j in self.planes:
                out.extend(self._code(j))
            code = f"torch.cat(({listed(f'c{j}' for j in self.planes)}), -1)"
            looked_up = side.alphabet.looked_up
            out.add(f"code = {call(side, 'levels', [code]) if looked_up else f'{code}.to(torch.float32)'}")
            out.extend(self._numbers() if side.store.measure is not None else [])
            meta = side.layout.meta
            if meta is not None:
                for name in ["scale", *(["offset"] if side.has_offset else [])]:
                    out.add(f"{name} = spread({name}, {meta.tokens}, {meta.channels}, 1)")
            out.add(f"return {self.steps.number('code', 'scale', 'offset')}")
        return str(out)

    def _from_slots(self, out: Lines, slots: Slots) -> None:
        """Lines that put single numbers in their places."""
        keys, row = self.side.name == "keys", (slots.count, slots.width)
        for name, start, kind in (("numbers", slots.offset, "float16"), ("places", slots.places_offset, "uint8")):
            found = f"section(pages, {start}, {slots.entries}, torch.{kind})"
            out.add(f"{name} = {found}.unflatten(-1, {(slots.entries // math.prod(row), *row)})")
        out.add(f"x = in_places(numbers, places, {self.side.dim if keys else SLOT_TOKENS})")
        out.add(f"return x{'.mT' * keys}.flatten(2, 4)  # a row a token")

    def _from_channels(self, out: Lines, held: Beside) -> None:
        """Lines that read what is kept of chosen channels."""
        size, tokens, lead = held.count, self.plan.layout.page_tokens, "*pages.shape[:2], -1"
        if not held.below:
            out.add(f"x = section(pages, {held.offset}, {tokens * size}, torch.float16)")
            out.add(f"return x.reshape({lead}, {size}).to(torch.float32)")
            return
        rows, which = held.size(tokens), self.side.choice
        whole = self.plan.side(self.side.name)
        assert whole.layout.meta is not None
        out.add(f"rows = section(pages, {held.offset}, {rows}, torch.uint8).reshape({lead}, {size})")
        out.add(f"channel = section(pages, {which.offset}, {which.blocks * size}, torch.uint8).reshape({lead}, {size})")
        often = which.tokens // whole.layout.meta.tokens
        spread = f"channel.repeat_interleave({often}, 2)" if often > 1 else "channel"
        out.add(f"scale = at_channels(numbers_{whole.label}(pages)[0], {spread})")
        out.add(f"code = codes_of(rows, {held.bits}).to(torch.float32) * {2.0**held.below}")
        out.add(f"return code * scale.repeat_interleave({whole.layout.meta.tokens}, 2)")

    def whole(self) -> str:
        """All bands decoded, one behind the other."""
        out = Lines()
        with out.deeper(f"def unpack_{self.side.space}({', '.join(self.inputs_of_all())}):"):
            out.add('"""Every token of the pages decoded, band by band: float32 (B, H, tokens, D)."""')
            bands = [TorchSide(self.plan, term) for term in self.side.terms]
            calls = [f"unpack_{band.side.label}({', '.join(band.inputs())})" for band in bands]
            out.add("return torch.cat((", *(f"    {call}," for call in calls), "), -1)")
        return str(out)

    def _code(self, plane: int) -> list[str]:
        """Lines that join the codes c<plane> of a plane over the streams."""
        lines = []
        for i, stream in enumerate(self.side.layout.streams):
            if stream.digits:
                return [f"c{plane} = digit({self._byte(stream, plane)}, {stream.places[plane].bit})"]
            bit = stream.places[plane].bit
            shifted = f"({self._byte(stream, plane)} >> {bit})" if bit else self._byte(stream, plane)
            kept = f"({shifted} & {2**stream.width - 1})" if stream.width < 8 else shifted
            part = f"({kept} << {stream.shift})" if stream.shift else kept
            lines.append(f"c{plane} = c{plane} | {part}" if i else f"c{plane} = {bare(part)}")
        return lines

    def _levels(self) -> list[str]:
        """Lines that look up the levels l<plane> of every plane; none where codes are read as they are."""
        if not self.side.alphabet.looked_up:
            return []
        lines = self._given("levels")
        for j in self.planes:
            lines += [*self._code(j), f"l{j} = {call(self.side, 'levels', [f'c{j}'])}"]
        return lines

    def _plane(self, stream: Stream, plane: int) -> str:
        """What a product reads of a plane, float32 (..., tokens, lanes): dirty codes, or levels."""
        if self.side.alphabet.looked_up:
            return f"l{plane}"
        if self.side.layout.digits:
            return f"{self._code(plane)[0].split(' = ')[1]}.to(torch.float32)"
        place = stream.places[plane]
        low = self.side.run(stream, plane).start * stream.width
        mask = 2 ** (place.bit + stream.width) - 2**low
        byte = self._byte(stream, plane)
        return f"{byte}.to(torch.float32)" if mask == 255 else f"({byte} & {mask}).to(torch.float32)"

    def _channels(self, name: str, plane: int) -> str:
        """The stored numbers of a plane's channels, of (..., groups) numbers."""
        meta = self.side.layout.meta
        channels = meta.channels if meta is not None else 1
        groups = meta.groups if meta is not None else self.plan.shape.head_dim
        block = self.side.scale.block
        if self.side.static and not isinstance(block.channels, int) or groups == 1:
            return name
        spread = name if channels == 1 or self.side.static else f"{name}.repeat_interleave({channels}, -1)"
        channels_of = self.side.layout.spans[plane].channels
        return f"{spread}[..., {channels_of[0]}:{channels_of[-1] + 1}]"

    # ---- products -------------------------------------------------------------------------------------------------

    def score(self) -> str:
        """Scores of packed keys."""
        side, out = self.side, Lines()
        with out.deeper(f"def {side.product}({', '.join(['query', *self.inputs_of_all()])}):"):
            if side.masked or side.beside:
                held = side.choice
                out.add('"""q.k of every packed token: queries float32 (B, H, blocks, M, rows), those of a block."""')
                out.add(
                    f"blocks = unpack_{side.space}({', '.join(self.inputs_of_all())}).unflatten(2, (-1, {held.tokens}))"
                )
                out.add("return (blocks @ query).flatten(2, 3)")
                return str(out)
            out.add('"""q.k of every packed token: query float32 (B, H, D, rows) -> (B, H, tokens, rows)."""')
            if side.when in (When.NEVER, When.IN_LOOP):
                out.add(f"return {self._channels_of(f'unpack_{side.space}')} @ query")
                return str(out)
            out.add(f"{unpacked(f'x{j}' for j in self.planes)} = query.split({self.sizes}, -2)")
            out.extend([*self._read(), *self._levels()])
            out.extend(self._numbers())
            if side.when is When.AFTER_DOT:
                self._score_after_dot(out)
            else:
                self._score_scaled(out)
        return str(out)

    def _channels_of(self, function: str) -> str:
        """What a product reads of decoded numbers: themselves, or the channels that radii and angles are of."""
        decoded = f"{function}({', '.join(self.inputs_of_all())})"
        levels = self.side.store.levels
        again = f", {levels}" if levels > 1 else ""
        return f"cartesian({decoded}{again})" if self.side.polar else decoded

    def _per_token(self) -> list[str]:
        """Lines that give every token of a block the block's numbers."""
        meta = self.side.layout.meta
        if meta is None or meta.tokens == 1 or self.side.when is not When.AFTER_DOT:
            return []
        names = ["scale", *(["offset"] if self.side.has_offset else [])]
        return [f"{name} = {name}.repeat_interleave({meta.tokens}, -2)" for name in names]

    def _score_after_dot(self, out: Lines) -> None:
        side = self.side
        out.extend(self._per_token())
        out.extend(self.steps.prepared("x"))
        for group in range(side.groups):
            members = [j for j in self.planes if side.group(j) == group]
            products = [f"{self._plane(s, j)} @ q{s.width}_{j}" for s in side.operands for j in members]
            out.add(f"s = {products[0]}", *(f"s = s + {product}" for product in products[1:]))
            if self.steps.offset_in_score:
                out.add(f"total = {self._over_lanes('x', members)}")
            out.add(f"scale_g = scale[..., {group}]")
            if side.has_offset:
                out.add(f"offset_g = offset[..., {group}]")
            text = self.steps.assembled("s", "total", "scale_g", "offset_g")
            out.add(f"score = {'score + ' if group else ''}{text}")
        out.add("return score")

    def _score_scaled(self, out: Lines) -> None:
        """Scales on the query: of each token block, or calibrated."""
        side, meta = self.side, self.side.layout.meta
        blocked = side.when is When.ONCE_PER_TILE
        for j in self.planes:
            query = f"x{j}[:, :, None]" if blocked else f"x{j}"
            if blocked:
                out.add(f"x{j} = {query}")
            out.add(f"scale_j = {self._channels(self._static_row('scale'), j)}")
            if side.has_offset:
                out.add(f"offset_j = {self._channels(self._static_row('offset'), j)}")
            out.extend(self.steps.scaled(j, f"x{j}", "scale_j", "offset_j"))
        out.extend(self.steps.prepared("y"))
        for i, (stream, j) in enumerate((s, j) for s in side.operands for j in self.planes):
            plane = self._plane(stream, j)
            if blocked:
                assert meta is not None
                plane = f"{plane}.unflatten(-2, (-1, {meta.tokens}))"
            out.add(f"s = {'s + ' if i else ''}{plane} @ q{stream.width}_{j}")
        if self.steps.offset_in_score:
            out.add(f"total = {self._over_lanes('b', self.planes)}")
            out.add("s = s + total[..., None, :]")
        out.add("return s.flatten(2, 3)" if blocked else "return s")

    def _over_lanes(self, name: str, planes: Sequence[int]) -> str:
        """The sum of <name>0, <name>1, ... over all lanes of these planes."""
        names = [f"{name}{j}" for j in planes]
        if not self.sizes.isdigit():
            return " + ".join(f"{name}.sum(-2)" for name in names)
        together = " + ".join(names)
        return f"({together}).sum(-2)" if len(names) > 1 else f"{together}.sum(-2)"

    def _static_row(self, name: str) -> str:
        """Calibrated numbers stand as (H, 1, channels): the middle axis is not there for a query."""
        return f"{name}[:, 0]" if self.side.static else name

    def weigh(self) -> str:
        """Sums of packed values under weights."""
        side, out = self.side, Lines()
        with out.deeper(f"def {side.product}({', '.join(['weights', *self.inputs_of_all()])}):"):
            out.add('"""Sums of packed values: weights float32 (B, H, tokens, rows) -> (B, H, D, rows)."""')
            if side.when in (When.NEVER, When.IN_LOOP):
                out.add(f"return used({self._channels_of(f'unpack_{side.space}')}, weights, 1).mT @ weights")
                return str(out)
            out.extend([*self._read(), *self._levels()])
            if side.alphabet.small is not None:  # a code that was never written may be a NaN
                out.add(*(f"l{j} = used(l{j}, weights, 1)" for j in self.planes))
            out.extend(self._numbers())
            meta = side.layout.meta
            if meta is not None:
                for name in ["scale", *(["offset"] if side.has_offset else [])]:
                    out.add(f"{name} = used({name}, weights, {meta.tokens})")
            out.extend(self._per_token())
            if side.when is When.ONCE_PER_TILE:
                self._weigh_blocks(out)
            else:
                self._weigh_planes(out)
            out.add(f"return torch.cat(({listed(f'o{j}' for j in self.planes)}), -2)")
        return str(out)

    def _weigh_planes(self, out: Lines) -> None:
        side = self.side
        carried = self.steps.carried("weights", "scale_g", "offset_g")
        for group in range(side.groups):
            if side.when is When.AFTER_DOT:
                out.add(f"scale_g = scale[..., {group}]")
                if side.has_offset:
                    out.add(f"offset_g = offset[..., {group}]")
            out.add(f"weight = {self.steps.weight('weights', 'scale_g')}")
            if carried is not None:
                text = f"({carried[0]})" if " " in carried[0] else carried[0]
                out.add(f"carried{group} = {text}.sum(-2)")
            for stream in side.operands:
                for j in (j for j in self.planes if side.group(j) == group):
                    out.add(f"a{stream.width}_{j} = {self._plane(stream, j)}.mT @ weight")
        for j in self.planes:
            text = self.steps.clean(j)
            if side.when is When.ONCE_PER_QUERY:
                out.add(f"total = {text}", f"scale_j = {self._channels(self._static_row('scale'), j)}")
                if side.has_offset:
                    out.add(f"offset_j = {self._channels(self._static_row('offset'), j)}")
                text = self.steps.output("total", "carried0", "scale_j", "offset_j")
            elif carried is not None:
                text = self.steps.plus_carried(text, side.group(j), carried[1])
            out.add(f"o{j} = {text}")

    def _weigh_blocks(self, out: Lines) -> None:
        side, meta = self.side, self.side.layout.meta
        assert meta is not None
        out.add(f"weight = weights.unflatten(-2, (-1, {meta.tokens}))", "weighed = weight.sum(-2)")
        for stream in side.operands:
            for j in self.planes:
                plane = f"{self._plane(stream, j)}.unflatten(-2, (-1, {meta.tokens}))"
                out.add(f"a{stream.width}_{j} = {plane}.mT @ weight")
        for j in self.planes:
            out.add(f"total = {self.steps.clean(j)}", f"scale_j = {self._channels('scale', j)}")
            if side.has_offset:
                out.add(f"offset_j = {self._channels('offset', j)}")
            out.add(f"o{j} = ({self.steps.output('total', 'weighed', 'scale_j', 'offset_j')}).sum(2)")
