"""QJL: the signs of a random projection and the vector's norm (arXiv 2406.03482, sections 3 and 4).

c = sign(S x) with S of `dim` rows, nu = |x| in fp16.  <q, x> is estimated as a*nu*<S q, c> and x itself as a*nu*S^T c,
a = sqrt(pi/2)/(dim*c_d) with c_d = 1 for independent rows and a little more for orthogonal ones, so that both are right
in the mean.  A value needs as many rows as its error allows: it is 0.571*d/dim of |x|^2.
The released code also sketches each block's largest channels apart; these two do not.
"""

from kvdsl.scheme import Float, Recent, Scheme, Sketch, Store

qjl_gauss = Scheme(
    keys=Store(Sketch(256, basis="gaussian")),
    values=Store(Float("fp16")),
    source="arXiv 2406.03482, section 3",
)
qjl_kv = Scheme(
    both=Store(Sketch(512)),
    recent=Recent(128),
    source="arXiv 2406.03482, section 3, on both sides with orthogonal rows",
)
