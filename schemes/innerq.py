"""InnerQ: groups along the axis that a product sums over, keys over a size of each channel (arXiv 2602.23200).

Keys: z = k_i/n_i, n_i = sqrt(max |k_i|) over the tokens behind the sinks that are there when the first ones leave the
window, then fixed, which the query is multiplied by; 32 channels of a token share s = max|z|/3, c = round(z/s) within
-3..3, k^ = n_i s*c.  Values: 32 tokens of a channel share s = max|v|/L, c = round(v/s) within -L..L, L 3 of three bits
and 1 of two; s in fp16.  The first 32 tokens and the newest 96 are exact; what leaves the window waits until 32 are
there, keys like values, where the paper packs keys one by one.

The released code measures n_i on the tokens that leave first: behind a prompt of up to 128 tokens that is a single key,
and channels where it is near 0 have others blown up for ever; so is a channel of zeros, whose size it divides by.  Here
the window is measured, too, and a size of 0 is taken as 1.  The paper's hybrid, where a group of values that errs less
so has its two ends for levels in place of three around 0, is left out: it has a minimum more to store, and half of each
code without use.  `innerq_signed` gives a group its side by the sign of s instead, s = -v/2 of the v with the largest
size, c within -2..1: no bit more than ternary values, and all four codes.
"""

from kvdsl.scheme import ChannelScale, Recent, Scheme, Sinks, Store, Tier, Uniform, per_channel, per_token

innerq3 = Scheme(
    keys=Store(
        Uniform(3), scale=per_token(channels=32, range="absmax"), transform=ChannelScale("sqrt_absmax", when="arrived")
    ),
    values=Store(Uniform(3), scale=per_channel(tokens=32, range="absmax")),
    sinks=Sinks(32),
    recent=Recent(96),
    tiers=(Tier(),),
    source="arXiv 2602.23200",
)
innerq = innerq3.with_(**{"values.code.bits": 2})
innerq_signed = innerq.with_(
    **{"values.scale.range": "signed_absmax"}, source="arXiv 2602.23200, values under signed scales"
)
