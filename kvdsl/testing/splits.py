"""Laws of what is split off a vector before it is coded."""

from __future__ import annotations

import torch

from kvdsl.scheme import SIDES, Scheme, Side, Store, TopChannels
from kvdsl.spaces import apart

from .cases import Case, law, require_equal
from .trips import roundtrip


def _split(store: Store) -> bool:
    return isinstance(store.outliers, TopChannels) and store.residual is None


@law("P11", lambda s: _split(s.keys) or _split(s.values), ("normal", "outlier_channel"))
def outlier_channels_and_others_do_not_meet(case: Case) -> None:
    """P11: whatever the outlier channels hold, the others decode to the same numbers, and the other way round: no
    range, norm or code of one part depends on the other."""
    k, v = case.pair(case.whole)
    params = case.params(k, v)
    before = roundtrip(case, k, v, params)
    for part in (True, False):
        changed = k.clone(), v.clone()
        tops = [_apart(case.scheme, side, params, k.shape) for side in SIDES]
        for x, top in zip(changed, tops, strict=True):
            x[:, top == part] = x[:, top == part].flip(-1) * -0.5
        after = roundtrip(case, changed[0], changed[1], params)
        for side, top, one, other in zip(SIDES, tops, before, after, strict=True):
            if _split(case.scheme.side(side)):
                require_equal(f"decoded {side}", other[:, top != part], one[:, top != part])


def _apart(scheme: Scheme, side: Side, params: dict[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """Which channels of the heads of numbers (B, H, T, D) stand apart: bool (H, T, D)."""
    there = isinstance(scheme.side(side).outliers, TopChannels)
    top = params[f"{side}.outliers"] if there else torch.zeros(shape[1], 0)
    return apart(top, shape[3])[:, None].expand(shape[1:])
