"""Schedules of decode that were found best by timing, and the files that keep them.

A file holds what is best for one scheme and shape on one kind of GPU, for calls of about so many sequences of about so
many tokens.  Files are read once, when kernels are built, and whatever stands in them is a legal schedule or is passed
over: a wrong one can make attention slow, never wrong.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvdsl.errors import BackendError
from kvdsl.interpreting import interpreted

from . import store
from .launches import decode_warps
from .occupancy import MOST_SPLITS

if TYPE_CHECKING:
    from .plan import Plan

FORMAT = 2
KERNEL = "decode"
MODEL = "model"
DEPTHS = range(1, 9)
LARGEST = 1 << 16  # bytes of a file that is read


class Schedule(NamedTuple):
    """How decode is launched: programs that share the pages of a sequence, the depth of their pipeline, and their
    warps."""

    splits: int
    stages: int
    warps: int

    def __str__(self) -> str:
        return f"{self.splits} programs a sequence, {self.stages} stages, {self.warps} warps"


class Card(NamedTuple):
    """A kind of GPU, such as "NVIDIA H200" of "sm_90"."""

    name: str
    arch: str

    def __str__(self) -> str:
        return f"{self.name} ({self.arch})"


class Bucket(NamedTuple):
    """Calls that one schedule is for: of the sequences, and the tokens of the longest one, the nearest powers of 2."""

    batch: int
    tokens: int

    @classmethod
    def of(cls, batch: int, longest: int) -> Bucket:
        return cls(*(1 << max(0, round(math.log2(max(1, number)))) for number in (batch, longest)))

    def __str__(self) -> str:
        return f"about {self.batch} x {self.tokens} tokens"


@dataclass
class Schedules:
    """Those found best for one scheme and shape: of calls that are in none of these buckets the model's is taken.

    card   the GPU that they are of; None where there is none that compiled kernels run on
    plan   the digest of the scheme, the shape and the generated text
    """

    card: Card | None
    plan: str
    best: dict[Bucket, Schedule] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Where schedules come from, in words."""
        return f"tuned on {self.card}" if self.best else MODEL

    def told(self) -> list[str]:
        """The same, bucket by bucket."""
        return [f"{bucket}: {self.best[bucket]}" for bucket in sorted(self.best)]


def folder() -> Path:
    """Where the files live: beside generated code."""
    return store.folder().parent / "schedules"


def this_card() -> Card | None:
    """The GPU that compiled kernels run on now."""
    import torch

    if not torch.cuda.is_available() or interpreted():
        return None
    major, minor = torch.cuda.get_device_capability()
    return Card(torch.cuda.get_device_name(), f"sm_{major}{minor}")


def digest(plan: Plan, text: str) -> str:
    """A digest of the scheme, the shape, and the text behind its header, which has the scheme's name in it."""
    code = text.partition('\n"""\n')[2] or text
    parts = (plan.scheme.hash, repr(plan.shape), code)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def known(plan: Plan, text: str) -> Schedules:
    """What the files have for this GPU.  Where there are none, the GPU is not looked for."""
    found = Schedules(None, digest(plan, text))
    paths = sorted(folder().glob(f"{found.plan}_*.json"))
    if paths and (card := this_card()) is not None:
        found.card = card
        for path in paths:
            if path.name.startswith(_prefix(found.plan, card)):
                found.best.update(_read(path, found.plan, card, decode_warps(plan)))
    return found


def keep(found: Schedules, bucket: Bucket, best: Schedule, more: Mapping[str, Any]) -> Path:
    """Write a file, in the place of an older one at once, and take the schedule; `more` is for a reader.  Raises
    BackendError where the folder cannot be used."""
    assert found.card is not None
    home = folder()
    if (why := store.usable(home)) is not None:
        raise BackendError(f"tune: schedules cannot be kept: {why}; set KVDSL_CACHE_DIR to a folder of your own")
    path = home / f"{_prefix(found.plan, found.card)}b{bucket.batch}_t{bucket.tokens}.json"
    document = {**_head(found.plan, found.card), **bucket._asdict(), "schedule": best._asdict(), **more}
    store.write(path, json.dumps(document, indent=2) + "\n")
    found.best[bucket] = best
    return path


def count(card: Card | None) -> int:
    """Files of a GPU, of all schemes."""
    return 0 if card is None else len(list(folder().glob(_prefix("*", card) + "*.json")))


def _prefix(plan: str, card: Card) -> str:
    return f"{plan}_{re.sub(r'[^A-Za-z0-9]+', '-', card.name)}_{card.arch}_"


def _head(plan: str, card: Card) -> dict[str, Any]:
    """What a file must say of itself."""
    return {"format": FORMAT, "plan": plan, "device": card.name, "arch": card.arch, "kernel": KERNEL}


def _read(path: Path, plan: str, card: Card, warps: Sequence[int]) -> dict[Bucket, Schedule]:
    """What one file holds; nothing, and a warning, where it is damaged or another's."""
    try:
        with open(path, encoding="utf-8") as file:
            document = json.loads(file.read(LARGEST))
        for name, right in _head(plan, card).items():
            if document[name] != right:
                raise ValueError(f"{name} is {document[name]!r}, here it is {right!r}")
        bucket = Bucket(_among(document, "batch", None), _among(document, "tokens", None))
        if bucket != Bucket.of(*bucket):
            raise ValueError(f"batch {bucket.batch} and tokens {bucket.tokens} are no powers of 2")
        chosen = document["schedule"]
        splits, depth = _among(chosen, "splits", range(1, MOST_SPLITS + 1)), _among(chosen, "stages", DEPTHS)
        return {bucket: Schedule(splits, depth, _among(chosen, "warps", warps))}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        store.say(f"{path} is no schedule for {card} and is not used: {why}; delete it, or run `kvdsl tune` again")
        return {}


def _among(document: Any, name: str, allowed: Any) -> int:
    """A number of a file, one of those allowed; a positive one where all are."""
    number = document[name]
    if type(number) is not int or (number < 1 if allowed is None else number not in allowed):
        raise ValueError(f"{name} is {number!r}")
    return number
