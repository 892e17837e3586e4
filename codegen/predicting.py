"""What machine code predicts of decode kernels before any runs: `kvdsl bench` where there is no GPU, and beside what
it measures on one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvdsl.cost import bits
from kvdsl.errors import BackendError
from kvdsl.scheme import Scheme
from kvdsl.shape import Shape

from .roofline import CARDS, Gpu
from .static import figures, untiered

TOGETHER = 8  # schemes compiled in one process


def cards_like(device: str) -> tuple[Gpu, ...]:
    """The GPUs of the table that a device of this name is."""
    return tuple(gpu for gpu in CARDS if gpu.name.split()[0] in device)


def predicted(schemes: Mapping[str, Scheme], shape: Shape, cards: Sequence[Gpu] | None = None) -> list[dict[str, Any]]:
    """A row a scheme and GPU (default: all of the table): instructions for 128 packed bytes, and the share of the read
    limit that they allow.  Of a scheme with tiers what its tiers store, behind its name.  A row says `failed` where
    kernels cannot be compiled here."""
    cards = CARDS if cards is None else cards
    arches, found = tuple(dict.fromkeys(gpu.arch for gpu in cards)), list[dict[str, Any]]()
    plain = untiered(schemes)
    for begin in range(0, len(plain) if arches else 0, TOGETHER):
        some = dict(list(plain.items())[begin : begin + TOGETHER])
        try:
            compiled = figures(some, shape, arches)
        except BackendError as error:
            found += [{"scheme": name, "failed": str(error).splitlines()[0]} for name in some]
            continue
        for name, rows in compiled.items():
            by_arch = {one.kernel.arch: one.kernel for one in rows}
            for gpu in cards:
                kernel = by_arch[gpu.arch]
                share = kernel.shares.get(gpu.name)
                found.append(
                    {
                        "scheme": name,
                        "bits": bits(some[name], shape.head_dim, shape.kv_heads).mean,
                        "gpu": gpu.name,
                        "arch": gpu.arch,
                        "triton": kernel.triton,
                        "slots": kernel.slots,
                        "registers": kernel.registers,
                        "spills": kernel.spills,
                        "share": share,
                        "gbps": None if share is None else share * gpu.bandwidth * 1e3,
                    }
                )
    return found
