"""TieredCache: the keys and values of one layer in tiers, each a packed cache, behind exact tokens that wait.

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

from .decisions import Decision
from .errors import CacheError, ShapeError
from .front import Front
from .inputs import checked_index, checked_number, checked_pair, refuse_query
from .kernels import Params, Segment, Side, attend_segments
from .pages import upload
from .quantized_cache import CAPACITY
from .routing import column, due
from .saliency import Read, carried
from .segment_cache import SegmentCache
from .segments import segments
from .tier_contents import held
from .tier_kernels import TierKernels
from .tier_params import checked_of_tiers
from .tier_saving import HELD, copied, reduced
from .watch import Watch

PLACED = "build for a shape with placed=True, and give the cache its window"


def real(query: Tensor, counts: Sequence[int]) -> Tensor:
    """Queries (B, Hq, Q, D) with zeros before the last counts_b of each sequence."""
    if all(count == query.shape[2] for count in counts):
        return query
    place = torch.arange(query.shape[2], device=query.device)
    padding = place < query.shape[2] - column(counts, query.device)
    return query.masked_fill(padding[:, None, :, None], 0.0)


@dataclass(frozen=True)
class Step:
    """What one step's attention reads: the exact tokens, its own among them, then the tiers as they were before it."""

    reads: tuple[Read, ...]


class TieredCache:
    """One layer's keys and values for `batch` sequences.

    kernels   the compiled scheme; `params` the calibrated numbers of its tiers, `tiers[0].keys.scale` and so on
    device    default: CUDA for the triton backend where there is one, else the CPU
    window    sliding window in tokens: a query at position p sees t > p - window.  Tokens beyond it stay where they
              are and receive nothing any more: a router that takes tokens down moves them, memory is not given back.
              CacheError where kernels know no positions (Shape.placed)
    capacity  tokens a sequence and tier, as for QuantizedCache

    Sequences may have their own lengths, see QuantizedCache.  Any method that changes the cache either succeeds or
    raises and leaves it as it was.
    """

    def __init__(
        self, kernels: TierKernels, batch: int, *, device: torch.device | str | None = None,
        params: Params | None = None, window: int | None = None, capacity: int = CAPACITY,
    ) -> None:  # fmt: skip
        checked_number("batch", batch, 0)
        checked_number("capacity", capacity, 1)
        checked_number("window", 1 if window is None else window, 1)
        if window is not None and not kernels.shape.placed:
            raise CacheError(f"window: {window} tokens, and the kernels know no positions; {PLACED}")
        self.window = window
        scheme, shape = kernels.scheme, kernels.shape
        if device is None:
            device = "cuda" if kernels.backend == "triton" and torch.cuda.is_available() else "cpu"
        self.kernels, self.capacity, self.requantized = kernels, capacity, 0
        self.params: Params = dict(params or {})
        self.device = torch.empty(0, device=device).device
        self.watch = Watch.of(scheme, batch)
        self.prompts: tuple[int | None, ...] = (None,) * batch
        """How many tokens behind its sinks a sequence held at its first decision."""
        self.prompt_query: Tensor | None = None
        self._fresh: tuple[int, ...] = (0,) * batch
        with torch.inference_mode(False), torch.no_grad():
            ready = checked_of_tiers(scheme, shape, params, self.device)
            self.front = Front.empty(scheme, self.watch.sums, batch, shape, self.device)
            self._pool = torch.zeros(1, 64, dtype=torch.uint8, device=self.device)  # of no page
            self._zeros = torch.zeros(batch, dtype=torch.int32, device=self.device)
            self.tiers = tuple(
                SegmentCache(
                    one,
                    both,
                    given,
                    batch,
                    self.watch.sums,
                    self.device,
                    capacity,
                    scheme.router is not None,
                    self.front.sinks,
                )
                if both
                else None
                for one, both, given in zip(segments(scheme), kernels.tiers, ready, strict=True)
            )

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self.prompts)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, as appended: those that were dropped count too."""
        return self.front.lengths

    def counts(self, tier: int) -> tuple[int, ...]:
        """Tokens of each sequence, of every head, that were sent to a tier and are there, or were dropped."""
        kept = self.tiers[tier]
        if kept is not None:
            return kept.counts
        others = [one.counts for one in self.tiers if one is not None]
        return tuple(n - sum(one[b] for one in others) for b, n in enumerate(self.front.gone))

    def state(self, *, scaling: float | None = None, softcap: float | None = None) -> Step:
        """What attention over the cache as it stands reads; valid until the cache changes."""
        state, asked = self.front.state(self._pool, self._zeros), None
        if self.kernels.any_placed:
            asked = upload(self.lengths, self.device)
            state = replace(state, places=self.front.stands(asked) if self.kernels.shape.placed else None)
        exact = Read(self.kernels.exact, state, {}, causal=True)
        reads = (exact, *(one.read(asked) for one in self.tiers if one is not None))
        return self.tuned(Step(reads), state.scaling if scaling is None else scaling, softcap, self.window)

    def tuned(self, step: Step, scaling: float, softcap: float | None, window: int | None) -> Step:
        """The step with the factor on q.k, the cap of scores and the sliding window of one call.  ValueError for a
        window where kernels know no positions."""
        if window is not None and not self.kernels.shape.placed:
            raise ValueError(f"attention: a sliding window of {window}, and the kernels know no positions; {PLACED}")
        states = (replace(r.state, scaling=scaling, softcap=softcap, window=window) for r in step.reads)
        return Step(tuple(read._replace(state=state) for read, state in zip(step.reads, states, strict=True)))

    def attend(self, query: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Attention of query (B, Hq, Q, D) over a step: (out (B, Hq, Q, D), lse (B, Hq, Q) float32), see KernelSet."""
        refuse_query(query, self.batch, self.kernels.shape, self.device)
        if not query.numel():
            return torch.empty_like(query), query.new_zeros(query.shape[:3], dtype=torch.float32)
        query = query.contiguous()
        parts = list[Segment]()
        for read in step.reads:
            state = read.state if read.causal else replace(read.state, ahead=query.shape[2])
            parts.append(Segment(read.kernels, state, read.params, read.fold(query)))
        return attend_segments(query, parts)

    def dense(self, side: Side) -> Tensor:
        """All tokens of a side as numbers, (B, H, longest, D) in the model's dtype, right aligned.  CacheError where
        some were dropped: they have none."""
        if any(one is None and any(self.counts(number)) for number, one in enumerate(self.tiers)):
            raise CacheError("cache: some tokens were dropped, and numbers of all are asked for; use kvdsl's attention")
        return held(self, side)[0]

    @property
    def labels(self) -> Tensor:
        """The tier of every token, int64 (B, H, longest), right aligned: -1 of exact ones, -2 where there is none."""
        return held(self, "keys")[1]

    @property
    def nbytes(self) -> int:
        """Bytes held: exact rows, tiers, and what their routing needs."""
        kept = sum(one.nbytes for one in self.tiers if one is not None)
        return kept + self.front.nbytes + self._pool.nbytes + self._zeros.nbytes + self.watch.nbytes

    def bits(self) -> float:
        """Bits held for each number of the keys and values seen so far, everything included; 0 when there is none."""
        shape = self.kernels.shape
        numbers = 2 * shape.kv_heads * shape.head_dim * sum(self.lengths)
        return 8 * self.nbytes / numbers if numbers else 0.0

    def stats(self) -> dict[str, Any]:
        """bytes; bits a number; tokens of all sequences; how many of them are in each tier; routing_bytes of places,
        sums and queries; requantized_tokens: quantized more than once, keys and values counted apart."""
        places = sum(one.routing_bytes for one in self.tiers if one is not None)
        return {
            "bytes": self.nbytes,
            "bits": self.bits(),
            "tokens": sum(self.lengths),
            "tiers": [sum(self.counts(number)) for number in range(len(self.tiers))],
            "routing_bytes": places + self.front.sums.nbytes + self.watch.nbytes,
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
        counts = checked_pair(keys, values, counts, self.batch, self.kernels, self.device)
        with self._changing():
            self.front = self.front.append({"keys": keys, "values": values}, counts)
            self._fresh = counts
            return self.state(scaling=scaling, softcap=softcap)

    def route(
        self, query: Tensor | None = None, step: Step | None = None, lse: Tensor | None = None,
        choice: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Behind a step's attention: note what its queries (B, Hq, Q, D) attend to, and send to tiers what is due.

        step, lse   what the attention read, and its log-sum-exps (B, Hq, Q), where they are known
        choice      the tier of every token so far, int64 (B, H, longest), in place of the router's own: as many tokens
                    of every head; ShapeError where they are not
        Where a router asks for attention and no query is given, tokens wait.  ShapeError where a sequence's first step
        has no query, and its keys' errors are fed forward by them.
        """
        with self._changing():
            self._weigh(query)
            router, first = self.watch.router, [prompt is None for prompt in self.prompts]
            if router is not None and query is None and choice is None:
                return
            reads = (self.state() if step is None else step).reads
            if query is not None and router is not None:
                self.watch = self.watch.seen(query, self._fresh, first)
                if self.watch.sums:
                    kept = [one for one in self.tiers if one is not None]
                    sums, *others = carried(query, self._fresh, lse, reads, self.front, kept)
                    self.front = replace(self.front, sums=sums)
                    for one, own in zip(kept, others, strict=True):
                        one.beside = replace(one.beside, sums=own)
            if 0 in self.front.gone:
                self.prompt_query = None if query is None else real(query, self._fresh)
            sinks, scheme = self.front.sinks, self.kernels.scheme
            behind = [max(0, length - sinks) for length in self.lengths]
            dues = [
                due(scheme, gone, n - gone, n if prompt is None else prompt, prompt is None)
                for n, gone, prompt in zip(behind, self.front.gone, self.prompts, strict=True)
            ]
            if any(one.tokens for one in dues):
                Decision(self, dues, reads, choice).send()
                self.watch = self.watch.after([one.tokens > 0 for one in dues])
            self.prompts = tuple(n if p is None and n else p for p, n in zip(self.prompts, behind, strict=True))
            self.prompt_query = None
            self.front = self.front.without([one.tokens for one in dues])

    def _weigh(self, query: Tensor | None) -> None:
        """Let tiers see the queries of sequences whose first step this is."""
        fed = [one for one in self.tiers if one is not None and one.segment.feedback is not None]
        begun = [n == count > 0 for n, count in zip(self.lengths, self._fresh, strict=True)]
        if not fed or not any(begun):
            return
        if query is None:
            raise ShapeError(
                f"query: missing; {fed[0].segment.asks}: give route() those of a sequence's first step, (B, Hq, Q, D), "
                "and read the cache by kvdsl's attention, which does"
            )
        for one in fed:
            one.weigh(real(query, self._fresh), begun)

    def append_and_attend(
        self, query: Tensor, keys: Tensor, values: Tensor, *, counts: Sequence[int] | None = None,
        scaling: float | None = None, softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One step: append, attention of query (B, Hq, Q, D), routing.  A failure in any undoes all."""
        refuse_query(query, self.batch, self.kernels.shape, self.device)
        with self._changing():
            step = self.append(keys, values, counts=counts, scaling=scaling, softcap=softcap)
            out, lse = self.attend(query, step)
            self.route(query, step, lse)
        return out, lse

    # -- cutting and moving -------------------------------------------------------------------------------------------

    def crop(self, length: int | Sequence[int], *, requantize: bool = True) -> None:
        """Shorten every sequence to at most `length` tokens, or sequence b to length_b.  CacheError where tokens went
        to tiers since: what a router decided cannot be taken back; nothing has changed then."""
        wanted = (length,) * self.batch if isinstance(length, int) else tuple(length)
        if len(wanted) != self.batch:
            raise ShapeError(f"length: {len(wanted)} numbers for {self.batch} sequences")
        cut = [min(n, now) for n, now in zip(wanted, self.lengths, strict=True)]
        for n, gone in zip(cut, self.front.gone, strict=True):
            if gone and n < gone + self.front.sinks:
                raise CacheError(
                    f"crop: to {n} tokens, but {gone + self.front.sinks} were sent to tiers, which no router takes "
                    f"back; crop to those at least, use a longer window, or reset the cache"
                )
        with self._changing():
            self.watch = self.watch.cropped([now - n for n, now in zip(cut, self.lengths, strict=True)])
            self.front = self.front.cropped(cut)

    def record(self, draft: int) -> None:
        """Nothing is kept for cropping: CacheError for a draft, see `crop`."""
        checked_number("draft", draft, 0)
        if draft:
            raise CacheError("record: tokens in tiers cannot be taken back; use a scheme without tiers for drafts")

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        """Sequence i becomes what sequence index_i was (beam search).  Pages are shared, and copied when written to."""
        chosen = checked_index(index, self.batch)
        with self._changing():
            self.front = self.front.chosen(chosen)
            self.watch = self.watch.chosen(chosen)
            self.prompts = tuple(self.prompts[i] for i in chosen)
            self._fresh = tuple(self._fresh[i] for i in chosen)
            self._zeros = self._zeros.new_zeros(len(chosen))
            for one in self.tiers:
                if one is not None:
                    one.reorder(chosen)

    select = reorder
    """The chosen sequences, in that order, any number of them."""

    def repeat(self, times: int) -> None:
        """Every sequence `times` times, the copies beside each other."""
        checked_number("times", times, 0)
        self.reorder([b for b in range(self.batch) for _ in range(times)])

    # -- keeping ------------------------------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        return reduced(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> TieredCache:
        return copied(self, memo)

    # -- inside -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """One change: outside autograd, and undone when it raises."""
        mark = self.mark()
        try:
            with torch.inference_mode(False), torch.no_grad():
                yield
        except BaseException:
            self.back(mark)
            raise

    def mark(self) -> tuple[dict[str, Any], list[Any]]:
        """What `back` brings the cache back to."""
        before = {name: getattr(self, name) for name in HELD}
        return before, [one.mark() for one in self.tiers if one is not None]

    def back(self, mark: tuple[dict[str, Any], list[Any]]) -> None:
        """The cache as it was at a mark; tokens that were written over in their places are not."""
        self.__dict__.update(mark[0])
        for one, was in zip((one for one in self.tiers if one is not None), mark[1], strict=True):
            one.back(was)
