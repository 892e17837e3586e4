"""Saved caches: one safetensors file, its metadata a JSON document; nothing in it can run code.

The metadata holds the document of snapshot.py with a sha256 for each tensor, and the sha256 of the document itself, so
a flipped bit anywhere is found.  Everything is checked against the file's size and the kernels before a tensor is made.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from .deflated import deflated, inflated, refuse_level
from .errors import CacheError
from .kernels import KernelSet
from .snapshot import Document, digest, expected, restore, snapshot

if TYPE_CHECKING:
    from .quantized_cache import QuantizedCache

Cache = TypeVar("Cache", bound="QuantizedCache")
HEADER_LIMIT = 1 << 20
TYPES = {"U8": torch.uint8, "I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def save(cache: QuantizedCache, path: Path, deflate: int | None = None) -> None:
    """Write the cache to `path`, its pages as they are or as streams of a level of DEFLATE; an interrupted save leaves
    what was there."""
    from safetensors.torch import save_file

    refuse_level(deflate)
    document, tensors = deflated(*snapshot(cache), deflate)
    text = json.dumps(document | {"sha256": {name: digest(t) for name, t in tensors.items()}}, sort_keys=True)
    if len(text) > HEADER_LIMIT // 2:
        raise CacheError(f"save: {len(document['members'])} sequences do not fit one header; save them in parts (fork)")
    part = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.part")
    try:
        save_file(tensors, part, {"kvdsl": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load(kind: type[Cache], path: Path, kernels: KernelSet, options: Mapping[str, Any]) -> Cache:
    """The cache saved at `path`; errors as for `read`."""
    return _made(kind, kernels, *read(path, kernels), options)


def read(path: Path, kernels: KernelSet) -> tuple[Document, dict[str, Tensor]]:
    """What the file at `path` holds, checked.  CacheError when it is damaged or was made for another scheme, shape or
    format."""
    with open(path, "rb") as file:
        document, sums, places, start = _header(file, path)
        sizes = expected(document, kernels)
        _check(sizes, places, sums, path)
        tensors = {}
        for name, (dtype, shape, begin, end) in places.items():
            file.seek(start + begin)
            data = bytearray(file.read(end - begin))
            if len(data) != end - begin or hashlib.sha256(data).hexdigest() != sums[name]:
                raise CacheError(f"{path}: the bytes of {name!r} are damaged")
            tensors[name] = (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).view(shape)
    try:
        return inflated(document, tensors)
    except CacheError as error:
        raise CacheError(f"{path}: {error}") from error


def copied(cache: Cache) -> Cache:
    """A cache of its own with the same content and the same kernels."""
    document, tensors = snapshot(cache)
    options = {"device": cache.device, "params": cache.params, "capacity": cache.capacity}
    return _made(type(cache), cache.kernels, document, tensors, options)


def reduced(cache: QuantizedCache) -> tuple[Any, ...]:
    """For pickle: the kernels are named by what they are built from, the tensors lie on the CPU."""
    document, tensors = snapshot(cache)
    built = (cache.kernels.scheme, cache.kernels.shape, cache.kernels.backend)
    params = {name: tensor.cpu() for name, tensor in cache.params.items()}
    options = {"device": str(cache.device), "params": params, "capacity": cache.capacity}
    return _rebuilt, (type(cache), built, document, {name: t.cpu() for name, t in tensors.items()}, options)


def _rebuilt(
    kind: type[Cache], built: tuple[Any, ...], document: Document, tensors: dict[str, Tensor], options: Any
) -> Cache:
    from .codegen import build

    scheme, shape, backend = built
    return _made(kind, build(scheme, shape, backend=backend), document, tensors, options)


def _made(
    kind: type[Cache], kernels: KernelSet, document: Document, tensors: Mapping[str, Tensor], options: Mapping[str, Any]
) -> Cache:
    cache = kind(kernels, len(document["members"]), window=document["window"], **options)
    restore(cache, document, tensors)
    return cache


Places = dict[str, tuple[torch.dtype, tuple[int, ...], int, int]]


def _header(file: BinaryIO, path: Path) -> tuple[Document, dict[str, str], Places, int]:
    """The document, the sha256 of each tensor, where each lies, and where the tensors begin in the file."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 0 < length <= min(HEADER_LIMIT, size - 8):
        raise CacheError(f"{path}: no saved cache: {size} bytes with a header of {length}")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_once)
        metadata = header.pop("__metadata__")
        if (
            set(metadata) != {"kvdsl", "sha256"}
            or hashlib.sha256(metadata["kvdsl"].encode()).hexdigest() != metadata["sha256"]
        ):
            raise ValueError("its description does not match its checksum")
        document = json.loads(metadata["kvdsl"], object_pairs_hook=_once)
        sums = document.pop("sha256")
        places = {name: _place(entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheError(f"{path}: the header of this saved cache is damaged ({error})") from error
    border = 0
    for _, _, begin, end in sorted(places.values(), key=lambda place: place[2:]):
        if begin != border or end < begin:
            raise CacheError(f"{path}: tensor bytes {begin}..{end} do not follow {border}")
        border = end
    if border != size - 8 - length:
        raise CacheError(f"{path}: {size - 8 - length} bytes of tensors, the header says {border}")
    return document, sums, places, 8 + length


def _place(entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"a tensor is described by {sorted(entry)}")
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(n) is int and 0 <= n < 2**48 for n in (begin, end, *shape)):
        raise ValueError(f"shape {shape} at {begin}..{end} is none")
    dtype = TYPES[entry["dtype"]]
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"shape {shape} does not take {end - begin} bytes")
    return dtype, shape, begin, end


def _check(
    sizes: Mapping[str, tuple[torch.dtype, tuple[int | None, ...]]], places: Places, sums: Any, path: Path
) -> None:
    if set(places) != set(sizes) or not isinstance(sums, dict) or set(sums) != set(sizes):
        raise CacheError(f"{path}: it holds {sorted(places)}, a saved cache holds {sorted(sizes)}")
    for name, (dtype, right) in sizes.items():
        found, shape = places[name][:2]
        if (
            found != dtype
            or len(shape) != len(right)
            or any(r is not None and r != s for r, s in zip(right, shape, strict=True))
        ):
            raise CacheError(f"{path}: {name!r} is {found} {shape}, its description says {dtype} {right}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table
