"""The quantized cache of transformers, with quanto: all is decoded and quantized anew whenever 128 tokens are full.

Per token and 64 channels of a head: s = (max - min)/15, c = round((x - min)/s), x^ = s*c + min.  The newest tokens wait
exact until they are 128.  There the whole prompt is coded at once, however many tokens it leaves over; here the rest of
it waits, too.
"""

from kvdsl.scheme import Recent, Scheme, Store, Uniform, per_token

hf_quanto4 = Scheme(
    both=Store(Uniform(4), scale=per_token(channels=64)),
    recent=Recent(128, "whole"),
    requantize="on_flush",
    source="HF, QuantizedCache with quanto",
)
