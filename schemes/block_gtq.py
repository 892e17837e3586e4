"""Block-GTQ: more bits for the pairs of channels that meet most energy, a norm and a rotation for those of equal bits.

E_j = (mean |k_j|^2 + mean |q_j|^2)/2 of the pair j that rotary positions turn, i and i + d/2, over calibration tokens
of a kv head and the queries that meet it.  Pairs stand in the order of their energy; those of equal bits are a group,
y = Q x of its channels with Q orthogonal, c = the nearest level of y over its root mean square, Lloyd and Max's for the
beta law of as many coordinates, s = |y|/|level[c]| (norm correction) in fp16, x^ = Q^T s*level[c].  Values are one such
group, as TurboQuant has it.

Published: every pair of every layer and kv head has 1 to 8 bits of its own, one more at a time for the largest
E_j*4^-b, until their mean is 2 or 3.  Here pages are alike for all heads, so that quotas are the scheme's: a quarter of
the pairs has a bit less than the mean, those of least energy, and a quarter a bit more.  That is, in quarters, what the
rule gives for the mean spectrum of a small model (SmolLM2: 7, 19, 5 and 1 of 32 pairs have 1, 2, 3 and 4 bits).  The
sum of E_j*4^-b is 0.61 of that of equal bits there, 0.54 with bits of each head's own.  `kvdsl.quotas` counts them for
any keys and queries; other quotas for a layer, or for some of its heads, are schemes in `layers` and `heads`.
No group has 5 to 8 bits, which the released code holds in whole bytes, beyond its budget.  It leaves groups of one bit
unrotated, and holds norms in fp32.
"""

from kvdsl.scheme import Bands, Codebook, Permute, Rotate, Scheme, Store, per_token

QUOTAS = (0.25, 0.5, 0.25)


def _group(bits: int) -> Store:
    return Store(Codebook(bits, "beta"), scale=per_token(refit="norm"))


def _scheme(keys: int, values: int) -> Scheme:
    groups = Bands(tuple(_group(keys + more) for more in (-1, 0, 1)), channels=QUOTAS)
    turned = (Permute("energy", pairs="halves"), Rotate("orthogonal", QUOTAS, seed=0))
    return Scheme(
        keys=Store(groups, transform=turned),
        values=_group(values).with_(transform=Rotate("orthogonal", seed=0)),
        source="arXiv 2606.24033, quotas that are the same for all heads",
    )


block_gtq_k2v2 = _scheme(2, 2)
block_gtq_k3v2 = _scheme(3, 2)
block_gtq_k3v3 = _scheme(3, 3)
