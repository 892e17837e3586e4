"""Every stage of the compiler as a person wants to read it, and as data: `kvdsl show`."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kvdsl import cost
from kvdsl.kernels import Backend
from kvdsl.scheme import SIDES, Scheme, Side
from kvdsl.segments import shaped
from kvdsl.shape import Shape
from kvdsl.window import Window, windows

from . import forms, render, schedules
from .launches import decode_warps, launches, loop_bytes
from .multiplications import multiplications
from .plan import Plan, SidePlan, plan_for
from .show_algebra import normal_form
from .show_layout import page


@dataclass(frozen=True)
class View:
    """A scheme under a name, to be shown for a shape; `tokens` counts the window of a sequence of this length."""

    name: str
    scheme: Scheme
    shape: Shape
    backend: Backend = "triton"
    tokens: int | None = None

    @property
    def plan(self) -> Plan:
        return plan_for(self.scheme, self.shape)


Stage = tuple[dict[str, Any], list[str]]
TOKENS = 32768  # of a sequence that forms of attention are told for, where no other length is asked
BITS = "bits an element   code  metadata  padding   window    total"


def show(view: View, stage: str) -> Stage:
    """(data, lines) of one stage.  Of a scheme with tiers what is compiled is shown tier by tier.  Raises SchemeError
    where the scheme does not fit the shape."""
    if not view.scheme.routed or stage == "scheme":
        return STAGES[stage](view)
    if stage == "cost":
        return tiers_cost(view)
    each = {
        place: STAGES[stage](replace(view, name=f"{view.name} {place}", scheme=part, shape=shape))
        for place, (part, shape) in shaped(view.scheme, view.shape).items()
    }
    lines = [line for place, (_, told) in each.items() for line in (f"# {place}", "", *told, "")]
    return {place: data for place, (data, _) in each.items()}, lines[:-1]


def tiers_cost(view: View) -> Stage:
    """Bits an element of a scheme with tiers, with their formula."""
    shape = view.shape
    found = cost.bits(view.scheme, shape.head_dim, shape.kv_heads, view.tokens)
    sides: dict[str, Any] = {side: _side_bits(found, side) for side in SIDES}
    lines = [BITS, *(_row_of_bits(side, part) for side, part in sides.items()), ""]
    lines += [f"{side}: {part['formula']}" for side, part in sides.items()]
    before = [place for place, (_, its) in shaped(view.scheme, shape).items() if its.placed]
    if before:
        fact = f"{', '.join(before)}: keys stand before their rotary positions, and tokens in any order: a step reads"
        lines.append(f"{fact} {4 * shape.head_dim} bytes of cosines and sines for each token of a head, and its place")
    if view.tokens is None:
        lines.append("of a sequence without end, its exact tokens not counted; --tokens N counts those of N tokens")
    return {**sides, "mean": found.mean, "constants_bytes": found.constants}, lines


def scheme_stage(view: View) -> Stage:
    """The spec, its hash, and which tokens it packs."""
    scheme = view.scheme
    kept = routed(scheme) if scheme.routed else {side: _tokens(window) for side, window in windows(scheme).items()}
    data = {
        "name": view.name,
        "source": scheme.source,
        "hash": scheme.hash,
        "spec": repr(scheme),
        "tree": scheme.to_dict(),
        "tokens": kept,
    }
    lines = textwrap.wrap(repr(scheme), 110, subsequent_indent="    ", break_long_words=False)
    lines += ["", f"hash     {scheme.hash}", f"source   {scheme.source or 'not stated'}"]
    lines += [f"{side:8s} {text}" for side, text in kept.items()]
    seen = "exactly" if scheme.prefill == "exact" else "as they are stored"
    lines.append(f"a step's fresh tokens are attended {seen}")
    return data, lines


def routed(scheme: Scheme) -> dict[str, str]:
    """Which tokens stay exact and where the others go, in words."""
    sinks = [f"the first {scheme.sinks.tokens}"] if scheme.sinks else []
    recent = [f"the newest {scheme.recent.tokens}"] if scheme.recent else []
    if scheme.recent is not None and scheme.recent.flush == "whole":
        recent = [f"the newest until {scheme.recent.tokens} are full, which leave together"]
    found = {"exact": " and ".join([*sinks, *recent]) or "a step's own tokens"}
    for number, tier in enumerate(scheme.tiers):
        share = (
            f"{tier.top:.0%} of them" if isinstance(tier.top, float) else "the rest" if tier.top is None else tier.top
        )
        found[f"tier {number}"] = f"{share}, {'dropped' if tier.drops else repr(tier)}"
    if scheme.router is not None:
        found["router"] = repr(scheme.router)
    if (part := scheme.keys.feedback) is not None:
        found["coding"] = f"keys {part.channels} channels at a time, errors moving later ones by the prompt's queries"
    if scheme.requantize != "never":
        found["anew"] = "whenever tokens leave, all that is packed is decoded and quantized again"
    return found


def _tokens(window: Window) -> str:
    said = [f"the first {window.sinks} tokens stay exact"] if window.sinks else []
    if window.whole:
        said.append(f"tokens wait exact until {window.recent} are full, then leave together")
    elif window.recent:
        said.append(f"the newest {window.recent} tokens are exact, older ones leave one by one")
    else:
        said.append("every token is packed when it arrives")
    return "; ".join(said)


def normal_form_stage(view: View) -> Stage:
    """The derivation and its proof."""
    return normal_form(view.plan)


def layout_stage(view: View) -> Stage:
    """The page."""
    return page(view.plan)


def plan_stage(view: View) -> Stage:
    """Tiles and launches."""
    plan = view.plan
    text = render(plan, "triton", view.name)
    records, tuned = [record.to_json() for record in launches(plan, text)], schedules.known(plan, text)
    data: dict[str, Any] = {
        "tile": plan.tile,
        "halves": plan.halves,
        "rows": {"decode": plan.rows(many=False), "extend": plan.rows(many=True)},
        "span": {term.path: term.span for term in plan.terms},
        "tokens": view.tokens or TOKENS,
        "forms": forms.thresholds(plan, view.tokens or TOKENS),
        "schedule": {
            "from": tuned.source,
            "tuned": [{**at._asdict(), **one._asdict()} for at, one in tuned.best.items()],
        },
        "kernels": records,
    }
    rows, abreast = plan.rows(many=False), ", of two tokens abreast" * plan.of_decode.abreast
    halves = f", as two halves of {plan.half} whose tokens share words" if plan.halves > 1 else ""
    lines = [
        f"tile     {plan.tile} tokens are read at a time{halves}",
        f"rows     {rows} query rows a program in decode{abreast}, {plan.rows(many=True)} in extend and scores",
        *(f"pack     one program quantizes {span} tokens of the {place}" for place, span in data["span"].items()),
        *_placed(plan),
        f"queries  of a step, over {data['tokens']} packed tokens; chosen by what each form costs",
        *(f"         {sentence}" for sentence in forms.told(plan, data["tokens"])),
        f"schedule of decode: {'by the model of the GPU' if not tuned.best else tuned.source}",
        *(f"         {line}" for line in tuned.told()),
        "",
    ]
    for record in records:
        loop = f", {record['loop_packed_bytes']} packed bytes an iteration" if record["loop_packed_bytes"] else ""
        depths = " or ".join(map(str, record["stages"]))
        rounded = "" if record["fp_fusion"] else ", rounded after every operation"
        warps = f"{record['warps']} warps"
        if record["kernel"] == schedules.KERNEL:
            warps += "".join(f", {more} of short sequences" for more in decode_warps(plan)[1:])
        lines.append(f"{record['kernel']:14s} {warps}, {depths} stages{loop}{rounded}")
        arguments = ", ".join(f"{name} {kind}" for name, kind in record["signature"] if kind != "constexpr")
        lines += textwrap.wrap(arguments, 104, initial_indent=" " * 15, subsequent_indent=" " * 15)
        if record["constants"]:
            lines.append(" " * 15 + ", ".join(f"{name} = {value}" for name, value in record["constants"]))
    return data, lines


def _placed(plan: Plan) -> list[str]:
    """Where tokens stand in any order: what is loaded for each of them beside its codes."""
    if not plan.shape.placed:
        return []
    waves = f", and {4 * plan.shape.head_dim} bytes of cosines and sines" if plan.keys.rope is not None else ""
    return [f"places   tokens stand in any order: the main loop masks, and loads where each stands{waves}"]


def source_stage(view: View) -> Stage:
    """The generated text."""
    text = render(view.plan, view.backend, view.name)
    return {"backend": view.backend, "text": text}, text.rstrip("\n").split("\n")


def cost_stage(view: View) -> Stage:
    """Bits an element with their formula, bytes a token and layer, multiplications that remain."""
    shape, plan = view.shape, view.plan
    layout = plan.layout
    found = cost.bits(view.scheme, shape.head_dim, shape.kv_heads, view.tokens)
    sides: dict[str, Any] = {side: _side_cost(plan, found, side) for side in SIDES}
    exact = 2 * shape.kv_heads * shape.head_dim * (1 if view.scheme.shared else 2)
    per_token = found.mean / 8 * 2 * shape.kv_heads * shape.head_dim
    read = loop_bytes(plan, repeated=True) * shape.kv_heads / plan.tile
    data: dict[str, Any] = {
        **sides,
        "mean": found.mean,
        "constants_bytes": found.constants,
        "bytes_per_token_and_layer": per_token,
        "read_bytes_per_token_and_layer": read,
        "fp16_bytes_per_token_and_layer": exact,
        "page_tokens": layout.page_tokens,
        "page_bytes": layout.page_bytes,
    }
    lines = [f"{BITS}   formula of a packed number"]
    lines += [f"{_row_of_bits(side, sides[side])}   {sides[side]['formula']}" for side in SIDES]
    lines += [
        f"mean            {found.mean:41.3f}",
        "",
        f"bytes a token and layer   {per_token:g} ({exact} in fp16, {exact / per_token:.2f} times as many)",
        *_read_again(plan, read),
        f"bytes a page              {layout.page_bytes} for {layout.page_tokens} tokens",
        f"calibrated numbers        {found.constants:g} bytes a layer, for any length",
        "",
        "multiplications a stored number, main loop, outside the tensor cores and the softmax:",
    ]
    for place, part in ((term.path, _products(plan, term)) for term in plan.terms):
        unpacking = f", {part['unpacking']:g} of integers to unpack it" if part["unpacking"] else ""
        scaling = f"{part['scaling']:.4g} a query row for scales"
        lines.append(f"{place:15s} {part['decoding']:g} to decode it, {scaling}{unpacking}")
    if view.tokens is None:
        lines.append("the window's exact tokens are not counted; --tokens N counts those of a sequence of N tokens")
    return data, lines


def _read_again(plan: Plan, read: float) -> list[str]:
    """Where heads are rotated together: what a step reads, and why it is more than what is stored."""
    several = [f"{term.joined} heads of the {term.title}" for term in plan.terms if term.joined > 1]
    if not several:
        return []
    return [f"bytes read a token        {read:g}, as each of {' and of '.join(several)} is read for all of them"]


def _side_bits(found: cost.Bits, side: Side) -> dict[str, Any]:
    part = found.side(side)
    return {
        "code": part.code,
        "metadata": part.metadata,
        "padding": part.padding,
        "window": part.window,
        "total": part.total,
        "formula": found.formula(side),
    }


def _row_of_bits(side: str, part: dict[str, Any]) -> str:
    widths = {"code": 6, "metadata": 9, "padding": 8, "window": 8, "total": 8}
    return f"{side:15s} " + " ".join(f"{part[name]:{width}.3f}" for name, width in widths.items())


def _side_cost(plan: Plan, found: cost.Bits, side: Side) -> dict[str, Any]:
    return {
        **_side_bits(found, side),
        "multiplications": _products(plan, plan.side(side)),
        "residual": [{"multiplications": _products(plan, term)} for term in plan.side(side).terms[1:]],
    }


def _products(plan: Plan, term: SidePlan) -> dict[str, float]:
    found = multiplications(plan, term)
    return {"decoding": float(found.decoding), "scaling": float(found.scaling), "unpacking": float(found.unpacking)}


def main_loop(text: str) -> str:
    """Of a generated Triton text the first loop of the kernel `decode`, as it stands there."""
    decode = next(one for one in ast.parse(text).body if isinstance(one, ast.FunctionDef) and one.name == "decode")
    loop = next(one for one in ast.walk(decode) if isinstance(one, ast.For) and ast.unparse(one.target) == "tile")
    return textwrap.dedent("\n".join(text.split("\n")[loop.lineno - 1 : loop.end_lineno]))


STAGES: dict[str, Callable[[View], Stage]] = {
    "scheme": scheme_stage,
    "normal-form": normal_form_stage,
    "layout": layout_stage,
    "plan": plan_stage,
    "source": source_stage,
    "cost": cost_stage,
}
