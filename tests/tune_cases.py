"""A GPU and a clock for tests of schedules, where there are none."""

from __future__ import annotations

from collections.abc import Callable

from kvdsl.codegen.schedules import Card

CARD = Card("NVIDIA H200", "sm_90")


class ListedClock:
    """What is timed first takes the first of these seconds, and so on."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds_of, self._next = seconds, 0

    def seconds(self, call: Callable[[], object], samples: int, *, cold: bool, graph: bool) -> tuple[float, ...]:
        call()
        self._next += 1
        return (self.seconds_of[(self._next - 1) % len(self.seconds_of)],) * samples
