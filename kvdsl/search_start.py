"""Where a search begins: few maps that tell what each cluster's errors cost the model, then those that follow from it.

A cluster's share of the loss is taken to be a e_k^2 + b e_v^2, with e_k and e_v the errors that its attention's output
has from keys and from values alone, and shares to add up.  Two probes a cluster, all others at the most bits, give a
and b.  What is searched later is not bound by this.
"""

from __future__ import annotations

from collections.abc import Sequence

from .search_pairs import Cluster, Figures, Pair

Map = tuple[Pair, ...]
"""A pair for each cluster."""


def uniform(offered: Sequence[Cluster]) -> list[Map]:
    """One pair everywhere, where all are offered it; the fewest bits come first."""
    return [(pair,) * len(offered) for pair in offered[0].pairs if all(pair in cluster.pairs for cluster in offered)]


def probes(offered: Sequence[Cluster]) -> list[Map]:
    """For each cluster the pair with the fewest bits of keys, and of values, and otherwise the most."""
    top = tuple(cluster.pairs[-1] for cluster in offered)
    return [
        (*top[:place], pair, *top[place + 1 :])
        for place, cluster in enumerate(offered)
        for pair in (
            min(cluster.pairs, key=lambda pair: (pair[0], -pair[1])),
            min(cluster.pairs, key=lambda pair: (pair[1], -pair[0])),
        )
    ]


def shares(
    offered: Sequence[Cluster], errors: Sequence[Figures], losses: Sequence[float], least: float
) -> list[list[float]]:
    """What each cluster adds to the loss at each of its pairs, over its last: of the losses of `probes`, and of the map
    of all last pairs, `least`."""
    found = []
    for place, cluster in enumerate(offered):
        squares = [_squares(cluster, errors, pair) for pair in cluster.pairs]
        tried = [probe[place] for probe in probes(offered)[2 * place : 2 * place + 2]]
        keys, values = _solved(
            [_squares(cluster, errors, pair) for pair in tried],
            [max(0.0, loss - least) for loss in losses[2 * place : 2 * place + 2]],
        )
        found.append([keys * of_keys + values * of_values for of_keys, of_values in squares])
    return found


def _squares(cluster: Cluster, errors: Sequence[Figures], pair: Pair) -> tuple[float, float]:
    """e_k^2 and e_v^2 at a pair, less those at the last, added up over the layers; e_k is the error where values have
    the most bits there are, e_v where keys have."""
    most, (last_keys, last_values) = max(bits for bits, _ in errors[0]), cluster.pairs[-1]
    keys = sum(errors[i][pair[0], most] ** 2 - errors[i][last_keys, most] ** 2 for i in cluster.layers)
    values = sum(errors[i][most, pair[1]] ** 2 - errors[i][most, last_values] ** 2 for i in cluster.layers)
    return max(0.0, keys), max(0.0, values)


def _solved(rows: Sequence[tuple[float, float]], right: Sequence[float]) -> tuple[float, float]:
    """a and b of two equations, neither below 0; where they tell nothing apart, a = b."""
    (k0, v0), (k1, v1) = rows
    split = k0 * v1 - k1 * v0
    if abs(split) > 1e-6 * (k0 + v0) * (k1 + v1):
        a, b = (right[0] * v1 - right[1] * v0) / split, (k0 * right[1] - k1 * right[0]) / split
        if a >= 0 and b >= 0:
            return a, b
        if a < 0:
            return 0.0, sum(right) / (v0 + v1)
        return sum(right) / (k0 + k1), 0.0
    return (sum(right) / (k0 + k1 + v0 + v1),) * 2 if sum(map(sum, rows)) else (0.0, 0.0)


def ladder(offered: Sequence[Cluster], costs: Sequence[Figures], losses: Sequence[Sequence[float]]) -> list[Map]:
    """Maps from the fewest bits to the most: every step takes off the most loss a bit.  `losses` has the share of each
    cluster at each of its pairs."""
    bits = [[sum(costs[i][pair] for i in cluster.layers) for pair in cluster.pairs] for cluster in offered]
    steps = [[0] * len(offered)]
    while True:
        rises = [
            ((loss[up] - loss[at]) / (size[up] - size[at]), place, up)
            for place, (at, loss, size) in enumerate(zip(steps[-1], losses, bits, strict=True))
            for up in range(at + 1, len(size))
            if size[up] > size[at]
        ]
        if not rises:
            return [tuple(c.pairs[at] for c, at in zip(offered, step, strict=True)) for step in steps]
        _, place, up = min(rises)
        steps.append([*steps[-1][:place], up, *steps[-1][place + 1 :]])
