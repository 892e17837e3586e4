"""GEAR: what a quantizer leaves of a block of tokens is stored as a few vectors (arXiv 2403.05527, section 3).

x ~ x^ + a b with x^ the quantizer's and a b of rank 2: of the error of every 64 tokens of a head, by three steps of
subspace iteration, in fp16.  The paper has rank 4 for a prompt as a whole and rank 2 for blocks of generated tokens;
here all blocks are of 64 tokens, as its generated ones are.

gear2 and gear4 keep single numbers first: of every channel of 128 tokens of keys, and of every token of values over all
heads, the largest and smallest hundredth each, the mean of the line coded in their places.  The paper compares keys
over a whole prompt.  Three slots a token of keys and two a channel of 64 tokens of values hold seven in eight.

gearl2 is on KIVI's quantizer in groups of 64, gearl4 on the one that takes a whole channel of keys (of a block) and a
whole token of values over all heads.  Both are without single numbers, GEAR-L.
"""

from kvdsl.scheme import ALL, Block, LowRank, Recent, Scheme, Sparse, Store, Uniform, per_channel, per_token

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

SINGLE = {"keys.outliers": Sparse(0.02, Block(128, 1), slots=3), "values.outliers": Sparse(0.02, Block(heads=ALL))}
gear2 = gearl2.with_(**SINGLE, recent=Recent(128, "whole"), source="arXiv 2403.05527, on KIVI")
gear4 = gearl4.with_(**SINGLE, recent=Recent(128, "whole"), source="arXiv 2403.05527, on KCVT")
