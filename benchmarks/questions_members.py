"""The schemes that docs/questions.md compares, question by question, each under the names of what it differs in.

Where sides or layouts are compared, exact tokens leave a window of 128 whole on both sides: a prompt of 896 tokens then
is packed to the last one, whatever the scheme, and only codes differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvdsl.scheme import (
    Codebook,
    Float,
    Recent,
    Rotate,
    Scale,
    Scheme,
    Sketch,
    Store,
    TopChannels,
    Uniform,
    per_channel,
    per_token,
)  # fmt: skip
from kvdsl.schemes import kivi2

HEAD_DIM = 64  # of the model that is measured
SEEDS, FEW = range(5), range(3)
EXACT = Store(Float("fp16"))
WHOLE = Recent(128, "whole")

GAUSSIAN, ORTHOGONAL, FAST = "QJL, Gaussian rows", "QJL, orthogonal rows", "QJL, Hadamard rows"
APART = "QJL, orthogonal rows, 8 channels apart"
EVEN, NORMAL, QUAROT = "Hadamard, even levels", "Hadamard, normal levels", "QuaRot"
TOKEN, CHANNEL = "per token", "per channel"
OF_VALUES, TOKEN_VALUES, BOTH = "values: QJL, orthogonal rows", "values: per token", "both: QJL, orthogonal rows"
NORMAL_VALUES = "values: Hadamard, normal levels"


@dataclass(frozen=True)
class Member:
    """A scheme and, by name, what it differs in from others of its question."""

    scheme: Scheme
    axes: Mapping[str, str | int]

    @property
    def name(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.axes.items())


def keys(store: Store) -> Scheme:
    """Keys alone are coded."""
    return Scheme(keys=store, values=EXACT, recent=WHOLE)


def values(store: Store) -> Scheme:
    """Values alone are coded."""
    return Scheme(keys=EXACT, values=store, recent=WHOLE)


def key_store(family: str, bits: int, seed: int = 0, head_dim: int = HEAD_DIM) -> Store:
    """What keys are stored in; of a sketch `bits` are rows a channel.  Beside codes all have a quarter of a bit at
    head_dim 64, but QuaRot, whose range has two ends, and the sketch whose channels are apart."""
    rows = bits * head_dim
    turned = Rotate("random_hadamard", seed=seed)
    if family == APART:
        code = Sketch(rows, seed=seed)
        return Store(code, outliers=TopChannels(8, per=32, store=Store(code)))
    made = {
        GAUSSIAN: lambda: Store(Sketch(rows, basis="gaussian", seed=seed)),
        ORTHOGONAL: lambda: Store(Sketch(rows, seed=seed)),
        FAST: lambda: Store(Sketch(rows, basis="hadamard", seed=seed)),
        EVEN: lambda: Store(Uniform(bits), scale=per_token(range="absmax"), transform=turned),
        NORMAL: lambda: Store(Codebook(bits, "normal"), scale=per_token(), transform=turned),
        QUAROT: lambda: Store(Uniform(bits), scale=per_token(), transform=Rotate("hadamard")),
        TOKEN: lambda: Store(Uniform(bits), scale=per_token(range="absmax")),
        CHANNEL: lambda: Store(Uniform(bits), scale=per_channel(tokens=128)),
    }
    return made[family]()


def qjl() -> Iterator[Member]:
    """Sketches of keys, and of values, beside what else takes as many bits."""
    plan = {
        GAUSSIAN: (range(1, 9), SEEDS),
        ORTHOGONAL: (range(1, 9), SEEDS),
        FAST: ((2, 8), FEW),
        APART: (range(1, 5), FEW),
        EVEN: (range(2, 9), FEW),
        NORMAL: (range(1, 5), FEW),
        QUAROT: (range(1, 9), range(1)),
        TOKEN: (range(2, 9), range(1)),
        CHANNEL: (range(1, 9), range(1)),
    }
    for family, (steps, seeds) in plan.items():
        for bits in steps:
            for seed in seeds:
                yield Member(keys(key_store(family, bits, seed)), {"family": family, "bits": bits, "seed": seed})
    for bits in (1, 2, 4, 8):
        for seed in FEW:
            store = Store(Sketch(bits * HEAD_DIM, seed=seed))
            yield Member(values(store), {"family": OF_VALUES, "bits": bits, "seed": seed})
            if bits > 2:
                both = Scheme(both=store, recent=WHOLE)
                yield Member(both, {"family": BOTH, "bits": bits, "seed": seed})
    for bits in (2, 4, 8):
        store = Store(Uniform(bits), scale=per_token(range="absmax"))
        yield Member(values(store), {"family": TOKEN_VALUES, "bits": bits, "seed": 0})
    for bits in (1, 2, 4):
        for seed in FEW:
            axes: dict[str, str | int] = {"family": NORMAL_VALUES, "bits": bits, "seed": seed}
            yield Member(values(key_store(NORMAL, bits, seed)), axes)


def kivi_at(bits: int, group: int, head_dim: int = HEAD_DIM) -> Scheme:
    """KIVI with groups of another size; of values no group is longer than a head."""
    of_keys = Store(Uniform(bits), scale=per_channel(tokens=group))
    of_values = Store(Uniform(bits), scale=per_token(channels=min(group, head_dim)))
    return Scheme(keys=of_keys, values=of_values, recent=kivi2.recent)


def kivi() -> Iterator[Member]:
    """KIVI at 2 and 4 bits with groups of three sizes."""
    for bits in (2, 4):
        for group in (32, 64, 128):
            yield Member(kivi_at(bits, group), {"bits": bits, "group": group})


HALF, PLAIN, TERNARY_WEIGHTS = "half of the largest", "half of the mean", "0.7 of the mean"
FITTED, TUNED, MIDDLE = "0.7 of the mean, least squares", "best of eight", "3 even levels, least to largest"
LLOYD, LLOYD_FITTED = "0.612 of the root mean square", "0.612 of the root mean square, least squares"
LENGTH = "0.7 of the mean, same length"
HALF_FITTED = "half of the largest, least squares"
SIGN, TWO_BITS, TWO_NORMAL = "1 bit, sign", "2 bits, 4 even levels, least to largest", "2 bits, normal levels"
TRITS = (-1.0, 0.0, 1.0)
TRIED = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the largest number, as the level
RULES: dict[str, tuple[Codebook | Uniform, dict[str, Any]]] = {
    HALF: (Codebook(levels=TRITS), dict(range="absmax")),
    HALF_FITTED: (Codebook(levels=TRITS), dict(range="absmax", refit="least_squares")),
    MIDDLE: (Uniform(levels=3), {}),
    PLAIN: (Codebook(levels=TRITS), dict(range="absmean")),
    TERNARY_WEIGHTS: (Codebook(levels=TRITS), dict(range="absmean", clip=1.4)),
    FITTED: (Codebook(levels=TRITS), dict(range="absmean", clip=1.4, refit="least_squares")),
    LENGTH: (Codebook(levels=TRITS), dict(range="absmean", clip=1.4, refit="norm")),
    LLOYD: (Codebook(levels=TRITS), dict(range="norm", clip=1.224)),
    LLOYD_FITTED: (Codebook(levels=TRITS), dict(range="norm", clip=1.224, refit="least_squares")),
    TUNED: (Codebook(levels=TRITS), dict(range="absmax", clip=TRIED)),
    SIGN: (Codebook(levels=(-1.0, 1.0)), dict(range="absmean")),
    TWO_NORMAL: (Codebook(2, "normal"), {}),
    TWO_BITS: (Uniform(2), {}),
}
"""Rule -> code and scale.  Of levels -1, 0, 1 a number is 0 below half of the scale."""
LAYOUTS = ("32 of a token", "64 of a token", "32 of keys' channels")


def scale_in(layout: str, of_keys: bool, rule: Mapping[str, Any]) -> Scale:
    """The scale of one side in a layout."""
    group = int(layout.split()[0])
    return per_channel(tokens=group, **rule) if of_keys and "keys" in layout else per_token(channels=group, **rule)


def ternary() -> Iterator[Member]:
    """Ternary rules, a sign and two bits, each in every layout."""
    for layout in LAYOUTS:
        for rule, (code, options) in RULES.items():
            stores = (Store(code, scale=scale_in(layout, of_keys, options)) for of_keys in (True, False))
            one, other = stores
            yield Member(Scheme(keys=one, values=other, recent=WHOLE), {"rule": rule, "layout": layout})


WIDTHS = (2, 3, 4, 8, 16)
CHANNELS, TOKENS = "keys per channel", "keys per token"


def sides() -> Iterator[Member]:
    """Bits of keys against bits of values, groups of 32 everywhere; 16 is the number itself."""
    for layout in (CHANNELS, TOKENS):
        for of_keys in WIDTHS:
            for of_values in WIDTHS:
                if of_keys == 16 and (of_values == 16 or layout == TOKENS):
                    continue  # nothing is coded, or what the other layout has
                scale = per_channel(tokens=32) if layout == CHANNELS else per_token(channels=32)
                one = Store(Uniform(of_keys), scale=scale) if of_keys < 16 else EXACT
                other = Store(Uniform(of_values), scale=per_token(channels=32)) if of_values < 16 else EXACT
                scheme = Scheme(keys=one, values=other, recent=WHOLE)
                yield Member(scheme, {"layout": layout, "keys": of_keys, "values": of_values})


MEMBERS = {"kivi": kivi, "sides": sides, "ternary": ternary, "qjl": qjl}
