"""What the ranks of a group tell each other in a step: whether all of them can take it, and their partial outputs."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import CacheError, ShapeError
from .merging import merged
from .shape import Shape

WORDS = 4  # int32: whether a rank refuses, and a digest of what it was given
FLOAT = 4  # bytes


def step_bytes(shape: Shape, batch: int, queries: int, ranks: int, *, checked: bool = True) -> int:
    """Bytes that one rank sends in a step of attention: to each of the others head_dim + 1 floats a query row, and,
    where steps are checked, a word whether it failed and WORDS words before.  The context's length is not in it."""
    rows = batch * (shape.q_heads or 0) * queries
    return (ranks - 1) * FLOAT * (rows * (shape.head_dim + 1) + checked * (1 + WORDS))


class Exchange:
    """The collectives of one cache over a group of ranks, each a single all_gather of equal sizes.

    sent   bytes that this rank sent to others so far, as the model of a step counts them: to each its part
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise CacheError(
                "group: torch.distributed is not initialized, so there are no ranks; call "
                "torch.distributed.init_process_group, with world_size=1 where there is one process"
            )
        self.group, self.device, self.sent = group, device, 0
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise CacheError("group: this process is none of its ranks; make the cache where the group has one")

    def agree(self, what: str, given: Any, error: BaseException | None) -> None:
        """Return where all ranks were given the same and none refuses it; else raise on every one of them: the own
        error, or one that names a rank that has another one."""
        digest = hashlib.blake2b(repr((what, given)).encode(), digest_size=4 * (WORDS - 1)).digest()
        words = [0 if error is None else 1]
        words += [int.from_bytes(digest[i : i + 4], "little", signed=True) for i in range(0, len(digest), 4)]
        mine = torch.tensor(words, dtype=torch.int32, device=self.device)
        every = self._gathered(mine).tolist()
        if error is not None:
            raise error
        for rank, theirs in enumerate(every):
            if theirs[0]:
                raise CacheError(f"{what}: rank {rank} refuses it, so no rank does it; its own error says why")
        for rank, theirs in enumerate(every):
            if theirs != every[0]:
                raise ShapeError(
                    f"{what}: rank {rank} was given something else than rank 0, rank {self.rank} has {given}; give "
                    f"every rank the same"
                )

    def merge(self, out: Tensor, lse: Tensor, *, failed: bool | None = None) -> tuple[Tensor, Tensor, list[int]]:
        """The partial outputs (B, Hq, Q, D) and log-sum-exps (B, Hq, Q) of all ranks as one, float32, the same to the
        bit on every rank; and which ranks failed, asked where `failed` is told."""
        flag = [] if failed is None else [out.new_full((1,), float(failed), dtype=torch.float32)]
        rows = torch.cat([out.float(), lse.float()[..., None]], -1)
        every = self._gathered(torch.cat([rows.flatten(), *flag]))
        told = [rank for rank, one in enumerate(every[:, -1].tolist()) if one] if flag else []
        parts = every[:, : rows.numel()].view(self.ranks, *rows.shape)
        return *merged(parts[..., :-1], parts[..., -1]), told

    def _gathered(self, mine: Tensor) -> Tensor:
        """The flat tensors of all ranks: (ranks, n)."""
        if self.ranks == 1:
            return mine[None]
        every = mine.new_empty(self.ranks * mine.numel())
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before
        gather(every, mine, group=self.group)
        self.sent += (self.ranks - 1) * mine.nbytes
        return every.view(self.ranks, -1)
