"""OmniQuant: levels with an integer zero point after learned scales and shifts of channels (arXiv 2308.13137).

Keys: y = k/n, met by q*n.  Values: y = (v - m)/n.  n and m come from training.  s = (max - min)/15, z = round(-min/s),
c = round(y/s) + z within 0..15, y^ = s*(c - z); s and z in fp16, one block a token and head.
"""

from kvdsl.scheme import ChannelScale, ChannelShift, Scheme, Store, Uniform, per_token

LEVELS = Store(Uniform(4), scale=per_token(zero="point"))

omniquant4 = Scheme(
    keys=LEVELS.with_(transform=ChannelScale("learned")),
    values=LEVELS.with_(transform=(ChannelShift("learned"), ChannelScale("learned"))),
    source="arXiv 2308.13137, the learned equivalent transform",
)
