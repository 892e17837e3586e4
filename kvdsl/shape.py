"""The shape a scheme is compiled for."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

from .errors import ShapeError

if TYPE_CHECKING:
    from .scheme import Scheme

InputFormat = Literal["fp16", "bf16", "fp32"]
LONGEST = 576  # channels of a key
USUAL = 128  # channels of a head, where a scheme does not say


@dataclass(frozen=True, repr=False)
class Shape:
    """What kernels are specialised for: one layer's heads, head_dim, the dtype of q, k and v, and logit soft-capping.

    `q_heads` None: as many as kv heads.  `placed`: tokens stand in any order, each head has its own, and every call is
    told where each token stands (`kernels.Places`); else they stand in the order of their places.  Raises ShapeError
    naming the field, its value and what would be right.
    """

    head_dim: int
    kv_heads: int = 8
    q_heads: int | None = None
    dtype: InputFormat = "fp16"
    softcap: bool = False
    placed: bool = False

    def __post_init__(self) -> None:
        if self.q_heads is None:
            object.__setattr__(self, "q_heads", self.kv_heads)
        for name in ("head_dim", "kv_heads", "q_heads"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ShapeError(f"shape.{name}: {value!r} is no positive integer")
        if self.head_dim % 8 or not 32 <= self.head_dim <= LONGEST:
            raise ShapeError(
                f"shape.head_dim: {self.head_dim} is no multiple of 8 from 32 to {LONGEST}; "
                "use 64, 80, 96, 112, 128, 192 or 256, or 576 of a latent and a key with rotary positions"
            )
        if self.q_heads % self.kv_heads:  # type: ignore[operator]
            raise ShapeError(f"shape.q_heads: {self.q_heads} query heads are no multiple of {self.kv_heads} kv heads")
        if self.dtype not in ("fp16", "bf16", "fp32"):
            raise ShapeError(f"shape.dtype: {self.dtype!r} is none of fp16, bf16, fp32")

    def __repr__(self) -> str:
        named = [field.name for field in fields(self) if field.name != "placed" or self.placed]
        return f"Shape({', '.join(f'{name}={getattr(self, name)!r}' for name in named)})"

    def of_heads(self, kv_heads: int) -> Shape:
        """The same for so many of the kv heads, with the query heads that read them."""
        return replace(self, kv_heads=kv_heads, q_heads=kv_heads * self.group)

    @property
    def deployed(self) -> Shape:
        """The same as a GPU reads it: a model in float32, as they run on a CPU, is served in float16."""
        return replace(self, dtype="fp16") if self.dtype == "fp32" else self

    @property
    def group(self) -> int:
        """Query heads that read one kv head."""
        return self.q_heads // self.kv_heads  # type: ignore[operator]


def usual(scheme: Scheme) -> Shape:
    """The shape that tables are of: 8 kv heads of 128 channels, or of as many as the scheme says, each for 4 query
    heads; of shared values one, for all 32."""
    return Shape(scheme.head_dim or USUAL, 1 if scheme.shared else 8, 32)
