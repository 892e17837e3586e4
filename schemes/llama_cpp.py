"""The cache types of llama.cpp: 32 channels of a token share an fp16 scale (ggml-quants.c, quantize_row_*_ref).

q8_0: s = max|x|/127, c = round(x/s), ties away from 0.  q4_0, q5_0: s = m/-(L/2) with m the number of largest size,
c = floor(x/s + L/2 + 1/2) within 0..L-1, x^ = s*(c - L/2).  q4_1, q5_1: s = (max - min)/(L - 1),
c = floor((x - min)/s + 1/2), x^ = s*c + min.  iq4_nl: s = m/-127, c = the nearest of 16 uneven levels l to x/s; then
s = sum x^3 l/sum x^2 l^2, the least squares that weigh x by its own square; c stays.
Codes are taken under the scale as stored, where llama.cpp takes them before it rounds the scale.
"""

from kvdsl.scheme import Code, Codebook, Scale, Scheme, Store, Uniform, per_token

IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
LARGEST = per_token(channels=32, range="signed_absmax")


def _blocks(name: str, code: Code, scale: Scale) -> Scheme:
    return Scheme(both=Store(code, scale=scale), prefill="stored", source=f"llama.cpp, {name}")


q8_0 = _blocks("q8_0", Uniform(8, rounding="away"), per_token(channels=32, range="absmax"))
q5_1 = _blocks("q5_1", Uniform(5, rounding="half_up"), per_token(channels=32))
q5_0 = _blocks("q5_0", Uniform(5, rounding="half_up"), LARGEST)
q4_1 = _blocks("q4_1", Uniform(4, rounding="half_up"), per_token(channels=32))
q4_0 = _blocks("q4_0", Uniform(4, rounding="half_up"), LARGEST)
iq4_nl = _blocks("iq4_nl", Codebook(4, IQ4_NL), LARGEST.with_(refit="weighted_least_squares"))
