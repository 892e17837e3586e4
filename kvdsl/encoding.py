"""How codes are chosen, where a number's own is not simply the nearest one: nothing that reads them knows of it."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from .part import Part


@dataclass(frozen=True, repr=False)
class Feedback(Part):
    """Keys are coded block by block of `channels` channels, each block's error making the later channels' numbers
    others, so that what is read has the least |e|^2 + weight |Q e|^2, e = k^ - k, that later channels can still give it
    (SQuat, arXiv 2503.24358).

    Q is s_i v_i^T of the `rank` largest singular values s_i, and their right singular vectors v_i, of the queries of a
    sequence's first step that meet the kv head, float32 (rank, D); it stays for all tokens that are packed later.  Of
    the error e_b of a block, later channels L move by -weight Q_L^T (1 + weight Q_L Q_L^T)^-1 Q_b e_b, which is that of
    -A_LL^-1 A_Lb e_b with A = 1 + weight Q^T Q.  A head of no more channels than a block is coded as it is.
    """

    rank: int = 5
    _: KW_ONLY
    weight: float = 1e-3
    channels: int = 64
