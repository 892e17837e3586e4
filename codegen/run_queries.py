"""Rounded queries where kernels run: as columns of the torch backend, and among keys that are decoded for many rows."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from kvdsl.kernels import Params

from .host_maps import mapped
from .plan import Plan


class Asked(NamedTuple):
    """Query rows, float32 and scaled: `columns` (B, H, D, rows), which exact keys meet, and where queries are rounded
    what packed keys meet in the space that is coded, (B, H, M, rows)."""

    columns: Tensor
    met: Tensor | None = None


def asked(plan: Plan, module: ModuleType, columns: Tensor, factor: float, params: Params) -> Asked:
    """Columns (B, H, D, rows), which are not scaled yet, times a factor: a query is rounded before."""
    if plan.queries is None:
        return Asked(columns * factor)
    rows = columns.mT
    if plan.keys.mapped:
        rows = mapped(rows, params[f"{plan.keys.home}.decode"].mT, None)
    met: Tensor = module.round_queries(rows.contiguous()).mT
    return Asked(columns * factor, met * factor)


def among_decoded(plan: Plan, rows: Tensor, met: Tensor, params: Params) -> tuple[Tensor, Tensor | None]:
    """What decoded keys meet so that products are those of `met` (B, H, rows, M) with numbers that are coded, (B, H,
    rows, D), and what is added to them, (B, H, rows), or None.

    With k^ = W y + v and y = E (k^ - v): met.y + q.v = (E^T met).k^ + (q - E^T met).v, q the query's `rows`.
    """
    keys = plan.keys
    near = met @ params[f"{keys.home}.encode"] if keys.mapped else met
    if not keys.shifted:
        return near, None
    return near, ((rows - near) * params[f"{keys.home}.decode_shift"][:, None]).sum(-1)
