"""A map of bits: which pair of key and value bits each layer of a model takes, found for a model, a text and a budget.

As KVTuner does it (arXiv 2502.04420): pairs that hurt a layer's attention needlessly are dropped, layers alike are put
together, and what is left is searched with Optuna for few bits and little loss at once, the loss being the model's own,
read through its packed cache.  It begins with maps that tell which clusters the loss depends on.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from .cost import bits as counted
from .cost import page_tokens
from .errors import Fault, SchemeError
from .generation import Loaded, called, digest_of, opened
from .kernels import Backend
from .params import ROPE, from_data
from .registry import load, name_of
from .scheme import SIDES, Scheme
from .search_layers import Observed, output_errors
from .search_loss import Divergence
from .search_pairs import Cluster, Figures, Pair, clusters, front, spread
from .search_start import Map, ladder, probes, shares, uniform
from .search_study import Trial, errors_of, run
from .search_study import opened as study_opened
from .shape import Shape
from .window import windows

ROUNDING = 1e-9  # of a mean of bits
STEPS = 12  # maps of the ladder that are tried
WORST = 1e3  # stands for a loss that is no number


@dataclass(frozen=True)
class Point:
    """A map, the pair of every layer: bits a number, and mean KL divergence a token from full precision, in nats."""

    bits: float
    loss: float
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Found:
    """The best map within the budget, as a scheme and as a point; the maps that none of those tried dominates, from the
    fewest bits on; how many were tried."""

    scheme: Scheme
    best: Point
    front: tuple[Point, ...]
    trials: int


def search(
    scheme: Scheme | str,
    model: str | Path | Loaded,
    text: str,
    *,
    bits: float,
    pairs: Sequence[int] = (2, 4, 8),
    trials: int = 100,
    seed: int = 0,
    study: str | Path | None = None,
    tokens: int = 1024,
    backend: Backend | None = None,
    device: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Found:
    """The map of bits over `scheme` with the least loss of `model` on `text` that takes at most `bits` a number.

    pairs    the bits that keys and values may have; `bits` counts metadata, too, as kvdsl.bits does
    trials   maps to try in all; a `study`, an SQLite file, keeps them, so that another run goes on where one stopped
    tokens   of the text to read at most: three quarters as a context, the last one is predicted
    model    as for kvdsl.generation.generate
    say      told what is being done

    Raises SchemeError for a scheme that has no bits to change, layers of its own or calibrated numbers; ValueError for
    a budget that no map meets, too short a text, a study of another search; ModelError, MissingExtra.
    """
    from .extras import need

    need("optuna", "search")
    base = load(scheme)
    choices = _choices(base, pairs)
    for name, count, least in (("trials", trials, 1), ("seed", seed, 0), ("tokens", tokens, 1)):
        if type(count) is not int or count < least:
            raise ValueError(f"{name}: {count!r} is no whole number of {least} or more; give one")
    say("reading the text")
    network, tokenizer = opened(model, device)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][:, :tokens].to(network.device)
    context = _context(base, ids.shape[1])
    layers, ropes = _observed(base, network, ids)
    costs = [_costs(base, choices, keys.shape) for keys, _, _ in layers]
    _refuse_budget(base, bits, costs)
    asked = {
        "scheme": f"{name_of(base)} {base.hash}", "model": digest_of(network), "text": _digest(ids.cpu().numpy()),
        "seed": seed, "pairs": " ".join(map(str, choices)), "bits": float(bits),
    }  # fmt: skip
    kept = study_opened(None if study is None else Path(study), asked)

    def measured() -> list[dict[Pair, float]]:
        errors = []
        for index, layer in enumerate(layers):
            say(f"layer {index + 1} of {len(layers)}")
            params = None if base.keys.rope is None else {ROPE: ropes[f"layers.{index}.{ROPE}"]}
            errors.append(output_errors(lambda pair: at(base, pair), layer, choices, params, backend))
        return errors

    errors = errors_of(kept, measured)
    offered = clusters(costs, errors)
    say("full precision")
    divergence = Divergence(network, ids[0], layers, context=context, backend=backend)

    def measure(chosen: Map) -> tuple[float, float]:
        taken = spread(offered, chosen)
        return _mean(costs, taken), divergence(mapped(base, taken))

    def starts(done: Sequence[Trial]) -> list[Map]:
        return _begun(offered, costs, errors, bits, done)

    done = run(
        kept, offered, starts, measure, budget=bits + ROUNDING, trials=trials, seed=seed,
        say=lambda number, all_: say(f"map {number + 1} of {all_}"),
    )  # fmt: skip
    points = [Point(trial.bits, trial.loss, spread(offered, trial.pairs)) for trial in done]
    shown = tuple(points[i] for i in front([(p.bits, p.loss) for p in points]))
    best = [point for point in shown if point.bits <= bits + ROUNDING][-1]
    source = f"{name_of(base)} in bits by layer, as kvdsl search finds for {called(model, network)} at {bits:g} bits"
    return Found(mapped(base, best.pairs, source), best, shown, len(done))


def at(scheme: Scheme, pair: Pair) -> Scheme:
    """The scheme with so many bits of keys and of values."""
    return scheme.with_(keys=scheme.keys.with_(bits=pair[0]), values=scheme.values.with_(bits=pair[1]))


def mapped(scheme: Scheme, pairs: Sequence[Pair], source: str = "") -> Scheme:
    """The scheme with a pair for every layer: the most frequent in its own stores, the others by layer."""
    counts = Counter(pairs)
    usual = max(counts, key=lambda pair: (counts[pair], pair))
    places = {pair: tuple(i for i, own in enumerate(pairs) if own == pair) for pair in sorted(counts)}
    plain = scheme.with_(source="")
    table = {where: at(plain, pair) for pair, where in places.items() if pair != usual}
    return at(plain, usual).with_(layers=table, source=source)


def _choices(scheme: Scheme, pairs: Sequence[int]) -> list[int]:
    """The bits to choose from, rising.  SchemeError where a scheme cannot be searched over."""
    if scheme.layers:
        raise SchemeError((Fault("layers", "they are what is searched for", "give the scheme of one layer"),))
    if names := from_data(scheme, Shape(128)):
        fact = f"{names[0]} is calibrated, for one number of bits only"
        raise SchemeError((Fault("scheme", fact, "search over one that takes nothing from data, as kivi2"),))
    for side in SIDES:
        try:
            scheme.side(side).with_(bits=2)
        except TypeError:
            fact, mend = f"{scheme.side(side).code!r} has no bits to change", "take one of Uniform codes, as kivi2"
            raise SchemeError((Fault(f"{side}.code", fact, mend),)) from None
        except SchemeError:
            pass  # 2 bits are not among its choices, perhaps
    found = sorted(set(pairs))
    if len(found) < 2 or not all(type(b) is int and b > 0 for b in found):
        raise ValueError(f"pairs: {list(pairs)} is no choice; give two or more numbers of bits, as 2, 4, 8")
    for pair in product(found, found):
        at(scheme, pair)
    return found


def _context(scheme: Scheme, tokens: int) -> int:
    """How many tokens are put into the cache at once: three quarters.  ValueError where none of them is packed."""
    policies = windows(scheme).values()
    least = max(policy.sinks + policy.recent + (not policy.whole) for policy in policies)
    needed = max(-(-4 * least // 3), page_tokens(scheme), 8)
    if tokens < needed:
        raise ValueError(f"text: {tokens} tokens, of which the scheme quantizes none; give at least {needed}")
    return 3 * tokens // 4


def _observed(scheme: Scheme, network: Any, ids: Any) -> tuple[list[Observed], dict[str, Any]]:
    from .hf import completed, observed

    layers = observed(network, ids)
    for index, (_, _, queries) in enumerate(layers):
        if queries is None:
            raise ValueError(f"model: layer {index} does not call the model's attention function; its map is not found")
    return layers, completed(scheme, network, None)


def _costs(scheme: Scheme, choices: Sequence[int], shape: Sequence[int]) -> dict[Pair, float]:
    _, heads, _, head_dim = shape
    return {pair: counted(at(scheme, pair), head_dim, heads).mean for pair in product(choices, choices)}


def _mean(costs: Sequence[Figures], taken: Sequence[Pair]) -> float:
    return sum(cost[pair] for cost, pair in zip(costs, taken, strict=True)) / len(costs)


def _refuse_budget(scheme: Scheme, bits: float, costs: Sequence[Figures]) -> None:
    lowest, highest = (_mean(costs, [end(cost, key=lambda p: cost[p]) for cost in costs]) for end in (min, max))
    if not lowest - ROUNDING <= bits <= highest + ROUNDING:
        raise ValueError(
            f"bits: {bits:g} is no budget for {name_of(scheme)}, maps of it take {lowest:g} to {highest:g} bits, "
            "metadata included; give one between"
        )


def _begun(
    offered: Sequence[Cluster],
    costs: Sequence[Figures],
    errors: Sequence[Figures],
    bits: float,
    done: Sequence[Trial],
) -> list[Map]:
    """What is tried first: the fewest bits, one pair everywhere, probes; when these are in, what they say is the best
    within the budget, and other steps of that ladder, evenly, down to the fewest bits."""
    lowest, top = (tuple(cluster.pairs[end] for cluster in offered) for end in (0, -1))
    asked = [*dict.fromkeys([lowest, *uniform(offered), top, *probes(offered)])]
    if len(done) < len(asked):
        return asked
    loss = {trial.pairs: trial.loss if math.isfinite(trial.loss) else WORST for trial in done[: len(asked)]}
    parts = shares(offered, errors, [loss[probe] for probe in probes(offered)], loss[top])
    steps = [step for step in ladder(offered, costs, parts) if _mean(costs, spread(offered, step)) <= bits + ROUNDING]
    even = [steps[-1 - i * (len(steps) - 1) // (STEPS - 1)] for i in range(STEPS)]
    return [*dict.fromkeys([*asked, *even])]


def _digest(array: Any) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:12]
