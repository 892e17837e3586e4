"""QuantizedCache: the keys and values of one layer, packed by a scheme's kernels and read where they lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from .errors import CacheError, ShapeError
from .inputs import checked_counts, checked_index, checked_number, checked_pair, refuse_query
from .kernels import AttentionState, KernelSet, Params, Places, Side, fixed_splits
from .members import Member, Policy
from .pages import ZERO, PagePool
from .params import checked
from .rows import dense_index, gather, ring_index
from .scheme import SIDES
from .state import Now
from .steps import Machine

CAPACITY = 131072


class QuantizedCache:
    """One layer's keys and values for `batch` sequences.

    kernels   the compiled scheme; `params` its calibrated parameters, moved to `device` once, ShapeError where one is
              missing or does not fit
    device    default: CUDA for the triton backend where there is one, else the CPU
    window    sliding window in tokens: a query at position p sees t > p - window; pages that no later query sees are
              freed
    capacity  tokens a sequence, for which address space is reserved: memory is taken page by page as it is used,
              nothing is ever moved or copied when the cache grows, and a full cache raises CacheError (see reserve.py)
    batch_invariant   attention gives a sequence to the bit what it gives it alone in a cache of this capacity, whatever
              stands beside it: how many programs share a sequence follows from `capacity` alone.  Slower, unless the
              number that the batch and the GPU would have is much the same

    A sequence may have its own length: `counts` of an append says how many of a chunk's *last* tokens it takes, which
    is what left-padded batches need (padding is then never stored).  Lengths live as integers on the host and as
    tensors on the device, so no call waits for the device, unless an index is given as a device tensor.

    Any method that changes the cache either succeeds or raises and leaves it as it was.  One thread at a time may
    change a cache and its forks; a second one gets CacheError.
    """

    def __init__(
        self,
        kernels: KernelSet,
        batch: int,
        *,
        device: torch.device | str | None = None,
        params: Params | None = None,
        window: int | None = None,
        capacity: int = CAPACITY,
        batch_invariant: bool = False,
    ) -> None:
        checked_number("batch", batch, 0)
        checked_number("capacity", capacity, 1)
        checked_number("window", 1 if window is None else window, 1)
        if device is None:
            device = "cuda" if kernels.backend == "triton" and torch.cuda.is_available() else "cpu"
        self.kernels = kernels
        self.capacity = capacity
        self.splits = fixed_splits(capacity, kernels.page_tokens) if batch_invariant else None
        self.requantized = 0
        with torch.inference_mode(False), torch.no_grad():
            self.device = torch.empty(0, device=device).device
            self.params = checked(kernels.scheme, kernels.shape, params, self.device)
            limit = max(1, batch) * -(-capacity // kernels.page_tokens)
            self.pool = PagePool(limit, kernels.page_bytes, self.device)
            self._now = Now.empty(Policy.of(kernels, window), batch, kernels, self.device)
        self._machine = Machine(kernels, self.params, self.pool)
        self.pool.owners.add(self)

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self._now.members)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, as appended: tokens that a sliding window let go of count too."""
        return self._now.lengths

    @property
    def window(self) -> int | None:
        """The sliding window in tokens, or None."""
        return self._now.policy.sliding

    def packed(self, side: Side) -> tuple[int, ...]:
        """How many tokens after the sinks are packed in each sequence."""
        return tuple(m.packed_of(side) for m in self._now.members)

    def held(self) -> Iterator[int]:
        """The page ids of all sequences, each as often as it is held."""
        return (page for ids in self._now.table.ids for page in ids if page != ZERO)

    def rows(self, side: Side) -> Tensor:
        """The row buffer of exact tokens of a side, (B, H, sinks + ring, D)."""
        return self._now.rows(side)

    def pages(self) -> tuple[Tensor, Tensor]:
        """(the page of each place, int32 (B, width), ZERO where there is none; the pool, uint8 (pages, bytes))."""
        return self._now.table.tensor, self.pool.bytes

    def own(self) -> None:
        """Make every page the cache's own, copied where others hold it too: for a caller that writes over tokens."""
        with self._changing() as now:
            places = [range(len(ids)) for ids in now.table.ids]
            table, dropped = now.table.claim(self.pool, places, [0] * self.batch)
            self._commit(replace(now, table=table), dropped)

    def state(self, *, scaling: float | None = None, softcap: float | None = None) -> AttentionState:
        """What attention over the cache as it stands reads; valid until the cache changes."""
        now = self._now
        return self._scaled(now.seen(now, self.pool), scaling, softcap)

    def tuned(self, state: AttentionState, scaling: float, softcap: float | None, window: int | None) -> AttentionState:
        """The state with the factor on q.k, the cap of scores and the sliding window of one call."""
        if (state.scaling, state.softcap, state.window) == (scaling, softcap, window):
            return state
        return replace(state, scaling=scaling, softcap=softcap, window=window)

    def route(self, query: Tensor | None, state: AttentionState, lse: Tensor | None = None) -> None:
        """Nothing: which tokens are packed when does not depend on attention; see TieredCache."""

    def attend(self, query: Tensor, state: AttentionState) -> tuple[Tensor, Tensor]:
        """Attention of query (B, Hq, Q, D) over a state: (out (B, Hq, Q, D), lse (B, Hq, Q) float32), see KernelSet."""
        refuse_query(query, self.batch, self.kernels.shape, self.device)
        if not query.numel():
            none = query.new_empty(*query.shape[:3], self.kernels.dim("values"))
            return none, query.new_zeros(query.shape[:3], dtype=torch.float32)
        return self.kernels.attend(query, state, self.params, self.splits)

    def dense(self, side: Side, places: Places | None = None) -> Tensor:
        """All tokens of a side as numbers, (B, H, longest, D) in the model's dtype: packed ones decoded, the others
        exact. Right aligned: a shorter sequence, and tokens a sliding window let go of, are zeros.  `places` only where
        kernels are of tokens in any order (Shape.placed): where all of these stand."""
        now, policy, packed = self._now, self._now.policy, self.packed(side)
        most, rows = max(packed, default=0), now.rows(side)
        gone = [min(m.gone, p) for m, p in zip(now.members, packed, strict=True)]
        index, held = dense_index(policy.sinks, policy.ring, most, self.lengths, packed, gone)
        with torch.no_grad():
            if most:
                decoded = self.kernels.unpack(side, self.pool.bytes, now.table.tensor, 0, most, self.params, places)
                rows = torch.cat([decoded.to(rows.dtype), rows], 2)
            return gather(rows, index).masked_fill_(~held.to(self.device)[:, None, :, None], 0)

    @property
    def nbytes(self) -> int:
        """Bytes held: pages in use (with the zero page; shared ones once), exact rows, table and lengths."""
        return (1 + len(set(self.held()))) * self.pool.page_bytes + self._now.nbytes

    def bits(self) -> float:
        """Bits held for each number of the keys and values seen so far, everything included; 0 when there is none."""
        shape = self.kernels.shape
        numbers = 2 * shape.kv_heads * shape.head_dim * sum(self.lengths)
        return 8 * self.nbytes / numbers if numbers else 0.0

    def stats(self) -> dict[str, float]:
        """bytes; bits a number; tokens; pages in use; committed (bytes backing the pool); page_copies (on write);
        requantized_tokens (decoded by crop, so quantized again later; keys and values counted apart)."""
        return {
            "bytes": self.nbytes,
            "bits": self.bits(),
            "tokens": sum(self.lengths),
            "pages": len(set(self.held())),
            "committed": self.pool.committed,
            "page_copies": self.pool.copies,
            "requantized_tokens": self.requantized,
        }

    # -- growing ------------------------------------------------------------------------------------------------------

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        *,
        counts: Sequence[int] | None = None,
        scaling: float | None = None,
        softcap: float | None = None,
        places: Places | None = None,
        due: Sequence[tuple[int, int]] | None = None,
    ) -> AttentionState:
        """Add keys and values (B, H, m, D); sequence b takes the last counts_b of the m tokens (default: all).

        Returns what the attention of this step reads.  prefill="exact": fresh tokens exactly, older ones as they were
        stored before; "stored": all as they are stored now.  The state is numbers and references: it stays true until
        the cache changes next, and a first chunk that is large is read from the given tensors themselves.  `places` as
        for `dense`, these tokens among them.  `due`: of a cache that holds a part of a longer sequence, how many keys
        and values of each sequence are packed behind the step, whole blocks, see context.py.

        ShapeError names a wrong tensor, CacheError a full pool; either way nothing has changed.
        """
        counts = checked_pair(keys, values, counts, self.batch, self.kernels, self.device)
        with self._changing() as now:
            step = self._machine.append(now, {"keys": keys, "values": values}, counts, places, due)
            state = self._scaled(step.state, scaling, softcap)
            self._commit(step.after, step.dropped)
        return state

    def append_and_attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        counts: Sequence[int] | None = None,
        scaling: float | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step: append, then attention of query (B, Hq, Q, D) over it.  A failure in either undoes both."""
        refuse_query(query, self.batch, self.kernels.shape, self.device)
        counts = checked_pair(keys, values, counts, self.batch, self.kernels, self.device)
        with self._changing() as now:
            step = self._machine.append(now, {"keys": keys, "values": values}, counts)
            result = self.attend(query, self._scaled(step.state, scaling, softcap))
            self._commit(step.after, step.dropped)
        return result

    def reserve(self, capacity: int) -> Now:
        """The state with pages of its own for all tokens of a sequence up to `capacity`: for `StaticCache`, which
        writes them.  CacheError, with nothing changed, where the pool has not that many."""
        size = self.kernels.page_tokens
        with self._changing() as now:
            places = -(-now.policy.after_sinks(capacity) // size)
            touched = [range(m.first // size, places) for m in now.members]
            table, dropped = now.table.claim(self.pool, touched, [0] * self.batch)
            self._commit(replace(now, table=table), dropped)
        return self._now

    def grown(self, counts: Sequence[int], key_rows: Tensor, value_rows: Tensor) -> None:
        """The cache with counts_b tokens more that something else has written: into pages it owns, and row buffers that
        take the place of the cache's."""
        with self._changing() as now:
            members = tuple(now.policy.advance(m, n, large=False) for m, n in zip(now.members, counts, strict=True))
            self._commit(now.moved(members, key_rows=key_rows, value_rows=value_rows))

    # -- cutting and moving --------------------------------------------------------------------------------------------

    def crop(self, length: int | Sequence[int], *, requantize: bool = True) -> None:
        """Shorten every sequence to at most `length` tokens, or sequence b to length_b.

        Within the draft (`record`) the cache is as if the rest had never come.  Further back, tokens whose exact rows
        are gone stay packed; where the cut divides a block of tokens that share a scale, the block's kept tokens are
        decoded into exact rows, to be quantized a second time later: counted in stats(), or CacheError with
        requantize=False. CacheError too when a sliding window has let go of what a later query would see.  Either way
        nothing has changed.
        """
        lengths = (length,) * self.batch if isinstance(length, int) else tuple(length)
        if len(lengths) != self.batch:
            raise ShapeError(f"length: {len(lengths)} numbers for {self.batch} sequences")
        for value in (length,) if isinstance(length, int) else lengths:
            checked_number("length", value, 0)
        with self._changing() as now:
            after, dropped, second = self._machine.crop(now, lengths, requantize=requantize)
            self._commit(after, dropped)
            self.requantized += second

    def record(self, draft: int) -> None:
        """From now on keep so many exact rows that cropping loses nothing down to `draft` tokens before the newest one
        that was ever there; 0 stops.

        For speculative decoding: what is attended and packed stays the same, the ring of exact rows gets longer.
        """
        checked_number("draft", draft, 0)
        with self._changing() as now:
            policy = replace(now.policy, draft=draft)
            index = ring_index(policy.sinks, policy.ring, self.lengths, [0] * self.batch, now.policy.ring)
            members = tuple(policy.resize(m) for m in now.members)
            rows = {side: gather(now.rows(side), index) for side in SIDES}
            self._commit(now.moved(members, policy=policy, key_rows=rows["keys"], value_rows=rows["values"]))

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        """Sequence i becomes what sequence index_i was (beam search).  Pages are shared, and copied when written to."""
        chosen = checked_index(index, self.batch)
        with self._changing() as now:
            after = now.chosen(chosen)
            times = Counter(chosen)
            dropped: list[int] = []
            for b, ids in enumerate(now.table.ids):
                if times[b]:
                    self.pool.share(ids, times[b] - 1)
                else:
                    dropped += ids
            self._commit(after, dropped)

    select = reorder
    """The chosen sequences, in that order, any number of them."""

    def repeat(self, times: int) -> None:
        """Every sequence `times` times, the copies beside each other."""
        checked_number("times", times, 0)
        self.reorder([b for b in range(self.batch) for _ in range(times)])

    def fork(self, index: Sequence[int] | Tensor | None = None) -> Self:
        """A second cache that begins with chosen sequences (default: all) and shares their pages, and the pool."""
        chosen = checked_index(range(self.batch) if index is None else index, self.batch)
        with self._changing() as now:
            twin = self.beside(now.chosen(chosen))
            self.pool.owners.add(twin)
            self.pool.recount()
        return twin

    def beside(self, now: Now) -> Self:
        """A cache of other sequences in the same pool; who makes it sees to it that their pages are counted."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, requantized=0, _now=now)
        return twin

    def hide(self, starts: Sequence[int]) -> None:
        """Attention sees no token before starts_b of sequence b: for batches whose left padding was stored."""
        starts = checked_counts("starts", starts, self.lengths)
        with self._changing() as now:
            self._commit(now.moved(tuple(m._replace(start=s) for m, s in zip(now.members, starts, strict=True))))

    def reset(self) -> None:
        """Forget all tokens; the pages go back to the pool."""
        with self._changing() as now:
            table, dropped = now.table.truncate([0] * self.batch)
            self._commit(now.moved((Member(),) * self.batch, table=table), dropped)

    def mark(self) -> Now:
        """What `back` brings the cache back to."""
        return self._now

    def back(self, mark: Now) -> None:
        """The cache as it was at a mark, if nothing but failed changes came between."""
        self._now = mark
        self.pool.recount()

    # -- keeping -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, *, deflate: int | None = None) -> None:
        """Write a safetensors file, see saving.py; an existing file is replaced only by a complete one.  `deflate`: a
        level, 1 to 9, of the streams that its pages are written as; None: as they are."""
        from .saving import save

        save(self, Path(path), deflate)

    @classmethod
    def load(cls, path: str | Path, kernels: KernelSet, **options: Any) -> Self:
        """Read what `save` wrote for the same scheme and shape; options as for the constructor: the file holds no
        calibrated parameters, so `params` are given again.  CacheError for another scheme, shape or set of them."""
        from .saving import load

        return load(cls, Path(path), kernels, options)

    def __reduce__(self) -> tuple[Any, ...]:
        from .saving import reduced

        return reduced(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        from .saving import copied

        return copied(self)

    # -- inside -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _changing(self) -> Iterator[Now]:
        """One change: the only one at a time, outside autograd, and undone when it raises."""
        if not self.pool.lock.acquire(blocking=False):
            raise CacheError("cache: another thread is changing it or a fork of it; let one thread at a time append")
        now = self._now
        try:
            with torch.inference_mode(False), torch.no_grad():
                yield now
        except BaseException:
            self._now = now
            self.pool.recount()
            raise
        finally:
            self.pool.lock.release()

    def _commit(self, after: Now, dropped: Sequence[int] = ()) -> None:
        self._now = after
        self.pool.release(dropped)

    def _scaled(self, state: AttentionState, scaling: float | None, softcap: float | None) -> AttentionState:
        scaling = state.scaling if scaling is None else scaling
        return self.tuned(state, scaling, softcap, state.window)
