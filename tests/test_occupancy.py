"""How many programs a GPU holds, and how many share a sequence."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kvdsl.codegen import render
from kvdsl.codegen.launches import loop_bytes, warps
from kvdsl.codegen.occupancy import (
    MOST_EDGES,
    MOST_SPLITS,
    Room,
    Work,
    alone,
    edge_splits,
    filling,
    held,
    mapped_tile,
    merge_lanes,
    merge_warps,
    more_registers,
    ranked,
    splits,
)
from kvdsl.codegen.plan import plan_for
from kvdsl.codegen.run_parts import Part
from kvdsl.codegen.text import padded
from kvdsl.schemes import ALL
from kvdsl.shape import Shape

PROCESSORS = 132
ROOM = 228 << 10
TIMED = Path(__file__).parents[1] / "benchmarks/results/schedules"


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "right"),
    [
        (168, 18 << 10, 1, 12),
        (169, 18 << 10, 1, 8),
        (255, 20 << 10, 1, 8),
        (168, 24 << 10, 1, 8),
        (168, 34 << 10, 1, 4),
        (128, 1024, 4, 4),
    ],
)
def test_registers_of_a_partition_or_shared_memory_end_first_and_partitions_have_as_many(
    registers: int, shared: int, warps: int, right: int
) -> None:
    assert held(registers, shared, warps, ROOM) == right


@pytest.mark.parametrize(
    ("registers", "warps", "programs", "right"),
    [
        (168, 1, 12, None),
        (168, 1, 8, "maxnreg=255"),
        (248, 1, 8, None),
        (168, 1, 4, "maxnreg=255"),
        (90, 2, 8, "maxnreg=128"),
    ],
)
def test_a_thread_has_the_registers_that_its_programs_leave(
    registers: int, warps: int, programs: int, right: str | None
) -> None:
    """And no program loses its place for them."""
    assert more_registers(registers, warps, programs) == right
    if right is not None:
        assert held(int(right.removeprefix("maxnreg=")), 1024, warps, ROOM) >= programs


@pytest.mark.parametrize("name", ["channel3", "kvtuner", "kivi2", "q8_0", "int8_token_head"])
def test_tiles_leave_a_processor_two_programs_a_partition(name: str) -> None:
    """With two tiles of each in shared memory, and all registers that a thread can have."""
    plan = plan_for(ALL[name], Shape(128, 8, 32))
    assert held(255, 2 * loop_bytes(plan), warps("decode", plan), ROOM) == 8


@pytest.mark.parametrize(("name", "dim", "right"), [("cq_8c8b", 64, 2), ("cq_8c8b", 128, 4), ("cq_4c8b", 64, 4)])
def test_codes_of_vectors_in_planes_narrower_than_an_operand_are_read_by_two_warps(
    name: str, dim: int, right: int
) -> None:
    """Four moved 6 numbers to memory on sm_100, where two have room, and took 1.7 times the instructions."""
    assert warps("decode", plan_for(ALL[name], Shape(dim, 8, 32))) == right


@pytest.mark.parametrize("resident", [6, 8])
def test_all_places_are_taken_and_none_twice(resident: int) -> None:
    """A long sequence: one more program than there are places would run alone."""
    room = Room(PROCESSORS, resident)
    work = Work(64, 2048, 64, edges=2)
    count = splits(work, room)
    waves = -(-64 * count // room.places)
    assert waves * room.places - 64 <= 64 * count <= waves * room.places


def test_warps_are_alone_while_there_are_as_many_partitions() -> None:
    one, two = (Room(PROCESSORS, 8, warps) for warps in (1, 2))
    assert alone(Work(8, 33, 128), two, 33) and not alone(Work(8, 34, 128), two, 34)
    assert alone(Work(8, 66, 128), one, 66) and not alone(Work(9, 66, 128), one, 66)
    assert not alone(Work(8, 66, 128), one, 65)  # some would have two pages
    assert not alone(Work(8, 66, 128), Room(PROCESSORS, 3), 66)  # some would wait for others to end
    assert not alone(Work(1, MOST_SPLITS, 128), one, MOST_SPLITS)  # edges must find a place among the partials, too
    assert splits(Work(8, 66, 128, 4), one) == 66


def test_each_tile_of_few_pages_has_a_program() -> None:
    """Where tiles would have no partition each, pages have, and of many pages one program reads all tiles."""
    room = Room(PROCESSORS, 8)
    work = Work(8, 33, 128, 4, parts=2)
    assert splits(work, room) == 66 and alone(work, room, 66)
    assert splits(Work(8, 34, 128, 4, parts=2), room) == 34
    assert not alone(work, Room(PROCESSORS, 8, 2), 66)
    many = Work(64, 2048, 128, 4, parts=2)
    assert splits(many, room) == splits(Work(64, 2048, 128, 4), room)


@pytest.mark.parametrize(
    ("name", "tokens", "right"), [("token4", 1000, 2), ("token4", 3000, 1), ("qjl", 1000, 2), ("kvtq_2bit", 1000, 1)]
)
def test_pages_of_a_short_sequence_have_two_warps_each(
    monkeypatch: pytest.MonkeyPatch, name: str, tokens: int, right: int
) -> None:
    """Where a tile can be shared; the usual ones where the plan is fixed, for the batch must not decide."""
    pytest.importorskip("triton")
    from kvdsl.codegen.run_triton import TritonModule

    plan = plan_for(ALL[name], Shape(128, 8, 32))
    module: Any = TritonModule(plan, ModuleType(name), render(plan, "triton", name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "processors", lambda: PROCESSORS)
    state: Any = SimpleNamespace(longest=tokens, key_rows=torch.empty(1, 8, 128, 0), window=None)
    part = Part(module, torch.empty(1, 32, 1, 128), state, {})
    part = replace(part, clean=module._clean_splits(part))
    assert part.clean == -(-tokens // 64) or right == 1
    assert module._times(part) == right
    assert module._times(replace(part, clean=1)) == module._times(replace(part, fixed=True)) == 1
    assert module._times(replace(part, form="extend")) == 1


def test_short_sequences_are_shared_by_few() -> None:
    room = Room(PROCESSORS, 8)
    counts = [splits(Work(8, pages, 64), room) for pages in (1, 4, 16, 64, 256)]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] > 50
    assert splits(Work(4096, 256, 64), room) <= 2


def test_edges_are_shared_by_many_where_the_gpu_has_room_and_by_few_where_it_is_full() -> None:
    """Eleven tiles: of one short sequence each has a program; beside long ones one or two programs have them all."""
    room = Room(PROCESSORS, 8)
    assert edge_splits(Work(8, 16, 64, 11), 16, room) >= 6
    assert edge_splits(Work(64, 2048, 64, 11), 16, room) <= 2
    counts = [edge_splits(Work(8, 16, 64, tiles), 16, room) for tiles in (0, 1, 2, 4, 8, 64)]
    assert counts == sorted(counts) and counts[0] == 1


def test_edges_that_find_no_place_wait_for_programs_that_end() -> None:
    """All places are taken once: edges begin behind, and sharing them among more than there are places is no use."""
    assert edge_splits(Work(PROCESSORS, 1, 64, 16), 1, Room(PROCESSORS, 1)) == 1


@pytest.mark.parametrize("partials", [MOST_SPLITS, MOST_SPLITS + MOST_EDGES])
@pytest.mark.parametrize("pages", [1, 100, 4096])
def test_no_more_share_a_sequence_than_are_merged_at_once(pages: int, partials: int) -> None:
    work, room = Work(1, pages, 64, edges=64, partials=partials), Room(PROCESSORS, 8)
    assert all(count <= MOST_SPLITS for count in ranked(work, room))
    assert all(count + edge_splits(work, count, room) <= partials for count in ranked(work, room))


@pytest.mark.parametrize(("residents", "warps"), [(12, 1), (4, 2), (3, 1), (1, 8)])
@pytest.mark.parametrize(("programs", "pages"), [(64, 2048), (128, 256), (8, 16), (4096, 4)])
def test_what_fills_all_processors_alike_runs_at_once(programs: int, pages: int, residents: int, warps: int) -> None:
    """Of so many no processor has more than it holds; of one more some have one more than the others."""
    found = filling(Work(programs, pages, 64), Room(PROCESSORS, residents, warps))
    for count in found:
        each = -(-count * programs // PROCESSORS)
        assert each <= residents and (count + 1) * programs > each * PROCESSORS and count <= pages


def test_processors_are_filled_from_one_program_a_partition_up() -> None:
    assert filling(Work(64, 2048, 64), Room(PROCESSORS, 12)) == (8, 10, 12, 14, 16, 18, 20, 22, 24)


@pytest.mark.parametrize(
    ("rows", "partials", "channels", "right"),
    [
        (32, 4, 128, 32), (67, 4, 128, 64), (133, 4, 128, 128), (1, 4, 96, 32), (1, 4, 16, 16),  # few rows
        (512, 16, 128, 64), (256, 64, 128, 32), (512, 8, 96, 128), (None, 16, 128, 64),  # many partials
    ],
)  # fmt: skip
def test_programs_that_merge_have_what_one_warp_merges_best_and_find_a_processor_each(
    rows: int | None, partials: int, channels: int, right: int
) -> None:
    lanes = merge_lanes(rows, partials, channels, PROCESSORS)
    assert lanes == right
    assert lanes >= channels or rows is None or partials * lanes >= 1024 or rows * -(-channels // lanes) <= 264
    assert merge_lanes(rows, partials, channels, PROCESSORS, least=64) == min(max(64, right), padded(channels))
    assert merge_lanes(None, partials, channels, PROCESSORS) >= lanes


@pytest.mark.parametrize(("numbers", "right"), [(256, 1), (2048, 1), (4096, 4), (32768, 4)])
def test_more_numbers_than_one_warp_holds_are_merged_by_four(numbers: int, right: int) -> None:
    assert merge_warps(numbers) == right


@pytest.mark.parametrize(
    ("programs", "partials", "numbers", "right"),
    [(128, 16, 128, (1, 128)), (8192, 4, 128, (16, 32)), (2048, 64, 384, (1, 64)), (8192, 4, 16, (16, 16))],
)
def test_many_rows_of_few_partials_share_what_is_read_of_a_map(
    programs: int, partials: int, numbers: int, right: tuple[int, int]
) -> None:
    """What a program has at a time fits its registers; of no known number of rows, as of a fixed plan, each is alone,
    as the order of sums must not depend on the batch."""
    rows, step = mapped_tile(programs, partials, numbers, PROCESSORS)
    assert (rows, step) == right
    assert rows * partials * step <= 64 * 128 and programs >= 12 * PROCESSORS or rows == 1
    assert mapped_tile(0, partials, numbers, PROCESSORS)[0] == 1


def timings(name: str) -> Iterator[tuple[Work, Room, dict[tuple[int, int], float]]]:
    """Of every scheme and size of a file what was read, by which GPU, and the microseconds of each pair of numbers."""
    found = json.loads((TIMED / name).read_text())
    for row in found["rows"]:
        work = Work(row["programs"], row["pages"], row["page_tokens"], row["edges"])
        room = Room(found["processors"], row["residents"])
        yield work, room, {(count, more): us for count, more, us in row["timed"]}


def test_what_is_chosen_is_near_the_best_that_was_timed() -> None:
    """Of every scheme and size on an H200: the choice itself, or what was timed next to it."""
    over = []
    for work, room, timed in timings("h200_5.json"):
        count = splits(work, room)
        right = count, edge_splits(work, count, room)
        over.append(timed[min(timed, key=lambda pair: math.dist(pair, right))] / min(timed.values()))
    assert len(over) == 143 and sum(over) / len(over) < 1.022 and max(over) < 1.13
