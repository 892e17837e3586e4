"""KVSink: tokens that attract attention wherever they stand stay exact, the others are KIVI's (arXiv 2508.04257).

Four of every head, over KIVI in 2 bits.  The paper predicts them from channels of the hidden state; a cache sees keys
and values: those with the smallest values are taken.  On SmolLM2 the four with the smallest values receive 35 % of all
attention, the first four 36 %, the four that receive most 46 %.
"""

from kvdsl.scheme import Largest, Recent, Scheme, Store, Tier, Uniform, per_channel, per_token

kvsink2 = Scheme(
    keys=Store(Uniform(2), scale=per_channel(tokens=32)),
    values=Store(Uniform(2), scale=per_token(channels=32)),
    recent=Recent(128),
    tiers=(Tier(16, top=4), Tier()),
    router=Largest("values", "norm", smallest=True),
    source="arXiv 2508.04257, sinks told by their values",
)
