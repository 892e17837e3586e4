"""MiKV: tokens that attention passes over are kept in 2 bits, not dropped (arXiv 2402.18096).

A fifth of all tokens, those with the largest accumulated attention, in fp16; each of the others per 64 channels:
s = (max - min)/3, c = round((x - min)/s).  Keys of these are first divided by sqrt(max|k|/max|q|) of every channel, of
the prompt, so that what is large in a channel of keys is shared with the queries.  The newest 32 tokens are exact.
At every step the token that matters least goes down, and none comes up again.
No code was published; half of what is kept being the newest, as in its re-implementation, is not followed: a window
has a fixed length here.
"""

from kvdsl.scheme import ChannelScale, Recent, Saliency, Scheme, Store, Tier, Uniform, per_token

mikv = Scheme(
    keys=Store(Uniform(), scale=per_token(channels=64), transform=ChannelScale("balance", when="prompt")),
    values=Store(Uniform(), scale=per_token(channels=64)),
    recent=Recent(32),
    tiers=(Tier(16, top=0.2), Tier(2)),
    router=Saliency("accumulated", moves="down"),
    source="arXiv 2402.18096",
)
