"""OSCAR: rotated by what attention weighs, clipped by rank, then two bits a number (arXiv 2605.17757).

y = P H U^T x: the columns of U are eigenvectors, largest eigenvalue first, of keys those of the second moment of the
queries that meet them, sum q q^T, of values those of sum w v v^T, w = k^T (sum q q^T) k of a value's key; H is
Hadamard's matrix over its root, which gives every eigenvector to all numbers alike, and P puts number i where the bits
of i in reverse order say.  Per token and head: tau is |y| at rank floor(0.96 d) of keys, floor(0.92 d) of values,
counted from the smallest; lo, hi = the ends of y brought within tau; s = (hi - lo)/3, c = floor((y - lo)/s + 1/2), kept
within 0..3, x^ = U H^T P^T (s*c + lo); s and lo in fp16.  The first 64 tokens and the newest 256 are exact.

U comes from calibration, one for every kv head in `oscar2`, one a layer in `oscar2_layer`, as in the first release
(`kvdsl show kvdsl.schemes.oscar:oscar2_layer`).  Left out: thresholds at which codes are of unequal steps ("LM"), with
which the authors saw long outputs degenerate; tokens leave the window here one by one, there in batches.
"""

from kvdsl.scheme import Eigenbasis, Recent, Rotate, Scheme, Sinks, Store, Uniform, per_token

TURNED = (Eigenbasis(), Rotate("hadamard"), Rotate("bit_reversal"))

oscar2 = Scheme(
    keys=Store(Uniform(2, rounding="half_up"), scale=per_token(quantile=0.96), transform=TURNED),
    values=Store(Uniform(2, rounding="half_up"), scale=per_token(quantile=0.92), transform=TURNED),
    sinks=Sinks(64),
    recent=Recent(256),
    source="arXiv 2605.17757, a basis for every kv head",
)
oscar2_layer = oscar2.with_(per="layer", source="arXiv 2605.17757")
