"""Values of a spec as a grid writes them: numbers and words, tables as in TOML specs, or what Python would have.

"Rotate('hadamard', size=64)" is read as a call of the language's own constructors with plain values; nothing is run.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

from kvdsl.errors import Fault, SchemeError
from kvdsl.part import ALL, Part
from kvdsl.saying import closest, said
from kvdsl.scheme import (
    PARTS,
    ChannelScale,
    ChannelShift,
    Permute,
    Polar,
    PreRope,
    Recent,
    Rotate,
    Scheme,
    Sinks,
    per_channel,
    per_tensor,
    per_token,
)
from kvdsl.text import part_of

NONE = "none"
TRANSFORMS: dict[str, Part] = {
    "hadamard": Rotate("hadamard"),
    "random_hadamard": Rotate("random_hadamard", seed=0),
    "orthogonal": Rotate("orthogonal", seed=0),
    "absmax": ChannelScale("absmax"),
    "sqrt_absmax": ChannelScale("sqrt_absmax"),
    "balance": ChannelScale("balance"),
    "shift": ChannelShift(),
    "permute": Permute(),
    "pre_rope": PreRope(),
    "polar": Polar(),
}
"""Words for transforms that need no other number."""
_CALLS: dict[str, Callable[..., Any]] = {
    **{name: kind for name, kind in PARTS.items() if kind is not Scheme},
    "per_channel": per_channel,
    "per_tensor": per_tensor,
    "per_token": per_token,
}
_TOKENS: dict[str, Callable[[int], Part]] = {"recent": Recent, "sinks": Sinks}
_LONGEST = 2000  # characters


def value(place: str, told: Any, now: Any = None) -> Any:
    """What stands at a place of a spec for what a grid says; `now` is what stands there in the base.

    recent, sinks: a number of tokens, 0 for none.  transform: none, a word of TRANSFORMS, or a list of them.  A table
    is a part as in a TOML spec, a call one as in Python; "none" is nothing.  All else is as it is.  SchemeError for
    what is none of these.
    """
    field = place.rpartition(".")[2]
    if isinstance(told, Part):
        return told
    if isinstance(told, Mapping):
        return part_of(told, place)
    if isinstance(told, (list, tuple)):
        return tuple(value(place, one) for one in told)
    if field in _TOKENS and type(told) is int:
        if told == 0:
            return None
        return now.with_(tokens=told) if isinstance(now, Part) else _TOKENS[field](told)
    if not isinstance(told, str):
        return told
    if told == NONE:
        return () if field == "transform" else None
    if field == "transform" and told in TRANSFORMS:
        return TRANSFORMS[told]
    if "(" in told:
        return called(place, told)
    if field == "transform":
        near = closest(told, (NONE, *TRANSFORMS))
        raise _fault(place, told, "is no transform", f"use {near}" if near else f"use {NONE}, {', '.join(TRANSFORMS)}")
    return ALL if told == "ALL" else told


def called(place: str, text: str) -> Any:
    """The part, or list of parts, of an expression of constructors.  SchemeError for any other."""
    if len(text) > _LONGEST:
        raise _fault(place, text, f"has {len(text)} characters", "a part is a line of text")
    try:
        return _built(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError:
        raise _fault(place, text, "is no Python", "write a part, as Uniform(2)") from None
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, SchemeError):
            raise
        raise _fault(place, text, f"makes no part: {error}", "write a part, as Uniform(2)") from None


def _built(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=found):
            return found
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as found)):
            return -found
        case ast.Tuple(elts=inner) | ast.List(elts=inner):
            return tuple(map(_built, inner))
        case ast.Name(id="ALL"):
            return ALL
        case ast.Call(func=ast.Name(id=name), args=args, keywords=named) if name in _CALLS:
            given = {one.arg: _built(one.value) for one in named if one.arg}
            return _CALLS[name](*map(_built, args), **given)
        case ast.Call(func=ast.Name(id=name)):
            near = closest(name, [*_CALLS])
            raise ValueError(f"{name} is no part" + (f", {near} is" if near else ""))
    raise ValueError(f"{said(ast.unparse(node))} is neither a part nor a plain value")


def _fault(place: str, told: str, fact: str, mend: str) -> SchemeError:
    return SchemeError((Fault(place, f"{said(told)} {fact}", mend),))
