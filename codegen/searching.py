"""A map of bits for a model's layers: `kvdsl search`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from kvdsl.scheme import Scheme

from .answer import columns
from .running import quiet

WRITTEN = {".toml": Scheme.to_toml, ".json": Scheme.to_json}


def searched(
    scheme: Scheme,
    name: str,
    model: str,
    text: str,
    bits: float,
    out: Path,
    pairs: str,
    say: Callable[[str], None],
    **options: Any,
) -> dict[str, Any]:
    """What kvdsl.search finds, written to `out`: scheme, model, bits, loss, budget, path, trials, front.

    ValueError for an `out` that cannot be written or is of no known kind, before anything is searched.
    """
    from kvdsl.search_maps import search

    if out.suffix not in WRITTEN:
        raise ValueError(f"out: {str(out)!r} is no .toml or .json file; name one, as {out.stem}.toml")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"out: there is no folder {out.absolute().parent}; make it, or write elsewhere")
    try:
        choices = [int(part) for part in pairs.split(",")]
    except ValueError:
        raise ValueError(f"pairs: {pairs!r} is no list of bits; give some, as 2,4,8") from None
    quiet()
    found = search(scheme, model, text, bits=bits, pairs=choices, say=say, **options)
    out.write_text(WRITTEN[out.suffix](found.scheme), encoding="utf-8")
    points = [
        {"bits": p.bits, "loss": p.loss, "layers": {str(i): list(pair) for i, pair in enumerate(p.pairs)}}
        for p in found.front
    ]
    best = {"bits": found.best.bits, "loss": found.best.loss}
    return {
        "scheme": name,
        "model": model,
        **best,
        "budget": bits,
        "path": str(out),
        "trials": found.trials,
        "front": points,
    }


def told(found: Mapping[str, Any]) -> list[str]:
    """The front, the map that was taken marked, and where it is."""
    table = [("bits", "loss", "keys/values: layers")]
    for point in found["front"]:
        taken = "   <" if (point["bits"], point["loss"]) == (found["bits"], found["loss"]) else ""
        table.append((f"{point['bits']:.3f}", f"{point['loss']:.3g}", _map(point["layers"]) + taken))
    return [
        *columns(table, right=(0, 1)),
        "",
        f"{found['trials']} maps tried; {found['bits']:.3f} bits of {found['budget']:g}, a loss of {found['loss']:.3g}",
        f"saved {found['path']}",
    ]


def _map(layers: Mapping[str, list[int]]) -> str:
    by_pair = dict[tuple[int, ...], list[int]]()
    for layer, pair in layers.items():
        by_pair.setdefault(tuple(pair), []).append(int(layer))
    return "; ".join(f"{k}/{v}: {_ranges(found)}" for (k, v), found in sorted(by_pair.items()))


def _ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 as 0-2 5."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda item: item[1] - item[0])]
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
