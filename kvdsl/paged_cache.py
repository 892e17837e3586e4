"""PagedCache: sequences of one layer that come, share pages, wait elsewhere and go, for engines that serve many."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .allocator import Eviction, LeastRecent
from .errors import CacheError, SchemeError, ShapeError
from .inputs import checked_counts, checked_number
from .kernels import AttentionState, KernelSet, Params, fixed_splits
from .members import Member
from .paged_rules import unshared
from .pages import PageTable
from .prefixes import Key, PrefixIndex, Rows, checked_keys
from .quantized_cache import CAPACITY, QuantizedCache
from .scheme import SIDES
from .sequences import Line, Name, Sequences
from .state import Now


class PagedCache:
    """One layer's keys and values for sequences that come and go, in `pages` pages of a pool.

    kernels   the compiled scheme, without tiers; SchemeError where pages could not be shared
    prefixes  full pages are found again by the keys of their tokens; not behind a sliding window, which lets go of them
    eviction  who is asked when the pool is full (see Eviction); default: cached pages, the least recently used first
    device, params, window, capacity, batch_invariant   as for QuantizedCache; `capacity`, tokens of a sequence, says
              for `batch_invariant` how many programs share one

    Decisions are a function of the calls alone, never of numbers: layers that get the same calls share, evict and
    preempt alike, if their pages have as many tokens.

    Any method either succeeds or raises and leaves every sequence as it was; but a sequence that was preempted for a
    step stays swapped out where the step then fails for another reason.  One thread at a time.
    """

    def __init__(
        self,
        kernels: KernelSet,
        pages: int,
        *,
        device: torch.device | str | None = None,
        params: Params | None = None,
        window: int | None = None,
        capacity: int = CAPACITY,
        batch_invariant: bool = False,
        prefixes: bool | None = None,
        eviction: Eviction | None = None,
    ) -> None:
        if faults := unshared(kernels.scheme):
            raise SchemeError(faults)
        if kernels.shape.placed:
            raise ShapeError("shape.placed: True, tokens of pages in any order; build for a shape with placed=False")
        checked_number("pages", pages, 1)
        checked_number("capacity", capacity, 1)
        if prefixes and window is not None:
            raise CacheError(
                f"prefixes: True, but a sliding window of {window} lets go of pages that a prefix would begin with; "
                f"give prefixes=False, or window=None"
            )
        size = kernels.page_tokens
        base = QuantizedCache(kernels, 0, device=device, params=params, window=window, capacity=pages * size)
        base.splits = fixed_splits(capacity, size) if batch_invariant else None
        self.kernels, self.pool, self._policy = kernels, base.pool, base.mark().policy
        self.pool.eviction = eviction or LeastRecent()
        self.pool.mend = "free or swap out a sequence, or build the cache with more pages="
        self._sequences = Sequences(base)
        sharing = window is None if prefixes is None else prefixes
        self._index = PrefixIndex(self.pool, kernels, base.params, self._policy.sinks) if sharing else None
        self._found_tokens = 0
        self._lock = threading.Lock()

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[Name, ...]:
        """All sequences, those that are swapped out among them."""
        return tuple(self._sequences.lines)

    @property
    def swapped(self) -> tuple[Name, ...]:
        """The sequences that are swapped out."""
        return tuple(name for name, line in self._sequences.lines.items() if line.batch is None)

    def length(self, name: Name) -> int:
        """Tokens of a sequence."""
        line = self._sequences.line(name)
        return line.member.length if line.batch is not None else line.length

    def pages(self, name: Name) -> tuple[int, ...]:
        """The page ids of a sequence in order, ZERO where a sliding window has let go of one; none when swapped out."""
        line = self._sequences.line(name)
        return line.pages if line.batch is not None else ()

    def stats(self) -> dict[str, int]:
        """What every page of the pool is, and what stands beside it.

        pages = pages_free + pages_used + pages_cached; pages_shared of the used ones are held more than once, and
        `references` counts table entries.  bytes = bytes_zero (the page of zeros) + bytes_free + bytes_used +
        bytes_cached.  Bytes beside the pool: rows, of exact rows, tables and lengths; sink_rows, of sinks kept with
        first pages; swapped, in host memory.  Then sequences, sequences_swapped, tokens; found_tokens (not packed
        again), evicted_pages, preempted, page_copies.
        """
        pool, lines = self.pool, self._sequences.lines.values()
        held = Counter(self._sequences.held())
        pages = {"used": len(held), "cached": len(pool.cached), "free": pool.limit - len(held) - len(pool.cached)}
        return {
            "pages": pool.limit,
            **{f"pages_{what}": count for what, count in pages.items()},
            "pages_shared": sum(times > 1 for times in held.values()),
            "references": sum(held.values()),
            "bytes": pool.bytes.nbytes,
            "bytes_zero": pool.page_bytes,
            **{f"bytes_{what}": count * pool.page_bytes for what, count in pages.items()},
            "committed": pool.committed,
            "rows": self._sequences.nbytes,
            "sink_rows": self._index.nbytes if self._index else 0,
            "swapped": self._sequences.swapped_bytes,
            "sequences": len(lines),
            "sequences_swapped": len(self.swapped),
            "tokens": sum(map(self.length, self.names)),
            "found_tokens": self._found_tokens,
            "evicted_pages": self._index.evicted if self._index else 0,
            "preempted": self._sequences.preempted,
            "page_copies": pool.copies,
        }

    # -- coming and going ---------------------------------------------------------------------------------------------

    def found(self, tokens: Sequence[Key], *, salt: Key = "") -> int:
        """How many of these tokens `add` would find packed: the sinks and whole pages, one token less than all at
        most, as the model has to be asked about something."""
        pages, _ = self._match(checked_keys("tokens", tokens), salt, None)
        return self._covered(len(pages))

    def add(self, name: Name, tokens: Sequence[Key] = (), *, salt: Key = "", most: int | None = None) -> int:
        """A new sequence; how many of its tokens are there already, the others are to be appended.

        tokens   keys of its first tokens (a prompt), by which pages of others are found, and its own by others; those
                 found are the bytes that the first such request has packed
        salt     what keys and values depend on besides the tokens: an adapter, a tenant
        most     find no more tokens than this, as of layers that found different numbers
        """
        keys = checked_keys("tokens", tokens)
        with self._turn():
            self._sequences.refuse_taken(name)
            pages, chain = self._match(keys, salt, most)
            now = self._begun(pages)
            self.pool.share(pages)
            batch = self._sequences.open(now)
            length = self._covered(len(pages))
            self._sequences.lines[name] = Line(batch, 0, keys, chain, salt, used=self._sequences.tick())
            self._found_tokens += length
        return length

    def fork(self, name: Name, new: Name) -> None:
        """`new` begins as what `name` is: pages are shared, the one that is being filled is copied by who first writes
        to it, exact rows are copied now."""
        with self._turn():
            line = self._sequences.resident(name)
            self._sequences.refuse_taken(new)
            now = line.alone()
            self.pool.share(line.pages)
            batch = self._sequences.open(now)
            self._sequences.lines[new] = Line(
                batch, 0, [*line.keys], [*line.chain], line.salt, used=self._sequences.tick()
            )

    def free(self, name: Name) -> None:
        """The sequence is gone; pages that can be found again stay as cache.  A file that it was swapped to stays."""
        with self._turn():
            line = self._sequences.line(name)
            if line.batch is not None:
                self._sequences.out(line)
            del self._sequences.lines[name]

    def forget(self) -> None:
        """Forget what could be found again: cached pages are free."""
        with self._turn():
            if self._index:
                self._index.clear()

    # -- steps --------------------------------------------------------------------------------------------------------

    def append(
        self,
        names: Sequence[Name],
        keys: Tensor,
        values: Tensor,
        *,
        counts: Sequence[int] | None = None,
        tokens: Sequence[Sequence[Key]] | None = None,
        scaling: float | None = None,
        softcap: float | None = None,
    ) -> AttentionState:
        """Add keys and values (B, H, m, D) to these sequences, see QuantizedCache.append; what this step's attention
        reads, for `attend`.  `tokens`: the keys of each one's fresh tokens, where `add` was not given them."""
        with self._step(names, keys, counts, tokens) as batch:
            return batch.append(keys, values, counts=counts, scaling=scaling, softcap=softcap)

    def append_and_attend(
        self,
        names: Sequence[Name],
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        counts: Sequence[int] | None = None,
        tokens: Sequence[Sequence[Key]] | None = None,
        scaling: float | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Append, then attention of query (B, Hq, Q, D) over it: (out, lse)."""
        with self._step(names, keys, counts, tokens) as batch:
            return batch.append_and_attend(query, keys, values, counts=counts, scaling=scaling, softcap=softcap)

    def attend(
        self,
        names: Sequence[Name],
        query: Tensor,
        state: AttentionState | None = None,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of query (B, Hq, Q, D) over these sequences as they stand, or over what `append` gave for them."""
        with self._turn():
            batch = self._sequences.together(names)
            for name in names:
                self._sequences.line(name).used = self._sequences.tick()
        return batch.attend(query, batch.state(scaling=scaling, softcap=softcap) if state is None else state)

    # -- waiting elsewhere --------------------------------------------------------------------------------------------

    def swap_out(self, name: Name, path: str | Path | None = None, *, deflate: int | None = None) -> None:
        """Move a sequence to host memory, or to a file as QuantizedCache.save writes it; its pages are given back.
        `deflate`: a level, 1 to 9, of the streams that they wait as; None: as they are."""
        with self._turn():
            self._sequences.swap_out(self._sequences.resident(name), None if path is None else Path(path), deflate)

    def swap_in(self, name: Name) -> None:
        """Bring a sequence back as it was, bit for bit, into pages of its own."""
        with self._turn():
            line = self._sequences.line(name)
            self._sequences.swap_in(name, line)
            self._register(line, 0)

    # -- inside -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise CacheError("cache: another thread is changing it; let one thread at a time do so")
        try:
            with torch.inference_mode(False), torch.no_grad():
                yield
        except BaseException:
            self.pool.recount()
            raise
        finally:
            self._lock.release()

    @contextmanager
    def _step(
        self,
        names: Sequence[Name],
        keys: Tensor,
        counts: Sequence[int] | None,
        tokens: Sequence[Sequence[Key]] | None,
    ) -> Iterator[QuantizedCache]:
        """The batch of these sequences; behind the step their full pages can be found."""
        with self._turn():
            told = self._told(names, keys, counts, tokens)
            batch = self._sequences.together(names)
            with self._sequences.stepping(names):
                yield batch
            for name, known in zip(names, told, strict=True):
                line = self._sequences.line(name)
                line.keys, line.used = known, self._sequences.tick()
                self._register(line, len(line.chain))

    def _told(
        self, names: Sequence[Name], keys: Tensor, counts: Sequence[int] | None, tokens: Sequence[Sequence[Key]] | None
    ) -> list[list[Key]]:
        """The keys of each sequence behind this step."""
        lines = [self._sequences.resident(name) for name in names]
        if tokens is None:
            return [line.keys for line in lines]
        chunk = keys.shape[2] if isinstance(keys, Tensor) and keys.dim() == 4 else 0
        each = (chunk,) * len(lines) if counts is None else checked_counts("counts", counts, (chunk,) * len(lines))
        if len(tokens) != len(lines) or any(len(row) != n for row, n in zip(tokens, each, strict=True)):
            right = ", ".join(map(str, each))
            raise ShapeError(f"tokens: {[len(row) for row in tokens]} keys for steps of {right} tokens; give one each")
        found = []
        for b, (line, row) in enumerate(zip(lines, tokens, strict=True)):
            fresh, length = checked_keys(f"tokens[{b}]", row), line.member.length
            known = line.keys[length : length + len(fresh)]
            if fresh[: len(known)] != known:
                raise ShapeError(f"tokens[{b}]: they are not those that {names[b]!r} was added with; give the same")
            # Keys behind tokens that nobody told are of no use: the chain ends before them.
            found.append(line.keys + fresh[len(known) :] if len(line.keys) >= length else line.keys)
        return found

    def _match(self, keys: list[Key], salt: Key, most: int | None) -> tuple[list[int], list[bytes]]:
        """Pages that a sequence of these tokens begins with, and their links: no more than it would have packed, were
        it alone, so that in the end it is what it would be alone."""
        if self._index is None:
            return [], []
        end = self._policy.after_sinks(len(keys)) - 1
        packed = min(end, *(window.packed(len(keys)) for window in self._policy.windows.values()))
        if most is not None:
            packed = min(packed, self._policy.after_sinks(most))
        chain = self._index.extended([], keys, salt, max(0, packed) // self.kernels.page_tokens)
        pages = self._index.match(chain)
        return pages, chain[: len(pages)]

    def _covered(self, pages: int) -> int:
        return self._policy.sinks + pages * self.kernels.page_tokens if pages else 0

    def _begun(self, pages: list[int]) -> Now:
        """The state of a sequence that begins with these pages."""
        now = Now.empty(self._policy, 1, self.kernels, self.pool.device)
        if not pages:
            return now
        assert self._index is not None
        if rows := self._index.rows(pages[0]):
            for side, kept in zip(SIDES, rows, strict=True):
                now.rows(side)[0, :, : self._policy.sinks] = kept
        packed = len(pages) * self.kernels.page_tokens
        member = Member(self._covered(len(pages)), packed, packed, packed, packed)
        return now.moved((member,), table=PageTable.of([pages], self.pool.device))

    def _register(self, line: Line, begin: int) -> None:
        """Let full pages of a sequence be found, from place `begin` on."""
        if self._index is None:
            return
        full = line.member.first // self.kernels.page_tokens
        line.chain = self._index.extended(line.chain, line.keys, line.salt, full)
        for place in range(begin, min(full, len(line.chain))):
            self._index.add(line.chain[place], line.pages[place], self._sinks(line) if not place else None)

    def _sinks(self, line: Line) -> Rows | None:
        sinks = self._policy.sinks
        keys, values = (line.here.rows(side)[line.row, :, :sinks].clone() for side in SIDES)
        return (keys, values) if sinks else None
