"""What is legal of tiers and of the router that sends tokens to them."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from . import feedback_rules, tier_kinds  # noqa: F401  (they enter what fields may hold)
from .errors import Fault, SchemeError
from .scheme import ALL, SIDES, ChannelScale, Scheme, Store
from .segments import segment, segments, spans_all
from .shape import Shape
from .sites import Site, rule
from .tiers import Router, Saliency, Tier
from .window import waiting


def faults(scheme: Scheme) -> tuple[Fault, ...]:
    """Every mistake of a scheme whose tokens go to tiers, its stores' own included."""
    found = (*_routes(scheme), *_tiers(scheme), *_moves(scheme), *_stores(scheme))
    return found or _of_segments(scheme)


def decides_by_position(router: Router | None) -> bool:
    """Whether the tier of a token follows from its position alone."""
    return router is None or type(router).labels is not Router.labels


def _routes(scheme: Scheme) -> Iterator[Fault]:
    if len(scheme.tiers) > 1 and scheme.router is None:
        fact = f"{len(scheme.tiers)} tiers and nothing that sorts tokens into them"
        yield Fault("router", fact, 'add router=Saliency("normalized", every=100)')
    if len(scheme.tiers) < 2 and scheme.router is not None:
        yield Fault("router", "it has no choice to make without two tiers", "add tiers=(Tier(4, top=0.5), Tier(2))")
    if scheme.prefill == "stored":
        fact = "tokens are sent to tiers behind the attention of their own step, which sees them exactly"
        yield Fault("prefill", fact, "leave prefill out")
    if scheme.recent is not None and scheme.router is not None and scheme.recent.flush == "whole":
        yield Fault("recent.flush", "a window that leaves at once is a router's `every`", "leave flush out")


def _tiers(scheme: Scheme) -> Iterator[Fault]:
    if scheme.shared:
        fact = "tiers store keys and values of their own, and these values are a stretch of the keys"
        yield Fault("values.code", fact, "leave tiers, router and requantize out")
    by_position, share = decides_by_position(scheme.router), Fraction(0)
    for position, tier in enumerate(scheme.tiers):
        place, last = f"tiers[{position}]", position == len(scheme.tiers) - 1
        if tier.drops and not last:
            yield Fault(f"{place}.bits", "tokens that are dropped stand in no order", "put the tier that drops last")
        if tier.drops and (tier.keys is not None or tier.values is not None):
            yield Fault(f"{place}.bits", "0 bits drop what the tier's own store would keep", "leave bits out")
        if tier.top is not None and (last or by_position):
            fact = "the last tier takes the rest" if last else "the router itself says which tokens stand here"
            yield Fault(f"{place}.top", fact, "leave top out")
        if tier.top is None and not last and not by_position:
            yield Fault(f"{place}.top", "only the last tier takes the rest", "say how many, as top=0.2")
        if isinstance(tier.top, float):
            share += Fraction(tier.top)
    if share > 1 + Fraction(1, 1 << 40):
        yield Fault("tiers", f"shares add up to {float(share):g}, more than all tokens", "make them smaller")


def _moves(scheme: Scheme) -> Iterator[Fault]:
    router = scheme.router
    if router is None:
        return
    if router.moves == "any" and scheme.requantize == "never":
        fact = "moving a token up needs its bits back"
        yield Fault("router.moves", fact, "use moves='down', or requantize='on_flush'")
    if router.moves != "new" and decides_by_position(router):
        yield Fault("router.moves", "a position says the same for ever", "leave moves out")
    elif router.moves != "new" and not isinstance(router, Saliency):
        fact = "importance is asked of new tokens alone, and those in tiers would have none"
        yield Fault("router.moves", fact, "leave moves out")
    if isinstance(router, Saliency) and router.metric == "last" and router.probes is not None:
        yield Fault("router.probes", "the newest query is the only one that 'last' asks", "leave probes out")
    if isinstance(router, Saliency) and router.metric == "last" and router.later not in (None, "last"):
        if router.probes is None and router.every != "prompt":
            fact = "sums over all queries are not carried on where the prompt's newest one is all that is asked"
            yield Fault("router.later", fact, "leave later out, or give probes with another metric")
    if router.moves == "down" and scheme.requantize == "never":
        for position, tier in enumerate(scheme.tiers):
            for side in SIDES:
                if not tier.drops and _together(tier.store(side, scheme.side(side))):
                    place = f"tiers[{position}].{side}"
                    fact = "tokens that share a scale with others cannot leave, or come, alone"
                    yield Fault(place, fact, "use a scale for each token of a head, or requantize='on_flush'")
                elif position < len(scheme.tiers) - 1 and _of_heads(tier.store(side, scheme.side(side))):
                    place = f"tiers[{position}].{side}"
                    fact = "a token that moves is coded for its head alone, and something here is given by head"
                    yield Fault(place, fact, "use what is measured online, or requantize='on_flush'")


def _together(store: Store) -> bool:
    """Whether a token's codes depend on others, or what they are read by is shared by heads."""
    scales = [term.measure for term in store.terms if term.measure is not None and term.measure.when == "online"]
    return any(waiting(term) > 1 for term in store.terms) or any(s.block.heads != 1 for s in scales) or spans_all(store)


def _of_heads(store: Store) -> bool:
    """Whether numbers of each head are given, or several heads are rotated together."""
    parts = [part for term in store.terms for _, part in term.walk()]
    given = any(getattr(part, "when", None) == "calibrated" for part in parts)
    return given or any(term.joined != 1 for term in store.terms)


def _stores(scheme: Scheme) -> Iterator[Fault]:
    for place, store in stores(scheme):
        yield from feedback_rules.of_tier(scheme, place, store)
        for position, part in enumerate(store.transform):  # type: ignore[arg-type]
            if isinstance(part, ChannelScale) and part.when != "calibrated":
                yield from _measured(scheme, part, f"{place}.transform[{position}]", position)
        scale = store.scale
        if scale is not None and scale.when == "online" and scale.block.tokens is ALL:
            if not spans_all(store):
                fact = "one scale over all tokens is of the range of each channel, of evenly spaced levels alone"
                yield Fault(f"{place}.scale", fact, "use Uniform under per_channel(), and nothing beside it")
            elif scheme.requantize == "never":
                fact = "one scale over all tokens cannot be appended to"
                yield Fault(f"{place}.scale", fact, "use requantize='on_flush', or a group such as tokens=64")


def _measured(scheme: Scheme, part: ChannelScale, place: str, position: int) -> Iterator[Fault]:
    if position:
        yield Fault(place, "what is measured on a tier's tokens is of the vector itself", "put it first")
    if part.by == "learned" or (part.by == "balance" and (place.startswith("values") or ".values" in place)):
        yield Fault(f"{place}.by", f"{part.by!r} is not measured on a tier's tokens", "use 'sqrt_absmax'")
    if part.by == "balance" and part.when == "online":
        yield Fault(f"{place}.when", "queries are at hand with the prompt", "use when='prompt'")
    if part.when == "online" and scheme.requantize == "never":
        yield Fault(f"{place}.when", "sizes that change need codes that do", "use 'prompt', or requantize='on_flush'")


@rule("~.transform")
def _measured_on_a_tier(site: Site) -> Iterator[Fault]:
    for position, part in enumerate(site.store.transform):  # type: ignore[arg-type]
        if isinstance(part, ChannelScale) and part.when != "calibrated":
            fact = f"{part.when!r} measures the tokens of a tier, and the scheme has none"
            yield site.fault(f"transform[{position}].when", fact, "use 'calibrated', or add tiers=(Tier(),)")


def stores(scheme: Scheme) -> Iterator[tuple[str, Store]]:
    """The stores of a routed scheme where they stand: its own, and those of tiers."""
    yield from ((side, scheme.side(side)) for side in SIDES)
    for position, tier in enumerate(scheme.tiers):
        yield from ((f"tiers[{position}].{side}", s) for side in SIDES if (s := tier.own(side)) is not None)


def shape_faults(scheme: Scheme, shape: Shape) -> Iterator[Fault]:
    """What shows only at a shape."""
    if shape.softcap and any((about := one.of("keys")) is not None and about.by == "range" for one in segments(scheme)):
        fact = "what a range over all tokens is shifted by is added to scores behind their softcap"
        yield Fault("keys.scale", fact, "use a group such as tokens=64, or a shape without softcap")


def _of_segments(scheme: Scheme) -> tuple[Fault, ...]:
    """The mistakes of what each tier stores, once each."""
    found: dict[Fault, None] = {}
    for position, tier in enumerate(scheme.tiers or (Tier(),)):
        try:
            segment(scheme, tier)
        except SchemeError as error:
            for fault in error.faults:
                side = fault.place.partition(".")[0]
                inner = side in SIDES and tier.own(side) is not None
                found[Fault(f"tiers[{position}].{fault.place}" if inner else fault.place, fault.fact, fault.mend)] = (
                    None
                )
    return tuple(found)
