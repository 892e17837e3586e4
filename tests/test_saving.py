"""Laws of saved caches: what is saved comes back, and nothing else is ever taken for a saved cache."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_cases import DIM, HEADS, SCHEMES, Failing, compiled, content, filled, pair, same, view

from kvdsl.errors import CacheError, ShapeError
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.schemes import int8_tensor

EACH = pytest.mark.parametrize("name", SCHEMES)


def saved(path: Path, name: str = "whole") -> QuantizedCache:
    """A small cache, ragged and with a shared page, saved at `path`."""
    keys, values = pair(2, 120)
    cache = QuantizedCache(compiled(name), 2, capacity=512)
    cache.append(keys, values, counts=(120, 41))
    cache.select([0, 1, 0])
    cache.hide([4, 0, 0])
    cache.save(path)
    return cache


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensor bytes of a safetensors file."""
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@EACH
def test_saved_caches_come_back(name: str, tmp_path: Path) -> None:
    """Lengths, packed bytes, exact rows, starts and sharing survive, and both go on alike."""
    cache = saved(tmp_path / "cache.safetensors", name)
    back = QuantizedCache.load(tmp_path / "cache.safetensors", compiled(name), capacity=512)
    assert same(view(back), view(cache))
    keys, values = pair(3, 70, seed=8)
    for one in (cache, back):
        one.append(keys, values)
    for b in range(3):
        assert same(content(back, b), content(cache, b))
    assert os.listdir(tmp_path) == ["cache.safetensors"]


def test_used_bytes_are_saved_only(tmp_path: Path) -> None:
    """A file holds each used page once, the table and the exact tokens: no row that is free, no page that is shared
    twice."""
    path = tmp_path / "c"
    cache = saved(path)
    header, data = split(path.read_bytes())
    pages = len(set(cache.held()))
    exact = sum(n - p for side in ("keys", "values") for n, p in zip(cache.lengths, cache.packed(side), strict=True))
    assert len(data) == pages * cache.kernels.page_bytes + cache.batch * 3 * 4 + exact * HEADS * DIM * 4
    assert set(header) == {"__metadata__", "pages", "table", "keys", "values"}


def test_sliding_windows_and_drafts_are_saved(tmp_path: Path) -> None:
    """A cache whose window has let go of pages comes back with the same window, and crops alike while it records."""
    keys, values = pair(1, 400)
    cache = filled(compiled("whole"), keys, values, [100, 250, 399], window=60)
    cache.save(tmp_path / "c")
    back = QuantizedCache.load(tmp_path / "c", compiled("whole"))
    assert back.window == 60 and same(view(back), view(cache)) and len(set(back.held())) < 5
    empty = QuantizedCache(compiled("whole"), 0)
    empty.save(tmp_path / "c")
    assert QuantizedCache.load(tmp_path / "c", compiled("whole")).batch == 0


def test_other_kernels_are_refused(tmp_path: Path) -> None:
    """Another scheme, shape or set of parameters does not read a cache."""
    saved(tmp_path / "c")
    with pytest.raises(CacheError, match="scheme is"):
        QuantizedCache.load(tmp_path / "c", compiled("bare"))


def test_calibrated_numbers_are_given_again(tmp_path: Path) -> None:
    """A file does not hold them: they are asked for by name, and others than it was packed with are refused."""
    kernels, path = compiled(int8_tensor), tmp_path / "c"
    params = {"keys.scale": torch.full((1, 1), 0.02), "values.scale": torch.full((1, 1), 0.03)}
    cache = filled(kernels, *pair(2, 70), params=params)
    cache.save(path)
    assert same(view(QuantizedCache.load(path, kernels, params=params)), view(cache))
    with pytest.raises(ShapeError, match=r"params\['keys.scale'\]: missing; .*kvdsl.calibrate"):
        QuantizedCache.load(path, kernels)
    with pytest.raises(CacheError, match="other calibrated parameters"):
        QuantizedCache.load(path, kernels, params=params | {"keys.scale": torch.ones(1, 1)})


def test_every_damage_is_found(tmp_path: Path) -> None:
    """Any flipped bit of the header, flipped bits of the payload, any cut and any added byte are refused."""
    path, bad = tmp_path / "good", tmp_path / "bad"
    saved(path)
    raw, kernels = path.read_bytes(), compiled("whole")
    (length,) = struct.unpack("<Q", raw[:8])
    start = 8 + length
    spots = [*range(start), *range(start, len(raw), max(1, (len(raw) - start) // 60)), len(raw) - 1]
    damaged = [raw[:i] + bytes([raw[i] ^ (1 << i % 8)]) + raw[i + 1 :] for i in spots]
    damaged += [raw[:n] for n in (0, 7, 8, 100, start, start + 1, len(raw) - 1)] + [raw + b"\0"]
    for number, data in enumerate(damaged):
        bad.write_bytes(data)
        with pytest.raises(CacheError):
            QuantizedCache.load(bad, kernels)
            pytest.fail(f"damage {number} was not found")


def test_claims_are_checked_before_allocation(tmp_path: Path) -> None:
    """Headers that claim what the file does not hold, with right checksums, are refused without making a tensor."""
    path, bad = tmp_path / "good", tmp_path / "bad"
    saved(path)
    header, data = split(path.read_bytes())
    kernels = compiled("whole")
    document = json.loads(header["__metadata__"]["kvdsl"])

    def told(**changes: Any) -> dict[str, Any]:
        import hashlib

        text = json.dumps(document | changes)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return header | {"__metadata__": {"kvdsl": text, "sha256": digest}}

    members = document["members"]
    forged = [
        told(members=[[10**12, 10**12, 10**12, 0, 0]]),
        told(members=[[2**31 - 1 - 3, 2**31 - 64, 2**31 - 100, 0, 0]] * 3),
        told(members=[[120, 96, 85, 64, 0], *members[1:]]),
        told(members=[[120, 97, 85, 0, 0], *members[1:]]),
        told(members=[[120, 96, 85, 0, 121], *members[1:]]),
        told(members=[[True, 0, 0, 0, 0], *members[1:]]),
        told(members=[[-1, 0, 0, 0, 0], *members[1:]]),
        told(members="no"),
        told(members=members[:2]),
        told(window=0),
        told(draft=-1),
        told(format=1),
        told(page_bytes=16),
        told(more=1),
        told(params="0" * 64),
        header | {"pages": {"dtype": "U8", "shape": [10**12, 10**6], "data_offsets": [0, 10**18]}},
        header | {"pages": header["pages"] | {"shape": [-1, 5]}},
        header | {"more": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}},
        {"__metadata__": header["__metadata__"]},
        {"pages": header["pages"]},
    ]
    texts = [joined(h, data) for h in forged] + [struct.pack("<Q", 600_000) + b"[" * 600_000]
    texts += [struct.pack("<Q", 2**40) + data, joined(header, data)[:-5] + b"12345"]
    for number, raw in enumerate(texts):
        bad.write_bytes(raw)
        with Failing(10**9, MemoryError) as operations, pytest.raises(CacheError):
            QuantizedCache.load(bad, kernels)
            pytest.fail(f"forgery {number} was not found")
        assert number in (14, 22) or operations.left == 10**9, number
    bad.write_bytes(joined(header, data))
    QuantizedCache.load(bad, kernels)


def test_tables_lead_somewhere(tmp_path: Path) -> None:
    """A table with an index out of range, a missing page or a page too many is refused, checksums or not;
    so are packed counts that the scheme's window never has."""
    from kvdsl.snapshot import expected, restore, snapshot

    cache = saved(tmp_path / "c")
    document, tensors = snapshot(cache)
    for numbers in ([120, 97, 85, 0, 0], [120, 112, 118, 0, 0], [120, 96, 84, 0, 0], [120, 64, 85, 0, 0]):
        with pytest.raises(CacheError, match="do not agree"):
            expected(document | {"members": [numbers, *document["members"][1:]]}, cache.kernels)
    for row, column, page in ((0, 0, 99), (0, 0, -1), (0, 0, 0), (1, 2, 1), (0, 1, 1)):
        table = tensors["table"].clone()
        assert table[row, column] != page
        table[row, column] = page
        with pytest.raises(CacheError, match="pages"):
            restore(QuantizedCache(cache.kernels, 3), document, tensors | {"table": table})


def test_a_pickle_is_no_saved_cache(tmp_path: Path) -> None:
    """Loading never runs what a file holds, and nothing here loads pickled files."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / "trap").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CacheError):
        QuantizedCache.load(tmp_path / "trap", compiled("bare"))
    torch.save({"x": torch.ones(1)}, tmp_path / "trap")
    with pytest.raises(CacheError):
        QuantizedCache.load(tmp_path / "trap", compiled("bare"))
    assert not (tmp_path / "sprung").exists()
    folder = Path(__file__).parent.parent / "kvdsl"
    for file in folder.glob("*.py"):
        text = file.read_text()
        assert "torch.load" not in text and "pickle.load" not in text, file


@pytest.mark.parametrize("where", ["save_file", "fsync", "replace"])
def test_an_interrupted_save_keeps_the_old_file(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever step of saving is interrupted, the old file is whole and no other is left."""
    import safetensors.torch

    path = tmp_path / "c"
    cache = saved(path)
    old = path.read_bytes()

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    cache.append(*pair(3, 9))
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch if where == "save_file" else os, where, stop)
        with pytest.raises(KeyboardInterrupt):
            cache.save(path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["c"]
    cache.save(path)
    assert QuantizedCache.load(path, compiled("whole")).lengths == cache.lengths


def test_failing_tensor_operations_keep_the_old_file(tmp_path: Path) -> None:
    """The same for every tensor operation of a save."""
    path = tmp_path / "c"
    cache = saved(path)
    before, old = view(cache), path.read_bytes()
    for at in itertools.count(1):
        try:
            with Failing(at, MemoryError):
                cache.save(path)
            break
        except MemoryError:
            assert path.read_bytes() == old and os.listdir(tmp_path) == ["c"]
    assert at > 3 and same(view(cache), before)
