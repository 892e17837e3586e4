"""Cases that once broke a law, on one backend or the other; both are asked all of them."""

from __future__ import annotations

from typing import Any

from law_cases import THRESHOLDS

from kvdsl.scheme import (
    Balance,
    Block,
    Codebook,
    Float,
    Recent,
    Rotate,
    Scale,
    Scheme,
    Store,
    TopChannels,
    Uniform,
    per_channel,
    per_token,
)
from kvdsl.shape import Shape

TWICE = (Rotate("random_hadamard", size=8, seed=1), Rotate("random_hadamard", size=8, seed=3))
SIGNED = Scale(Block(4), range="signed_absmax", refit="least_squares", dtype="fp32")
FOUND: dict[str, tuple[str, Scheme, Shape, dict[str, Any]]] = {
    "cancelled terms of a product of rotations": (
        "decoding_equals_the_reference",
        Scheme(
            both=Store(
                Uniform(4, rounding="half_up"),
                scale=per_token(channels=32, range="signed_absmax", clip=2.0, refit="least_squares"),
                transform=TWICE,
            )
        ),
        Shape(64, 2, 2, "bf16"),
        {"tokens": 11, "kind": "ties", "seed": 36407},
    ),
    "levels that float16 does not hold": (
        "every_code_comes_back",
        Scheme(both=Store(Codebook(2, levels=(-0.9, 0.4)), scale=SIGNED), recent=Recent(64)),
        Shape(88, 2, 4),
        {"tokens": 168, "seed": 8001},
    ),
    "what is left is larger than the vector": (
        "errors_stay_within_the_bound",
        THRESHOLDS,
        Shape(32, 1, 1),
        {"tokens": 1, "kind": "huge"},
    ),
    "floats without a scale are multiplied by none": (
        "decode_is_attention",
        Scheme(both=Store(Float("e4m3"))),
        Shape(32, 1, 1),
        {"tokens": 1},
    ),
    "two rows of floats have names of their own": (
        "outlier_channels_and_others_do_not_meet",
        Scheme(keys=Store(Float("fp16")), values=Store(Float("fp16"), outliers=TopChannels())),
        Shape(32, 1, 1),
        {"tokens": 1},
    ),
    "factors of tiles divide finite numbers": (
        "infinity_saturates",
        Scheme(
            keys=Store(Uniform(1), scale=per_channel(tokens=32), transform=Balance(32, loops=1)),
            values=Store(Float("fp16")),
            recent=Recent(32),
        ),
        Shape(32, 1, 1),
        {"tokens": 1},
    ),
}
