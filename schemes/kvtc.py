"""KVTC: numbers along principal axes, more bits the more they vary, none at the end (arXiv 2511.01815).

y = U^T (x - m): m is the mean over calibration tokens, the columns of U are eigenvectors of the covariance, the largest
eigenvalue first.  The first quarter of y is coded in 4 bits a number, the next half in 2, the last quarter not at all:
it is read as 0.  Each stretch of a token has lo, hi = its ends, s = (hi - lo)/(2^b - 1), c = round((y - lo)/s), y^ =
s*c + lo, s and lo in fp16; x^ = U y^ + m.  The first 4 tokens and the newest 128 are exact.

Published: keys come without their rotary positions, which their axes are far shorter without: `kvtc2_before_rope` has
them so (`kvdsl show kvdsl.schemes.kvtc:kvtc2_before_rope`).  U stays in the loop over tokens then, and at head_dim 128
that kernel moves numbers to memory; here positions stay on keys, and U goes onto the query.  One basis there is of
several heads, or layers, side by side; here each kv head has one.  Bits come from a dynamic program over all of it,
which may give a group of numbers none; `kvdsl.basis_quotas` counts them for any tokens, by the rule that one more bit
makes a quarter of an error.  There it is a store that is inflated and unpacked before attention; here attention reads
what is packed, and `deflate=` is for what waits elsewhere (docs/pages.md).
"""

from kvdsl.scheme import Bands, ChannelShift, Eigenbasis, PreRope, Recent, Scheme, Sinks, Store, Uniform, per_token

AXES = (ChannelShift(), Eigenbasis("own", rank=0.75))
STRETCHES = Bands(tuple(Store(Uniform(bits), scale=per_token()) for bits in (4, 2)), channels=(1 / 3, 2 / 3))

kvtc2 = Scheme(
    both=Store(STRETCHES, transform=AXES),
    sinks=Sinks(4),
    recent=Recent(128),
    source="arXiv 2511.01815, keys with positions",
)
kvtc2_before_rope = kvtc2.with_(
    keys=Store(STRETCHES, transform=(PreRope(), *AXES)), source="arXiv 2511.01815, a basis for every kv head"
)
