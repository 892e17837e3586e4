"""Schemes that differ from another in one choice, for `kvdsl eval benchmarks/variants.py:NAME`: what a choice is worth.

Shipped schemes differ in several at once: KIVI beside plain tokens in the direction of its scales, their groups and its
exact window; QuaRot in its rotation and in that a prompt reads what is stored of itself.  As a script it prints them.
"""

from kvdsl.scheme import Recent, Rotate, Scheme, Store, Uniform, per_channel, per_token
from kvdsl.schemes import kivi2, kivi4

kivi2_window32 = kivi2.with_(recent=Recent(32))
kivi4_window32 = kivi4.with_(recent=Recent(32))
kivi2_keys_by_token = kivi2_window32.with_(keys=kivi2.values)
kivi4_keys_by_token = kivi4_window32.with_(keys=kivi4.values)
kivi2_values_by_channel = kivi2_window32.with_(values=kivi2.keys)
kivi2_group64 = kivi2.with_(
    keys=Store(Uniform(2), scale=per_channel(tokens=64)), values=Store(Uniform(2), scale=per_token(channels=64))
)
kivi2_rotated_keys = kivi2.with_(keys=Store(Uniform(2), scale=per_channel(tokens=32), transform=Rotate("hadamard")))
kivi2_rotated_values = kivi2.with_(values=Store(Uniform(2), scale=per_token(channels=32), transform=Rotate("hadamard")))
token2_group32, token4_group32 = (
    Scheme(both=Store(Uniform(bits), scale=per_token(channels=32)), source="baseline") for bits in (2, 4)
)
token2_rotated, token4_rotated = (
    Scheme(both=Store(Uniform(bits), scale=per_token(), transform=Rotate("hadamard")), source="baseline")
    for bits in (2, 4)
)

ALL = [name for name, value in globals().items() if isinstance(value, Scheme) and name not in ("kivi2", "kivi4")]

if __name__ == "__main__":
    print(*(f"benchmarks/variants.py:{name}" for name in ALL))
