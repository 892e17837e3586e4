"""SKVQ: like channels share a clipped scale of 8 bits, keys before RoPE (arXiv 2405.06219, on heads of their own).

Per token and 32 channels of a head: lo, hi = 0.92*min, 0.92*max, s = (hi - lo)/(L - 1), c = clamp(round((x - lo)/s)),
x^ = s*c + lo; s and lo in e4m3.  L is 4; of the values of `skvq_k2v1p5` 3, five codes in a byte.  The channels of a
head are sorted by their range in calibration data before they are grouped, keys as R_t^-1 k.  The first 5 tokens and
the newest 128 are exact.
The paper's groups are clusters of a layer's channels by (min, max), of all heads and of unequal sizes, 128, 64 or 32 in
the mean.  Here they are equal and inside a head: 32 is the one of the three that divides heads of 128, 96 and 64 and
leaves each at least two groups, since in a head that is one group no order changes anything.
The released code chooses codes by the scale before it is rounded and decodes by the rounded one: not followed, here
both are the stored one.  The paper searches the clip of every group, its code has 0.92 for all; so do these.  A tuple
searches online: `skvq2.with_(**{"keys.scale.clip": (1.0, 0.92, 0.84)})`.
"""

from kvdsl.scheme import Permute, PreRope, Recent, Scheme, Sinks, Store, Uniform, per_token

skvq2 = Scheme(
    keys=Store(
        Uniform(2), scale=per_token(channels=32, clip=0.92, dtype="e4m3"), transform=(PreRope(), Permute("range"))
    ),
    values=Store(Uniform(2), scale=per_token(channels=32, clip=0.92, dtype="e4m3"), transform=Permute("range")),
    sinks=Sinks(5),
    recent=Recent(128),
    source="arXiv 2405.06219, groups of equal size inside a head",
)
skvq_k2v1p5 = skvq2.with_(**{"values.code": Uniform(levels=3)})
