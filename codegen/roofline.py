"""How near the main loop of a decode kernel can come to the memory's read limit, from its instruction counts alone.

C = 128 * SMs * 4 * clock / bandwidth is the number of cycles one scheduler has while the memory brings 128 bytes.  The
loop needs T = 2 alu + fp + 4 mma + 2 xu + 5 mem cycles for them, counts being those of all warps of a program per 128
packed bytes.  The *sum* of the pipes fits because the few resident warps of these kernels hardly overlap them.

The weights were fitted to 30 decode kernels (8 to 1 bit, head_dim 64 to 256) on an H200; they agree with the pipes'
issue rates.  Mean error 6 % of the share, worst 22 %.  Latency, bank conflicts and the last wave are not seen, and
other GPUs are extrapolated: what is bound by instructions mostly comes out slower than the law says, so that it tells
what is possible.  docs/static.md has it beside what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LINE = 128
MICRO = 1e-6  # microseconds of a byte at 1 TB/s
_REACHED = 0.93  # of the read limit by a loop with no work at all
_SHARPNESS = 6.0  # of the bend between bound by memory and bound by instructions
_WEIGHTS = {"alu": 2.0, "fp": 1.0, "mma": 4.0, "xu": 2.0, "mem": 5.0}


@dataclass(frozen=True)
class Gpu:
    """A GPU and where its figures come from.

    arch        of the machine code that runs on it
    processors  streaming multiprocessors
    clock       GHz under load
    bandwidth   TB/s, as a reading kernel reaches it where it was measured
    shared      bytes of shared memory that one program may have
    origin      of clock and bandwidth: what was measured, and what a data sheet says
    """

    name: str
    arch: str
    processors: int
    clock: float
    bandwidth: float
    shared: int
    origin: str

    @property
    def cycles_per_line(self) -> float:
        """Cycles that one of the four schedulers of a processor has for 128 bytes."""
        return LINE * self.processors * 4 * self.clock / (self.bandwidth * 1000)


CARDS = (
    Gpu("A100 80 GB", "sm_80", 108, 1.41, 1.75, 163 << 10, "clock of the data sheet; 86 % of its bandwidth, assumed"),
    Gpu("H100", "sm_90", 132, 1.98, 3.114, 227 << 10, "clock of the data sheet; bandwidth measured, docs/speed.md"),
    Gpu("H200", "sm_90", 132, 1.98, 4.40, 227 << 10, "clock and bandwidth measured"),
    Gpu("B200", "sm_100", 148, 1.85, 8.0, 227 << 10, "clock and bandwidth of data sheets"),
)
GPUS = {gpu.arch: gpu for gpu in CARDS}
"""Architecture -> the GPU that one share is stated for: the last of the table."""


def card(name: str) -> Gpu:
    """A GPU of the table by the beginning of its name.  ValueError for none."""
    found = [gpu for gpu in CARDS if gpu.name.lower().startswith(name.lower())]
    if not name or not found:
        raise ValueError(f"gpu: {name!r} is none of {', '.join(gpu.name for gpu in CARDS)}; give one of these")
    return found[0]


def reading_time(gpu: Gpu, nbytes: float, share: float | None = None) -> float:
    """Microseconds that so many bytes take at a share of the read limit, by default that of a loop without any work."""
    return nbytes / ((_REACHED if share is None else share) * gpu.bandwidth) * MICRO


def cycles(pipes_per_line: Mapping[str, float]) -> dict[str, float]:
    """Cycles of one scheduler by pipe, for the instructions by pipe per 128 packed bytes."""
    return {pipe: _WEIGHTS[pipe] * count for pipe, count in pipes_per_line.items()}


def share_on(gpu: Gpu, pipes_per_line: Mapping[str, float]) -> float:
    """Share of a GPU's read limit, between 0 and 0.93.

    `pipes_per_line`: instructions by pipe ("alu", "fp", "mma" in m16n8k16 products, "xu", "mem") per 128 packed bytes.
    """
    load = sum(cycles(pipes_per_line).values()) / gpu.cycles_per_line
    return float((_REACHED**-_SHARPNESS + load**_SHARPNESS) ** (-1 / _SHARPNESS))


def shares(arch: str, pipes_per_line: Mapping[str, float]) -> dict[str, float]:
    """The same for every GPU that code of this architecture is for, by its name."""
    return {gpu.name: share_on(gpu, pipes_per_line) for gpu in CARDS if gpu.arch == arch}


def predicted_share(arch: str, pipes_per_line: Mapping[str, float]) -> float:
    """The same for `GPUS[arch]`."""
    return share_on(GPUS[arch], pipes_per_line)
