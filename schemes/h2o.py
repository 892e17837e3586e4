"""H2O: a fifth of all tokens stays, those with the largest accumulated attention, the others are dropped (arXiv
2306.14048).

The newest 128 tokens stay, too, all in full precision.  What is dropped is dropped behind the attention of its step,
head by head: the attention of a kv head's query heads is added up.  The share is of all tokens seen; published code
takes it of the prompt's, and adds up the sequences of a batch.
"""

from kvdsl.scheme import DROP, Recent, Saliency, Scheme, Store, Tier

h2o = Scheme(
    both=Store(),
    recent=Recent(128),
    tiers=(Tier(top=0.2), DROP),
    router=Saliency("accumulated", moves="down"),
    source="arXiv 2306.14048",
)
