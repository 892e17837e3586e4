"""lmdeploy: keys from a table of 3 bits and a sign of what it leaves, values from one of 2 bits (its TurboQuant K4V2).

y = H x/sqrt(d) with Hadamard's matrix and n = |y|/sqrt(d); c = the nearest of Lloyd and Max's levels of y/n.  Keys also
keep the sign of r = y - n level[c] of every coordinate, and one amplitude for all of them, a = |r|/sqrt(d):
y^ = n level[c] + a sign(r), with n and a in fp16.  No sketch is drawn, though the code names it after one.  Values:
y^ = n level[c].
"""

from kvdsl.scheme import Codebook, Rotate, Scheme, Store, per_token

TABLE = Store(Codebook(2, "normal"), scale=per_token(), transform=Rotate("hadamard"))

lmdeploy_k4v2 = Scheme(
    keys=TABLE.with_(bits=3, residual=TABLE.with_(code=Codebook(levels=(-1, 1)))),
    values=TABLE,
    source="lmdeploy, quant_policy 42",
)
