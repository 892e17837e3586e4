"""BitDecoding: keys per channel over 128 tokens, values per token over 128 channels (arXiv 2503.18773, k-channel).

s = (max - min)/(2^b - 1), c = round((x - min)/s), x^ = s*c + min; s and min in fp16.
Both sides leave the exact window of 128 tokens together, when it is full.
"""

from kvdsl.scheme import Recent, Scheme, Store, Uniform, per_channel, per_token

bitdecoding4 = Scheme(
    keys=Store(Uniform(4), scale=per_channel(tokens=128)),
    values=Store(Uniform(4), scale=per_token(channels=128)),
    recent=Recent(128, "whole"),
    source="arXiv 2503.18773, k-channel",
)
bitdecoding2 = bitdecoding4.with_(bits=2)
