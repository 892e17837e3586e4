"""A scheme for a model within a budget of bits: who is looked at, in which rounds, who is named, and why.

Successive halving: all candidates are looked at briefly, the best third again, and a few at length, each round on
places of the text drawn anew.  Only figures of the last round are compared with each other.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvdsl.cost import bits
from kvdsl.errors import SchemeError
from kvdsl.rules import layer_faults, shape_faults
from kvdsl.scheme import Scheme
from kvdsl.shape import Shape

from .grid import LeftOut, Member
from .results import Figured

ROUNDING = 1e-9  # of a mean of bits
BELOW, BEYOND = 1.25, 1.0  # bits under and over the budget, up to which schemes are looked at
MOSTLY = 0.5  # of a prompt's tokens exact: what is measured then says little of the codes
KEPT = 3  # looked at at length within the budget
LEAST = 4  # looked at again
CHEAPER = 0.9  # of the bits of the scheme that is named
Look = Callable[[Sequence[Member], int], Mapping[str, Figured | LeftOut]]
"""Members and a round's number to figures, or why there are none."""


@dataclass(frozen=True)
class Candidate:
    """A member and the bits that the budget is held against."""

    member: Member
    bits: float


@dataclass(frozen=True)
class Beside:
    """A scheme that was measured: `role` says what it is beside the one that is named, `round` its last round."""

    role: str
    bits: float
    round: int
    figured: Figured

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"role": self.role, "budget_bits": self.bits, "round": self.round, **self.figured.to_dict()}


@dataclass(frozen=True)
class Recommendation:
    """The scheme that is named, others of the last round beside it, all that were looked at, and why, in sentences."""

    about: Mapping[str, Any]
    budget: float
    chosen: Beside
    beside: tuple[Beside, ...]
    looked: tuple[Beside, ...]
    left_out: tuple[LeftOut, ...]
    why: tuple[str, ...]
    path: Path | None = None

    @property
    def scheme(self) -> Scheme:
        """The scheme that is named."""
        return self.chosen.figured.scheme

    def to_dict(self) -> dict[str, Any]:
        """Plain values alone: the document of `kvdsl recommend --json`."""
        return {
            **self.about,
            "budget": self.budget,
            **self.chosen.to_dict(),
            "spec": self.scheme.to_toml(),
            "why": list(self.why),
            "beside": [one.to_dict() for one in self.beside],
            "looked_at": [one.to_dict() for one in self.looked],
            "left_out": [{"scheme": one.name, "why": one.why} for one in self.left_out],
            "path": None if self.path is None else str(self.path),
        }


def candidates(
    members: Sequence[Member], budget: float, shape: Shape, layers: int, tokens: int | None, context: int
) -> tuple[list[Candidate], list[Candidate], list[LeftOut]]:
    """Those within the budget, those a little beyond it, and who is not looked at, and why.

    Bits are those of kvdsl.bits for the model: of a sequence of `tokens`, or of one without end.  ValueError where no
    scheme is within the budget.
    """
    within, beyond, left, counted = list[Candidate](), list[Candidate](), list[LeftOut](), list[Candidate]()
    for one in members:
        try:
            found = _counted(one.scheme, shape, layers, tokens)
        except SchemeError as error:
            left.append(LeftOut(one.name, str(error).splitlines()[0]))
            continue
        exact = bits(one.scheme, shape.head_dim, shape.kv_heads, tokens=context, layers=layers)
        if found <= ROUNDING:
            why = "it keeps a fixed number of tokens, so bits of a sequence without end say nothing; count at a length"
            left.append(LeftOut(one.name, why))
        elif (share := sum(side.exact for side in exact.sides) / 2) > MOSTLY:
            why = f"{share:.0%} of a prompt of {context} tokens stand exactly, which hides its codes; take a longer one"
            left.append(LeftOut(one.name, why))
        else:
            counted.append(Candidate(one, found))
    for each in counted:
        if each.bits > budget + BEYOND + ROUNDING:
            left.append(LeftOut(each.member.name, f"{each.bits:.3f} bits are more than {budget:g}"))
        elif each.bits < budget - BELOW:
            left.append(LeftOut(each.member.name, f"{each.bits:.3f} bits leave much of {budget:g} unused"))
        else:
            (within if each.bits <= budget + ROUNDING else beyond).append(each)
    if not within:
        fitting = [each for each in counted if each.bits <= budget + ROUNDING]
        if not fitting:
            raise ValueError(_nothing_fits(counted, budget))
        within = sorted(fitting, key=lambda each: (-each.bits, each.member.name))[:KEPT]  # a generous budget
        names = {each.member.name for each in within}
        left = [one for one in left if one.name not in names]
    return within, beyond, left


def _nothing_fits(counted: Sequence[Candidate], budget: float) -> str:
    if not counted:
        return "candidates: none of them fits the model; give others"
    least = min(counted, key=lambda one: (one.bits, one.member.name))
    return (
        f"bits: no scheme that fits the model takes {budget:g} bits or fewer; the fewest are {least.bits:.3f}, of "
        f"{least.member.name}; give more"
    )


def _counted(scheme: Scheme, shape: Shape, layers: int, tokens: int | None) -> float:
    if found := layer_faults(scheme, layers):
        raise SchemeError(found)
    for index in range(layers):
        if found := shape_faults(scheme.for_layer(index, layers), shape):
            raise SchemeError(found)
    return bits(scheme, shape.head_dim, shape.kv_heads, tokens=tokens, layers=layers).mean


def halved(
    within: Sequence[Candidate], beyond: Sequence[Candidate], look: Look
) -> tuple[list[Beside], list[Beside], list[LeftOut]]:
    """Figures of the last round of three, the best first, and of all who were looked at; who could not be measured."""
    by_name = {one.member.name: one for one in (*within, *beyond)}
    inside = {one.member.name for one in within}
    seen, left = dict[str, Beside](), list[LeftOut]()

    def looked(names: Sequence[str], number: int) -> list[str]:
        """Measured in a round, the least divergence first."""
        for name, found in look([by_name[name].member for name in names], number).items():
            if isinstance(found, LeftOut):
                left.append(found)
                seen.pop(name, None)
            else:
                seen[name] = Beside("", by_name[name].bits, number, found)
        return sorted((name for name in names if name in seen), key=lambda name: _order(seen[name]))

    first = looked([*by_name], 1)
    mine = [name for name in first if name in inside]
    if not mine:
        raise ValueError("candidates: none of those within the budget runs with this model: " + _reasons(left))
    again = looked(mine[: max(LEAST, math.ceil(len(mine) / 3))], 2) if len(mine) > KEPT else mine
    others = [name for name in mine if name not in again]
    last = again[:KEPT]
    if not last:
        raise ValueError("candidates: none of those within the budget runs with this model: " + _reasons(left))
    cheap = [name for name in (*again, *others) if seen[name].bits <= CHEAPER * seen[last[0]].bits]
    better = [name for name in first if name not in inside]
    last = [*dict.fromkeys([*last, *cheap[:1], *better[:1]])]
    final = looked(last, 3)
    return [seen[name] for name in final], sorted(seen.values(), key=lambda one: (-one.round, *_order(one))), left


def _reasons(left: Sequence[LeftOut]) -> str:
    return "; ".join(f"{one.name}: {one.why.splitlines()[0]}" for one in left[:KEPT]) or "no figures"


def _order(one: Beside) -> tuple[float, float, str]:
    """The least divergence first, then the fewest bits, then by name: the same for every run."""
    loss = one.figured.figures.get("kl")
    return (math.inf if loss is None else loss, one.bits, one.figured.name)


def named(measured: Sequence[Beside], budget: float) -> tuple[Beside, tuple[Beside, ...], tuple[str, ...]]:
    """Of schemes measured alike: the one within the budget that loses least, its neighbours with their roles, and why.

    ValueError where none is within the budget, or none has figures.
    """
    ordered = sorted(measured, key=_order)
    fitting = [one for one in ordered if one.bits <= budget + ROUNDING and math.isfinite(_order(one)[0])]
    if not fitting:
        least = min((one.bits for one in measured), default=math.nan)
        raise ValueError(f"bits: nothing that was measured takes {budget:g} bits or fewer, the fewest are {least:.3f}")
    best, *rest = fitting
    cheaper = next((one for one in rest if one.bits <= CHEAPER * best.bits), None)
    beyond = next((one for one in ordered if one.bits > budget + ROUNDING), None)
    roles = {"next best": rest[0] if rest else None, "cheaper": cheaper, "beyond the budget": beyond}
    found = dict[str, Beside]()
    for role, one in roles.items():
        if one is not None:
            name = one.figured.name
            both = f"{found[name].role}, {role}" if name in found else role
            found[name] = Beside(both, one.bits, one.round, one.figured)
    chosen = Beside("named", best.bits, best.round, best.figured)
    return chosen, tuple(found.values()), tuple(_why(chosen, found.values(), budget))


def _why(chosen: Beside, beside: Any, budget: float) -> list[str]:
    mine = chosen.figured
    told = [
        f"{mine.name} takes {chosen.bits:.3f} of {budget:g} bits and loses {_loss(mine):.4f} nats a token"
        f"{_error(mine)}, the least of those within the budget"
    ]
    exact = mine.figures.get("exact_share")
    if exact and mine.figures.get("bits") is not None:
        told.append(
            f"its window holds {exact:.0%} of the tokens of the prompts measured, {mine.figures['bits']:.3f} bits an "
            "element there; shorter contexts take more: --tokens counts at a length"
        )
    for one in beside:
        other, gap = one.figured, difference(mine, one.figured)
        more = one.bits - chosen.bits
        told.append(
            f"{one.role}: {other.name}, {abs(more):.3f} bits {'more' if more > 0 else 'fewer'}, "
            f"loses {_loss(other):.4f}" + ("" if gap is None else f", {_gap(gap)}")
        )
    return told


def difference(one: Figured, other: Figured) -> tuple[float, float] | None:
    """What the other loses more, mean over windows and its standard error, window by window; None of fewer than two."""
    both = [other.windows[start] - kl for start, kl in one.windows.items() if start in other.windows]
    if len(both) < 2 or not all(map(math.isfinite, both)):
        return None
    return statistics.fmean(both), statistics.stdev(both) / math.sqrt(len(both))


def _gap(gap: tuple[float, float]) -> str:
    mean, error = gap
    told = f"{abs(mean):.4f} ± {error:.4f} {'more' if mean >= 0 else 'less'}"
    return told if abs(mean) > 2 * error else f"{told}, which these windows do not tell apart"


def _loss(one: Figured) -> float:
    loss = one.figures.get("kl")
    return math.inf if loss is None else loss


def _error(one: Figured) -> str:
    error = one.figures.get("kl_error")
    return "" if error is None else f" ± {error:.4f}"
