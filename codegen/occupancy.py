"""How many programs of a kernel a GPU holds at once, and how many of them should share one sequence.

A kernel that reads packed bytes is as fast as its programs are many: each waits for memory most of the time.  So all
places for programs should be taken, once or a whole number of times: a few more programs than there are places run
alone, behind all others.  Measured on an H200, 8 x 8 x 131072, share of the read limit by programs a sequence:
`token2`, of which a processor holds 12, 54 % with 16, 78 % with 24 and 75 % with 32; `channel4`, of which it holds 8,
95 % with 16, 82 % with 24 and 94 % with 32.  Nor should a partition of a processor have one more than the others, which
would wait for it: `kivi4`, of which a processor holds 9, takes 104 us with 16 programs a sequence and 120 with 18 (8 x
8 x 32768), `token4`, 11, 76 with 15 and 80 with 22.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from kvdsl.window import TILE

MOST_SPLITS = 128
MOST_EDGES = 32
START = 1.5  # what a program does beside its tiles, in tiles
EDGE = 0.8  # what a tile at the edges, of fewer tokens, takes
MERGE = 0.07  # what one more partial of a row costs where all are merged, in tiles
REGISTERS = 65536  # of a processor, on every GPU that Triton knows of NVIDIA's
MOST_REGISTERS = 255  # of a thread
PARTITIONS = 4  # of a processor: each has a quarter of its registers, and warps of its own
ALLOCATED = 8  # registers of a thread that are given together
RESERVED = 1024  # bytes of shared memory that a program takes beside its own


def residents(compiled: Any, warps: int) -> int | None:
    """Programs of a kernel that Triton compiled which a processor of the current GPU holds at once; None where it was
    interpreted."""
    import torch

    registers, shared = (getattr(compiled, "n_regs", None), getattr(compiled, "metadata", None))
    if not registers or shared is None or not torch.cuda.is_available():
        return None
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return held(registers, shared.shared, warps, gpu.shared_memory_per_multiprocessor)


def held(registers: int, shared: int, warps: int, room: int) -> int:
    """Programs of `warps` warps of `registers` a thread and `shared` bytes that a processor with `room` bytes of shared
    memory holds with as many in each of its partitions, or as many as it holds if that is none; at least one."""
    given = -(-registers // ALLOCATED) * ALLOCATED * 32
    in_registers = PARTITIONS * (REGISTERS // PARTITIONS // given) // warps
    all_ = max(1, min(in_registers, room // (shared + RESERVED)))
    even = max(1, PARTITIONS // warps)
    return all_ // even * even or all_


def more_registers(registers: int, warps: int, programs: int) -> str | None:
    """The setting of the assembler that lets a thread have all the registers that so many programs leave it; None where
    it has them.

    The assembler saves registers for programs that shared memory, or the partitions, leave no place for.  Measured on
    an H200, 16 x 8 x 16384: `kivi4` 130 us with 168 registers and 99 with 229.
    """
    beside = max(1, -(-programs * warps // PARTITIONS))  # warps of a partition
    most = min(MOST_REGISTERS, REGISTERS // PARTITIONS // 32 // beside // ALLOCATED * ALLOCATED)
    return f"maxnreg={most}" if most - registers >= ALLOCATED else None


def splits(programs: int, pages: int, page_tokens: int, places: int) -> int:
    """How many programs should share a sequence of so many pages, where `programs` are needed without sharing and the
    GPU has `places`: few if they fill it, as what they found must be merged."""
    return ranked(programs, pages, page_tokens, places)[0]


@lru_cache(maxsize=4096)
def ranked(programs: int, pages: int, page_tokens: int, places: int) -> tuple[int, ...]:
    """The same, the best first: of the numbers that give as many waves of programs of as many pages the least, which
    has the fewest partials to merge."""
    kinds: dict[tuple[int, int], int] = {}
    for count in range(1, max(1, min(pages, MOST_SPLITS)) + 1):
        kinds.setdefault((-(-programs * count // places), -(-pages // count)), count)

    def cost(kind: tuple[int, int]) -> float:
        waves, each = kind
        return waves * (each * page_tokens / TILE + START) + MERGE * kinds[kind]

    return tuple(kinds[kind] for kind in sorted(kinds, key=cost))


@lru_cache(maxsize=4096)
def edge_splits(programs: int, count: int, pages: int, page_tokens: int, tiles: int, places: int) -> int:
    """How many more programs should share the edges of a sequence, `tiles` of them, where `count` share its pages: they
    take the places that are left, and those of programs that have ended."""
    main = -(-pages // count) * page_tokens / TILE + START

    def cost(more: int) -> float:
        each = -(-tiles // more) * EDGE + START
        return _ended(programs * count, main, programs * more, each, places) + MERGE * more

    return min((2**i for i in range(MOST_EDGES.bit_length()) if 2**i < 2 * max(1, tiles)), key=cost)


def _ended(first: int, long: float, then: int, each: float, places: int) -> float:
    """When the last program ends, of `first` that take `long` and `then` behind them that take `each`."""
    waves, rest = divmod(first, places)
    free = places - rest
    beside = free * int(long / each) if rest else 0  # those that end while the last wave of the first ones runs
    if then <= beside:
        return waves * long + max(long, -(-then // free) * each)
    return waves * long + (long if rest else 0.0) + -(-(then - beside) // places) * each
