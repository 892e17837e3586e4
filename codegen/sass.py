"""Machine code of a compiled kernel: its loops, the main loop, and what the main loop is made of.

Works on the text of `nvdisasm -c` (part of the Triton wheel), so it needs no GPU.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

_LABEL = re.compile(r"^\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P(?:\d+|T))\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`?\(?(\.L_\w+)\)?")
RESOURCE = re.compile(r"\b(REG|STACK|SHARED|LOCAL):(\d+)")  # in the text of `cuobjdump --dump-resource-usage`
_PREDICATE = re.compile(r"^!?U?P\d\b")
_SIZES = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}  # modifiers; without one 32 bits
_MATRICES = {"2": 64, "4": 128}  # of LDSM: 8 x 8 numbers of 16 bits, 32 bits a lane each
_GROUPED = ("HGMMA", "IGMMA", "QGMMA", "BGMMA")  # four warps run the same instruction and do a quarter each

# First part of an opcode -> class.  Anything that starts with U and is not listed runs on the uniform path.
_CLASSES = {
    "mma": "HMMA HGMMA IMMA QGMMA IGMMA QMMA BGMMA BMMA OMMA DMMA UTCHMMA UTCQMMA UTCIMMA UTCOMMA",
    "global_load": "LDG LD LDGMC",
    "global_store": "STG ST RED ATOM ATOMG REDG",
    "async_copy": "LDGSTS UBLKCP UTMALDG",
    "shared_load": "LDS LDSM LDT LDTM",
    "shared_store": "STS STSM STT STTM ATOMS",
    "bit": "LOP3 LOP SHF SHL SHR PRMT SGXT BMSK POPC BREV FLO",
    "convert": "I2F I2FP F2F F2FP F2I F2IP I2I I2IP FRND",
    "special": "MUFU",
    "fp32": "FFMA FMUL FADD FMNMX FMNMX3 FSETP FSEL FSET FCHK FFMA2 FMUL2 FADD2 FHADD FHFMA",
    "fp16": "HADD2 HMUL2 HFMA2 HMNMX2 HSETP2 HSET2",
    "shuffle": "SHFL VOTE VOTEU REDUX CREDUX MATCH MOVM ELECT",
    "sync": "BAR WARPSYNC DEPBAR LDGDEPBAR SYNCS WARPGROUP WARPGROUPDEPBAR MEMBAR FENCE ERRBAR ARRIVES ENDCOLLECTIVE",
    "local": "LDL STL",
    "integer": "MOV IMAD IADD3 ISETP LEA IADD SEL IMNMX VIADD VIADDMNMX CS2R S2R P2R R2P PLOP3 VIMNMX VIMNMX3 IABS "
    "IMUL IMUL3 IDP IDP4A ISCADD ICMP XMAD VABSDIFF LDC",
    "control": "BRA BRX JMP JMX BSSY BSYNC EXIT RET CALL NOP BREAK BMOV NANOSLEEP YIELD KILL BPT PREEXIT ACQBULK",
    "uniform": "R2UR S2UR ULDC LDCU",
}
_CLASS_OF = {opcode: name for name, opcodes in _CLASSES.items() for opcode in opcodes.split()}
CLASSES = (*_CLASSES, "other")
LOADS = ("async_copy", "global_load", "shared_load")  # of global memory: the first two
WARP = 32

# Pipe of the cost law -> the classes that it takes.
PIPES = {
    "alu": ("bit", "integer", "shuffle"),
    "fp": ("fp32", "fp16"),
    "mma": ("mma",),
    "xu": ("special", "convert"),
    "mem": ("shared_load", "shared_store", "async_copy", "global_load", "global_store", "sync", "uniform", "local"),
}


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: its byte address, guard ("@!P1" or ""), opcode with modifiers, and operands."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def head(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def kind(self) -> str:
        """Its class, one of `CLASSES`; what is never executed (guard "@!PT", a filler of the assembler) is control."""
        if self.guard in ("@!PT", "@!UPT"):
            return "control"
        return _CLASS_OF.get(self.head) or ("uniform" if self.head.startswith("U") else "other")

    @property
    def target(self) -> str | None:
        """The label it may jump to."""
        if self.head not in ("BRA", "BSSY", "JMP"):
            return None
        found = _TARGET.search(self.operands)
        return found[1] if found else None

    @property
    def conditional(self) -> bool:
        return self.guard not in ("", "@PT", "@UPT") or bool(_PREDICATE.match(self.operands))

    @property
    def bits(self) -> int | None:
        """What a load, store or copy moves for one lane; None where no opcode tells: bulk copies, tensor memory."""
        if self.head in ("UBLKCP", "UTMALDG", "LDT", "LDTM", "STT", "STTM"):
            return None
        parts = self.opcode.split(".")[1:]
        if self.head in ("LDSM", "STSM"):
            return _MATRICES.get(parts[-1] if parts else "", 32)
        return next((_SIZES[part] for part in parts if part in _SIZES), 32)

    @property
    def hidden(self) -> bool:
        """A product of tensor memory: its size is in a register, and one thread starts it for the program."""
        return self.kind == "mma" and self.head.startswith("UTC")

    @property
    def mma_units(self) -> float:
        """The work of one warp in units of an m16n8k16 product of 16-bit operands, read from the shape in the opcode.

        "HMMA.16816" is 1; "HGMMA.64x8x16" is 1 for each of its four warps; an 8-bit operand counts half of the same
        shape; what is hidden counts 0.
        """
        if self.kind != "mma" or self.hidden:
            return 0.0
        eight_bit = self.head[0] in "IQ"
        if found := re.search(r"\.(\d+)x(\d+)x(\d+)", self.opcode):
            m, n, k = map(int, found.groups())
        elif found := re.search(r"\.(16)(8)(8|16|32|64)\b", self.opcode):
            m, n, k = map(int, found.groups())
        else:
            return 1.0
        return m * n * k / (4 if self.head in _GROUPED else 1) / (16 * 8 * (32 if eight_bit else 16))


@dataclass(frozen=True)
class Loop:
    """A natural loop: `body` are positions of its instructions, `path` those that every iteration runs.

    The path is the shortest way round; what it goes past is guarded code, such as a rescaling that is rarely needed.
    Counting it would make a kernel that skips work look slower than one that always does it.
    """

    header: int
    body: tuple[int, ...]
    path: tuple[int, ...]


@dataclass(frozen=True)
class Code:
    """The instructions of a kernel in the order of the text, and the position each label stands for."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    @property
    def spills(self) -> int:
        """Instructions that read or write local memory: registers that did not fit, or an array that was indexed."""
        return sum(instruction.kind == "local" for instruction in self.instructions)

    @cached_property
    def blocks(self) -> dict[int, tuple[int, tuple[int, ...]]]:
        """Basic blocks: first position -> (position after the last, first positions of the successors)."""
        last = len(self.instructions)
        edges = {at: self._leaves(at) for at in range(last)}
        starts = {0, *(at for at in self.labels.values() if at < last)}
        for at, (falls, targets) in edges.items():
            if targets or not falls:
                starts |= {at + 1, *targets} if at + 1 < last else set(targets)
        order = sorted(starts)
        blocks = {}
        for begin, end in zip(order, [*order[1:], last], strict=True):
            falls, targets = edges[end - 1]
            blocks[begin] = (end, (*targets, *((end,) if falls and end < last else ())))
        return blocks

    def _leaves(self, at: int) -> tuple[bool, tuple[int, ...]]:
        """Whether control may go on to the next instruction, and where else it may go."""
        instruction = self.instructions[at]
        if instruction.head in ("BRA", "JMP"):
            to = self.labels.get(instruction.target or "", len(self.instructions))
            targets = (to,) if to < len(self.instructions) else ()
            return instruction.conditional or not targets, targets
        if instruction.head in ("EXIT", "RET"):
            return instruction.conditional, ()
        return True, ()

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """Every natural loop, by header; back edges to one header make one loop."""
        if not self.instructions:
            return ()
        blocks, dominators = self.blocks, self._dominators()
        before: dict[int, list[int]] = defaultdict(list)
        for begin, (_, after) in blocks.items():
            for block in after:
                before[block].append(begin)
        latches: dict[int, list[int]] = defaultdict(list)
        for begin, (_, after) in blocks.items():
            for header in after:
                if header in dominators.get(begin, ()):
                    latches[header].append(begin)
        return tuple(self._loop(header, latches[header], before) for header in sorted(latches))

    def _loop(self, header: int, latches: list[int], before: dict[int, list[int]]) -> Loop:
        body = {header}
        todo = list(latches)
        while todo:
            block = todo.pop()
            if block not in body:
                body.add(block)
                todo += before[block]
        path = self._shortest_round(header, set(latches), body)
        return Loop(header, self._positions(body), self._positions(path))

    def _positions(self, blocks: Iterable[int]) -> tuple[int, ...]:
        return tuple(at for begin in sorted(blocks) for at in range(begin, self.blocks[begin][0]))

    def _shortest_round(self, header: int, latches: set[int], body: set[int]) -> list[int]:
        """Blocks of the cheapest way from the header to a latch, in instructions."""
        length = {block: self.blocks[block][0] - block for block in body}
        cost, came = {header: length[header]}, {header: header}
        todo = {header}
        while todo:
            block = min(todo, key=lambda one: cost[one])
            todo.remove(block)
            for after in self.blocks[block][1]:
                if after in body and after != header and cost[block] + length[after] < cost.get(after, 1 << 60):
                    cost[after], came[after] = cost[block] + length[after], block
                    todo.add(after)
        end = min((latch for latch in latches if latch in cost), key=lambda one: cost[one])
        path = [end]
        while path[-1] != header:
            path.append(came[path[-1]])
        return path

    def _dominators(self) -> dict[int, set[int]]:
        """For every block that can be reached, the blocks on every way to it."""
        blocks = self.blocks
        reached, todo = set(), [0]
        while todo:
            block = todo.pop()
            if block not in reached:
                reached.add(block)
                todo += blocks[block][1]
        before: dict[int, list[int]] = defaultdict(list)
        for block in reached:
            for after in blocks[block][1]:
                before[after].append(block)
        order = sorted(reached)
        dominators = {block: set(order) for block in order}
        dominators[0] = {0}
        changed = True
        while changed:
            changed = False
            for block in order[1:]:
                found = set.intersection(*(dominators[one] for one in before[block])) | {block}
                if found != dominators[block]:
                    dominators[block], changed = found, True
        return dominators

    @cached_property
    def straight(self) -> tuple[int, ...]:
        """Positions on the way through a kernel without loops that loads and stores most, and of those the shortest:
        without slow paths and early ends.  Empty where the kernel has a loop."""
        if self.loops or not self.instructions:
            return ()
        worth: dict[int, tuple[int, int]] = {}  # of the best way from a block on: accesses of memory, -instructions
        todo = [0]
        while todo:
            block = todo[-1]
            end, targets = self.blocks[block]
            if missing := [target for target in targets if target not in worth]:
                todo += missing
                continue
            todo.pop()
            counts = self.counts(range(block, end))
            moved, length = max((worth[target] for target in targets), default=(0, 0))
            moved += counts.get("global_load", 0) + counts.get("global_store", 0)
            worth[block] = (moved, length - (end - block))
        path = [0]
        while targets := self.blocks[path[-1]][1]:
            path.append(max(targets, key=lambda target: worth[target]))
        return self._positions(path)

    def counts(self, positions: Iterable[int]) -> dict[str, int]:
        """Instructions by class at these positions; classes that do not occur are left out."""
        found = Counter(self.instructions[at].kind for at in positions)
        return {kind: found[kind] for kind in CLASSES if found[kind]}

    def pipes(self, positions: Iterable[int]) -> dict[str, float]:
        """Instructions by pipe at these positions; matrix products in units of m16n8k16."""
        positions = tuple(positions)
        counts = self.counts(positions)
        found = {pipe: float(sum(counts.get(kind, 0) for kind in kinds)) for pipe, kinds in PIPES.items()}
        return {**found, "mma": sum(self.instructions[at].mma_units for at in positions)}

    def loads(self, positions: Iterable[int]) -> dict[str, int]:
        """Loads and copies at these positions by kind and bits a lane, "LDGSTS.128": those of global memory first."""
        found: Counter[tuple[int, str, int]] = Counter()
        for at in positions:
            one = self.instructions[at]
            if one.kind in LOADS:
                found[LOADS.index(one.kind), one.head, -(one.bits or 0)] += 1
        return {f"{kind[1]}.{-kind[2]}" if kind[2] else kind[1]: found[kind] for kind in sorted(found)}

    def copied(self, positions: Iterable[int]) -> int:
        """Bytes of global memory that all lanes of one warp ask for at these positions, had none of them been masked;
        bulk copies are not counted."""
        asked = (self.instructions[at] for at in positions)
        return sum(WARP * (one.bits or 0) // 8 for one in asked if one.kind in LOADS[:2])

    def main_loop(self) -> Loop | None:
        """The first innermost loop that has matrix products or asynchronous copies, else the first that has loads at
        all; None if there is none.

        The first, as kernels have their loop over pages in front of those over edges, which have as many copies, and
        where pages are of float32 numbers more products.
        """

        def counted(loop: Loop, *classes: str) -> bool:
            counts = self.counts(loop.body)
            return any(counts.get(name) for name in classes)

        multiplied = [loop for loop in self.loops if counted(loop, "mma", "async_copy")]
        busy = multiplied or [loop for loop in self.loops if counted(loop, "global_load", "shared_load")]
        innermost = [loop for loop in busy if not any(set(other.body) < set(loop.body) for other in busy)]
        return min(innermost, key=lambda loop: loop.body[0], default=None)


def parse(text: str) -> Code:
    """The code in the text of `nvdisasm -c`; lines that are no instruction and no label are passed over."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(Instruction(int(found[1], 16), found[2] or "", found[3], found[4]))
    return Code(tuple(instructions), labels)
