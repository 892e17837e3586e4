"""CommVQ: keys before RoPE as sums of entries that commute with it, values as sums of vectors (arXiv 2506.18879).

A token's key R_t^-1 k of all kv heads is divided by its norm; a head's 128 channels are 64 pairs z.  Stage s has a
table of 64 entries, codes a_s and b_s of 6 bits, and z^ = sum_s C_s[a_s] + i C_s[b_s]: 21 stages are 252 bits.  What
turns z turns z^ in the same way, as the 2 x 2 blocks [[x, -y], [y, x]] of an entry commute with a rotation.  Values of
all kv heads are divided by their norm, too, and v^ = sum_s V_s[c_s].  Norms are fp16; heads of fewer channels have
fewer stages.

What the paper has otherwise: a_s and b_s are chosen together, here one after the other; tables are trained by EM with
soft codes, here fitted by least squares to the codes themselves.  Values there are 256 bits a head from a trained
network, times a matrix, brought to the norm of v: no network is trained here, and a sum of 64 entries, each of 16
vectors, is what as many bits give by search.  The released code keeps 12 bits of a key in 16.
"""

from kvdsl.scheme import ALL, Additive, PreRope, Scheme, Store, per_token

commvq = Scheme(
    keys=Store(Additive(6, stages=21 / 128, commuting=True), scale=per_token(heads=ALL), transform=PreRope()),
    values=Store(Additive(4, stages=0.5), scale=per_token(heads=ALL)),
    source="arXiv 2506.18879, 2 bits a channel",
)
commvq_1bit = commvq.with_(
    **{"keys.code.bits": 3, "values.code.stages": 0.25}, source="arXiv 2506.18879, 1 bit a channel"
)
