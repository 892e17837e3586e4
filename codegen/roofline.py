"""How near the main loop of a decode kernel can come to the memory's read limit, from its instruction counts alone.

C = 128 * SMs * 4 * clock / bandwidth is the number of cycles one scheduler has while the memory brings 128 bytes.  The
loop needs T = 2 alu + fp + 4 mma + 2 xu + 5 mem cycles for them, counts being those of all warps of a program per 128
packed bytes.  The *sum* of the pipes fits because the few resident warps of these kernels hardly overlap them.

The weights were fitted to 30 decode kernels (8 to 1 bit, head_dim 64 to 256) on an H200; they agree with the pipes'
issue rates.  Mean error 6 % of the share, worst 22 %.  Latency, bank conflicts and the last wave are not seen, and
other GPUs are extrapolated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LINE = 128
_REACHED = 0.93  # of the read limit by a loop with no work at all
_SHARPNESS = 6.0  # of the bend between bound by memory and bound by instructions
_WEIGHTS = {"alu": 2.0, "fp": 1.0, "mma": 4.0, "xu": 2.0, "mem": 5.0}


@dataclass(frozen=True)
class Gpu:
    """A GPU: `clock` in GHz under load, `bandwidth` in TB/s as a reading kernel reaches it, `shared` memory that one
    program may have in bytes."""

    name: str
    processors: int
    clock: float
    bandwidth: float
    shared: int
    measured: bool

    @property
    def cycles_per_line(self) -> float:
        """Cycles that one of the four schedulers of a processor has for 128 bytes."""
        return LINE * self.processors * 4 * self.clock / (self.bandwidth * 1000)


# Architecture -> the GPU its shares are stated for.  Only the H200's bandwidth was measured; the rest are data sheets.
GPUS = {
    "sm_80": Gpu("A100 80 GB", 108, 1.41, 1.75, 163 << 10, measured=False),
    "sm_90": Gpu("H200", 132, 1.98, 4.40, 227 << 10, measured=True),
    "sm_100": Gpu("B200", 148, 1.85, 8.0, 227 << 10, measured=False),
}


def predicted_share(arch: str, pipes_per_line: Mapping[str, float]) -> float:
    """Share of the read limit of `GPUS[arch]`, between 0 and 0.93.

    `pipes_per_line`: instructions by pipe ("alu", "fp", "mma" in m16n8k16 products, "xu", "mem") per 128 packed bytes.
    """
    work = sum(_WEIGHTS[pipe] * count for pipe, count in pipes_per_line.items())
    load = work / GPUS[arch].cycles_per_line
    return float((_REACHED**-_SHARPNESS + load**_SHARPNESS) ** (-1 / _SHARPNESS))
