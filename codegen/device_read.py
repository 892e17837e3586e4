"""A kernel that only reads, as wide as decode kernels do: what its rate is, no kernel can pass."""

import triton
import triton.language as tl


@triton.jit
def read_words(words_ptr, out_ptr, rounds, WORDS: tl.constexpr):
    """Each program joins `rounds` blocks of WORDS words in a row to one, which is all that it writes."""
    lane = tl.arange(0, WORDS)
    words = words_ptr + tl.program_id(0).to(tl.int64) * rounds * WORDS + lane
    found = tl.zeros([WORDS], tl.int32)
    for i in range(rounds):
        found ^= tl.load(words + i * WORDS)
    tl.store(out_ptr + tl.program_id(0), tl.xor_sum(found, 0))
