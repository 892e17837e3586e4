"""Keys behind rotary positions whose numbers lie in several stretches, or are fewer than channels, in Triton: each
stretch is decoded in planes of its own, and what it is mapped back to is added up in planes of channels."""

from __future__ import annotations

from dataclasses import replace

from .layout import SideLayout
from .plan import Plan, SidePlan
from .sections import Span
from .tiling import NARROWEST
from .triton_keys import Keys
from .triton_planes import Planes


class StrungKeys(Keys):
    """All stretches of the keys in an attention kernel."""

    def __init__(self, plan: Plan, side: SidePlan) -> None:
        dim = plan.shape.head_dim
        width = max(NARROWEST, min(2 * NARROWEST, dim & -dim))
        spans = tuple(Span(start, 0, min(width, dim - start)) for start in range(0, dim, width))
        super().__init__(plan, replace(side, layout=SideLayout(dim, (), width, spans, None), rest=None))
        self.prefix, self.lane = "key", "key_lane"  # a stretch's own begin with its letter
        self.readers = [Planes(plan, term) for term in side.terms]
        assert self.positions is not None and self.positions.unmap is not None
        self.positions.unmap.readers = self.readers

    def lane_lines(self) -> list[str]:
        return self._lane_lines() + [line for reader in self.readers for line in reader.lane_lines()]
