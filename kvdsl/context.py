"""ContextCache: one long context over the ranks of a group, each of which packs and attends to its own pages.

Attention does not care about the order of tokens, and partial outputs are merged by their log-sum-exps.  So a rank's
tokens are a cache of their own under the scheme's own kernels, and what ranks exchange in a step does not depend on how
many tokens there are.  All counts, windows and sinks stay those of the whole sequence, which every rank knows:

* a stretch of tokens begins at a page, so that blocks which share a scale are those of one cache, to the bit;
* sinks are the first tokens of the sequence, which rank 0 holds; the places of sinks on other ranks hold nothing and
  are hidden;
* the exact window is the newest tokens of the sequence, wherever they are: how many keys and values a rank has packed
  follows from the length of the whole, and a rank that gets no token packs what the window let go of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .context_rules import digest, refuse, refuse_other
from .errors import CacheError, SchemeError, ShapeError
from .exchange import Exchange, step_bytes
from .inputs import checked_counts, checked_number, checked_pair, refuse_query
from .kernels import AttentionState, Places
from .pages import upload
from .partial import seen_here, taken
from .quantized_cache import QuantizedCache
from .scheme import SIDES
from .spread import Spread
from .window import windows


class ContextCache:
    """One layer's keys and values for a batch of sequences, their tokens spread over the ranks of a group.

    cache     this rank's own, made alike on every rank and empty: kernels, batch, device, params.  `capacity` is what
              one rank holds of a sequence
    group     of torch.distributed, None: all ranks; gloo for tensors on the CPU, NCCL for those on GPUs
    turn      tokens of a stretch, a multiple of the kernels' page_tokens (default: one page).  A step that is longer is
              cut into one stretch a rank: of a first step of T tokens rank r holds those from about T r/n to
              T (r + 1)/n; tokens that come one by one fill a stretch on one rank, then one on the next
    checked   ranks compare what they were given before anything runs, and tell of failures, so that all do a step or
              none does.  That waits for the device, and costs a few words; without, ranks that differ may hang

    Every rank makes the same calls with the same queries, counts and factors, and gets the same result to the bit.
    Raises SchemeError for a scheme whose tokens cannot be parted, CacheError for a cache that holds tokens, has a
    sliding window, or where there is no group, ShapeError for a `turn` that is no whole number of pages.
    """

    def __init__(
        self, cache: QuantizedCache, group: Any = None, *, turn: int | None = None, checked: bool = True
    ) -> None:
        refuse_other(cache)
        self.cache, self.checked = cache, checked
        self.exchange = Exchange(group, cache.device)
        scheme, error = cache.kernels.scheme, None
        try:
            refuse(cache, turn)
        except (SchemeError, CacheError, ShapeError) as refused:
            error = refused
        self.turn = turn or cache.kernels.page_tokens
        given = scheme.hash, cache.kernels.shape, cache.batch, cache.capacity, self.turn, checked
        self.exchange.agree("ContextCache", given if error else (*given, digest(cache)), error)
        self.sinks = scheme.sinks.tokens if scheme.sinks else 0
        self._spreads: tuple[Spread, ...] = ()
        self.reset()

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return self.exchange.rank

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self._spreads)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, on all ranks together."""
        return tuple(spread.length for spread in self._spreads)

    @property
    def own(self) -> tuple[int, ...]:
        """Tokens of each sequence that this rank holds."""
        return tuple(spread.held(self.rank) for spread in self._spreads)

    @property
    def nbytes(self) -> int:
        """Bytes that this rank holds."""
        return self.cache.nbytes

    def stats(self) -> dict[str, float]:
        """rank and ranks; tokens: those of all ranks; own: this rank's; bytes, pages, committed: this rank's, as of
        QuantizedCache; sent: bytes sent to other ranks so far; step: those that decoding one token sends."""
        own = self.cache.stats()
        return {
            "rank": self.rank,
            "ranks": self.exchange.ranks,
            "tokens": sum(self.lengths),
            "own": sum(self.own),
            **{name: own[name] for name in ("bytes", "pages", "committed")},
            "sent": self.exchange.sent,
            "step": self.step_bytes(1),
        }

    def step_bytes(self, queries: int) -> int:
        """Bytes that this rank sends in a step of attention of so many queries, see exchange.py."""
        shape, ranks = self.cache.kernels.shape, self.exchange.ranks
        return step_bytes(shape, self.batch, queries, ranks, checked=self.checked)

    def share(self, tokens: int, counts: Sequence[int] | None = None) -> tuple[tuple[int, ...], ...]:
        """Which of the m tokens of the next step this rank would take, by their places in the step, sequence by
        sequence."""
        checked_number("tokens", tokens, 0)
        counts = (tokens,) * self.batch if counts is None else checked_counts("counts", counts, (tokens,) * self.batch)
        found = []
        for spread, count in zip(self._spreads, counts, strict=True):
            after, shift = spread.grown(count), tokens - count - spread.length
            runs = after.runs(self.rank, spread.length)
            found.append(tuple(t + shift for begin, end in runs for t in range(begin, end)))
        return tuple(found)

    # -- growing ------------------------------------------------------------------------------------------------------

    def append(
        self, keys: Tensor, values: Tensor, *, counts: Sequence[int] | None = None, of: int | None = None
    ) -> None:
        """Add keys and values (B, H, m, D); sequence b takes the last counts_b of the m tokens (default: all).

        Every rank gives all m tokens and keeps its own; or, with `of` = m, only its own ones, those of `share`, right
        aligned.  ShapeError names a wrong tensor, CacheError a full rank; nothing has changed then, on any rank.
        """
        after = self._agreed("append", None, keys, values, counts, of, None, None)
        with _Undone(self) as step:
            step.run(lambda: self._grown(keys, values, after, of, None, None))
            if self.checked:
                self.exchange.agree("append", "done", step.error)

    def append_and_attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        counts: Sequence[int] | None = None,
        of: int | None = None,
        scaling: float | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step: append, then attention of query (B, Hq, Q, D), the same on every rank, over the tokens of all
        ranks: (out (B, Hq, Q, D) in query's dtype, lse (B, Hq, Q) float32), as QuantizedCache.append_and_attend gives
        it of one cache.  A failure on any rank undoes the step on all of them."""
        after = self._agreed("append_and_attend", query, keys, values, counts, of, scaling, softcap)
        with _Undone(self) as step:
            parts = step.run(lambda: self._partial(query, self._grown(keys, values, after, of, scaling, softcap)))
            return self._merged(query, parts, step.error)

    def attend(
        self, query: Tensor, *, scaling: float | None = None, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention of query (B, Hq, Q, D), which stands at the newest Q tokens, over what all ranks hold."""
        self._agreed("attend", query, None, None, None, None, scaling, softcap)
        with _Undone(self) as step:
            state = self.cache.state(scaling=scaling, softcap=softcap)
            return self._merged(query, step.run(lambda: self._partial(query, state)), step.error)

    def reset(self) -> None:
        """Forget all tokens."""
        self.cache.reset()
        ranks, batch = self.exchange.ranks, self.cache.batch
        heads = self.cache.kernels.shape.kv_heads
        self._at = torch.zeros(batch, heads, 0, dtype=torch.int32, device=self.cache.device)
        self._spreads = (Spread(ranks, self.turn, self.sinks),) * batch
        if self._hidden:  # kernels read the first rows as sinks: here they are nobody's
            like = self.cache.rows("keys")
            nothing = like.new_zeros(batch, like.shape[1], self._hidden, like.shape[3])
            self.cache.append(nothing, nothing)
            self.cache.hide([self._hidden] * batch)

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _hidden(self) -> int:
        """Tokens of the own cache that are nobody's."""
        return self.sinks if self.rank else 0

    def _agreed(
        self, what: str, query: Tensor | None, keys: Tensor | None, values: Tensor | None,
        counts: Sequence[int] | None, of: int | None, scaling: float | None, softcap: float | None,
    ) -> tuple[Spread, ...]:  # fmt: skip
        """Where the step leads, once it is known that every rank can take it and was given the same."""
        after, error, given = self._spreads, None, None
        try:
            kernels, batch = self.cache.kernels, self.batch
            if query is not None:
                refuse_query(query, batch, kernels.shape, self.cache.device)
            if softcap is not None and not kernels.shape.softcap:
                raise ShapeError(f"softcap: {softcap!r}, and the kernels have none; build for a shape with softcap")
            if keys is not None and values is not None:
                counts = self._counts(keys, values, counts, of)
                after = tuple(one.grown(n) for one, n in zip(self._spreads, counts, strict=True))
                self._refuse_full(after)
            tokens = of if of is not None or keys is None else keys.shape[2]
            asked = None if query is None else query.shape[2]
            given = (asked, tokens, counts, scaling, softcap, self.lengths)
        except (ShapeError, CacheError) as refused:
            error = refused
        if self.checked:
            self.exchange.agree(what, given, error)
        elif error is not None:
            raise error
        return after

    def _counts(self, keys: Tensor, values: Tensor, counts: Sequence[int] | None, of: int | None) -> tuple[int, ...]:
        """How many tokens each sequence takes; ShapeError where tensors do not fit that."""
        own = checked_pair(keys, values, counts if of is None else None, self.batch, self.cache.kernels,
                           self.cache.device)  # fmt: skip
        if of is None:
            return own
        taken = self.share(of, counts)  # refuses what is no number, and counts that do not fit
        most = max(map(len, taken), default=0)
        if keys.shape[2] != most:
            raise ShapeError(
                f"keys: {keys.shape[2]} tokens, and rank {self.rank} takes {most} of {of}; give those of share({of})"
            )
        return (of,) * self.batch if counts is None else tuple(counts)

    def _refuse_full(self, after: Sequence[Spread]) -> None:
        """CacheError, on every rank, where one of them has no room."""
        for rank in range(self.exchange.ranks):
            most = max((one.held(rank) for one in after), default=0) + (self.sinks if rank else 0)
            if most > self.cache.capacity:
                raise CacheError(
                    f"capacity: rank {rank} would hold {most} tokens of a sequence, and has room for "
                    f"{self.cache.capacity}; make the caches with a larger capacity, or use more ranks"
                )

    def _grown(
        self, keys: Tensor, values: Tensor, after: tuple[Spread, ...], of: int | None, scaling: float | None,
        softcap: float | None,
    ) -> AttentionState:  # fmt: skip
        """The own tokens of the step are in the cache, and what is due is packed; what this step's attention reads."""
        own = [new.held(self.rank) - old.held(self.rank) for old, new in zip(self._spreads, after, strict=True)]
        if of is None:
            counts = [new.length - old.length for old, new in zip(self._spreads, after, strict=True)]
            keys, values = taken(keys, values, self.share(keys.shape[2], counts))
        due = [self._due(spread) for spread in after]
        if self.cache.kernels.shape.placed:
            self._note(after)
        places = self._places(after)
        state = self.cache.append(keys, values, counts=own, scaling=scaling, softcap=softcap, due=due, places=places)
        self._spreads = after
        return state

    def _due(self, spread: Spread) -> tuple[int, int]:
        """How many of the own tokens behind the sinks are packed, of keys and of values, where one cache would have
        packed so many of all."""
        mine = 0 if self.rank else self.sinks
        sides = windows(self.cache.kernels.scheme)
        keys, values = (
            max(0, spread.held(self.rank, self.sinks + sides[side].packed(spread.length)) - mine) for side in SIDES
        )
        return keys, values

    def _note(self, after: Sequence[Spread]) -> None:
        """Write where the own tokens of a step stand, behind those that are there; places behind them mean nothing."""
        needed, room = max((one.held(self.rank) for one in after), default=0) + self._hidden, self._at.shape[2]
        if needed > room:
            first = torch.arange(room, max(needed, 2 * room), dtype=torch.int32, device=self._at.device)
            self._at = torch.cat([self._at, first.expand(*self._at.shape[:2], -1)], 2)
        for b, (old, new) in enumerate(zip(self._spreads, after, strict=True)):
            place = old.held(self.rank) + self._hidden
            for begin, end in new.runs(self.rank, old.length):
                self._at[b, :, place : place + end - begin] = torch.arange(begin, end, device=self._at.device)
                place += end - begin

    def _places(self, spreads: Sequence[Spread]) -> Places | None:
        """Where the own tokens stand in their sequences, for kernels that ask."""
        if not self.cache.kernels.shape.placed:
            return None
        lengths = [spread.length for spread in spreads]
        return Places(self._at, max(1, self.sinks, *lengths), 0, upload(lengths, self._at.device))

    def _partial(self, query: Tensor, state: AttentionState) -> tuple[Tensor, Tensor]:
        """Attention over this rank's own tokens, those that each query of the whole sequence sees."""
        if (places := self._places(self._spreads)) is not None:
            return self.cache.attend(query, replace(state, places=places))
        pieces = [spread.pieces(self.rank, query.shape[2]) for spread in self._spreads]
        return seen_here(self.cache, query, state, pieces, self._hidden)

    def _merged(
        self, query: Tensor, parts: tuple[Tensor, Tensor] | None, error: BaseException | None
    ) -> tuple[Tensor, Tensor]:
        """The partial outputs of all ranks as one.  Raises on every rank where one failed, if ranks are told."""
        if error is not None and not self.checked:
            raise error
        if parts is None:
            parts = torch.zeros_like(query), query.new_zeros(query.shape[:3], dtype=torch.float32)
        out, lse, failed = self.exchange.merge(*parts, failed=error is not None if self.checked else None)
        if error is not None:
            raise error
        if failed:
            raise CacheError(
                f"attention: ranks {failed} failed, so the step is undone on every rank; their errors say why"
            )
        return out.to(query.dtype), lse


class _Undone:
    """A step that leaves the cache as it was where it raises."""

    def __init__(self, context: ContextCache) -> None:
        self.context = context
        self.before = context.cache.mark(), context._spreads
        self.error: Exception | None = None

    def run(self, step: Callable[[], Any]) -> Any:
        """What the step gives, or None where it fails: the other ranks are told before the error is raised."""
        try:
            with torch.no_grad():
                return step()
        except Exception as error:
            self.error = error
            return None

    def __enter__(self) -> _Undone:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.context.cache.back(self.before[0])
            self.context._spreads = self.before[1]
