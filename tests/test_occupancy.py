"""How many programs a GPU holds, and how many share a sequence."""

from __future__ import annotations

import pytest

from kvdsl.codegen.occupancy import MOST_SPLITS, held, splits

PROCESSORS = 132
ROOM = 228 << 10


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "right"),
    [(168, 18 << 10, 1, 12), (169, 18 << 10, 1, 8), (255, 20 << 10, 1, 8), (168, 34 << 10, 1, 6), (128, 1024, 4, 4)],
)
def test_registers_of_a_partition_or_shared_memory_end_first(
    registers: int, shared: int, warps: int, right: int
) -> None:
    assert held(registers, shared, warps, ROOM) == right


@pytest.mark.parametrize("resident", [6, 8, 12])
def test_all_places_are_taken_and_none_twice(resident: int) -> None:
    """A long sequence: one more program than there are places would run alone."""
    places = resident * PROCESSORS
    count = splits(64, 2048, 64, places)
    assert places - 64 < 64 * count <= places


def test_short_sequences_are_shared_by_few() -> None:
    places = 8 * PROCESSORS
    counts = [splits(8, pages, 64, places) for pages in (1, 4, 16, 64, 256, 2048)]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == MOST_SPLITS
    assert splits(4096, 256, 64, places) <= 2
