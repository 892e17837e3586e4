"""What machine code tells of a kernel beside what its plan says: products against the fewest, work by pipe, and in
words what keeps a scheme's loop from the memory's read limit.  No GPU is needed.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kvdsl.codes import SLOT_TOKENS
from kvdsl.scheme import Additive, Scheme
from kvdsl.segments import parts
from kvdsl.shape import Shape

from . import render
from .aot import CompiledKernel, compile_many
from .launch import ATTEND
from .launches import launches, loop_bytes
from .plan import DECODE_ROWS, Plan, plan_for
from .roofline import LINE, cycles
from .sass import WARP
from .side import SidePlan

PRODUCT = 16 * 16  # numbers that one m16n8k16 product takes, each for 8 query rows
MEMORY = ("LDGSTS", "LDG", "UBLKCP", "UTMALDG", "LD")  # kinds of loads that are not of shared memory
WIDE = 128  # bits: the widest that a lane can ask for on all architectures, and what codes should be copied by
FEW_BITS = 3.1  # an element: below, work a number and not a byte is what counts


@dataclass(frozen=True)
class Packing:
    """What one program of a pack kernel does, where it has all of its tokens.

    tokens         of one kv head, a program
    elements       numbers that become codes
    bytes_read     of their rows, each number once
    bytes_written  codes and what is stored beside them
    """

    tokens: int
    elements: int
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True)
class Figures:
    """One kernel on one architecture.

    kernel     what its machine code is
    ideal_mma  m16n8k16 products per 128 packed bytes that its codes take at least, see `ideal_mma`; None without any
    packing    what a program packs, see `packing`; None of other kernels
    """

    kernel: CompiledKernel
    ideal_mma: float | None
    packing: Packing | None = None

    @property
    def instructions_per_element(self) -> float | None:
        """Instructions of all lanes of a program, on the way through the whole kernel that all programs with tokens
        take, for each number that it packs; None where the kernel has loops."""
        if self.packing is None or not self.kernel.straight_instructions:
            return None
        return self.kernel.straight_instructions * self.kernel.warps * WARP / self.packing.elements

    @property
    def mma_ratio(self) -> float | None:
        """Products over the ideal: 1 where no warp repeats another's and nothing but codes is multiplied; None where
        there is no ideal, or where products are not all counted (tensor memory)."""
        return self.kernel.mma / self.ideal_mma if self.ideal_mma and not self.kernel.hidden_mma else None

    @property
    def work(self) -> dict[str, float]:
        """Pipe of the law -> its share of a scheduler's cycles for 128 packed bytes; empty without a main loop."""
        found = cycles(self.kernel.pipes)
        total = sum(found.values())
        return {pipe: one / total for pipe, one in found.items()} if total else {}

    @property
    def memory_loads(self) -> int:
        """Of `kernel.loads`, copies and loads of memory, and not of shared memory."""
        return sum(count for kind, count in self.kernel.loads.items() if kind.split(".")[0] in MEMORY)

    @property
    def wide_loads(self) -> int:
        """Of those, the ones that ask for 16 bytes a lane, or for more in bulk."""
        named = {f"{kind}.{WIDE}" for kind in MEMORY} | set(MEMORY)
        return sum(count for kind, count in self.kernel.loads.items() if kind in named)

    def row(self) -> dict[str, Any]:
        """Plain values by their names: a row of `kvdsl compile --json`."""
        names = ("ideal_mma", "mma_ratio", "work", "memory_loads", "wide_loads", "instructions_per_element")
        packing = asdict(self.packing) if self.packing else dict.fromkeys(one.name for one in fields(Packing))
        return {**asdict(self.kernel), **{name: getattr(self, name) for name in names}, **packing}


def figures_of(plan: Plan, kernel: CompiledKernel) -> Figures:
    """A compiled kernel of a plan beside what the plan says of it."""
    return Figures(kernel, ideal_mma(plan, kernel.kernel), packing(plan, kernel.kernel))


def packing(plan: Plan, kernel: str) -> Packing | None:
    """What a program of a pack kernel reads and writes; None of other kernels, and of those that store vectors of low
    rank, single numbers or chosen channels."""
    if not kernel.startswith("pack_"):
        return None
    side, layout = plan.side(kernel.removeprefix("pack_")), plan.layout
    if side.factors or side.slots or side.beside:
        return None
    wide = plan.shape.dtype == "fp32" or side.turned or side.depth  # what is mapped, or left over, is float32
    page = sum(stream.size for stream in side.layout.streams)
    page += layout.page_tokens * side.dim * {"fp32": 4, "fp16": 2}.get(side.floats or "", 0)
    if (meta := side.layout.meta) is not None:
        page += meta.size // (layout.kv_heads if meta.shared else 1)
    elements = side.span * side.dim
    return Packing(side.span, elements, elements * (4 if wide else 2), page * side.span // layout.page_tokens)


def ideal_mma(plan: Plan, kernel: str) -> float | None:
    """The fewest m16n8k16 products per 128 packed bytes of attention's main loop; None of other kernels, and where
    products are of float32 numbers, outside the tensor cores.

    Tokens (of keys) or channels (of values) are the M side, both inner sides are 16 wide and 8 query rows the N side,
    so that 256 numbers take one product, for 16 rows two.  Of codes of b bits 128 bytes hold 1024/b: that is 4/b, and
    8/b for 16 rows, on either side; scales and all other metadata are bytes without any product.  Vectors of low rank,
    single numbers, chosen channels, rotary positions and heads that are rotated together take more: they are not in it.
    """
    exact = plan.shape.dtype == "fp32" or any(term.floats == "fp32" for term in plan.terms)
    if kernel not in ATTEND or exact:
        return None
    coded = [term for term in plan.terms if term.layout.streams or term.floats]
    numbers = sum(term.dim for term in coded) * plan.tile
    wide = plan.columns(many=kernel != "decode") / DECODE_ROWS
    return numbers * wide / PRODUCT / (loop_bytes(plan) / LINE)


def untiered(schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """The schemes without tiers, and what the tiers of the others store, each once, behind its place: `h2o_exact`."""
    found = {name: scheme for name, scheme in schemes.items() if not scheme.routed}
    for name, scheme in schemes.items():
        for place, part in parts(scheme).items() if scheme.routed else ():
            if part not in found.values():
                found[re.sub(r"\W+", "_", f"{name} {place}").strip("_")] = part
    return found


def figures(
    schemes: Mapping[str, Scheme],
    shape: Shape,
    arches: Sequence[str],
    *,
    kernels: Sequence[str] = ("decode",),
    cache_folder: Path | None = None,
    workers: int = 2,
) -> dict[str, list[Figures]]:
    """These kernels of schemes without tiers: by the scheme's name for each architecture each kernel, in order.

    Raises SchemeError and ShapeError for what cannot be planned, CompileError for what does not compile.
    """
    plans = {name: plan_for(scheme, shape) for name, scheme in schemes.items()}
    with tempfile.TemporaryDirectory(prefix="kvdsl-") as folder:
        sources = []
        for name, plan in plans.items():
            path = Path(folder) / f"{name}.py"
            text = render(plan, "triton", name)
            path.write_text(text, encoding="utf-8")
            sources.append((path, [launch for launch in launches(plan, text) if launch.kernel in kernels]))
        found = compile_many(sources, arches, workers=workers, cache_folder=cache_folder)
    return {
        name: [figures_of(plan, kernel) for kernel in rows]
        for (name, plan), rows in zip(plans.items(), found, strict=True)
    }


def loads_told(loads: Mapping[str, int]) -> str:
    """Loads in one line: `LDGSTS.128 x16, LDG.32 x1`."""
    return ", ".join(f"{name} x{count}" for name, count in loads.items()) or "none"


def pipes_told(work: Mapping[str, float]) -> str:
    """The shares of `Figures.work` in one line, the largest first."""
    found = sorted(work.items(), key=lambda item: -item[1])
    return ", ".join(f"{pipe.upper()} {share:.0%}" for pipe, share in found)


def reasons(plan: Plan) -> list[str]:
    """What of a scheme makes its main loop do more than unpack codes of 4 bits under one scale a token, in words."""
    found = []
    if plan.shape.dtype == "fp32" or any(term.floats == "fp32" for term in plan.terms):
        found.append("products are of float32 numbers, outside the tensor cores")
    if plan.keys.rope is not None:
        found.append("keys are stored without rotary positions, and every decoded pair of channels is turned by them")
    whose: dict[str, list[str]] = {}
    for term in plan.terms:
        for reason in (*_of_codes(term), *_of_scales(term)):
            whose.setdefault(reason, []).append(term.name if term.band else term.title)
    found += [f"{' and '.join(dict.fromkeys(titles))}: {reason}" for reason, titles in whose.items()]
    coded = sum(term.dim for term in plan.terms if term.layout.streams)
    held = coded * plan.tile * LINE / loop_bytes(plan)
    if held > LINE * 8 / FEW_BITS:
        found.append(f"{held:.0f} numbers are in 128 bytes: each is unpacked and multiplied, and tokens have softmax")
    return found


def _of_codes(term: SidePlan) -> list[str]:
    """What a term's codes ask for."""
    found, alphabet = [], term.alphabet
    if term.polar:
        found.append("radii and angles become channels")
    if term.layout.digits:
        found.append("digits of three levels, five in a byte, are taken apart by multiplications")
    elif len(term.layout.streams) > 1:
        widths = " and ".join(str(stream.width) for stream in term.layout.streams)
        found.append(f"codes of {alphabet.bits} bits stand in streams of {widths}")
    if alphabet.small is not None:
        found.append(f"each code of {alphabet.small.name} becomes a float16")
    elif alphabet.vectors:
        size = term.layout.coupled
        found.append(f"each code of {size} channels is looked up in a table in memory, {2 * size} bytes a code")
    elif alphabet.sums:
        code = term.store.code
        assert isinstance(code, Additive)
        rounds = code.of(term.dim).count
        found.append(f"every channel is a sum of entries of tables in memory: {rounds} rounds of loops, counted as one")
    elif alphabet.kind == "table":
        whose = "the parameters" if alphabet.given else "the scheme"
        found.append(f"each code is looked up in a table of {alphabet.count} levels of {whose}")
    if term.sketched and term.dim > term.channels:
        found.append(f"{term.dim} signs stand for {term.channels} channels")
    if term.factors is not None:
        found.append(f"vectors of rank {term.factors.rank} are multiplied beside the codes")
    if term.slots is not None:
        each = "token" if term.name == "keys" else f"channel of {SLOT_TOKENS} tokens"
        found.append(f"numbers, {term.slots.count} a {each}, are brought to their places")
    if term.beside is not None:
        found.append(f"{term.beside.count} numbers a token of chosen channels are read beside the codes")
    if term.joined > 1:
        found.append(f"codes of the {term.joined} heads that are rotated together are read for each")
    if term.mixed:
        found.append("a map stays in the loop behind rotary positions")
    return found


def _of_scales(term: SidePlan) -> list[str]:
    """What a term's scales ask for."""
    meta = term.layout.meta
    if meta is None or term.polar:
        return []
    found = []
    if term.second is not None:
        found.append("scales are of two levels")
    if term.rope is None and term.when.name == "IN_LOOP" and not term.alphabet.sums:
        found.append(f"groups of {meta.channels} channels cross planes: their scales meet each number")
    elif term.groups > 1:
        found.append(f"{term.groups} groups of {meta.channels} channels of a token have their own scales and products")
    elif term.when.name == "ONCE_PER_TILE":
        met = "queries meet the scales" if term.name == "keys" else "sums meet the scales"
        found.append(f"groups of {meta.tokens} tokens have scales of their own a channel: {met} anew in each")
    return found
