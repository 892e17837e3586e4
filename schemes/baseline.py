"""The plain asymmetric quantizers that papers compare with, one for each direction and width.

s = (max - min)/(2^b - 1), c = round((x - min)/s), x^ = s*c + min; s and min in fp16.
token*: a block is one token of one kv head, all channels.  channel*: a block is one channel over 64 tokens, which wait
for one another in an exact window.
"""

from kvdsl.scheme import Recent, Scheme, Store, Uniform, per_channel, per_token

token2 = Scheme(both=Store(Uniform(2), scale=per_token()), source="baseline")
token3 = token2.with_(bits=3)
token4 = token2.with_(bits=4)

channel2 = Scheme(both=Store(Uniform(2), scale=per_channel(tokens=64)), recent=Recent(64), source="baseline")
channel3 = channel2.with_(bits=3)
channel4 = channel2.with_(bits=4)
