"""ZipCache: tokens that receive much attention get 4 bits, the others 2 (arXiv 2405.14256).

Keys: a scale and a minimum for each channel of a head, over all tokens of a tier; values: each channel over
c = sqrt(max|v|) of the tier's tokens, then a scale and a minimum for each token, of all heads; both in fp16.
A token's saliency is the attention it receives over the number of queries that can see it, from the newest 5 % of the
queries and another 5 % of them drawn at random.  Every 100 tokens all that is stored is decoded and quantized anew.
`zipcache` lets any token change its tier then, as the paper says; `zipcache_code` keeps the old ones where they are and
goes by the newest query's weights alone, as the released code does.
That code draws probes with replacement, here each is another one; its statistics are of a whole batch, here of one
sequence.
"""

from kvdsl.scheme import (
    ALL,
    ChannelScale,
    Probes,
    Saliency,
    Scheme,
    Store,
    Tier,
    Uniform,
    per_channel,
    per_token,
)

zipcache = Scheme(
    keys=Store(Uniform(), scale=per_channel()),
    values=Store(Uniform(), scale=per_token(heads=ALL), transform=ChannelScale("sqrt_absmax", when="online")),
    tiers=(Tier(4, top=0.6), Tier(2)),
    router=Saliency("normalized", probes=Probes(recent=0.05, random=0.05), every=100, moves="any"),
    requantize="on_flush",
    source="arXiv 2405.14256",
)
zipcache_84 = zipcache.with_(tiers=(Tier(8, top=0.6), Tier(4)))
zipcache_32 = zipcache.with_(tiers=(Tier(3, top=0.6), Tier(2)))
zipcache_code = zipcache.with_(
    router=Saliency("normalized", probes=Probes(recent=0.05, random=0.05), every=100, later="last"),
    source="arXiv 2405.14256, the released code",
)
