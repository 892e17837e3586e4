"""TieredCache: the keys and values of one layer in tiers, each a packed cache of its own, behind exact tokens that wait.

A step appends, attends, and then routes: tokens that leave the window are sent to tiers by what is known behind their
step's attention, and no query of the step sees a difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import CacheError, ShapeError
from .front import Front
from .inputs import checked_counts, checked_index, checked_number, refuse_tensor
from .kernels import AttentionState, Params, Segment, Side, attend_segments
from .pages import upload
from .quantized_cache import CAPACITY
from .router_run import Decision, Run
from .routing import column, due
from .saliency import Read, Rows
from .scheme import SIDES
from .segment_cache import SegmentCache, Tokens
from .segments import segments
from .tier_kernels import TierKernels
from .watch import Watch


@dataclass(frozen=True)
class Step:
    """What one step's attention reads: the exact tokens, its own among them, then the tiers as they were before it."""

    reads: tuple[Read, ...]
    scaling: float
    softcap: float | None = None


class TieredCache:
    """One layer's keys and values for `batch` sequences.

    kernels   the compiled scheme; `params` the calibrated numbers of its tiers
    device    default: CUDA for the triton backend where there is one, else the CPU
    capacity  tokens a sequence and tier, as for QuantizedCache

    Sequences may have their own lengths, see QuantizedCache.  Any method that changes the cache either succeeds or
    raises and leaves it as it was.  `prompts`: how many tokens behind its sinks a sequence held at its first decision.
    """

    window = None

    def __init__(
        self, kernels: TierKernels, batch: int, *, device: torch.device | str | None = None,
        params: Params | None = None, capacity: int = CAPACITY,
    ) -> None:  # fmt: skip
        checked_number("batch", batch, 0)
        checked_number("capacity", capacity, 1)
        scheme, shape = kernels.scheme, kernels.shape
        if device is None:
            device = "cuda" if kernels.backend == "triton" and torch.cuda.is_available() else "cpu"
        self.kernels, self.capacity = kernels, capacity
        self.device = torch.empty(0, device=device).device
        self.requantized = 0
        ready = kernels.ready(params, self.device)
        sums = Watch.sums_of(scheme)
        with torch.inference_mode(False), torch.no_grad():
            self._front = Front.empty(scheme, sums, batch, shape, self.device)
            self._pool = torch.zeros(1, kernels.exact.page_bytes, dtype=torch.uint8, device=self.device)
            self.tiers = tuple(
                SegmentCache(one, *both, given, batch, sums, self.device, capacity) if both else None
                for one, both, given in zip(segments(scheme), kernels.tiers, ready, strict=True)
            )
        self.prompts: tuple[int | None, ...] = (None,) * batch
        self.watch = Watch(scheme, (0,) * batch)

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self.prompts)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, as appended: those that were dropped count too."""
        return self._front.lengths

    @property
    def routed(self) -> tuple[int, ...]:
        """Tokens of each sequence that were sent to a tier."""
        return self._front.gone

    def counts(self, tier: int) -> tuple[int, ...]:
        """Tokens of each sequence, and of every head, that stand in a tier: those that were dropped, too."""
        kept = self.tiers[tier]
        if kept is not None:
            return kept.counts
        others = [one.counts for one in self.tiers if one is not None]
        return tuple(n - sum(c) for n, c in zip(self.routed, zip(*others, strict=True), strict=True)) if others else self.routed

    def state(self, *, scaling: float | None = None, softcap: float | None = None) -> Step:
        """What attention over the cache as it stands reads; valid until the cache changes."""
        zeros = torch.zeros(self.batch, dtype=torch.int32, device=self.device)
        exact = Read(self.kernels.exact, self._front.state(self._pool, zeros), {}, causal=True)
        kept = [one.read() for one in self.tiers if one is not None]
        scale = exact.state.scaling if scaling is None else scaling
        reads = [r._replace(state=replace(r.state, scaling=scale, softcap=softcap)) for r in (exact, *kept)]
        return Step(tuple(reads), scale, softcap)

    def attend(self, query: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Attention of query (B, Hq, Q, D) over a step: (out (B, Hq, Q, D), lse (B, Hq, Q) float32), see KernelSet."""
        self._check_query(query)
        if not query.numel():
            return torch.empty_like(query), query.new_zeros(query.shape[:3], dtype=torch.float32)
        parts = list[Segment]()
        for read, tier in zip(step.reads, (None, *(t for t in self.tiers if t is not None)), strict=True):
            state = read.state if tier is None else replace(read.state, ahead=query.shape[2])
            parts.append(Segment(read.kernels, state, read.params, *(() if tier is None else tier.folded(query, state))))
        return attend_segments(query, parts)

    def dense(self, side: Side) -> Tensor:
        """All tokens of a side as numbers, (B, H, longest, D) in the model's dtype, right aligned.  CacheError where
        some were dropped: they have none."""
        if any(one is None and any(self.counts(i)) for i, one in enumerate(self.tiers)):
            raise CacheError("cache: some tokens were dropped, and code other than kvdsl's attention wants numbers of all")
        return self.held(side)[0]

    def held(self, side: Side) -> tuple[Tensor, Tensor]:
        """(all tokens of a side, zeros where one was dropped, (B, H, longest, D) in the model's dtype; the tier of
        each, int64 (B, H, longest): -1 where it is exact, -2 where there is none), right aligned."""
        front = self._front
        most, shape = max(self.lengths, default=0), self.kernels.shape
        rows = front.rows(side)
        out = rows.new_zeros(self.batch, shape.kv_heads, most, shape.head_dim)
        tier_of = torch.full(out.shape[:3], -2, dtype=torch.int64, device=self.device)
        lead = most - column(self.lengths, self.device)  # (B, 1)
        waiting = max(front.waiting, default=0)
        sinks = min(front.sinks, most)
        place = torch.arange(sinks, device=self.device) + lead
        _put(out, tier_of, rows[:, :, :sinks], place.expand(self.batch, -1), place < most, -1)
        gone = column(front.gone, self.device)
        place = torch.arange(waiting, device=self.device) + lead + front.sinks + gone
        index = front.places(waiting)
        picked = rows.gather(2, index[:, None, :, None].expand(*rows.shape[:2], -1, rows.shape[3]))
        _put(out, tier_of, picked, place, place < most, -1)
        for number, one in enumerate(self.tiers):
            if one is not None and any(one.counts):
                numbers, (positions, _) = one.dense(side).to(out.dtype), one.aligned()
                width = numbers.shape[2]
                valid = torch.arange(width, device=self.device) >= width - column(one.counts, self.device)
                at = positions.long() + (lead + front.sinks)[..., None]
                _put(out, tier_of, numbers, at, valid[:, None].expand_as(at), number)
            elif one is None:
                place = torch.arange(most, device=self.device)
                inside = (place >= lead + front.sinks) & (place < lead + front.sinks + gone)
                tier_of[inside[:, None].expand_as(tier_of) & (tier_of == -2)] = number
        return out, tier_of

    @property
    def labels(self) -> Tensor:
        """The tier of every token, int64 (B, H, longest), right aligned: -1 where it is exact, -2 where there is none."""
        return self.held("keys")[1]

    @property
    def nbytes(self) -> int:
        """Bytes held: exact rows, tiers, and what their routing needs."""
        kept = sum(one.nbytes for one in self.tiers if one is not None)
        return kept + self._front.nbytes + self._pool.nbytes + self.watch.nbytes

    def bits(self) -> float:
        """Bits held for each number of the keys and values seen so far, everything included; 0 when there is none."""
        shape = self.kernels.shape
        numbers = 2 * shape.kv_heads * shape.head_dim * sum(self.lengths)
        return 8 * self.nbytes / numbers if numbers else 0.0

    def stats(self) -> dict[str, Any]:
        """bytes; bits a number; tokens; in each tier, tokens of all sequences; requantized_tokens: quantized a second
        time, keys and values counted apart."""
        return {
            "bytes": self.nbytes,
            "bits": self.bits(),
            "tokens": sum(self.lengths),
            "tiers": [sum(self.counts(number)) for number in range(len(self.tiers))],
            "requantized_tokens": self.requantized,
        }

    # -- growing ------------------------------------------------------------------------------------------------------

    def append(
        self, keys: Tensor, values: Tensor, *, counts: Sequence[int] | None = None, scaling: float | None = None,
        softcap: float | None = None,
    ) -> Step:  # fmt: skip
        """Add keys and values (B, H, m, D) to the exact tokens; sequence b takes the last counts_b of the m tokens.

        Returns what the attention of this step reads; `route` is for behind it.  ShapeError names a wrong tensor.
        """
        counts = self._checked(keys, values, counts)
        with self._changing():
            self._front = self._front.append({"keys": keys, "values": values}, counts)
            return self.state(scaling=scaling, softcap=softcap)

    def route(self, query: Tensor | None = None, step: Step | None = None, lse: Tensor | None = None) -> None:
        """Behind a step's attention: note what its queries (B, Hq, Q, D) attend to, and send to tiers what is due.

        step, lse   what the attention read, and its log-sum-exps (B, Hq, Q) where they are known
        Of a router that asks for attention, tokens wait until queries come.
        """
        with self._changing():
            step = self.state() if step is None else step
            self.watch = self.watch.noted(self, query, step, lse)
            if not self.watch.ready:
                return
            dues = []
            for b, (length, gone, prompt) in enumerate(zip(self.lengths, self.routed, self.prompts, strict=True)):
                behind = max(0, length - self._front.sinks)
                dues.append(due(self.kernels.scheme, gone, behind - gone, behind if prompt is None else prompt, prompt is None))
            if any(one.tokens for one in dues):
                Run(self, dues, step).send()
            self.prompts = tuple(
                max(0, n - self._front.sinks) if p is None and n else p for p, n in zip(self.prompts, self.lengths, strict=True)
            )
            self._front = self._front.without([one.tokens for one in dues])

    def append_and_attend(
        self, query: Tensor, keys: Tensor, values: Tensor, *, counts: Sequence[int] | None = None,
        scaling: float | None = None, softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One step: append, attention of query (B, Hq, Q, D), routing.  A failure in any undoes all."""
        self._check_query(query)
        before = self._snapshot()
        try:
            step = self.append(keys, values, counts=counts, scaling=scaling, softcap=softcap)
            out, lse = self.attend(query, step)
            self.route(query, step, lse)
        except BaseException:
            self._restore(before)
            raise
        return out, lse
