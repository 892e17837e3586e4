"""What is asked of an evaluation, and how much of it: one frozen value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

ROWS = "rows.jsonl"
"""The file of a folder that rows are kept in."""
TASKS = ("perplexity", "passkey", "needle", "copy", "greedy", "layers")


@dataclass(frozen=True)
class Settings:
    """The numbers of an evaluation; all lengths are in tokens.

    tasks            some of TASKS, in their order
    seed             of the places of windows, of keys, and of what intervals are drawn with
    calibration      first tokens of the text: what schemes take from data is measured on them, nothing else is
    windows          disjoint places of the text, one at random in each of so many equal stretches of the rest
    context, score   of a window: tokens of the prompt, and tokens scored behind it
    chunk            tokens that are put in at a time behind a prompt: they see each other exactly, all before them as
                     it is stored
    lengths, depths  of prompts that hide a key: about so many tokens, the key behind such a share of them
    keys             prompts for each length and depth
    copies, passage  prompts that ask for a passage again, and its tokens, of which the first `copied` are scored
    continued        prompts that are continued greedily, of `start` tokens, by `new` tokens
    queries          newest tokens whose attention over a window is compared layer by layer
    sizes            lengths of sequences whose bytes are counted
    resamples        of the bootstrap
    """

    tasks: tuple[str, ...] = TASKS
    seed: int = 0
    calibration: int = 512
    windows: int = 5
    context: int = 896
    score: int = 128
    chunk: int = 32
    lengths: tuple[int, ...] = (512, 1024)
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    keys: int = 1
    copies: int = 2
    passage: int = 200
    copied: int = 128
    continued: int = 2
    start: int = 384
    new: int = 24
    queries: int = 32
    sizes: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    resamples: int = 2000

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", chosen(self.tasks))
        for name in ("lengths", "depths", "sizes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for field in fields(self):
            value = getattr(self, field.name)
            if type(field.default) is int and (type(value) is not int or value < (field.name != "seed")):
                least = "0" if field.name == "seed" else "1"
                raise ValueError(f"{field.name}: {value!r} is no whole number of {least} or more; give one")
        for name in ("lengths", "sizes"):
            if not all(type(n) is int and n > 0 for n in getattr(self, name)):
                raise ValueError(f"{name}: {getattr(self, name)!r} are no whole numbers of tokens; give some, as 512")
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths: {self.depths!r} are no shares; give numbers from 0 to 1")
        if self.copied > self.passage:
            raise ValueError(f"copied: {self.copied} tokens of a passage of {self.passage}; give no more than it has")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values}

    def with_(self, **changes: object) -> Settings:
        """The same with other numbers; those that are None stay.  ValueError names one that is wrong."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})  # type: ignore[arg-type]


def chosen(tasks: Iterable[str]) -> tuple[str, ...]:
    """The tasks, each once, in the order of TASKS.  ValueError for one that is not known, and for none."""
    asked = list(tasks)
    if wrong := [task for task in asked if task not in TASKS]:
        raise ValueError(f"tasks: {wrong[0]!r} is none of {', '.join(TASKS)}; give some of these, separated by commas")
    if not asked:
        raise ValueError(f"tasks: none is given; give some of {', '.join(TASKS)}")
    return tuple(task for task in TASKS if task in asked)


FULL = Settings(
    windows=16, lengths=(512, 1024, 2048), depths=(0.0, 0.25, 0.5, 0.75, 1.0), keys=2, copies=6, continued=6, new=128,
    queries=64, sizes=(256, 512, 1024, 2048, 4096, 8192),
)  # fmt: skip
"""More of all: for figures that are to be compared closely."""
