"""The law of powers of two: numbers times one decode to the same times it, since floats only move their exponents."""

from __future__ import annotations

import torch
from torch import Tensor

from kvdsl.reference.quantize import encoded_rows, quantize
from kvdsl.scheme import SIDES, ChannelShift, Float, Scale, Scheme, Store

from .bounds import FORMATS, LARGEST, spread
from .cases import Case, law, require_equal
from .codes import LEAST, TOPS, roundtrip


def _grown(scheme: Scheme, name: str, numbers: Tensor, factor: float) -> Tensor | float:
    """What multiplies calibrated numbers where keys and values are multiplied by `factor`: those of their own size are,
    scales of angles are not."""
    side, _, inner = name.partition(".")
    store = scheme.side("keys" if side == "keys" else "values")
    place = dict(store.walk()).get(inner)
    if not isinstance(place, (Scale, ChannelShift)):
        return 1.0
    if isinstance(place, ChannelShift) or not store.polar:
        return factor
    radii = torch.arange(numbers.shape[-1]) < numbers.shape[-1] // 2
    return torch.where(radii, factor, 1.0)


def _everywhere(store: Store, holds: Tensor, x: Tensor) -> Tensor:
    """Whether something holds of the block of each number of x, or of every block of its vector where it is mapped."""
    if not store.turned:
        return spread(store, holds, x)
    coded = x.new_empty(*x.shape[:3], store.coded(x.shape[3]))
    return spread(store, holds, coded).all(-1, keepdim=True).expand(x.shape)


@law("P1", kinds=("normal", "positive", "outlier_channel"))
def powers_of_two_go_through(case: Case) -> None:
    """Numbers times a power of two decode to the same times it, so the codes are the same, wherever the metadata is
    neither subnormal nor saturated."""
    k, v = case.pair(case.whole)
    params = case.params(k, v)
    factor = 2.0 ** case.random.choice((1, 2, 3))
    bigger = {name: tensor * _grown(case.scheme, name, tensor, factor) for name, tensor in params.items()}
    once = roundtrip(case, k, v, params)
    twice = roundtrip(case, k * factor, v * factor, bigger)
    for side, x, first, second in zip(SIDES, (k, v), once, twice, strict=True):
        store = case.scheme.side(side)
        usual = torch.ones_like(first, dtype=torch.bool)
        if isinstance(store.code, Float) and store.measure is None:
            least, most = 2.0 ** LEAST[store.code.format], TOPS.get(store.code.format, float("inf"))
            y = encoded_rows(store, x, params, side, case.sinks)
            usual = ((y.abs() >= least) | (y == 0)) & (y.abs() * factor < most)
            usual = usual.all(-1, keepdim=True).expand(x.shape) if store.turned else usual
        else:
            assert store.measure is not None
            found, scale = quantize(store, x, params, side, case.sinks), store.measure
            # a scale that was chosen, or fitted to another one, may be that much larger than one that was not kept
            room = 1.0 if scale.refit is None and not isinstance(scale.clip, tuple) else 16.0
            least, most = 2.0 ** LEAST[scale.dtype] * room, min(LARGEST, FORMATS[scale.dtype][2]) / factor / room
            larger = quantize(store, x * factor, bigger, side)
            pairs = [(found.scale, larger.scale), *([(found.offset, larger.offset)] if scale.zero == "min" else [])]
            for number, more in pairs:
                if number is not None and more is not None and scale.scale is None:  # a second level grows with them
                    # the least normal number may have been rounded up from among the others, and a zero down
                    normal = ((number.abs() > least) | (number == 0) & (more == 0)) & (number.abs() < most)
                    usual &= _everywhere(store, normal, x)
        require_equal(f"decoded {side}", second[usual], (first * factor)[usual])
