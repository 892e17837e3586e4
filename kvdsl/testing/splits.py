"""Laws of what is split off a vector before it is coded."""

from __future__ import annotations

import torch

from kvdsl.reference.chosen import among, choose
from kvdsl.scheme import SIDES, Scheme, Side, Sketch, Store, TopChannels
from kvdsl.spaces import apart

from .cases import Case, law, require_equal
from .trips import roundtrip


def _split(store: Store) -> bool:
    return isinstance(store.outliers, TopChannels) and store.residual is None


def moved(x: torch.Tensor, store: Store) -> torch.Tensor:
    """Which numbers of x (B, H, T, D) may be of other parts because of a NaN: those of channels chosen with it."""
    if not isinstance(store.outliers, TopChannels) or not store.outliers.online:
        return torch.zeros_like(x, dtype=torch.bool)
    tokens = store.outliers.tokens
    bad = x.isnan().unflatten(2, (-1, tokens)).any(-1).any(-1)
    return bad.repeat_interleave(tokens, 2)[..., None].expand(x.shape)


@law("P11", lambda s: _split(s.keys) or _split(s.values), ("normal", "outlier_channel"))
def outlier_channels_and_others_do_not_meet(case: Case) -> None:
    """P11: whatever the outlier channels hold, the others decode to the same numbers, and the other way round: no
    range, norm or code of one part depends on the other.  Channels that are chosen anew hold as much as before."""
    k, v = case.pair(case.whole)
    params = case.params(k, v)
    before = roundtrip(case, k, v, params)
    for part in (True, False):
        changed = k.clone(), v.clone()
        tops = [_apart(case.scheme, side, params, x) for side, x in zip(SIDES, (k, v), strict=True)]
        for side, x, top in zip(SIDES, changed, tops, strict=True):
            there = x[top == part]
            x[top == part] = -there if case.scheme.side(side).split is None else there.flip(-1) * -0.5
        after = roundtrip(case, changed[0], changed[1], params)
        for side, top, one, other in zip(SIDES, tops, before, after, strict=True):
            store = case.scheme.side(side)
            if _split(store) and (part or _alone(store)):
                require_equal(f"decoded {side}", other[top != part], one[top != part])


def _alone(store: Store) -> bool:
    """Whether what is kept of outlier channels says nothing of the others: not so of what codes of all channels at once
    leave of them."""
    choice, scale = store.outliers, store.measure
    assert isinstance(choice, TopChannels)
    if not choice.online or isinstance(choice.store.code, Sketch):
        return True
    return not store.own.turned and scale is not None and scale.block.channels == 1


def _apart(scheme: Scheme, side: Side, params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Which numbers of x (B, H, T, D) are of outlier channels: bool (B, H, T, D)."""
    outliers = scheme.side(side).outliers
    if isinstance(outliers, TopChannels) and outliers.online:
        return among(choose(x.double(), outliers), outliers, x.shape[3])
    top = params[f"{side}.outliers"] if isinstance(outliers, TopChannels) else torch.zeros(x.shape[1], 0)
    return apart(top, x.shape[3])[:, None].expand(x.shape)
