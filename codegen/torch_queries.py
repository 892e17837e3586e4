"""What queries are rounded to before they meet packed keys, in torch."""

from __future__ import annotations

from kvdsl.scheme import ALL

from .codec import call
from .codec_text import unstored
from .plan import SidePlan
from .text import Lines


def rounding(queries: SidePlan) -> list[str]:
    """The texts of `round_queries` and of the functions that it calls."""
    out = Lines()
    with out.deeper("def round_queries(x):"):
        out.add('"""What packed keys meet of queries x, float32 (..., D)."""')
        if queries.store.measure is None:
            out.add(f"return {call(queries, 'levels', [call(queries, 'encode', ['x'])])}")
            return [*unstored(queries, "torch."), str(out)]
        channels = queries.scale.block.channels
        cut = channels is not ALL
        out.extend([f"shape, x = x.shape, x.unflatten(-1, (-1, {channels}))"] if cut else [])
        out.add(
            "spoilt = torch.isnan(x).any(-1, keepdim=True)", "x = finite(x)", "top = x.abs().amax(-1, keepdim=True)"
        )
        out.add(f"scale = {call(queries, 'measure', ['top'])}")
        out.add(f"x = {call(queries, 'levels', [call(queries, 'encode', ['x', 'scale'])])} * scale")
        out.add(f"return x.masked_fill(spoilt, torch.nan){'.reshape(shape)' if cut else ''}")
    return [*unstored(queries, "torch."), str(out)]
