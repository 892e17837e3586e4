"""SnapKV: of the prompt 1024 tokens stay, those that its newest 32 queries attend to (arXiv 2404.14469).

A token counts as much as the largest of its 7 neighbours; those 32 tokens and all that are generated stay, too.
"""

from kvdsl.scheme import DROP, Probes, Recent, Saliency, Scheme, Store, Tier

snapkv = Scheme(
    both=Store(),
    recent=Recent(32),
    tiers=(Tier(top=1024), DROP),
    router=Saliency("accumulated", probes=Probes(recent=32), every="prompt", pool=7),
    source="arXiv 2404.14469",
)
