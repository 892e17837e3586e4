"""The torch functions of a side: the same steps as the Triton kernels, over all pages of a batch at once.

Arrays lead with (B, H); tokens and query rows are the last two axes of scores, lanes and rows of outputs.
"""

from __future__ import annotations

import math
import re

from kvdsl.codes import SLOT_TOKENS

from .codec import READ, call
from .codec_text import functions
from .layout import Stream
from .placement import When
from .sections import Across, Beside, Slots
from .text import Lines, bare, listed
from .torch_pack import TorchPack, turns

IN_STEPS = r"(code|\(code (?P<sign>[+-]) (?P<centre>[\d.]+)\)) \* scale(?P<offset> \+ offset)?"


class TorchSide(TorchPack):
    """Prints `pack_<side>`, `numbers_<side>`, `codes_<side>`, `unpack_<side>`, and `score` or `weigh`."""

    def functions(self) -> list[str]:
        texts = functions(self.side, "torch.") if self.side.coded else []
        made = self.side.beside or self.side.shared  # chosen channels are bytes when they come, or keys are packed
        texts += [] if made else [self.pack()]
        if self.side.layout.meta is not None:
            texts.append(self.numbers())
        texts += [self.codes()] if self.side.coded else []
        texts.append(self.unpack())
        if self.side.band and self.side.depth:
            return texts
        texts += [self.whole()] if self.side.band else []
        texts.append(self.score() if self.side.name == "keys" else self.weigh())
        return texts

    # ---- reading --------------------------------------------------------------------------------------------------

    @property
    def _names(self) -> list[str]:
        """What is stored of a block."""
        return ["scale", *(["offset"] if self.side.has_offset else [])]

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
            if side.has_offset and side.scale.zero_inside:
                mask = 2**side.alphabet.bits - 1
                out.add(f"return scale_over_zero_point(word, {mask}), (word & {mask}).to(torch.float32)")
            elif not side.has_offset:
                out.add(f"return {whole}(word){outer}")
            elif (low, outer) == ("low_half", ""):
                out.add("return halves(word)")
            elif meta.kind == "words":
                out.add(f"return as_float(word){outer}, as_float(second_word){outer}")
            else:
                out.add(f"return {low}(word){outer}, {high}(word){outer}")
        return str(out)

    def codes(self) -> str:
        """The codes of every token, plane beside plane."""
        out = Lines()
        with out.deeper(f"def codes_{self.side.label}(pages):"):
            out.add('"""The codes of every token of the pages: whole numbers (B, H, tokens, D)."""')
            for stream in self.side.layout.streams:
                name = f"{self.prefix}{stream.width}"
                rows = "byte_rows" if stream.paired else "word_rows"
                out.add(f"{name} = {rows}(pages, {stream.offset}, {stream.rows}, {stream.row_words})")
            first, *more = self.side.layout.streams
            if len(self.planes) > 1 and not (more or first.digits):  # the bits that are not the code's, off all at once
                planes = listed(self._shifted(first, j) for j in self.planes)
                clean = "" if first.width == 8 and first.paired else f".bitwise_and_({2**first.width - 1})"
                out.add(f"return torch.cat(({planes}), -1){clean}")
                return str(out)
            for j in self.planes:
                out.extend(self._code(j))
            planes = listed(f"c{j}" for j in self.planes)
            out.add(f"return torch.cat(({planes}), -1)" if len(self.planes) > 1 else "return c0")
        return str(out)

    def _shifted(self, stream: Stream, plane: int) -> str:
        """The words of a stream with a plane's bits lowest."""
        place, row = stream.places[plane], f"{self.prefix}{stream.width}"
        if stream.tiles > 1:
            row = f"{row}[..., {place.tile * self.width}:{(place.tile + 1) * self.width}]"
        bit = place.bit + 8 * place.byte
        return f"{row} >> {bit}" if bit else row

    def _code(self, plane: int) -> list[str]:
        """Lines that join the codes c<plane> of a plane over the streams."""
        lines = []
        for i, stream in enumerate(self.side.layout.streams):
            place, span = stream.places[plane], self.side.layout.spans[plane]
            if stream.digits:
                row = f"{self.prefix}{stream.width}[..., {span.low}:{span.high}]"
                return [f"c{plane} = digit({row}, {place.bit})"]
            shifted = self._shifted(stream, plane)
            shifted = f"({shifted})" if ">>" in shifted else shifted
            whole = stream.width == 8 and stream.paired
            kept = shifted if whole else f"({shifted} & {2**stream.width - 1})"
            part = f"({kept} << {stream.shift})" if stream.shift else kept
            lines.append(f"c{plane} = c{plane} | {part}" if i else f"c{plane} = {bare(part)}")
        return lines

    def _codes(self) -> list[str]:
        """Lines that read what a product takes of every number, float32: its code, or the level of that."""
        codes = f"codes_{self.side.label}(pages)"
        if not self.side.alphabet.looked_up:
            return [f"code = {codes}.to(torch.float32)"]
        if self.side.alphabet.sums:
            return [f"code = sums_of({codes}, table, {turns(self.side)})"]
        if self.side.alphabet.vectors:
            return [f"code = vectors_of({codes}, table)"]
        return [*self._given("levels"), f"code = {call(self.side, 'levels', [codes])}"]

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
            out.extend(self._codes())
            out.extend(self._numbers() if side.store.measure is not None else [])
            meta = side.layout.meta
            if meta is not None:
                for name in self._names:
                    out.add(f"{name} = spread({name}, {meta.tokens}, {meta.channels}, 1)")
            if side.layout.across:
                out.add(f"x = {self._decoded('scale', 'offset')}", *self._across(), "return x * across")
                return str(out)
            out.add(f"return {self._decoded('scale', 'offset')}")
        return str(out)

    def _across(self) -> list[str]:
        """Lines that read the factors of tiles, to broadcast over (B, H, tokens, D)."""
        held = self.side.layout.across
        assert held is not None
        found = f"section(pages, {held.offset}, {held.entries}, torch.float16).to(torch.float32)"
        lines = [f"across = {found}.reshape(*pages.shape[:2], -1, {1 if held.of_tokens else self.side.dim})"]
        return lines if held.of_tokens else [*lines, f"across = across.repeat_interleave({held.tokens}, 2)"]

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

    def _of_channels(self) -> list[str]:
        """Lines that give every channel of a group the group's numbers; calibrated ones are of channels already."""
        meta = self.side.layout.meta
        if self.side.static:
            spread = "[:, 0]"  # (H, 1, channels): the middle axis is not there for a query
        elif meta is not None and meta.channels > 1 and meta.groups > 1:
            spread = f".repeat_interleave({meta.channels}, -1)"
        else:
            return []
        return [f"{name} = {name}{spread}" for name in self._names]

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
                out.add("return scored(blocks, query).flatten(2, 3)")
                return str(out)
            out.add('"""q.k of every packed token: query float32 (B, H, D, rows) -> (B, H, tokens, rows)."""')
            if side.when in (When.NEVER, When.IN_LOOP) or side.band:
                out.add(f"return scored({self._channels_of(f'unpack_{side.space}')}, query)")
                return str(out)
            out.extend([*self._codes(), *self._numbers()])
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
        return [f"{name} = {name}.repeat_interleave({meta.tokens}, -2)" for name in self._names]

    def _score_after_dot(self, out: Lines) -> None:
        """The dot product, then the scale that the token has; of several groups of channels decoded numbers."""
        side = self.side
        out.extend(self._per_token())
        if side.groups > 1:
            out.extend(self._groups())
            out.add("return scored(x, query)")
            return
        out.add(*(f"{name} = {name}[..., 0]" for name in self._names), "s = scored(code, query)")
        out.extend(["total = query.sum(-2)"] if self.steps.offset_in_score else [])
        text = self.steps.assembled("s", "total", "scale", "offset")
        out.add(f"return {text}")

    def _groups(self) -> list[str]:
        """Lines that decode numbers whose groups of channels have scales of their own: that takes fewer calls, and no
        more time, than a product for each group."""
        size = self.side.dim // self.side.groups
        text = self._decoded("scale[..., None]", "offset[..., None]")
        return [f"code = code.unflatten(-1, ({self.side.groups}, {size}))", f"x = ({text}).flatten(-2)"]

    def _decoded(self, scale: str, offset: str) -> str:
        """Numbers from codes, in the codes' place where that is a step after another: fresh memory takes as long as
        both steps."""
        found = re.fullmatch(IN_STEPS, self.steps.number("code", "scale", "offset"))
        if found is None:
            return self.steps.number("code", scale, offset)
        centred = {"-": ".sub_", "+": ".add_"}[found["sign"]] + f"({found['centre']})" if found["sign"] else ""
        return f"code{centred}.mul_({scale})" + (f".add_({offset})" if found["offset"] else "")

    def _score_scaled(self, out: Lines) -> None:
        """Scales on the query: of each token block, or calibrated."""
        side, meta = self.side, self.side.layout.meta
        blocked = side.when is When.ONCE_PER_TILE
        if blocked:
            assert meta is not None
            out.add(f"code = code.unflatten(-2, (-1, {meta.tokens}))", "query = query[:, :, None]")
        out.extend(self._of_channels())
        out.add(f"s = scored(code, {self.steps.times_scale('query', 'scale', 'offset')})")
        share = self.steps.share("query", "scale", "offset")
        if share is not None:
            out.add(f"total = ({share}).sum(-2)", "s = s + total[..., None, :]")
        if side.layout.across:
            out.add(*self._across(), "return s.flatten(2, 3) * across")
            return
        out.add("return s.flatten(2, 3)" if blocked else "return s")

    def weigh(self) -> str:
        """Sums of packed values under weights."""
        side, out = self.side, Lines()
        with out.deeper(f"def {side.product}({', '.join(['weights', *self.inputs_of_all()])}):"):
            out.add('"""Sums of packed values: weights float32 (B, H, tokens, rows) -> (B, H, D, rows)."""')
            if side.when in (When.NEVER, When.IN_LOOP) or side.band:
                decoded = self._channels_of(f"unpack_{side.space}")
                out.add(f"return weighed(used({decoded}, weights, 1), weights)")
                return str(out)
            out.extend(self._codes())
            if side.alphabet.small is not None:  # a code that was never written may be a NaN
                out.add("code = used(code, weights, 1)")
            out.extend(self._numbers())
            meta = side.layout.meta
            if meta is not None:
                out.add(f"unused = unreached(weights, {meta.tokens})")
                out.add(*(f"{name} = {name}.masked_fill(unused, 0.0)" for name in self._names))
            if side.when is When.AFTER_DOT:
                self._weigh_tokens(out)
            else:
                self._weigh_scaled(out)
        return str(out)

    def _weigh_tokens(self, out: Lines) -> None:
        """The scales of tokens on their weights; of several groups of channels decoded numbers."""
        out.extend(self._per_token())
        if self.side.groups > 1:
            out.extend(self._groups())
            out.add("return weighed(x, weights)")
            return
        if self.side.layout.across:
            self._weigh_tiles(out, self.side.layout.across)
            return
        carried = self.steps.carried_by_token("scale", "offset")
        out.extend([f"carried = weighed({carried}, weights)"] if carried is not None else [])
        out.add("scale = scale[..., 0]")
        text = f"weighed(code, {self.steps.weight('weights', 'scale')})"
        out.add(f"return {text} + carried" if carried is not None else f"return {text}")

    def _weigh_tiles(self, out: Lines, held: Across) -> None:
        """The scales of tokens on their weights, the factors of tiles on the sums of each."""
        out.add(f"code, weights, scale = (x.unflatten(2, (-1, {held.tokens})) for x in (code, weights, scale))")
        carried = self.steps.carried_by_token("scale", "offset")
        if carried is not None:
            out.add(f"offset = offset.unflatten(2, (-1, {held.tokens}))", f"carried = weighed({carried}, weights)")
        out.add("scale = scale[..., 0]", f"total = weighed(code, {self.steps.weight('weights', 'scale')})")
        out.extend(["total = total + carried"] if carried is not None else [])
        found = f"section(pages, {held.offset}, {held.entries}, torch.float16).to(torch.float32)"
        out.add(f"across = {found}.reshape(*pages.shape[:2], -1, {self.side.dim})")
        out.add(
            "unused = (weights == 0).all(-1).all(-1, keepdim=True)  # of a tile that was never written they are any"
        )
        out.add("return (total * across.masked_fill(unused, 0.0)[..., None]).sum(2)")

    def _weigh_scaled(self, out: Lines) -> None:
        """Scales on the sums: of each token block, or calibrated."""
        side, meta = self.side, self.side.layout.meta
        if side.when is When.ONCE_PER_TILE:
            assert meta is not None
            out.add(*(f"{name} = {name}.unflatten(-2, (-1, {meta.tokens}))" for name in ("code", "weights")))
        out.extend(self._of_channels())
        out.add("total = weighed(code, weights)")
        text = self.steps.output("total", "mass", "scale", "offset")
        out.extend(["mass = weights.sum(-2)"] if "mass" in text else [])
        out.add(f"return ({text}).sum(2)" if side.when is When.ONCE_PER_TILE else f"return {text}")
