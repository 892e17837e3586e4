"""UltraQuant: 4-bit floats under powers of two, keys behind a Hadamard matrix (arXiv 2606.20474; vLLM, CDNA4).

Keys: y = H x/sqrt(d); values as they are.  Of 32 channels s = 2^e with e = floor(log2(0.156 max|y|) + 1/2), so that the
largest number is 4.5 to 9.1 and what is beyond 6 saturates; c = the nearest to y/s of 0, 1/2, 1, 3/2, 2, 3, 4, 6 and
the same with a minus sign, the lower one where two are equally near; y^ = s c.  0.156 is 0.936/6.  A block of zeros has
the least of all powers here, a byte that says so there.

Queries: e4m3(H q/sqrt(d)), nearest even and saturating at 448, under no scale.  Keys that are exact meet q itself.  Its
kernels round the queries of single tokens, and decode keys for those of prompts; here all meet packed keys alike.
"""

from kvdsl.scheme import Float, Rotate, Scheme, Store, per_token

PLAIN = Store(
    Float("e2m1", rounding="half_down"),
    scale=per_token(channels=32, dtype="e8m0", exponent="round", clip=0.936),
)

ultraquant4 = Scheme(
    keys=PLAIN.with_(transform=Rotate("hadamard")),
    values=PLAIN,
    queries=Store(Float("e4m3")),
    source="arXiv 2606.20474",
)
