"""Pairs of key and value bits: which a layer is offered, and which layers take one together.

The first two steps of KVTuner (arXiv 2502.04420), on numbers alone.  The error of a layer's attention output tells
pairs apart only roughly: an error that keys make costs a model more than one of the same size that values make.  So a
pair is dropped only where another of no more bits is better by a factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Pair = tuple[int, int]
"""Bits of the codes of keys and of values."""
Figures = Mapping[Pair, float]
CLEARLY = 1.5
ALIKE = 1.25
MOST = 16  # clusters: more are made fewer by putting layers together that are less alike


@dataclass(frozen=True)
class Cluster:
    """Layers that take one pair together, and the pairs they are offered, from the fewest bits to the most."""

    layers: tuple[int, ...]
    pairs: tuple[Pair, ...]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that none dominates, in the order of their first number; of equal points the first.

    A point dominates another that is larger in one number and not smaller in the other.
    """
    found, lowest = list[int](), math.inf
    for place in sorted(range(len(points)), key=lambda i: (*points[i], i)):
        if points[place][1] < lowest or not found:
            found.append(place)
            lowest = points[place][1]
    return found


def pruned(cost: Figures, error: Figures, clearly: float = CLEARLY) -> tuple[Pair, ...]:
    """The pairs that no other of no more bits beats by the factor `clearly`, and the best one of the fewest bits; with
    a factor of 1 those on the front of bits and error."""
    ordered = sorted(cost, key=lambda pair: (cost[pair], error[pair], pair))
    kept = [
        pair
        for place, pair in enumerate(ordered)
        if not any(clearly * error[other] <= error[pair] for other in ordered[:place])
    ]
    return tuple(sorted(kept, key=lambda pair: (cost[pair], pair)))


def clusters(
    costs: Sequence[Figures], errors: Sequence[Figures], alike: float = ALIKE, clearly: float = CLEARLY
) -> tuple[Cluster, ...]:
    """Layers with the same costs and the same pruned pairs, none of whose errors differ by more than the factor `alike`
    where the pair is one of these; the nearest are put together first.  Beyond MOST clusters the factor grows."""
    offered = [pruned(cost, error, clearly) for cost, error in zip(costs, errors, strict=True)]
    groups = dict[object, list[list[int]]]()
    for layer, (cost, pairs) in enumerate(zip(costs, offered, strict=True)):
        groups.setdefault((pairs, *(cost[pair] for pair in pairs)), []).append([layer])

    def apart(first: Sequence[int], second: Sequence[int]) -> float:
        ratios = (_ratio(errors[a][p], errors[b][p]) for a in first for b in second for p in offered[a])
        return max(ratios)

    found = list[Cluster]()
    for parts in groups.values():
        while len(parts) > 1:
            nearest, i, j = min((apart(parts[i], parts[j]), i, j) for j in range(len(parts)) for i in range(j))
            if nearest > alike:
                break
            parts[i] += parts.pop(j)
        found += [Cluster(tuple(sorted(part)), offered[part[0]]) for part in parts]
    if MOST < len(found) > len(groups) and alike < math.inf:
        return clusters(costs, errors, alike**2, clearly)
    return tuple(sorted(found, key=lambda cluster: cluster.layers))


def _ratio(a: float, b: float) -> float:
    """How many times the larger is the smaller."""
    return 1.0 if a == b else max(a, b) / min(a, b) if min(a, b) > 0 else math.inf


def spread(offered: Sequence[Cluster], chosen: Sequence[Pair]) -> tuple[Pair, ...]:
    """The pair of every layer, of a pair for each cluster."""
    by_layer = {layer: pair for cluster, pair in zip(offered, chosen, strict=True) for layer in cluster.layers}
    return tuple(by_layer[layer] for layer in sorted(by_layer))
