"""Other systems' decode attention over the same shapes: optional, each a class of its own, found if it is installed.

Peer        what a system is to `kvdsl bench`; a package adds its own under the entry-point group `kvdsl.peers`
Ready       one that is ready to run
known       all peers, those of this package first
row         one peer at one size: timed, missing, or failed
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kvdsl.bench import CHECKED, Limit, Size, numbers
from kvdsl.bench_cache import Numbers
from kvdsl.exact import Tokens, attended, relative_error
from kvdsl.timing import Clock, timed

GROUP = "kvdsl.peers"


class Decoded(NamedTuple):
    """Of one sequence what attention is of: the query (Hq, D), and keys and values (H, T, D) as the system holds
    them."""

    query: Tensor
    keys: Tensor
    values: Tensor


class Ready(NamedTuple):
    """A call over a filled cache.

    call        one query a sequence; its result, if it gives one, has batch x q_heads x head_dim numbers in that order
    read_bytes  codes, metadata and page numbers that the call must read once
    decoded     sequence -> what its output should be of; None where that is not known
    graph       whether a CUDA graph can hold the call
    """

    call: Callable[[], Any]
    read_bytes: int
    decoded: Callable[[int], Decoded] | None = None
    graph: bool = True


class Peer(Protocol):
    """A system to stand beside.

    name  as it is printed; bits  of a stored number, without its metadata
    """

    @property
    def name(self) -> str: ...

    @property
    def bits(self) -> float: ...

    def why_not(self, size: Size) -> str | None:
        """Why it cannot run at a size, with the mend: "not installed: pip install ..."; None where it can."""
        ...

    def prepare(self, size: Size, normal: Numbers) -> Ready:
        """Its cache, filled, on the device that `normal` gives numbers on."""
        ...


def known() -> tuple[Peer, ...]:
    """All peers: SDPA first, then those of this package, then what packages registered."""
    from .bit_decoding import BIT_DECODING
    from .flash_infer import FLASH_INFER
    from .kivi import KIVI
    from .sdpa import Sdpa
    from .vllm_triton import VLLM

    return (Sdpa(), *FLASH_INFER, *VLLM, *BIT_DECODING, *KIVI, *registered())


def registered() -> tuple[Peer, ...]:
    """Peers of other packages; one that does not load is warned about and left out."""
    found = list[Peer]()
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            loaded = entry.load()
            found.append(loaded() if isinstance(loaded, type) else loaded)
        except Exception as error:  # another package's code: anything can happen
            warnings.warn(f"the registered peer {entry.name!r} ({entry.value}) does not load: {error!r}", stacklevel=2)
    return tuple(found)


def missing(module: str, mend: str) -> str | None:
    """Why a peer that needs a module and a GPU cannot run."""
    if importlib.util.find_spec(module) is None:
        return f"not installed: {mend}"
    return None if torch.cuda.is_available() else "installed, but it needs a GPU"


def row(peer: Peer, size: Size, device: torch.device, clock: Clock, limit: Limit | None) -> dict[str, Any]:
    """One row: what was measured, or `missing` or `failed` in words.  No peer's fault goes further."""
    found: dict[str, Any] = {"peer": peer.name, "shape": str(size), "group": size.group, "head_dim": size.head_dim}
    try:
        if (why := peer.why_not(size)) is not None:
            return found | {"bits": peer.bits, "missing": why}
        return found | _measured(peer.prepare(size, numbers(size, device)), size, clock, limit)
    except Exception as error:  # another system's code: anything can happen
        first = (str(error).strip().splitlines() or ["no message"])[0]
        return found | {"bits": peer.bits, "failed": f"{type(error).__name__}: {first}"}


def _measured(ready: Ready, size: Size, clock: Clock, limit: Limit | None) -> dict[str, Any]:
    error, rows = _error(ready, size)  # before any graph: a first call may compile
    times = timed(ready.call, clock, graph=ready.graph)
    rate, gpu = ready.read_bytes / times.median, limit is not None
    return {
        "bits": 8 * ready.read_bytes / size.numbers,
        "bytes": ready.read_bytes,
        "seconds": times.median,
        "us": times.median * 1e6 if gpu else None,
        "us_p10": times.at(0.1) * 1e6 if gpu else None,
        "us_p90": times.at(0.9) * 1e6 if gpu else None,
        "gbps": rate / 1e9 if gpu else None,
        "share": rate / limit(None) if limit is not None else None,
        "graph": ready.graph,
        "error": error,
        "error_rows": rows,
    }


def _error(ready: Ready, size: Size) -> tuple[float | None, int]:
    """(the relative error of the first and the last sequence against float64 over what the system holds, the rows)."""
    out = ready.call()
    if ready.decoded is None or not isinstance(out, Tensor):
        return None, 0
    which = sorted({0, size.batch - 1})[:CHECKED]
    found = out.reshape(size.batch, size.q_heads, size.head_dim)[which]
    exact = []
    for b in which:
        query, keys, values = ready.decoded(b)
        exact.append(attended(query, [Tokens(keys, values)]))
    return relative_error(found, torch.stack(exact)), found.shape[0] * found.shape[1]
