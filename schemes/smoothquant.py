"""SmoothQuant: int8 after the keys' large channels are balanced against the queries' (arXiv 2211.10438, equation 4).

n = sqrt(max|k|/max|q|) of every channel in calibration data, k/n is coded and meets q*n.  s = max|x|/127 over a token
of all heads, in fp16; c = round(x/s).  Values have no partner to be balanced with.
"""

from kvdsl.scheme import ALL, ChannelScale, Scheme, Store, Uniform, per_token

INT8 = Store(Uniform(8), scale=per_token(heads=ALL, range="absmax"))

smoothquant8 = Scheme(
    keys=INT8.with_(transform=ChannelScale("balance")),
    values=INT8,
    source="arXiv 2211.10438, the int8 operands of attention",
)
