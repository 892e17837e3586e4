"""What a generated kernel is launched with: enough to compile it ahead of time exactly as it will run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

CONSTEXPR = "constexpr"
DEPTH = "STAGES"  # the constexpr argument that takes the depth of the pipeline
ATTEND = ("decode", "extend")  # the kernels that read pages for queries


@dataclass(frozen=True)
class Launch:
    """One specialization of one generated kernel.

    kernel             name of the `@triton.jit` function in the generated text
    signature          argument name -> "*fp16", "*u8", "i32", "fp32", ... or "constexpr", in the order of the arguments
    constants          values of the constexpr arguments, DEPTH apart
    warps              `num_warps`
    stages             depths of the asynchronous pipeline in the order they are tried, until the buffers fit and no
                       number is moved to memory
    assembler          settings of NVIDIA's assembler to try until no number is moved to memory, see `assembled`
    fp_fusion          False where results must be rounded after every operation (packing)
    loop_packed_bytes  bytes of codes and metadata that one iteration of the main loop reads of the program's
                       head; 0 without such a loop
    aligned            pointers, strides and lengths that are multiples of 16 at every call; without it no wide loads
    """

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...] = ()
    warps: int = 1
    stages: tuple[int, ...] = (1,)
    assembler: tuple[str | None, ...] = (None,)
    fp_fusion: bool = True
    loop_packed_bytes: int = 0
    aligned: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.signature]
        constexprs = {name for name, kind in self.signature if kind == CONSTEXPR and name != DEPTH}
        given = [name for name, _ in self.constants]
        if len(set(names)) != len(names):
            raise ValueError(f"launch of {self.kernel}: an argument stands twice in the signature {names}")
        if set(given) != constexprs or len(given) != len(constexprs):
            raise ValueError(
                f"launch of {self.kernel}: constants {sorted(given)} do not match constexprs {sorted(constexprs)}"
            )
        if unknown := set(self.aligned) - (set(names) - constexprs):
            raise ValueError(f"launch of {self.kernel}: aligned names {sorted(unknown)} that are no run-time arguments")

    def values(self, stages: int) -> dict[str, object]:
        """The constexpr arguments at this depth."""
        depth = {DEPTH: stages} if (DEPTH, CONSTEXPR) in self.signature else {}
        return {**dict(self.constants), **depth}

    def to_json(self) -> dict[str, Any]:
        """A mapping of plain values; constants must be numbers, strings, booleans or None."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Launch:
        """The launch that `to_json` wrote."""
        pairs = {name: tuple((key, value) for key, value in data[name]) for name in ("signature", "constants")}
        flat = {name: tuple(data[name]) for name in ("stages", "aligned", "assembler")}
        return cls(**{**data, **pairs, **flat})


def assembled(setting: str | None) -> dict[str, object]:
    """A setting of the assembler as options of Triton: one of its own options, or how many registers it may take."""
    name, _, value = (setting or "").partition("=")
    return {"maxnreg": int(value)} if name == "maxnreg" else {"ptx_options": setting}
