"""How other systems are called: their caches hold the numbers that they should, by stand-ins for what is not here."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kvdsl import peers
from kvdsl.bench import Size, numbers
from kvdsl.exact import Tokens, attended
from kvdsl.peers import bit_decoding, flash_infer, kivi, row, vllm_triton
from kvdsl.peers.paged import fill, table, take

CPU = torch.device("cpu")
SIZE = Size(3, 2, 150, 4, 64)


class Once:
    """A clock of one sample."""

    def seconds(self, call: Any, samples: int, *, cold: bool, graph: bool) -> tuple[float, ...]:
        call()
        return (1e-6,)


def measured(peer: peers.Peer, size: Size = SIZE) -> dict[str, Any]:
    """The row of a peer that is said to be there."""
    return row(peer, size, CPU, Once(), lambda n: 1e12)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for module in (bit_decoding, flash_infer, kivi, vllm_triton):
        monkeypatch.setattr(module, "missing", lambda *_: None)
    return monkeypatch


def modules(monkeypatch: pytest.MonkeyPatch, **given: dict[str, Any]) -> None:
    """Stand-ins, with what is imported of them; the last dot of a name is `__`."""
    for name, values in given.items():
        path = name.replace("__", ".")
        for end in range(1, path.count(".") + 2):
            part = ".".join(path.split(".")[:end])
            if part not in sys.modules or part == path:
                monkeypatch.setitem(sys.modules, part, ModuleType(part))
        vars(sys.modules[path]).update(values)


class Wrapper:
    """FlashInfer's, as far as it is called: attention in float64 over the pages that its plan names."""

    def __init__(self, workspace: Tensor, layout: str, *, use_tensor_cores: bool, backend: str) -> None:
        assert (layout, use_tensor_cores, backend) == ("NHD", True, "fa2")

    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int,
        head_dim: int, page_size: int, *, q_data_type: torch.dtype, kv_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        self.given = (indptr, indices, last_page_len, page_size)
        assert {indptr.dtype, indices.dtype, last_page_len.dtype} == {torch.int32}

    def run(self, q: Tensor, pages: Tensor, *, out: Tensor, kv_cache_sf: Tensor | None = None) -> Tensor:
        starts, indices, last, page = self.given
        if kv_cache_sf is not None:
            assert kv_cache_sf.shape == (*pages.shape[:4], pages.shape[4] // 8)
            return out.zero_()
        for b in range(len(last)):
            own = indices[starts[b] : starts[b + 1]]
            tokens = (len(own) - 1) * page + int(last[b])
            k, v = (pages[own.long(), side].flatten(0, 1)[:tokens].transpose(0, 1).float() for side in range(2))
            out[b] = attended(q[b], [Tokens(k, v)])
        return out


def test_flashinfer_reads_the_pages_that_it_is_given(there: pytest.MonkeyPatch) -> None:
    """150 tokens are two pages of 64 and 22 more; bytes are those of the numbers and three page numbers a sequence."""
    modules(there, flashinfer__decode={"BatchDecodeWithPagedKVCacheWrapper": Wrapper})
    fp16, fp8, nvfp4 = map(measured, flash_infer.FLASH_INFER)
    assert max(fp16["error"], fp8["error"]) < 1e-3 and nvfp4["error"] is None
    of_pages = 3 * 3 * 4
    assert [one["bytes"] - of_pages for one in (fp16, fp8)] == [SIZE.numbers * 2, SIZE.numbers]
    assert nvfp4["bytes"] - of_pages == SIZE.numbers * 9 // 16


def test_vllm_reads_codes_and_scales_through_its_table(there: pytest.MonkeyPatch) -> None:
    class Modes:
        INT8_PER_TOKEN_HEAD, FP8_PER_TOKEN_HEAD, INT4_PER_TOKEN_HEAD = 2, 3, 4

    def unified(q: Tensor, k: Tensor, v: Tensor, out: Tensor, **given: Any) -> None:
        for b, own in enumerate(given["block_table"]):
            sides = list[Tensor]()
            for codes, scales in ((k, given["k_scale_cache"]), (v, given["v_scale_cache"])):
                x, s = (y[own.long()].flatten(0, 1)[: given["seqused_k"][b]].float() for y in (codes, scales))
                sides += [(x * s[..., None]).transpose(0, 1)] if x.shape[2] == q.shape[2] else []
            if sides:
                out[b] = attended(q[b], [Tokens(*sides)])

    modules(
        there,
        vllm__v1__attention__ops__triton_unified_attention={"unified_attention": unified},
        vllm__v1__kv_cache_interface={"KVQuantMode": Modes},
    )
    int8, fp8, int4 = map(measured, vllm_triton.VLLM)
    assert max(int8["error"], fp8["error"]) < 1e-3 and int4["error"] is None and "failed" not in int4
    assert int8["bits"] == pytest.approx(8 + 32 / 64, rel=0.01) and int4["bits"] == pytest.approx(4.5, rel=0.02)


def test_int8_of_vllm_is_near_what_was_coded() -> None:
    """The largest number of each token and head becomes 127."""
    normal, at = numbers(SIZE, CPU), table(SIZE, vllm_triton.PAGE, CPU)
    codes, scales = vllm_triton.VLLM[0]._cache(SIZE, normal, at)
    x = numbers(SIZE, CPU)(SIZE.kv_heads, SIZE.tokens).float()
    held = torch.stack([take(codes, own, 150).float() * take(scales, own, 150)[..., None] for own in at])
    assert (held - x).abs().max() <= scales.max() * 0.51


def test_kivi_multiplies_what_its_words_stand_for(there: pytest.MonkeyPatch) -> None:
    """Codes stand in words from the lowest bits on, along tokens of keys and along channels of values."""

    def product(x: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor, bits: int, group: int, q_heads: int,
                kv_heads: int) -> Tensor:  # fmt: skip
        outer = torch.arange(codes.shape[1] * 32 // bits)
        code = (codes[:, outer * bits // 32] >> (outer * bits % 32)[:, None]) & (2**bits - 1)
        matrix = code.float() * scales[:, outer // group] + offsets[:, outer // group]
        return (x.float() @ matrix.repeat_interleave(q_heads // kv_heads, 0).mT).half()

    modules(there, kivi_gemv={"gemv_forward_cuda_outer_dim": product})
    size = Size(2, 2, 256, 4, 128)
    for one, bits in zip(kivi.KIVI, (4.5, 2.25), strict=True):
        found = measured(one, size)
        assert found["error"] < 5e-3 and found["bits"] == bits and not found["graph"]
    assert "64 tokens only" in measured(kivi.KIVI[0], SIZE)["missing"]


def test_what_is_missing_is_said_before_what_does_not_fit() -> None:
    """In an environment without them, whatever the size."""
    others: tuple[peers.Peer, ...] = (
        *flash_infer.FLASH_INFER,
        *vllm_triton.VLLM,
        *bit_decoding.BIT_DECODING,
        *kivi.KIVI,
    )
    for peer in others:
        why = peer.why_not(Size(1, 1, 77, 1, 80))
        assert why is not None
        if why.startswith("not installed"):
            assert "pip install" in why or "build github.com" in why


@pytest.mark.parametrize("tokens", [5, 16, 150])
def test_pages_give_back_what_was_written(tokens: int) -> None:
    size = Size(3, 2, tokens, 1, 64)
    rows, at = torch.randn(3, 2, tokens, 64), table(size, 16, CPU)
    pages = torch.full((at.numel(), 16, 2, 64), torch.nan)
    fill(pages, at, rows)
    assert all(torch.equal(take(pages, own, tokens), rows[b]) for b, own in enumerate(at))
    assert at.unique().numel() == at.numel() and at.max() == at.numel() - 1
