"""QJL: the signs of a random projection and the vector's norm (arXiv 2406.03482, sections 3 and 4).

c = sign(S x) with S of `dim` rows, nu = |x| in fp16.  <q, x> is estimated as a*nu*<S q, c> and x itself as a*nu*S^T c,
a = sqrt(pi/2)/(dim*c_d) with c_d = 1 for independent rows and a little more for orthogonal ones, so that both are right
in the mean.  A value needs as many rows as its error allows: it is 0.571*d/dim of |x|^2.

`qjl` has the released settings.  Of every 32 keys the 8 channels with the largest norms are sketched apart: the one
sketch is of the vector with zeros there, the other one of these alone, each with a norm of its own (the paper's code
stores that of the whole vector instead of the first).  256 orthogonal rows each; 512 and 128 in the first 15 layers.
Values per token, s = (max - min)/3 and c = round((x - min)/s) of 32 channels, s and min in fp16.  The newest 128 values
stay exact, and keys until 128 of them leave together.
"""

from kvdsl.scheme import Float, Recent, Scheme, Sketch, Store, TopChannels, Uniform, per_token

VALUES = Store(Uniform(2), scale=per_token(channels=32))

initial = Scheme(
    keys=Store(Sketch(512), outliers=TopChannels(8, per=32, store=Sketch(128))),
    values=VALUES,
    recent=Recent(128),
)
qjl = initial.with_(
    keys=Store(Sketch(256), outliers=TopChannels(8, per=32, store=Sketch(256))),
    layers={range(15): initial},
    source="arXiv 2406.03482, the released settings",
)

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
