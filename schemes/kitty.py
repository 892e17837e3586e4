"""Kitty: the largest channels of every 128 keys have 4 bits, all others 2 (arXiv 2511.18643, section 3).

c = round((x - min)/s) with s = (max - min)/3 of a channel of 128 tokens, and (max - min)/15 of the channels whose mean
size is largest among the head's, 16 of 128 in `kitty` and 32 in `kitty_pro`; s and min in fp16.  The low 2 bits of all
channels stand side by side, so that a page is read as one of 2 bits; the high 2 of chosen channels stand beside them.
Values: 2 bits, a scale and a minimum a token.  The first 32 tokens are exact; the newest 128 are, too: keys leave
together, values one by one.

The paper counts 2.5625 and 2.8125 bits for keys: its page of 128 tokens tells which channels are chosen in a byte for
every channel, of which this one lists the chosen: 2.508 and 2.766.
"""

from kvdsl.scheme import Recent, Scheme, Sinks, Store, TopChannels, Uniform, per_channel, per_token

kitty = Scheme(
    keys=Store(
        Uniform(2),
        scale=per_channel(tokens=128),
        outliers=TopChannels(0.125, per=128, by="absmean", store=Uniform(4)),
    ),
    values=Store(Uniform(2), scale=per_token()),
    sinks=Sinks(32),
    recent=Recent(128),
    source="arXiv 2511.18643, one channel in eight",
)
kitty_pro = kitty.with_(**{"keys.outliers.n": 0.25}, source="arXiv 2511.18643, one channel in four")
