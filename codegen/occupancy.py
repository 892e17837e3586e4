"""How many programs of a kernel a GPU holds at once, and how many of them should share one sequence.

A kernel that reads packed bytes is as fast as its programs are many: each waits for memory most of the time.  So all
places for programs should be taken, once or a whole number of times: a few more programs than there are places run
alone, behind all others.  Measured on an H200, 8 x 8 x 131072, share of the read limit by programs a sequence:
`token2`, of which a processor holds 12, 54 % with 16, 78 % with 24 and 75 % with 32; `channel4`, of which it holds 8,
95 % with 16, 82 % with 24 and 94 % with 32.  Nor should a partition of a processor have one more than the others, which
would wait for it: `kivi4`, of which a processor holds 9, takes 104 us with 16 programs a sequence and 120 with 18 (8 x
8 x 32768), `token4`, 11, 76 with 15 and 80 with 22.

What is below is in tiles of TILE tokens: of a full partition the time of one of a program's, divided by its programs.
The five constants are fitted to what numbers of programs took on an H200, eleven schemes at thirteen sizes
(benchmarks/results/schedules/h200_5.json): what they choose takes 1.02 times the best of each on average.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

from kvdsl.window import TILE

from .text import padded

MOST_SPLITS, MOST_EDGES = 128, 32  # programs of a sequence that share its pages, and its edges
LEAST_LANES = 32  # channels that a program merges
MERGED_AT_ONCE = 1024  # partial numbers that a program of one warp merges best; it holds twice as many
MERGE_WARPS = 4  # of one that has more
# Of a merge that maps: rows of a program, partials of each, numbers of all at a time; partial numbers of one row's.
MERGED_ROWS, MERGED_PARTIALS, MERGED_NUMBERS, MERGED_TILE = 16, 16, 32, 4096
START = 0.2  # what a program does beside its tiles
EDGE = 1.03  # what a tile at the edges takes, of fewer tokens
LATENCY = 2.4  # what a tile takes where others work while a warp waits, so few that it waits all the same
ALONE = 2.15  # what it takes a warp that has its partition alone
MERGED = 0.7  # what it takes a processor to merge what one program has left
REGISTERS = 65536  # of a processor, on every GPU that Triton knows of NVIDIA's
MOST_REGISTERS = 255  # of a thread
PARTITIONS = 4  # of a processor: each has a quarter of its registers, and warps of its own
ALLOCATED = 8  # registers of a thread that are given together
RESERVED = 1024  # bytes of shared memory that a program takes beside its own


@cache
def processors(device: int) -> int:
    """Multiprocessors of a GPU."""
    import torch

    found: int = torch.cuda.get_device_properties(device).multi_processor_count
    return found


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


@dataclass(frozen=True)
class Room:
    """What a GPU has for a kernel: processors, programs that each of them holds at once, and warps of a program."""

    processors: int
    residents: int
    warps: int = 1

    @property
    def places(self) -> int:
        """Programs that run at once."""
        return self.processors * self.residents

    def pace(self, programs: int) -> float:
        """What a tile takes with so many programs at once, of which every processor has as many but one."""
        beside = -(-(-(-programs // self.processors) * self.warps) // PARTITIONS)  # warps of the fullest partition
        return (ALONE if beside <= 1 else max(LATENCY, beside)) / self.warps


@dataclass(frozen=True)
class Work:
    """What is read: by `programs` where none is shared, each `pages` of `page_tokens` tokens and `edges` tiles.
    `parts`: tiles of a page, each of which a program can have for itself.  `partials`: the most of a row that are
    merged well."""

    programs: int
    pages: int
    page_tokens: int
    edges: int = 0
    parts: int = 1
    partials: int = MOST_SPLITS + MOST_EDGES

    def among(self, count: int) -> Work:
        """The same in the units that `count` programs a sequence share: tiles, where there are more than pages."""
        if count <= self.pages:
            return self
        tiles, tokens = self.pages * self.parts, self.page_tokens // self.parts
        return replace(self, pages=tiles, page_tokens=tokens, parts=1)


def splits(work: Work, room: Room) -> int:
    """How many programs should share the pages of a sequence: few if they fill the GPU, as what they found must be
    merged."""
    return ranked(work, room)[0]


def alone(work: Work, room: Room, count: int) -> bool:
    """Whether each page, or each tile, has one of `count` programs a sequence, and every warp a partition of a
    processor to itself: of short sequences, which wait for the instructions of one warp and not for memory.

    As many programs are the best then; microseconds on an H200 of what the model took without this, and so: 1 x 8 x
    4096 `token4` 10.4, 9.8, 1 x 8 x 8192 `token3` 15.1, 13.7, a tile each, not a page, 1 x 8 x 1024 `exl3_3` 17.7,
    12.1.  And so are twice the warps, where these are alone, too: 1 x 8 x 1024 `kivi4` 10.3, 9.4, `kvtq` 13.5, 10.8,
    `token4` 8.7, 8.3, 1 x 8 x 4096 `kivi2` 13.3, 12.1.  Beyond that it is the other way: 1 x 8 x 4096 `token4` 9.5,
    9.9, 1 x 8 x 32768 `kivi4` 20.2, 26.7.
    """
    units, programs = work.among(count).pages, work.programs * count
    few = units <= count <= MOST_SPLITS - MOST_EDGES and programs <= room.places
    return few and programs * room.warps <= room.processors * PARTITIONS


@lru_cache(maxsize=4096)
def ranked(work: Work, room: Room) -> tuple[int, ...]:
    """The same, the best first: of the numbers that give each program as many pages the least, which has the fewest
    partials to merge, with the edges shared as is best beside it."""
    least = 1 if work.edges else 0  # programs at the edges

    def time(count: int) -> float:
        return predicted(work, count, edge_splits(work, count, room) if least else 0, room)

    found = counts(work.pages, max(1, min(work.pages, MOST_SPLITS, work.partials - least)))
    first = [count for count in (work.pages * work.parts, work.pages) if alone(work, room, count)][:1]
    return (*first, *sorted((count for count in found if count not in first), key=time))


def filling(work: Work, room: Room) -> tuple[int, ...]:
    """Numbers of programs that share a sequence so that every processor has as many at once, from one a partition up.

    Where a kernel waits for memory one of these is the best, by up to 4 %, and the model cannot tell which: `token4`
    8 x 8 x 131072 takes 260.8 us with 14, 267 with 12, 24 and 49, `quarot4` 16 x 8 x 16384 75.3 with 4, 78.1 with 12.
    """
    least = max(1, min(PARTITIONS // room.warps, room.residents))
    found = (room.processors * each // work.programs for each in range(least, room.residents + 1))
    return tuple(dict.fromkeys(count for count in found if 1 <= count <= min(work.pages, MOST_SPLITS)))


def counts(pages: int, most: int, least: int = 1) -> list[int]:
    """Numbers of programs from `least` to `most`, rising: the fewest of those that give each as many pages."""
    kinds: dict[int, int] = {}
    for count in range(least, most + 1):
        kinds.setdefault(-(-pages // count), count)
    return list(kinds.values())


@lru_cache(maxsize=4096)
def edge_splits(work: Work, count: int, room: Room) -> int:
    """How many more programs should share the edges of a sequence where `count` share its pages: they take the places
    that are left, and those of programs that have ended."""
    most = max(1, min(MOST_EDGES, work.partials - count, 2 * work.edges - 1))
    sizes = (2**i for i in range(most.bit_length()))
    return min(sizes, key=lambda more: predicted(work, count, more, room))


def merge_lanes(rows: int | None, partials: int, channels: int, processors: int, least: int = LEAST_LANES) -> int:
    """Channels that a program merges so many partials of: all, or fewer where these are more numbers than one warp
    merges best, or the rows, if they are known, too few to keep the processors busy; `least` or more.

    Microseconds of a step on an H200 with four warps a program and all channels if there are rows enough, and so:
    64 x 8 x 2048 `token4` 52.3, 47.1, `quarot4` 61.3, 51.5; 16 x 8 x 16384 76.5, 76.2; 81.7, 78.9; 128 x 8 x 1024 49.2,
    49.0; 64.8, 53.3; 32 x 8 x 8192 79.4, 77.3; 86.7, 80.7.
    """
    lanes = whole = padded(channels)
    while lanes > least and (
        partials * lanes > MERGED_AT_ONCE or rows is not None and rows * whole // lanes <= processors
    ):
        lanes //= 2
    return lanes


def merge_warps(numbers: int) -> int:
    """Warps of a program that merges so many partial numbers: one, in which nothing waits for other warps, where it
    holds them."""
    return 1 if numbers <= 2 * MERGED_AT_ONCE else MERGE_WARPS


def mapped_tile(programs: int, partials: int, numbers: int, processors: int) -> tuple[int, int]:
    """(Rows that a program merges and maps at once, numbers of each at a time), where there were so many programs if
    each had one row: as many as a product has, so that the map is read less often, where that leaves the processors
    enough to do and a row has few partials."""
    if 4 * programs >= 3 * MERGED_ROWS * processors and partials <= MERGED_PARTIALS:
        return MERGED_ROWS, min(MERGED_NUMBERS, padded(numbers))
    return 1, min(4 * MERGED_NUMBERS, padded(numbers), MERGED_TILE // partials)


def predicted(work: Work, count: int, more: int, room: Room) -> float:
    """What a step takes, in tiles: until all have ended, of `count` programs a sequence that share its pages and `more`
    behind them for its edges, and have been merged."""
    work = work.among(count)
    long = -(-work.pages // count) * work.page_tokens / TILE + START
    short = -(-work.edges // max(1, more)) * EDGE + START
    waves, rest = divmod(work.programs * count, room.places)
    waiting, free = work.programs * more, room.places - rest
    time = waves * long * room.pace(room.places)
    if rest and waiting <= free:
        time += min(long, short) * room.pace(rest + waiting)
        time += abs(long - short) * room.pace(rest if long > short else waiting)
        waiting = 0
    elif rest:
        time += long * room.pace(room.places)
        waiting = max(0, waiting - free * int(long / short))  # as many have ended beside the others
    waves, rest = divmod(waiting, room.places)
    time += short * (waves * room.pace(room.places) + (room.pace(rest) if rest else 0.0))
    return time + MERGED * work.programs * (count + more) / room.processors
