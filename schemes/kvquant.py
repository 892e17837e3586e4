"""KVQuant: keys per channel before RoPE, values per token, on calibrated levels (arXiv 2401.18079).

s = (max - min)/2, o = (max + min)/2: of keys over calibration data, one channel; of values of one token, all heads.
c = the nearest of 2^b levels l in -1..1 to (x - o)/s, one table for a layer's keys and one for its values; x^ = s*l +
o, s and o in fp16.  A table makes sum F (x - x^)^2 least over calibration data, F = (dL/dx)^2 of the model's loss L,
the diagonal of the Fisher information.  Keys are coded as R_t^-1 k, before RoPE, and dL/dx is taken there.  The first
token is exact.
Of 2 bits, codes are then decoded as x^ = s*(a*l + m) + o, a and m of each table such that over calibration data mean
and standard deviation of (x^ - o)/s are those of (x - o)/s (Q-Norm).
The released code weighs the errors of (x - o)/s by F alone: not followed, a channel's s differs from another's.

nuq is without the sparse outliers, kvquant with them: of keys what lies beyond the percentiles 0.5 and 99.5 of its
channel over calibration data, of values the half per cent at either end of a token over all heads.  Ranges and tables
are those of the others.  Two slots a token of a head's keys hold 84 % of them, one a channel of 64 tokens of values
75 %, of normal numbers; one more on either side would hold 95 % and take 0.19 and 0.38 bits.  Slots want blocks of 64
tokens, which wait; the paper has no window, and no limit.
"""

from kvdsl.scheme import (
    ALL,
    Block,
    Codebook,
    PreRope,
    Recent,
    Scheme,
    Sinks,
    Sparse,
    Store,
    per_channel,
    per_token,
)

nuq4 = Scheme(
    keys=Store(Codebook(4, "calibrated", weights="fisher"), scale=per_channel(when="calibrated"), transform=PreRope()),
    values=Store(Codebook(4, "calibrated", weights="fisher"), scale=per_token(heads=ALL)),
    sinks=Sinks(1),
    source="arXiv 2401.18079, nuq without outliers",
)
nuq3 = nuq4.with_(bits=3)
nuq2 = nuq4.with_(bits=2, match="moments")

SINGLE = {
    "keys.outliers": Sparse(0.01, Block(ALL, 1), fill="clamp", when="calibrated"),
    "values.outliers": Sparse(0.01, Block(heads=ALL), slots=1, fill="clamp"),
}
kvquant4 = nuq4.with_(**SINGLE, recent=Recent(64), source="arXiv 2401.18079")
kvquant3 = nuq3.with_(**SINGLE, recent=Recent(64), source="arXiv 2401.18079")
kvquant2 = nuq2.with_(**SINGLE, recent=Recent(64), source="arXiv 2401.18079")
