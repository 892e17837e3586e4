"""RoCo: the smallest mean attention is dropped, but not of tokens whose weights vary most (arXiv 2402.06262).

Two fifths of all tokens stay, and the newest 10.  A token's mean is over all queries that could see it; published code
counts them from the size of the cache down.
"""

from kvdsl.scheme import DROP, Recent, Saliency, Scheme, Store, Tier

roco = Scheme(
    both=Store(),
    recent=Recent(10),
    tiers=(Tier(top=0.4), DROP),
    router=Saliency("mean_std", moves="down"),
    source="arXiv 2402.06262",
)
