"""A cache as plain data: a JSON document and four tensors that hold the used bytes only.

document   format, scheme (hash), shape, page_tokens, page_bytes, window, draft, members (length, keys, values, gone,
           start for each sequence: see members.py), params (a digest of the calibrated parameters)
pages      uint8 (P, page_bytes): every page that is held, once
table      int32 (B, width): 1 + the row of `pages`, 0 for none
keys, values   (tokens, H, D): exact tokens, sequence by sequence, sinks first
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .deflated import FIELD, LENGTHS, refuse_level
from .errors import CacheError
from .inputs import DTYPES
from .kernels import KernelSet, Params, Side
from .members import Member, Policy
from .pages import ZERO, PageTable, upload
from .rows import live_index
from .scheme import SIDES

if TYPE_CHECKING:
    from .quantized_cache import QuantizedCache

FORMAT = 2  # raise it when bytes of a page mean something else
Document = dict[str, Any]
FIELDS = ("length", "keys", "values", "gone", "start")


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes, in hex."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def params_digest(params: Params) -> str:
    """One digest of all parameters: names, dtypes, shapes and bytes."""
    text = "".join(f"{n} {t.dtype} {tuple(t.shape)} {digest(t)}\n" for n, t in sorted(params.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def identity(kernels: KernelSet) -> Document:
    """What a saved cache and the kernels that read it must agree on."""
    shape = dataclasses.asdict(kernels.shape)
    if not kernels.shape.placed:  # files that were written before there was such a thing say nothing of it
        del shape["placed"]
    return {
        "format": FORMAT,
        "scheme": kernels.scheme.hash,
        "shape": shape,
        "page_tokens": kernels.page_tokens,
        "page_bytes": kernels.page_bytes,
    }


def snapshot(cache: QuantizedCache) -> tuple[Document, dict[str, Tensor]]:
    """The cache as plain data; the tensors are copies on the cache's device."""
    now = cache._now
    document = identity(cache.kernels) | {
        "window": now.policy.sliding,
        "draft": now.policy.draft,
        "members": [[getattr(m, field) for field in FIELDS] for m in now.members],
        "params": params_digest(cache.params),
    }
    held = sorted(set(cache.held()))
    local = {ZERO: 0} | {page: 1 + i for i, page in enumerate(held)}
    with torch.no_grad():
        table = PageTable.of([[local[page] for page in ids] for ids in now.table.ids], cache.device).tensor
        tensors = {"pages": cache.pool.bytes[upload(held, cache.device, torch.int64)], "table": table}
        for side in SIDES:
            b, row = _live(now.policy, now.members, side)
            tensors[side] = now.rows(side).transpose(1, 2)[b.to(cache.device), row.to(cache.device)]
    return document, tensors


def expected(document: Document, kernels: KernelSet) -> dict[str, tuple[torch.dtype, tuple[int | None, ...]]]:
    """dtype and shape of each tensor of a document (None: any), or CacheError naming what does not fit."""
    for key, right in identity(kernels).items():
        if document.get(key) != right:
            raise CacheError(f"saved cache: {key} is {document.get(key)!r}, these kernels need {right!r}")
    level = document.get(FIELD)
    refuse_level(level)
    if set(document) - {FIELD} != {*identity(kernels), "window", "draft", "members", "params"}:
        raise CacheError(f"saved cache: its fields are {sorted(map(str, document))}, which is not format {FORMAT}")
    window, draft, rows = document["window"], document["draft"], document["members"]
    if not (window is None or _count(window, 1)) or not _count(draft, 0) or not isinstance(rows, list):
        raise CacheError(f"saved cache: window {window!r} or draft {draft!r} is no count, or members is no list")
    policy = Policy.of(kernels, window, draft)
    members = tuple(_member(policy, row) for row in rows)
    heads, dtype = kernels.shape.kv_heads, DTYPES[kernels.shape.dtype]
    width = 1 + max((-(-m.packed // policy.page_tokens) for m in members), default=0)
    sizes: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {
        "pages": (torch.uint8, (None, kernels.page_bytes)),
        "table": (torch.int32, (len(members), width)),
    }
    if level is not None:
        sizes |= {"pages": (torch.uint8, (None,)), LENGTHS: (torch.int32, (None,))}
    for side in SIDES:
        exact = sum(min(policy.sinks, m.length) + policy.after_sinks(m.length) - m.packed_of(side) for m in members)
        sizes[side] = (dtype, (exact, heads, kernels.dim(side)))
    return sizes


def restore(cache: QuantizedCache, document: Document, tensors: Mapping[str, Tensor]) -> None:
    """Fill an empty cache of the document's batch from checked data.  CacheError for tables that lead nowhere."""
    if document["params"] != params_digest(cache.params):
        raise CacheError("saved cache: it was packed with other calibrated parameters; give the same params=")
    policy = Policy.of(cache.kernels, document["window"], document["draft"])
    members = tuple(_member(policy, row) for row in document["members"])
    entries, count = tensors["table"].tolist(), len(tensors["pages"])
    if {page for row in entries for page in row} | {0} != set(range(count + 1)):
        raise CacheError(f"saved cache: its table does not name each of {count} pages")
    ids, place = [], dict[int, int]()
    for member, row in zip(members, entries, strict=True):
        used = -(-member.packed // policy.page_tokens)
        astray = any(page and place.setdefault(page, j) != j for j, page in enumerate(row))
        if astray or any(row[used:]) or (policy.sliding is None and not all(row[:used])):
            raise CacheError(f"saved cache: a sequence of {member.packed} packed tokens has pages {row}")
        ids.append(row[:used])
    with cache._changing() as now:
        pages = [ZERO, *cache.pool.take(count)]
        if count:
            cache.pool.bytes[upload(pages[1:], cache.device, torch.int64)] = tensors["pages"].to(cache.device)
        after = type(now).empty(policy, len(members), cache.kernels, cache.device)
        for side in SIDES:
            b, row = _live(policy, members, side)
            rows = after.rows(side).transpose(1, 2)
            rows[b.to(cache.device), row.to(cache.device)] = tensors[side].to(cache.device)
        table = PageTable.of([[pages[page] for page in row] for row in ids], cache.device)
        cache._commit(after.moved(members, table=table))
        cache.pool.recount()


def _live(policy: Policy, members: tuple[Member, ...], side: Side) -> tuple[Tensor, Tensor]:
    packed = [m.packed_of(side) for m in members]
    return live_index(policy.sinks, policy.ring, [m.length for m in members], packed)


def _member(policy: Policy, row: Any) -> Member:
    if not isinstance(row, list) or len(row) != len(FIELDS) or not all(_count(n, 0) for n in row):
        raise CacheError(f"saved cache: {str(row)[:80]} are not the numbers of a sequence ({', '.join(FIELDS)})")
    length, keys, values, gone, start = row
    end = policy.after_sinks(length)
    for window, packed in ((policy.keys, keys), (policy.values, values)):
        if packed % window.block or not window.packed(length) <= packed <= end:
            raise CacheError(f"saved cache: {packed} packed tokens of {length} do not agree with the scheme's window")
    if gone % policy.page_tokens or (gone and policy.sliding is None) or gone > end or start > length:
        raise CacheError(f"saved cache: {gone} tokens let go of, or start {start}, do not agree with {length} tokens")
    return Member(length, keys, values, keys, values, gone, start)


def _count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 2**31
