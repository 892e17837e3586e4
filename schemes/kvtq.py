"""KVTQ: keys and values as -1, 0 or 1 times a scale (OpenReview eZAlb8fX5y, of which only the abstract is public).

The rule is that of ternary weight networks and the group of 64 is chosen here: c is 0 below 0.7 of the mean of |x|,
else the sign of x; s = <x, c>/<c, c> in fp16, the least squares for these codes; x^ = s*c.  Five digits a byte, or two
bits each.
"""

from kvdsl.scheme import Codebook, Recent, Scheme, Store, per_token

kvtq = Scheme(
    both=Store(
        Codebook(levels=(-1, 0, 1)),
        scale=per_token(channels=64, range="absmean", clip=1.4, refit="least_squares"),
    ),
    recent=Recent(128),
    source="KVTQ, OpenReview eZAlb8fX5y; rule and group chosen here",
)

kvtq_2bit = kvtq.with_(bits=2)
