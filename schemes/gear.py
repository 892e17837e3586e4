"""GEAR: what a quantizer leaves of a block of tokens is stored as a few vectors (arXiv 2403.05527, section 3).

x ~ x^ + a b with x^ the quantizer's and a b of rank 2: of the error of every 64 tokens of a head, by three steps of
subspace iteration, in fp16.  The paper has rank 4 for a prompt as a whole and rank 2 for blocks of generated tokens;
here all blocks are of 64 tokens, as its generated ones are.

gearl2 is on KIVI's quantizer in groups of 64, gearl4 on the one that takes a whole channel of keys (of a block) and a
whole token of values over all heads.  Both are GEAR without its sparse part, GEAR-L.
"""

from kvdsl.scheme import ALL, LowRank, Recent, Scheme, Store, Uniform, per_channel, per_token

gearl2 = Scheme(
    keys=Store(Uniform(2), scale=per_channel(tokens=64), residual=LowRank(2)),
    values=Store(Uniform(2), scale=per_token(channels=64), residual=LowRank(2)),
    recent=Recent(64, "whole"),
    source="arXiv 2403.05527, GEAR-L on KIVI",
)
gearl4 = Scheme(
    keys=Store(Uniform(4), scale=per_channel(tokens=64), residual=LowRank(2)),
    values=Store(Uniform(4), scale=per_token(heads=ALL), residual=LowRank(2)),
    recent=Recent(64, "whole"),
    source="arXiv 2403.05527, GEAR-L on KCVT",
)
