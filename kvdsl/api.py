"""What is left of keys, values, scores and attention after a scheme: through real packed bytes and generated kernels.

The functions ask what kvdsl.reference asks, with the same arguments, and answer in the precision of the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import routed_api
from .errors import ShapeError
from .fisher import Gradients, coded, weighted
from .fitting import fitted, without_single
from .head_api import by_heads, calibrated
from .inputs import DTYPES, refuse_tensor
from .kernels import AttentionState, Backend, KernelSet, Params, Side
from .params import ROPE, checked, wanted
from .quantized_cache import QuantizedCache
from .scheme import SIDES, Scheme, Store, TopChannels
from .shape import InputFormat, Shape
from .window import windows

FORMATS: dict[torch.dtype, InputFormat] = {dtype: name for name, dtype in DTYPES.items()}  # type: ignore[misc]
AXES = "(batch, kv_heads, tokens, head_dim)"


def roundtrip(
    scheme: Scheme,
    k: Tensor,
    v: Tensor,
    *,
    backend: Backend | None = None,
    window: bool = True,
    params: Params | None = None,
    labels: Tensor | None = None,
    queries: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(k^, v^), float32 (B, H, T, D) each: what a cache holds of k and v (B, H, T, D) once appended and flushed.

    `window=False` leaves the window and the sinks out: every token is quantized, T must be whole blocks.
    `params` holds what a calibrated scheme wants, see `calibrate`.  Of a scheme with layers, its own stores are used.
    `backend` "triton" or "torch"; None: triton where there is a GPU or TRITON_INTERPRET=1.  Of schemes
    with tiers: `queries` (B, Hq, T, D) of all tokens, where tokens are sent by the attention that they receive, or keys
    balanced against queries; or `labels`, integers (B, H, T), the tier of each token.  What is dropped is zeros.

    Raises ShapeError (a tensor), SchemeError (the scheme does not fit the shape), BackendError.
    """
    if scheme.heads:
        given: dict[str, Any] = dict(backend=backend, window=window, params=params, labels=labels, queries=queries)
        keys, values = by_heads(roundtrip, scheme, k, v=v, **given)
        return keys, values
    with torch.no_grad():
        if scheme.routed:
            return routed_api.roundtrip(scheme, k, v, backend, window, params, labels, queries)
        run = _Run.of(scheme, k, v, None, backend, window, params)
        keys, values = (run.held(side) for side in SIDES)
        return keys.to(k.device), values.to(k.device)


def scores(
    scheme: Scheme,
    q: Tensor,
    k: Tensor,
    *,
    backend: Backend | None = None,
    window: bool = True,
    params: Params | None = None,
    labels: Tensor | None = None,
    queries: Tensor | None = None,
) -> Tensor:
    """q.k^ before any scaling or mask: q (B, Hq, Q, D), k (B, H, T, D) -> float32 (B, Hq, Q, T).

    Query head h reads kv head h // (Hq / H).  Arguments and errors as in `roundtrip`.
    """
    if scheme.heads:
        given: dict[str, Any] = dict(backend=backend, window=window, params=params, labels=labels, queries=queries)
        return by_heads(scores, scheme, k, q=q, **given)[0]
    with torch.no_grad():
        if scheme.routed:
            return routed_api.scores(scheme, q, k, backend, window, params, labels, queries)
        run = _Run.of(scheme, k, k, q, backend, window, params, sides=("keys",))
        first, packed, query = run.sinks, run.packed("keys"), run.query
        assert query is not None
        found = query.float() @ run.keys.float().repeat_interleave(run.kernels.shape.group, 1).transpose(2, 3)
        if packed:
            state = run.state
            found[..., first : first + packed] = run.kernels.scores(query, state.pool, state.table, packed, run.params)
        return found.to(k.device)


def attend(
    scheme: Scheme,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: Backend | None = None,
    scale: float | None = None,
    window: bool = True,
    params: Params | None = None,
    sliding: int | None = None,
    start: Tensor | int | None = None,
    softcap: float | None = None,
    labels: Tensor | None = None,
    queries: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last Q of T tokens: q (B, Hq, Q, D), k and v (B, H, T, D).

    Returns (out (B, Hq, Q, D) in q's dtype, lse float32 (B, Hq, Q): the natural logarithm of the sum of exp of the
    scaled scores); zeros and -inf for a query that sees no token.  The Q tokens are one step: with prefill="exact"
    they are seen exactly and the T - Q older ones as the cache held them before the step, with prefill="stored" all
    tokens as it holds them after.

    scale     factor on q.k, default head_dim ** -0.5
    sliding   a query sees the newest `sliding` tokens up to its own
    start     the first visible token, an integer or int (B,): left padding
    softcap   c: scores become c * tanh(score / c) after scaling

    Other arguments and errors as in `roundtrip`.
    """
    if scheme.heads:
        given: dict[str, Any] = dict(backend=backend, window=window, params=params, labels=labels, queries=queries)
        given |= dict(q=q, v=v, scale=scale, sliding=sliding, start=start, softcap=softcap)
        out, lse = by_heads(attend, scheme, k, **given)
        return out, lse
    if scheme.routed and start is not None:
        raise ShapeError(
            "start: padding is never sent to tiers; leave it out, and give sequences without their padding"
        )
    with torch.no_grad():
        if scheme.routed:
            return routed_api.attend(scheme, q, k, v, backend, scale, window, params, labels, queries, softcap, sliding)
        count = q.shape[2] if isinstance(q, Tensor) and q.dim() == 4 else 0
        capped = softcap is not None
        run = _Run.of(scheme, k, v, q, backend, window, params, queries=count, softcap=capped, sliding=sliding)
        state = replace(
            run.state,
            scaling=k.shape[3] ** -0.5 if scale is None else scale,
            softcap=softcap,
            window=sliding,
            start=run.state.start if start is None else _starts(start, k.shape[0], run.keys.device),
        )
        assert run.query is not None
        if not run.query.numel():
            return torch.empty_like(q), q.new_zeros(q.shape[:3], dtype=torch.float32)
        out, lse = run.kernels.attend(run.query, state, run.params)
        return out.to(k.device), lse.to(k.device)


def calibrate(
    scheme: Scheme,
    k: Tensor,
    v: Tensor,
    q: Tensor | None = None,
    *,
    params: Params | None = None,
    gradients: Gradients | None = None,
) -> dict[str, Tensor]:
    """What the scheme takes from data, measured over k and v (B, H, T, D), and over queries q (B, Hq, Q, D) where keys
    are balanced against them, a basis is by attention or an order by energy: thresholds of single numbers, transforms,
    calibrated scales, rounded as the scheme stores them, second levels, tables of levels; float32 on the CPU.  Empty
    where nothing is calibrated.

    The first token stands at position 0: those that the scheme keeps as sinks are not measured.  `params` holds what no
    data tells, the frequencies `keys.transform[0]` of PreRope, which are returned too.  `gradients`, for tables with
    weights="fisher": the derivatives of a loss by k and by v, of their shapes, whatever their common factor.

    Raises ShapeError for tensors that are no such pair, hold no token to measure, or hold a NaN, and for gradients that
    are missing, not finite or all 0.
    """
    from .calibration import measured
    from .reference.quantize import encoded_rows

    if scheme.heads:
        return calibrated(calibrate, scheme, k, v=v, q=q, params=params, gradients=gradients)
    if scheme.routed:
        return routed_api.calibrate(scheme, k, v, q, params, gradients)
    shape, found = _shape(k, None), dict[str, Tensor]()
    refuse_tensor("v", v, (*k.shape[:3], scheme.dim("values", k.shape[3])), shape, k.device)
    sinks = scheme.sinks.tokens if scheme.sinks else 0
    if not k[:, :, sinks:].numel():
        beside = f" beside {sinks} sinks" if sinks else ""
        raise ShapeError(f"k: shape {tuple(k.shape)} holds no token{beside}; give typical keys and values")
    given = {ROPE: (params or {})[ROPE]} if scheme.keys.rope is not None and ROPE in (params or {}) else {}
    queries = None if q is None else q.detach().cpu()
    for side, x in zip(SIDES, (k, v), strict=True):
        store, x = scheme.side(side), x[:, :, sinks:].detach().cpu()
        x, single, own = without_single(store, side, x, given, sinks)
        if isinstance(store.outliers, TopChannels) and store.outliers.online:  # x is without them
            store = store.with_(outliers=None)
        own = fitted(store, side, x, queries, own, sinks, k[:, :, sinks:].detach().cpu())
        store = store.own
        y = encoded_rows(store, x, own, side, sinks) if store.turned else x
        dy = _gradient(store, x, single, gradients, own | given, side, sinks) if weighted(store) else None
        single = None if store.mapped or store.polar else single  # what is coded is other numbers
        found |= own | measured(store.with_(transform=()), y, side, dy, single, store.rope)
    ready = checked(scheme, shape, found | given)
    return {name: ready[name].to(torch.float32) for name in wanted(scheme, shape)}


def _gradient(
    store: Store,
    x: Tensor,
    single: Tensor | None,
    gradients: Gradients | None,
    params: dict[str, Tensor],
    side: Side,
    sinks: int,
) -> Tensor:
    """The loss's derivative by what is coded of x, the tokens behind the sinks, without single numbers."""
    if gradients is None:
        raise ShapeError(
            f"gradients: missing; {side}.code has weights='fisher', give gradients=(dk, dv), the derivatives of the "
            "model's loss by k and v, as kvdsl.hf.weighed observes them"
        )
    given, right = gradients[SIDES.index(side)], (x.shape[0], x.shape[1], x.shape[2] + sinks, x.shape[3])
    if not isinstance(given, Tensor) or tuple(given.shape) != right:
        what = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"{type(given).__name__} is no tensor"
        raise ShapeError(f"gradients[{side!r}]: {what}; the right shape is {right}, that of {side[0]}")
    return coded(store, x, given[:, :, sinks:].detach().cpu(), params, side, sinks, single)


@dataclass(frozen=True)
class _Run:
    """Keys and values brought into packed bytes, and what attention would read of them."""

    kernels: KernelSet
    params: dict[str, Tensor]
    query: Tensor | None
    keys: Tensor
    values: Tensor
    sinks: int
    state: AttentionState
    cache: QuantizedCache | None = None
    """Whoever owns the pages of `state`: they live as long as it does."""

    @classmethod
    def of(
        cls,
        scheme: Scheme,
        k: Tensor,
        v: Tensor,
        q: Tensor | None,
        backend: Backend | None,
        window: bool,
        params: Params | None,
        *,
        queries: int = 0,
        softcap: bool = False,
        sliding: int | None = None,
        sides: tuple[Side, ...] = SIDES,
    ) -> _Run:
        """Check, compile, append.  The last `queries` tokens are one step of their own."""
        from .codegen import build

        shape = replace(_shape(k, q), softcap=softcap)
        refuse_tensor("k", k, tuple(k.shape), shape, k.device)
        if "values" not in sides:
            v = k[..., : scheme.dim("values", k.shape[3])]
        else:
            refuse_tensor("v", v, (*k.shape[:3], scheme.dim("values", k.shape[3])), shape, k.device)
            _refuse_others(scheme, k, v)
        if q is not None:
            refuse_tensor("q", q, (k.shape[0], shape.q_heads, None, k.shape[3]), shape, k.device)
        if queries > k.shape[2]:
            raise ShapeError(
                f"q: {queries} queries for {k.shape[2]} tokens; they belong to the last tokens, give at most those"
            )
        if sliding is not None and (type(sliding) is not int or sliding < 1):
            raise ShapeError(f"sliding: {sliding!r} is no positive number of tokens")
        # Without the window nothing is exact, the sinks neither.
        stored = scheme if window else scheme.with_(sinks=None)
        _whole_blocks(stored, k.shape[2], window, sides)
        kernels = build(stored, shape, backend)
        device = _device(kernels, k)
        ready = checked(stored, shape, params, device)
        query, keys, values = (None if x is None else x.to(device) for x in (q, k, v))
        assert keys is not None and values is not None
        if not window:
            return cls(kernels, ready, query, keys, values, 0, _all_packed(kernels, keys, values, ready, sides))
        cache = QuantizedCache(
            kernels, k.shape[0], device=device, params=ready, window=sliding, capacity=max(1, k.shape[2])
        )
        old = k.shape[2] - queries
        state = cache.append(keys[:, :, :old], values[:, :, :old])
        if queries:
            state = cache.append(keys[:, :, old:], values[:, :, old:])
        sinks = scheme.sinks.tokens if scheme.sinks else 0
        return cls(kernels, ready, query, keys, values, sinks, state if queries else cache.state(), cache)

    def packed(self, side: Side) -> int:
        """Tokens after the sinks that are packed, the same in every sequence."""
        counts = self.state.packed_keys if side == "keys" else self.state.packed_values
        return int(counts.max()) if counts.numel() else 0

    def held(self, side: Side) -> Tensor:
        """All tokens of a side as the state has them, float32."""
        found = (self.keys if side == "keys" else self.values).float().clone()
        if packed := self.packed(side):
            state = self.state
            decoded = self.kernels.unpack(side, state.pool, state.table, 0, packed, self.params)
            found[:, :, self.sinks : self.sinks + packed] = decoded
        return found


def _shape(k: Tensor, q: Tensor | None) -> Shape:
    """The shape to compile for.  ShapeError for tensors that have none."""
    for name, x, axes in (("k", k, AXES), ("q", q, AXES.replace("kv", "q").replace("tokens", "queries"))):
        if x is None and name == "q":
            continue
        if not isinstance(x, Tensor):
            raise ShapeError(f"{name}: {type(x).__name__} is no tensor; give one of {axes}")
        if x.dim() != 4:
            raise ShapeError(f"{name}: shape {tuple(x.shape)} has {x.dim()} axes; give {axes}")
        if x.dtype not in FORMATS:
            raise ShapeError(f"{name}: {x.dtype} is none of float16, bfloat16, float32; convert it to one")
    return Shape(k.shape[3], k.shape[1], None if q is None else q.shape[1], FORMATS[k.dtype])


def _refuse_others(scheme: Scheme, k: Tensor, v: Tensor) -> None:
    """ShapeError for shared values that are not the keys' first channels."""
    same = not scheme.shared or torch.equal(v.nan_to_num(), k[..., : v.shape[3]].nan_to_num())
    if not same:
        raise ShapeError(
            f"v: other numbers than the first {v.shape[3]} channels of k, which shared values are; give "
            f"k[..., :{v.shape[3]}]"
        )


def _whole_blocks(scheme: Scheme, tokens: int, window: bool, sides: tuple[Side, ...]) -> None:
    for side in sides:
        block = windows(scheme)[side].block
        if not window and tokens % block:
            raise ShapeError(
                f"{side[0]}: {tokens} tokens are no whole number of blocks of {block}; give a multiple of {block}, or "
                f"window=True"
            )


def _device(kernels: KernelSet, k: Tensor) -> torch.device:
    """Where the kernels run: a compiled Triton kernel on the GPU, all else where the tensors are."""
    compiled = kernels.backend == "triton" and "interpreted" not in kernels.why
    return k.device if k.is_cuda or not compiled else torch.device("cuda")


def _all_packed(
    kernels: KernelSet, keys: Tensor, values: Tensor, params: Params, sides: tuple[Side, ...]
) -> AttentionState:
    """Every token quantized: pages of these tensors alone, in order, and no exact row."""
    batch, _, tokens, dim = keys.shape
    device, pages = keys.device, -(-tokens // kernels.page_tokens)
    pool = torch.zeros(max(1, batch * pages), kernels.page_bytes, dtype=torch.uint8, device=device)
    table = torch.zeros(batch, pages + 1, dtype=torch.int32, device=device)
    table[:, :pages] = torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)
    zeros = torch.zeros(batch, dtype=torch.int32, device=device)
    ends = torch.full_like(zeros, tokens)
    for side, x in (("keys", keys), ("values", values)):
        if side in sides and batch and tokens:
            kernels.pack(side, x.contiguous(), zeros, 0, zeros, ends, (0, tokens), pool, table, params)
    row, value_row = (x.new_zeros(batch, keys.shape[1], 1, x.shape[3]) for x in (keys, values))
    return AttentionState(
        pool=pool, table=table, packed_keys=ends, packed_values=ends, length=ends, key_rows=row, value_rows=value_row,
        first=zeros, start=zeros, longest=tokens, packed_most=tokens, scaling=dim**-0.5,
    )  # fmt: skip


def _starts(start: Tensor | int, batch: int, device: torch.device) -> Tensor:
    given = torch.as_tensor(start)
    if given.is_floating_point() or given.dim() > 1 or (given.dim() == 1 and given.shape[0] != batch):
        raise ShapeError(
            f"start: {tuple(given.shape)} of {given.dtype}; give an integer, or one for each of {batch} sequences"
        )
    return given.to(device, torch.int32).expand(batch).contiguous()
