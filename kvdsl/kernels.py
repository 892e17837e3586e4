"""KernelSet: what a compiled scheme can do.  Cache, models and laws take one and never import the compiler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from .errors import BackendError, ShapeError
from .scheme import Scheme
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor

Side = Literal["keys", "values"]
Backend = Literal["triton", "torch"]
Form = Literal["decode", "extend", "dense"]
"""How attention reads packed tokens: by programs of few query rows, of more, in passes, or decoded once for all."""
Params = Mapping[str, "Tensor"]
MOST_FIXED, FIXED_PAGES = 32, 2
Segments = Sequence[tuple[Any, "AttentionState", Params, "Fold | None"]]
"""Modules, what each of them reads, and its parameters."""


class Module(Protocol):
    """The functions that every backend's generated module is bound to; see KernelSet for what they take."""

    @property
    def schedule(self) -> str: ...

    def schedule_for(self, batch: int, tokens: int) -> str: ...

    def pack(self, side: Side, rows: Tensor, first: Tensor, offset: int, begin: Tensor, end: Tensor,
             reach: tuple[int, int], pool: Tensor, table: Tensor, params: Params,
             places: Places | None = None) -> None: ...  # fmt: skip

    @property
    def packs_at_once(self) -> tuple[Side, ...] | None: ...

    def append(self, keys: Tensor, values: Tensor, into: Room, params: Params) -> None: ...

    def unpack(
        self, side: Side, pool: Tensor, table: Tensor, begin: int, end: int, params: Params,
        places: Places | None = None,
    ) -> Tensor: ...  # fmt: skip

    def scores(
        self, query: Tensor, pool: Tensor, table: Tensor, tokens: int, params: Params, places: Places | None = None
    ) -> Tensor: ...

    def form(self, queries: int, packed: int, exact: int, window: int | None) -> Form: ...

    def attend(
        self, query: Tensor, state: AttentionState, params: Params, splits: int | None = None, form: Form | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def union(
        self, query: Tensor, segments: Segments, splits: int | None = None, form: Form | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention over the tokens of all segments; their modules are of the same backend and shape."""
        ...

    def reach(self, query: Tensor, position: Tensor, state: AttentionState, params: Params) -> Tensor: ...

    def received(
        self, query: Tensor, position: Tensor, lse: Tensor, state: AttentionState, params: Params
    ) -> tuple[Tensor, Tensor]: ...


class Places(NamedTuple):
    """Where tokens stand, whose places follow no order: token t of a head, t = 0 the first of the sequence's here, at
    position at[b, h, t] + origin.

    at       int32 (B, H, room), contiguous; what stands behind a sequence's tokens is never read
    end      host: every position is below it
    origin   host: what is added to each
    asked    int32 (B,): the position behind the last query's, query i of Q stands at asked_b - Q + i; `attend` needs it
    """

    at: Tensor
    end: int
    origin: int = 0
    asked: Tensor | None = None


@dataclass(frozen=True)
class AttentionState:
    """Everything one attention call reads besides the query, frozen: later appends do not change what it sees.

    B sequences; positions u count after the sinks.  Lengths are int32 tensors on the device, maxima are host integers.

    pool          uint8 (pages, page_bytes)
    table         int32 (B, width): page of u // page_tokens; one more entry than the longest sequence needs
    packed_keys, packed_values   int32 (B,): u below this is read from pages, the rest from rows
    length        int32 (B,): tokens of the sequence, the queries' own included
    key_rows, value_rows   (B, H, sinks + ring, D): token t < sinks is row t, else row sinks + (u - first) % ring
    first         int32 (B,): the u that stands in the first ring row
    start         int32 (B,): the first visible token t (left padding)
    longest       host: largest length; packed_most: largest of packed_keys and packed_values
    scaling       factor on q.k before the softmax
    softcap       cap of `cap * tanh(score / cap)`, only where Shape.softcap
    window        sliding window in tokens, or None
    ahead         how many positions behind the last token the last query stands: query i is at position
                  length_b - Q + i + ahead; 0 where the queries' own tokens are the last ones here, Q or more where
                  every query sees every token but for the window
    places        only where Shape.placed: where tokens stand; causality, window and `start` are of these positions
                  then, rotary positions too, and `ahead` says nothing
    """

    pool: Tensor
    table: Tensor
    packed_keys: Tensor
    packed_values: Tensor
    length: Tensor
    key_rows: Tensor
    value_rows: Tensor
    first: Tensor
    start: Tensor
    longest: int
    packed_most: int
    scaling: float
    softcap: float | None = None
    window: int | None = None
    ahead: int = 0
    places: Places | None = None


@dataclass(frozen=True, eq=False)
class Room:
    """Where one token more of every sequence goes, all of it on the device and written in place.

    pool, table, key_rows, value_rows, length   as for AttentionState; length counts the token itself
    packed        side -> int32 (B,): u below this is packed
    due           side -> int32 (B,): u below this is packed once the token is there
    most          side -> host: due - packed is no more than this; of a side that `append` packs at once it asks nothing
    """

    pool: Tensor
    table: Tensor
    key_rows: Tensor
    value_rows: Tensor
    length: Tensor
    packed: Mapping[Side, Tensor]
    due: Mapping[Side, Tensor]
    most: Mapping[Side, int]

    def rows(self, side: Side) -> Tensor:
        """The row buffer of one side."""
        return self.key_rows if side == "keys" else self.value_rows


@dataclass(frozen=True, eq=False)
class KernelSet:
    """A scheme compiled for a shape.

    `source` is the generated text, `path` the file it was loaded from, `plan` and `layout` what they were printed from,
    `why` one sentence saying why this backend was taken, `page_tokens` and `page_bytes` the unit of storage.
    """

    scheme: Scheme
    shape: Shape
    backend: Backend
    why: str
    source: str
    path: Path
    plan: Any
    layout: Any
    page_tokens: int
    page_bytes: int
    module: Module

    def _repr_html_(self) -> str:
        from .notebook import of_kernels

        return of_kernels(self)

    def pack(self, side: Side, rows: Tensor, first: Tensor, offset: int, begin: Tensor, end: Tensor,
             reach: tuple[int, int], pool: Tensor, table: Tensor, params: Params,
             places: Places | None = None) -> None:  # fmt: skip
        """Quantize tokens u in [begin_b, end_b) of one side and write them into the pages of `table`.

        rows (B, H, offset + ring, D) with token u in row `offset + (u - first_b) % ring`; first, begin, end int32 (B,);
        `reach` = (min of begin, max of end), host integers.  Whole blocks only.  Bytes of other tokens are untouched.
        `places` only where Shape.placed.
        """
        self.refuse_places(places)
        self.module.pack(side, rows, first, offset, begin, end, reach, pool, table, params, places)

    def append(self, keys: Tensor, values: Tensor, into: Room, params: Params) -> None:
        """Write the exact rows of one token of every sequence, keys and values (B, H, 1, D), and pack what is due.

        Nothing is read from the device, and what runs does not depend on lengths: a CUDA graph may hold it.  Raises
        BackendError for keys without their rotary positions, which are packed by their place in the sequence."""
        self.refuse_positions()
        self.module.append(keys, values, into, params)

    @property
    def packs_at_once(self) -> tuple[Side, ...] | None:
        """The sides whose blocks `append` packs in the launch that writes the token; None where it takes several, or
        none at all."""
        return None if self.by_position else self.module.packs_at_once

    def unpack(
        self, side: Side, pool: Tensor, table: Tensor, begin: int, end: int, params: Params,
        places: Places | None = None,
    ) -> Tensor:  # fmt: skip
        """Decoded tokens u in [begin, end) of every sequence: float32 (B, H, end - begin, D)."""
        self.refuse_places(places)
        return self.module.unpack(side, pool, table, begin, end, params, places)

    def scores(
        self, query: Tensor, pool: Tensor, table: Tensor, tokens: int, params: Params, places: Places | None = None
    ) -> Tensor:
        """Estimates of q.k for packed u in [0, tokens), unscaled: query (B, Hq, Q, D) -> float32 (B, Hq, Q, tokens);
        `places`, as for `pack`, of all these tokens of every sequence."""
        self.refuse_places(places)
        return self.module.scores(query, pool, table, tokens, params, places)

    def form(self, queries: int, packed: int, exact: int = 0, window: int | None = None) -> Form:
        """How `attend` reads a sequence of so many packed and exact tokens for so many queries, where neither `splits`
        nor `form` is given: the cheapest form by the backend's model, see `kvdsl show --stage plan`."""
        return self.module.form(queries, packed, exact, window)

    def attend(
        self, query: Tensor, state: AttentionState, params: Params, splits: int | None = None, form: Form | None = None
    ) -> tuple[Tensor, Tensor]:
        """Causal attention: query (B, Hq, Q, D), query i at position length_b - Q + i + state.ahead -> (out like
        query, in its dtype, lse (B, Hq, Q) float32, natural logarithm).  A query that sees no token gives zeros
        and -inf.

        `splits` is the number of programs that share the packed tokens of one sequence, and of those that share the
        exact ones (None: chosen from the batch and the machine).  Given, a sequence gets to the bit what it gets
        alone, whatever batch it is in: Triton kernels read pages then, torch's one sequence after the other.

        `form` asks for one way to read them; None: that of `self.form`."""
        self.refuse_places(state.places)
        return self.module.attend(query, state, params, splits, form)

    def reach(self, query: Tensor, position: Tensor, state: AttentionState, params: Params) -> Tensor:
        """How much attention query rows have to give: query (B, Hq, P, D), position int32 (B, P) -> float32 (B, Hq, P),
        the natural logarithm of the sum of exp(score) over the tokens that a row sees, -inf where there are none.

        Rows stand anywhere, in any order: row i of sequence b at token position[b, i], counted like `state.length`, or
        among the positions of `state.places`.  It sees the tokens t <= position that the state has, from `start` on,
        and no others than `state.window` allows.  At -1 stands a row that does not count.  Raises BackendError for a
        state with a sliding window, unless Shape.placed.
        """
        self.refuse_places(state.places)
        _refuse_window(state)
        return self.module.reach(query, position, state, params)

    def received(
        self, query: Tensor, position: Tensor, lse: Tensor, state: AttentionState, params: Params
    ) -> tuple[Tensor, Tensor]:
        """The attention that tokens receive: the sums of p and of p^2 over query rows and the query heads of a group,
        float32 (B, H, state.longest) each, p = exp(score - lse) of the tokens that a row sees.

        query and position as for `reach`; lse float32 (B, Hq, P), that of `reach`, of `attend`, or of several states
        together; rows where it is -inf count nothing.  These are the columns' sums of the softmax, what a token's
        saliency is made of (H2O, arXiv 2306.14048; ZipCache, arXiv 2405.14256, section 4: of a few rows, over how many
        of them see the token), in memory of the inputs' and the outputs' size.  Raises BackendError as `reach` does.
        """
        self.refuse_places(state.places)
        _refuse_window(state)
        return self.module.received(query, position, lse, state, params)

    def dim(self, side: Side) -> int:
        """Numbers of a vector of one side."""
        return self.scheme.dim(side, self.shape.head_dim)

    @property
    def schedule(self) -> str:
        """Where the schedule of decoding comes from: "model", or "tuned on" a GPU by `kvdsl tune`; "torch" where torch
        has none."""
        return self.module.schedule

    def schedule_for(self, batch: int, tokens: int) -> str:
        """The same of decoding one token of about so many sequences of about so many tokens."""
        return self.module.schedule_for(batch, tokens)

    @property
    def by_position(self) -> bool:
        """Whether what is stored of a token depends on where it stands, which the host must know then."""
        return self.shape.placed or self.scheme.keys.rope is not None

    def refuse_positions(self) -> None:
        """BackendError where packing needs to know where a token stands."""
        if self.by_position:
            raise BackendError(
                "append: keys are stored without their positions (PreRope), so the host must know where they stand "
                "when they are packed; use QuantizedCache.append"
            )

    def refuse_places(self, places: Places | None) -> None:
        """BackendError where positions are given to kernels that know none, or none to those that need them."""
        if self.shape.placed != (places is not None):
            missing = "places: missing; these kernels are of tokens in any order, say where each stands"
            given = (
                "places: these kernels are of tokens in the order of their places; build for a shape with placed=True"
            )
            raise BackendError(missing if places is None else given)


def fixed_splits(capacity: int, page_tokens: int) -> int:
    """How many programs share a sequence where neither the batch nor the GPU may decide: one for two pages of what it
    has room for, and 32 at most, so that the partials of a large batch stay few."""
    return max(1, min(MOST_FIXED, -(-capacity // (FIXED_PAGES * page_tokens))))


class Fold(NamedTuple):
    """What is taken out of the numbers of a segment, sequence by sequence, and put back around its kernels.

    query    what its keys meet in place of the query, (B, Hq, Q, D)
    bias     what is added to its scaled scores, float32 (B, Hq, Q), or None
    factor, shift   what its output is multiplied by, and what is added then, float32 (B, H, D), or None
    """

    query: Tensor
    bias: Tensor | None = None
    factor: Tensor | None = None
    shift: Tensor | None = None


class Segment(NamedTuple):
    """Tokens of the sequences of a batch that are held by one compiled scheme, in pages and rows of their own."""

    kernels: KernelSet
    state: AttentionState
    params: Params
    fold: Fold | None = None


def attend_segments(
    query: Tensor, segments: Sequence[Segment], splits: int | None = None, form: Form | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens of all segments, whatever their order: query (B, Hq, Q, D) -> (out like query, in its
    dtype, lse (B, Hq, Q) float32, natural logarithm), as `KernelSet.attend`.

    The queries' own tokens are the last ones of one segment, whose state has `ahead` 0; one of older tokens has `ahead`
    Q or more.  `splits` and `form` as for `KernelSet.attend`, in every segment.  A segment without tokens costs
    nothing, and one alone gives what its own `attend` gives.  Raises ShapeError or BackendError where schemes are not
    compiled alike.
    """
    if not segments:
        raise ShapeError("segments: none; give those of the cache, one at least")
    first = segments[0].kernels
    for position, (kernels, state, *_) in enumerate(segments):
        kernels.refuse_places(state.places)
        if kernels.backend != first.backend:
            raise BackendError(
                f"segments[{position}]: compiled for {kernels.backend}, segments[0] for {first.backend}; build all of "
                f"them for one backend"
            )
        if replace(kernels.shape, placed=False) != replace(first.shape, placed=False):
            raise ShapeError(f"segments[{position}]: {kernels.shape}, segments[0]: {first.shape}; build all for one")
    held = [segment for segment in segments if segment.state.longest] or segments[:1]
    if len(held) == 1 and held[0].fold is None:
        return held[0].kernels.attend(query, held[0].state, held[0].params, splits, form)
    parts = [(segment.kernels.module, segment.state, segment.params, segment.fold) for segment in held]
    return held[0].kernels.module.union(query, parts, splits, form)


def _refuse_window(state: AttentionState) -> None:
    if state.window is not None and state.places is None:
        raise BackendError(
            f"state.window: attention within the newest {state.window} tokens is not summed by token; give a state "
            "whose window is None"
        )
