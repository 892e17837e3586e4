"""Laws of what is split off a vector before it is coded."""

from __future__ import annotations

import torch
from torch import Tensor

from kvdsl.kernels import Params
from kvdsl.scheme import SIDES, Sketch, Store, TopChannels
from kvdsl.spaces import apart

from .cases import Case, law, require_equal
from .terms import chosen_of
from .trips import roundtrip


def _split(store: Store) -> bool:
    return isinstance(store.outliers, TopChannels) and store.residual is None


@law("P11", lambda s: _split(s.keys) or _split(s.values), ("normal", "outlier_channel"))
def outlier_channels_and_others_do_not_meet(case: Case) -> None:
    """P11: whatever the outlier channels hold, the others decode to the same numbers, and the other way round: no
    range, norm or code of one part depends on the other.  Channels that are chosen anew are negated, so that the same
    ones are chosen."""
    k, v = case.pair(case.whole)
    params = case.params(k, v)
    before = roundtrip(case, k, v, params)
    for part in (True, False):
        pairs = tuple(zip(SIDES, (k, v), strict=True))
        changed = [_changed(case.scheme.side(side), x, params, side, part) for side, x in pairs]
        after = roundtrip(case, changed[0], changed[1], params)
        for (side, x), one, other in zip(pairs, before, after, strict=True):
            store = case.scheme.side(side)
            if _split(store) and (part or _alone(store)):
                kept = _apart(store, x, params, side) != part
                require_equal(f"decoded {side}", other[kept], one[kept])


def _changed(store: Store, x: Tensor, params: Params, side: str, part: bool) -> Tensor:
    """x (B, H, T, D) with other numbers in the outlier channels, or (not `part`) in the others."""
    here = _apart(store, x, params, side) == part
    if chosen_of(store, x) is not None:
        return torch.where(here, -x, x)
    changed = x.clone()
    changed[:, here[0]] = x[:, here[0]].flip(-1) * -0.5
    return changed


def _alone(store: Store) -> bool:
    """Whether what is kept of outlier channels says nothing of the others: not so of what codes of all channels at once
    leave of them."""
    choice, scale = store.outliers, store.measure
    assert isinstance(choice, TopChannels)
    if not choice.online or isinstance(choice.store.code, Sketch):
        return True
    return not store.own.turned and scale is not None and scale.block.channels == 1


def _apart(store: Store, x: Tensor, params: Params, side: str) -> Tensor:
    """Which numbers of x stand apart: bool (B, H, T, D)."""
    theirs = chosen_of(store, x)
    if theirs is not None:
        return theirs
    top = params[f"{side}.outliers"].cpu() if isinstance(store.outliers, TopChannels) else x.new_zeros(x.shape[1], 0)
    return apart(top, x.shape[3])[:, None].expand(x.shape)
