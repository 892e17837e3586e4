"""Octave: int8 tables of 4 and 3 bits behind random signs and a Hadamard matrix, and a scale of unit gain (vLLM).

y = H diag(signs) x/sqrt(64) of every 64 channels of a key, of all channels of a value.  c = the nearest of Lloyd and
Max's levels of y over its root mean square, held as int8: l/46 at 4 bits, l/59 at 3.  s = <y,y>/<y,l> in place of the
one that errs least, so that <y,y^> = <y,y>: what attends most keeps its score.  y^ = s l, s in fp16, one for what is
rotated together.  Levels are over 64 here, which keeps s as the kernels do, 64 times as large, away from subnormals.

Channels that carry rotary positions have 4 bits in keys, others 3; here all of a head's do.  `octave_compact` rotates
whole heads and codes both sides in 3 bits.  A slot of the engine is padded to 8 bytes, to 4 if compact; pages here have
no such slots.  The signs are drawn from the published seed by this project's generator.
"""

from kvdsl.scheme import Codebook, Rotate, Scheme, Store, per_token


def _store(sizes: tuple[int, ...], multiplier: int, size: int | None = None) -> Store:
    """Levels of both signs for numbers over their root mean square times `multiplier`; blocks of `size` channels."""
    block = {} if size is None else {"channels": size}
    turn = Rotate("random_hadamard", seed=0x5E17) if size is None else Rotate("random_hadamard", size, seed=0x5E17)
    levels = tuple(level / 64 for level in (*(-one for one in reversed(sizes)), *sizes))
    return Store(
        Codebook(levels=levels),
        scale=per_token(**block, range="norm", clip=64 / multiplier, refit="unit_gain"),
        transform=turn,
    )


FOUR, THREE = (6, 18, 30, 43, 58, 74, 95, 126), (14, 45, 79, 127)

octave_k3v4 = Scheme(keys=_store(FOUR, 46, 64), values=_store(FOUR, 46), source="vLLM, octave_k3v4")
octave_k3v3 = octave_k3v4.with_(values=_store(THREE, 59), source="vLLM, octave_k3v3")
octave_compact = Scheme(both=_store(THREE, 59), source="vLLM, octave_k3v3_compact")
