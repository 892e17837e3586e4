"""Speed, in figures: `kvdsl bench`, on the GPU of this machine; on a CPU what machine code predicts, and ratios."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvdsl.scheme import Scheme

from .answer import progress

if TYPE_CHECKING:
    import torch

    from kvdsl.bench import Limit, Size
    from kvdsl.kernels import Backend
    from kvdsl.peers import Peer
    from kvdsl.timing import Clock

GPU_SHAPES = ("8x8x131072", "16x8x16384", "1x8x32768")
CPU_SHAPES = ("1x8x2048",)
ON_A_CPU = "no GPU here: the torch kernels on this CPU, as ratios of one run; they say nothing about a GPU"


@dataclass(frozen=True)
class Machine:
    """What is measured, and by which clock.

    limit      its read limit, see `kvdsl.bench.Limit`; None on a CPU, where no time is told
    predicted  schemes and a size -> rows of what machine code predicts, see `predicting.predicted`
    """

    name: str
    device: torch.device
    clock: Clock
    limit: Limit | None
    predicted: Callable[[Mapping[str, Scheme], Size], list[dict[str, Any]]]


def this_machine() -> Machine:
    """The GPU that torch uses, or the CPU."""
    import torch

    from kvdsl.timing import clock_of

    from .limits import ReadLimit
    from .predicting import cards_like, predicted

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    name, clock = torch.cuda.get_device_name(device) if gpu else "cpu", clock_of(device)
    cards = cards_like(name) if gpu else None
    return Machine(
        name, device, clock, ReadLimit(device, clock) if gpu else None,
        lambda schemes, size: predicted(schemes, size.shape, cards),
    )  # fmt: skip


def results(
    schemes: Mapping[str, Scheme],
    shapes: Sequence[str],
    group: int,
    head_dim: int,
    peers: Sequence[Peer] = (),
    machine: Machine | None = None,
) -> dict[str, Any]:
    """device, versions, date, read_limit_gbps (None on a CPU), what kept a path from being taken, what machine code
    predicts, a row a scheme and shape, and one a peer and shape; `failed` where one does not fit the memory or does not
    run."""
    from kvdsl.bench import Size

    from .doctor import versions

    machine = machine or this_machine()
    gpu = machine.limit is not None
    sizes = [Size.parse(text, group, head_dim) for text in shapes or (GPU_SHAPES if gpu else CPU_SHAPES)]
    with progress("compiling ahead of time"):
        predicted = machine.predicted(schemes, sizes[0])
    with progress("measuring how fast memory is read"):
        limit = machine.limit(None) if machine.limit is not None else None
        _free(machine)  # of what was read for it the first scheme's call could be 31 us of 273 slower
    rows = [_row(name, scheme, size, machine) for name, scheme in schemes.items() for size in sizes]
    for row in rows if gpu else ():
        mine = (one.get("share") for one in predicted if one["scheme"] == row["scheme"])
        row["predicted_share"] = next(mine, None)
    others = [_peer(peer, size, machine) for size in sizes for peer in peers]
    _compared(rows, others)
    return {
        "device": machine.name,
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["kvdsl", *sys.argv[1:]]),
        "note": None if gpu else ON_A_CPU,
        "read_limit_gbps": None if limit is None else limit / 1e9,
        **_conditions(machine),
        "predicted": predicted,
        "results": rows,
        "peers": others,
    }


def _row(name: str, scheme: Scheme, size: Size, machine: Machine) -> dict[str, Any]:
    """One scheme at one size."""
    import torch

    from kvdsl.bench import measured, result

    from . import build, build_tiers

    limit = machine.limit
    with progress(f"{name} at {size}"):
        backend: Backend = "triton" if machine.device.type == "cuda" else "torch"
        kernels = (build_tiers if scheme.routed else build)(scheme, size.shape, backend)
        try:
            found = measured(kernels, size, machine.device, machine.clock)
            of_all, own = (None, None) if limit is None else (limit(None), limit(found.read_bytes))
            return result(name, size, found, of_all, own)
        except RuntimeError as error:  # of the GPU, or of its memory: the rows before are worth keeping
            kind = "" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: "
            failed = kind + str(error).partition(". ")[0].partition("\n")[0]
            return {"scheme": name, "kernel": "decode", "shape": str(size), "failed": failed}
        finally:
            _free(machine)


def _peer(peer: Peer, size: Size, machine: Machine) -> dict[str, Any]:
    """One peer at one size."""
    from kvdsl.peers import row

    with progress(f"{peer.name} at {size}"):
        try:
            return row(peer, size, machine.device, machine.clock, machine.limit)
        finally:
            _free(machine)


def _free(machine: Machine) -> None:
    import torch

    if machine.device.type == "cuda":
        torch.cuda.empty_cache()


def _compared(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> None:
    """Every row's times over the peers of its shape, and every peer's over SDPA."""
    from kvdsl.peers.sdpa import Sdpa

    for other in others:
        beside = [one for one in others if one["shape"] == other["shape"] and "seconds" in one]
        exact = next((one["seconds"] for one in beside if one["peer"] == Sdpa().name), None)
        if "seconds" in other:
            other["speedup_fp16"] = exact / other["seconds"] if exact else None
    for row in rows:
        if "seconds" in row:
            beside = [one for one in others if one["shape"] == row["shape"] and "seconds" in one]
            row["speedup_peers"] = {one["peer"]: one["seconds"] / row["seconds"] for one in beside}
    for one in (*rows, *others):
        one.pop("seconds", None)  # of a CPU, too: times of one say nothing


def _conditions(machine: Machine) -> dict[str, Any]:
    """On a GPU: its clock now, MHz, where the driver tells, and what a graph of one tiny kernel takes."""
    import torch

    from kvdsl.timing import timed

    if machine.limit is None:
        return {"sm_mhz": None, "us_launch": None}
    one = torch.zeros(1, device=machine.device)
    launch = timed(lambda: one.add_(1), machine.clock).median * 1e6
    try:
        return {"sm_mhz": torch.cuda.clock_rate(machine.device), "us_launch": launch}
    except Exception:  # no driver, or no Python package that asks it
        return {"sm_mhz": None, "us_launch": launch}
