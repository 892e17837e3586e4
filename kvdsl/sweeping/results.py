"""What a sweep measured: figures of each member, what was left out and why, the fronts; to_dict is the document."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvdsl.cost import bits
from kvdsl.evaluation.results import SchemeResult
from kvdsl.scheme import Scheme
from kvdsl.shape import Shape

from .front import front
from .grid import LeftOut, Member

MEASURES = {
    "bits": "an element, exact tokens of the window included, at the length of a whole window",
    "packed_bits": "an element, without a window: of a sequence without end",
    "bytes": "of the whole model's cache at the first of the settings' sizes",
    "exact_share": "of a window's prompt, tokens that stand there exactly",
    "perplexity": "of the scored tokens, through the packed cache",
    "full_perplexity": "of the same tokens, in full precision",
    "delta": "perplexity over full_perplexity, their difference",
    "kl": "KL(full || packed) of a token, in nats",
    "kl_error": "its standard error over windows",
    "same": "share of tokens whose likeliest successor is that of full precision",
    "seconds": "spent on its windows",
    "share": "of the GPU's read limit that its decode kernel can reach, by its machine code",
    "microseconds": "predicted, in which attention of all layers reads the cache once, see predicted_time",
}
"""What is said of a member: a row of the file each."""
FRONTS = {"bits": "bits", "time": "microseconds"}
"""Name of a front and its cost; the loss is kl."""


@dataclass(frozen=True)
class Figured:
    """A member with its figures, by the names of MEASURES, and the divergence of each window by its start."""

    name: str
    scheme: Scheme
    axes: tuple[tuple[str, str], ...]
    figures: Mapping[str, float | None]
    windows: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, member: Member, found: SchemeResult, shape: Shape) -> Figured:
        """What an evaluation says of it; bits without a window are counted at a shape."""
        text = found.tasks.perplexity
        assert text is not None
        packed = bits(member.scheme, shape.head_dim, shape.kv_heads)
        figures = {
            "bits": found.bits,
            "packed_bits": packed.mean,
            "bytes": float(found.storage.sizes[0].nbytes) if found.storage and found.storage.sizes else None,
            "exact_share": found.reads.exact_share if found.reads else None,
            **{name: getattr(text, name) for name in ("perplexity", "full_perplexity", "delta", "kl", "kl_error")},
            "same": text.same,
            "seconds": found.seconds,
        }
        windows = {one.start: one.kl for one in text.windows}
        return cls(member.name, member.scheme, member.axes, {n: _number(x) for n, x in figures.items()}, windows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        known = {name: self.figures.get(name) for name in MEASURES}
        return {"scheme": self.name, "hash": self.scheme.hash, "axes": dict(self.axes), **known}


@dataclass(frozen=True)
class Sweep:
    """All members in the order of their grid.  `about` says of what: model, text, settings, shape, layers, versions,
    and of the predicted time gpu, tokens and batch."""

    about: Mapping[str, Any]
    members: tuple[Figured, ...]
    left_out: tuple[LeftOut, ...] = ()
    path: Path | None = None

    def front(self, name: str = "bits") -> tuple[Figured, ...]:
        """The members that none dominates, by `bits` or by predicted `time` against divergence, from the least on."""
        if name not in FRONTS:
            raise ValueError(f"front: {name!r} is none of {', '.join(FRONTS)}; give one of these")
        rows = [one.figures for one in self.members]
        return tuple(self.members[i] for i in front(rows, FRONTS[name], "kl"))

    def to_dict(self) -> dict[str, Any]:
        """Plain values alone: the document of `kvdsl sweep --json`."""
        return {
            **self.about,
            "measures": dict(MEASURES),
            "members": [one.to_dict() for one in self.members],
            "left_out": [{"scheme": one.name, "why": one.why} for one in self.left_out],
            "front": {name: [one.name for one in self.front(name)] for name in FRONTS},
            "path": None if self.path is None else str(self.path),
        }


def _number(value: float | None) -> float | None:
    """None for what is no number, which no table can hold."""
    return None if value is None or math.isnan(value) else float(value)
