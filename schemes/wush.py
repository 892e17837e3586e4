"""WUSH-KV: a map of keys that is no rotation, under which they and the queries that meet them are alike (arXiv
2609.38121).

y = H T x, queries T^-T q: with K = sum k k^T = C C^T of calibration data and Q = sum q q^T of the queries that meet
them, C^T Q C = V S^2 V^T, T = S^(1/2) V^T C^-1, so that T K T^T = T^-T Q T^-1 = S; H is Hadamard's matrix over its
root.  Of values Q is the identity: the paper takes the weights of the output, which a cache does not have, and folds T
into them.  Codes are OSCAR's, which the authors run behind T: per token and head clipped at rank floor(0.96 d) of keys
and floor(0.92 d) of values, two bits between the ends, half up; the first 64 tokens and the newest 256 exact.

Known by its abstract and the released code for weights alone: clips, window and the values' moment are choices here.
T is damped by 1e-4 of each moment's mean diagonal and scaled so that y is as long as x in the mean.
"""

from kvdsl.scheme import Eigenbasis, Recent, Rotate, Scheme, Sinks, Store, Uniform, per_token

BALANCED = (Eigenbasis("balanced"), Rotate("hadamard"))

wush2 = Scheme(
    keys=Store(Uniform(2, rounding="half_up"), scale=per_token(quantile=0.96), transform=BALANCED),
    values=Store(Uniform(2, rounding="half_up"), scale=per_token(quantile=0.92), transform=BALANCED),
    sinks=Sinks(64),
    recent=Recent(256),
    source="arXiv 2609.38121, behind OSCAR's quantizer",
)
