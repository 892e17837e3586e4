"""KVarN: tiles whose rows and columns are brought to like deviations, then asymmetric levels (arXiv 2606.03458).

y = H x/sqrt(d), keys and values, in tiles of 128 tokens of a head.  Eight rounds divide a tile by the deviations of its
tokens and of its channels in turn; of keys the factors f of tokens are stored, of values those of channels, the others
go into the scale.  Keys: z = y/f_t, s = (max - min)/(2^b - 1) of each channel over the tile, c = round((z - min)/s),
y^ = f_t (s*c + min).  Values: z = y/f_i, s and min of each token over its channels, y^ = f_i (s*c + min).  s, min and f
in fp16.  The first 128 tokens are exact, and those of a tile that is not full.

Deviations are kept within 1e-3 and 1e3, factors within e^-0.3 and e^10: a tile of small numbers is hardly balanced at
all, so that the error depends on their size.  `kvarn_even` mends that: a tile's numbers over their root mean square,
and factors down to e^-10.
"""

from kvdsl.scheme import Balance, Recent, Rotate, Scheme, Sinks, Store, Uniform, per_channel, per_token

kvarn_k4v2 = Scheme(
    keys=Store(Uniform(4), scale=per_channel(tokens=128), transform=(Rotate("hadamard"), Balance(128))),
    values=Store(Uniform(2), scale=per_token(), transform=(Rotate("hadamard"), Balance(128))),
    sinks=Sinks(128),
    recent=Recent(128),
    source="arXiv 2606.03458, tiles of 128 tokens",
)
kvarn_k2v2 = kvarn_k4v2.with_(**{"keys.code.bits": 2})
kvarn_even = kvarn_k2v2.with_(unit="rms", low=-10.0, source="arXiv 2606.03458, whatever a tile's size")
