"""What an evaluation finds, as plain values; `to_dict` is the document of `kvdsl eval --json` and of results.json, and
`from_dict` reads it back, so that a report needs nothing else.

Where a name begins with full_ it is of the same model in full precision, on the same tokens.  Losses and divergences
are in nats a token, shares from 0 to 1, lengths in tokens.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

Interval = tuple[float, float]
Grid = tuple[tuple[float | None, ...], ...]
"""Of every layer, a number for each kv head; None where there is none to be had."""


@dataclass(frozen=True)
class Window:
    """One place of the text, which begins at token `start` of what is scored."""

    start: int
    nll: float
    full_nll: float
    kl: float
    same: float


@dataclass(frozen=True)
class Perplexity:
    """Teacher-forced text behind a prompt of `context` tokens, `score` tokens in each window.

    perplexity, full_perplexity   exp of the mean loss over all windows
    delta                         their difference
    interval, delta_interval      of 95 %, by a bootstrap over windows; None of a single one
    kl, kl_error                  KL(full || packed), and its standard error over windows
    same                          share of tokens whose most likely successor is the same
    kl_by_place                   KL of the token at each place behind the prompt, mean over windows
    """

    context: int
    score: int
    chunk: int
    perplexity: float
    full_perplexity: float
    delta: float
    interval: Interval | None
    full_interval: Interval | None
    delta_interval: Interval | None
    kl: float
    kl_error: float | None
    same: float
    same_error: float | None
    windows: tuple[Window, ...]
    kl_by_place: tuple[float, ...]


@dataclass(frozen=True)
class Cell:
    """Prompts of about `length` tokens with the key behind a share `depth` of them.

    exact: share of prompts whose answer greedy generation gives, all of it; nll: of a token of the answer.
    """

    length: int
    depth: float
    prompts: int
    exact: float
    full_exact: float
    nll: float
    full_nll: float
    kl: float


@dataclass(frozen=True)
class Retrieval:
    """A key of five digits that the prompt hides; the means over `cells`."""

    prompts: int
    exact: float
    full_exact: float
    nll: float
    full_nll: float
    kl: float
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Copy:
    """A passage asked for a second time: accuracy is the share of tokens that are the likeliest, each behind the right
    ones."""

    prompts: int
    tokens: int
    accuracy: float
    full_accuracy: float
    nll: float
    full_nll: float
    kl: float


@dataclass(frozen=True)
class Continuation:
    """One prompt continued; first: the first place with another token, None where there is none."""

    start: int
    same: float
    first: int | None
    text: str
    full_text: str


@dataclass(frozen=True)
class Greedy:
    """Greedy generation beside full precision, token by token.

    same    share of places with the same token
    first   tokens before the first other one, mean over prompts; all of them where there is none
    equal   share of prompts with no other token
    """

    prompts: int
    tokens: int
    same: float
    first: float
    equal: float
    continuations: tuple[Continuation, ...]


@dataclass(frozen=True)
class Layers:
    """Relative errors by layer and kv head over one window, each layer on exact inputs; see layers.errors.

    Those of keys, values and scores are of all tokens of the prompt, exact ones among them; *_outlier: of channels
    whose root mean square is three times the median of their head's, `outliers` of them; *_other: of the others.
    mean_*: over all layers and heads.
    """

    context: int
    queries: int
    mean_output: float | None
    mean_score: float | None
    output: Grid
    score: Grid
    score_outlier: Grid
    score_other: Grid
    key: Grid
    key_outlier: Grid
    key_other: Grid
    value: Grid
    outliers: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Parts:
    """Bytes of a whole model's cache by what they hold, see storage.parts_of; their sum is its nbytes."""

    code: int
    metadata: int
    index: int
    padding: int
    window: int
    labels: int
    tables: int
    reserved: int


@dataclass(frozen=True)
class Counted:
    """Bits an element by kvdsl.bits at a length: exact tokens at 16, nothing that is reserved or that finds pages."""

    mean: float
    keys: float
    values: float
    code: float
    metadata: float
    padding: float
    window: float


@dataclass(frozen=True)
class Size:
    """One sequence of `tokens` tokens: bytes measured, `bits` of them an element, and what the spec counts.

    Exact rows take the model's dtype, `Evaluation.dtype`.  constants: bytes of calibrated numbers, for all sequences
    together, not among nbytes.
    """

    tokens: int
    nbytes: int
    bits: float
    parts: Parts
    constants: int
    counted: Counted


@dataclass(frozen=True)
class Storage:
    """Bytes over lengths, and bits of a number of either side as a formula in words: of the scheme's own stores, where
    layers may have others, which `sizes` count."""

    keys: str
    values: str
    sizes: tuple[Size, ...]


@dataclass(frozen=True)
class Reads:
    """How attention read: packed_calls read packed bytes, fresh_calls prompts from their own tensors; dense_calls and
    fallbacks should be 0.  exact_share: of the prompt's tokens in a window, how many stand there exactly, by the spec.
    """

    packed_calls: int
    fresh_calls: int
    dense_calls: int
    fallbacks: int
    exact_share: float


@dataclass(frozen=True)
class Tasks:
    """What was asked; None where a task was not."""

    perplexity: Perplexity | None = None
    passkey: Retrieval | None = None
    needle: Retrieval | None = None
    copy: Copy | None = None
    greedy: Greedy | None = None
    layers: Layers | None = None


@dataclass(frozen=True)
class SchemeResult:
    """One scheme.  bits: an element by kvdsl.bits at the length of a whole window, everything included.

    calibrated   names of what was measured on the first part of the text, or given
    refused      why the scheme was left out; then there are no figures
    backend      whose kernels ran
    prompt       exact: a prompt is attended in full precision, then packed; stored: it reads what is packed of itself
    seconds      spent on it, without what schemes share
    """

    scheme: str
    hash: str
    source: str
    bits: float | None
    perplexity: float | None
    delta: float | None
    tasks: Tasks
    storage: Storage | None = None
    reads: Reads | None = None
    backend: str | None = None
    prompt: str = "exact"
    calibrated: tuple[str, ...] = ()
    seconds: float = 0.0
    refused: str | None = None


@dataclass(frozen=True)
class Model:
    """What was run: name, a digest of its weights, shape, dtype and device."""

    name: str
    digest: str
    kind: str
    layers: int
    kv_heads: int
    q_heads: int
    head_dim: int
    dtype: str
    device: str


@dataclass(frozen=True)
class Text:
    """What was read: tokens in all; those before `scored_from` were calibrated on, none of them is scored."""

    name: str
    sha256: str
    tokens: int
    scored_from: int


@dataclass(frozen=True)
class Evaluation:
    """All of it.  `settings` as kvdsl.evaluation.Settings has them; `notes` say how it was measured, in sentences."""

    model: str
    text: str
    about_model: Model
    about_text: Text
    settings: dict[str, Any]
    versions: dict[str, str]
    results: tuple[SchemeResult, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values alone.  Of tasks those that were asked."""
        told: dict[str, Any] = _plain(self)
        return told

    def _repr_html_(self) -> str:
        from kvdsl.notebook import of_evaluation

        return of_evaluation(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """What `to_dict` gave, also behind JSON.  ValueError for what is no such document."""
        try:
            found: Self = made(cls, data)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"results: {error!r}; give a document that `kvdsl eval` wrote") from None
        return found


def _plain(value: Any) -> Any:
    if isinstance(value, Tasks):
        return {name: _plain(x) for name, x in vars(value).items() if x is not None}
    if dataclasses.is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(x) for x in value]
    return {name: _plain(x) for name, x in value.items()} if isinstance(value, dict) else value


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, which are text in its module, read once."""
    return typing.get_type_hints(kind)


def made(kind: Any, data: Any) -> Any:
    """A value of an annotated type from plain ones.  TypeError, AttributeError or KeyError for what is none; None may
    stand for a float, as JSON has it for what is not finite."""
    origin = typing.get_origin(kind)
    if kind is Any or (data is None and kind is float):
        return data
    if origin in (typing.Union, types.UnionType):
        kind = next(one for one in typing.get_args(kind) if one is not type(None))
        return None if data is None else made(kind, data)
    if dataclasses.is_dataclass(kind):
        hints = _hints(kind)  # type: ignore[arg-type]
        return kind(**{name: made(hints[name], value) for name, value in data.items()})  # type: ignore[operator]
    if origin is tuple:
        inner = typing.get_args(kind)[0]
        return tuple(made(inner, x) for x in data)
    if origin is dict:
        return dict(data)
    if not isinstance(data, (int, float) if kind is float else kind):
        raise TypeError(f"{data!r} is no {kind.__name__}")
    return data
