"""SAW-INT4: keys behind a block-diagonal Hadamard matrix, values as they are, in 4 bits (arXiv 2604.19157).

y = H k with H of blocks of Hadamard's matrix, orthonormal, s = (max - min)/15, c = round((y - min)/s), k^ = H^T (s*c +
min); values the same without H; s and min in fp16, one block a token and head.  No window, no sinks, no calibration.
The paper's blocks have 16 to 128 channels.  `saw_int4` has one block a head, up to 128 channels the largest of these;
`saw_int4_16` has blocks of 16, for heads that are no power of two.
"""

from kvdsl.scheme import Rotate, Scheme, Store, Uniform, per_token

saw_int4 = Scheme(
    keys=Store(Uniform(4), scale=per_token(), transform=Rotate("hadamard")),
    values=Store(Uniform(4), scale=per_token()),
    source="arXiv 2604.19157",
)
saw_int4_16 = saw_int4.with_(**{"keys.transform": Rotate("hadamard", size=16)})
