"""Full pages found again by what their tokens are: a chain of hashes, each of a page's tokens and of all before it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from operator import index
from typing import TYPE_CHECKING, NamedTuple

from .errors import ShapeError
from .snapshot import identity, params_digest

if TYPE_CHECKING:
    from torch import Tensor

    from .allocator import Allocator
    from .kernels import KernelSet, Params

Key = int | str | bytes
"""What tells a token from others at its place: its id, or a digest of what else it stands for (a piece of an image)."""
Rows = tuple["Tensor", "Tensor"]
"""Exact keys and values of the sinks, (H, sinks, D) each."""


def encoded(key: Key) -> bytes:
    """A key as bytes, which no other key and no row of others gives."""
    if isinstance(key, (str, bytes)):
        raw = key.encode() if isinstance(key, str) else key
        return b"%s%d:%s" % (b"s" if isinstance(key, str) else b"b", len(raw), raw)
    return b"i%d;" % index(key)


def checked_keys(name: str, keys: Sequence[Key]) -> list[Key]:
    """The keys as plain values; ShapeError naming the first that is none."""
    found: list[Key] = []
    for place, key in enumerate(keys):
        try:
            found.append(key if isinstance(key, (str, bytes)) else index(key))
        except TypeError:
            raise ShapeError(
                f"{name}[{place}]: {key!r} is no token id; give an integer, or a str or bytes that tells the token"
            ) from None
    return found


class Entry(NamedTuple):
    """A page that can be found: its link of the chain, and of a first page the exact rows of the sinks before it."""

    link: bytes
    rows: Rows | None


class PrefixIndex:
    """Pages by links.  The link of a page is sha256(link of the page before, its tokens' keys); the first page has the
    sinks' keys in front, and behind it stands all that bytes of a page depend on besides: scheme, shape, format,
    calibrated parameters, and the caller's `salt` (an adapter of the model, a tenant)."""

    def __init__(self, pool: Allocator, kernels: KernelSet, params: Params, sinks: int) -> None:
        document = identity(kernels) | {"params": params_digest(params)}
        self.root = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).digest()
        self.pool, self.page_tokens, self.sinks = pool, kernels.page_tokens, sinks
        self._pages: dict[bytes, int] = {}
        self._entries: dict[int, Entry] = {}
        self.evicted = 0
        pool.forgotten = self.taken

    def __len__(self) -> int:
        return len(self._pages)

    @property
    def nbytes(self) -> int:
        """Bytes of the sinks' rows that are kept beside the pages."""
        return sum(x.nbytes for entry in self._entries.values() for x in entry.rows or ())

    def extended(self, chain: Sequence[bytes], keys: Sequence[Key], salt: Key, pages: int) -> list[bytes]:
        """The chain of the first `pages` pages, or of as many as the keys tell whole, given its beginning."""
        links = list(chain)
        while len(links) < pages and self.span(len(links))[1] <= len(keys):
            begin, end = self.span(len(links))
            before = links[-1] if links else self.root + encoded(salt)
            links.append(hashlib.sha256(before + b"".join(map(encoded, keys[begin:end]))).digest())
        return links

    def span(self, place: int) -> tuple[int, int]:
        """The tokens that the link of a page is made of."""
        begin = self.sinks + place * self.page_tokens
        return begin if place else 0, begin + self.page_tokens

    def match(self, chain: Sequence[bytes]) -> list[int]:
        """The pages of the longest beginning of the chain that is there."""
        found: list[int] = []
        for link in chain:
            if link not in self._pages:
                break
            found.append(self._pages[link])
        return found

    def rows(self, page: int) -> Rows | None:
        """The sinks' rows before a first page."""
        return self._entries[page].rows

    def add(self, link: bytes, page: int, rows: Rows | None) -> None:
        """A full page, from now on kept; where another one has the link already, that one stays."""
        if link not in self._pages and page not in self._entries:
            self._pages[link], self._entries[page] = page, Entry(link, rows)
            self.pool.keep(page)

    def taken(self, page: int) -> None:
        """A cached page was needed."""
        self.forget(page)
        self.evicted += 1

    def forget(self, page: int) -> None:
        """The page is to hold something else."""
        del self._pages[self._entries.pop(page).link]

    def clear(self) -> None:
        """Forget all pages; those that nobody holds are free."""
        for page in list(self._entries):
            self.forget(page)
            self.pool.drop(page)
