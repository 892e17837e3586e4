"""What an engine makes of a scheme, and which schemes it cannot serve.

An engine cuts prompts into chunks, batches them with others, finds blocks of tokens again that another request has
stored, and computes preempted requests anew.  None of that may change what a request gets.  So a query's place alone
says how it reads: the blocks before its own as they are stored, its own block exactly; or, where every token is stored
as it comes, all of them as they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvdsl.cost import page_tokens
from kvdsl.errors import Fault, SchemeError
from kvdsl.paged_rules import unshared
from kvdsl.params import rope_of
from kvdsl.scheme import Recent, Scheme
from kvdsl.window import windows

LONGEST_BLOCK = 1024


@dataclass(frozen=True)
class Served:
    """A scheme as it is served.

    scheme        with the window and the prefill that it is served with
    block         tokens of an engine's block: whole pages
    page_tokens   tokens of a page
    waits         tokens wait in exact rows until their block is full, and sinks for good; else each is stored as it
                  comes, and there are no rows
    """

    scheme: Scheme
    block: int
    page_tokens: int
    waits: bool

    @property
    def sinks(self) -> int:
        """Tokens at the beginning that stay exact."""
        return self.scheme.sinks.tokens if self.scheme.sinks else 0

    @property
    def shares(self) -> bool:
        """Whether full blocks can be found again by other requests: not where exact rows belong to them."""
        return not self.sinks

    def own_block(self, tokens: int) -> int:
        """The u at which the block of the token after `tokens` others begins."""
        return max(0, tokens - self.sinks) // self.block * self.block


def served(scheme: Scheme) -> Served:
    """The scheme as an engine serves it: its window is the block that is being filled, as long as the window rounded up
    to whole pages.  SchemeError for one that cannot be served, with every reason."""
    if faults := unserved(scheme):
        raise SchemeError(faults)
    page = page_tokens(scheme)
    window = scheme.recent.tokens if scheme.recent else 0
    waits = bool(window or scheme.sinks or any(side.block > 1 for side in windows(scheme).values()))
    block = page * max(1, -(-window // page))
    recent = Recent(block, flush="whole") if waits else None
    return Served(replace(scheme, recent=recent, prefill="exact" if waits else "stored"), block, page, waits)


def unserved(scheme: Scheme) -> tuple[Fault, ...]:
    """Why an engine cannot serve the scheme; empty where it can."""
    found = list(unshared(scheme))
    if scheme.layers:
        fact = f"{len(scheme.layers)} groups of layers have schemes of their own; pages of all layers are of one size"
        found.append(Fault("layers", fact, "serve one scheme, and let the engine skip layers"))
    if scheme.shared:
        fact = "Shared, records of which keys and values are both read; models that cache such have another backend"
        found.append(Fault("values.code", fact, "take a scheme with values of their own"))
    if rope_of(scheme) is not None:
        fact = "PreRope, keys without their positions; the engine hands over keys that have them"
        found.append(Fault("keys.transform", fact, "take a scheme whose keys are stored with their positions"))
    if scheme.recent and scheme.recent.tokens > LONGEST_BLOCK:
        fact = f"{scheme.recent.tokens} tokens stay exact; a block that waits is {LONGEST_BLOCK} at most"
        found.append(Fault("recent.tokens", fact, f"use {LONGEST_BLOCK} or fewer"))
    return tuple(found)
