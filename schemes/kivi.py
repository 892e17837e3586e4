"""KIVI: keys per channel, values per token (arXiv 2402.02750, section 3).

Per block of 32: s = (max - min)/(2^b - 1), c = round((x - min)/s), x^ = s*c + min; s and min in fp16.
The newest 128 tokens are exact: keys leave in whole windows, since 32 tokens share a scale; values leave one by one.
"""

from kvdsl.scheme import Recent, Scheme, Sinks, Store, Uniform, per_channel, per_token

kivi2 = Scheme(
    keys=Store(Uniform(2), scale=per_channel(tokens=32)),
    values=Store(Uniform(2), scale=per_token(channels=32)),
    recent=Recent(128),
    source="arXiv 2402.02750, section 3",
)
kivi4 = kivi2.with_(bits=4)
kivi2_sinks = kivi2.with_(sinks=Sinks(4), source="arXiv 2402.02750, section 3, behind four sinks")
