"""FlashInfer's batched decode over pages: float16, fp8 and NVFP4.  Its plan is made before, and not timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvdsl.bench import Size
from kvdsl.bench_cache import Numbers

from . import Decoded, Ready, missing
from .paged import fill, table, take

PAGE = 64
WORKSPACE = 512 << 20
MEND = "pip install flashinfer-python, and flashinfer-jit-cache or nvcc for its kernels"
DTYPES = {"fp16": torch.float16, "fp8": torch.float8_e4m3fn, "nvfp4": torch.uint8}
BLOCK = 16  # numbers that share a scale of NVFP4


@dataclass(frozen=True)
class FlashInfer:
    """BatchDecodeWithPagedKVCacheWrapper on tensor cores: without them fp8 is slower than float16."""

    name: str
    bits: float
    kind: str

    def why_not(self, size: Size) -> str | None:
        if (why := missing("flashinfer", MEND)) is not None:
            return why
        known = size.head_dim in (64, 128, 256)
        return None if known else f"head_dim {size.head_dim}: it has kernels for 64, 128 and 256"

    def prepare(self, size: Size, normal: Numbers) -> Ready:
        from flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper

        query = normal(size.q_heads, 1)[:, :, 0].contiguous()
        device, dtype, at = query.device, DTYPES[self.kind], table(size, PAGE, query.device)
        width = size.head_dim // 2 if self.kind == "nvfp4" else size.head_dim
        pages = torch.zeros(at.numel(), 2, PAGE, size.kv_heads, width, dtype=dtype, device=device)
        scales = None
        if self.kind == "nvfp4":
            pages.random_(0, 256)
            drawn = torch.rand(*pages.shape[:4], size.head_dim // BLOCK, device=device)
            scales = (drawn * 0.25 + 0.125).to(torch.float8_e4m3fn)
        else:
            for side in range(2):
                fill(pages[:, side], at, normal(size.kv_heads, size.tokens).to(dtype))
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            torch.empty(WORKSPACE, dtype=torch.uint8, device=device), "NHD", use_tensor_cores=True, backend="fa2"
        )
        starts = torch.arange(size.batch + 1, dtype=torch.int32, device=device) * at.shape[1]
        last = torch.full((size.batch,), (size.tokens - 1) % PAGE + 1, dtype=torch.int32, device=device)
        wrapper.plan(
            starts, at.flatten().contiguous(), last, size.q_heads, size.kv_heads, size.head_dim, PAGE,
            q_data_type=torch.float16, kv_data_type=dtype,
        )  # fmt: skip
        out, more = torch.empty_like(query), {} if scales is None else {"kv_cache_sf": scales}

        def call() -> Tensor:
            wrapper.run(query, pages, out=out, **more)
            return out

        def decoded(b: int) -> Decoded:
            keys, values = (take(pages[:, side], at[b], size.tokens) for side in range(2))
            return Decoded(query[b], keys.half(), values.half())

        read = size.numbers * width // size.head_dim * pages.element_size() + at.nbytes
        read += 0 if scales is None else size.numbers // BLOCK
        # How its kernels lay the scales of NVFP4 out is theirs: what these random ones stand for is not known.
        return Ready(call, read, decoded if scales is None else None)


FLASH_INFER = (
    FlashInfer("FlashInfer fp16", 16, "fp16"),
    FlashInfer("FlashInfer fp8", 8, "fp8"),
    FlashInfer("FlashInfer NVFP4", 4, "nvfp4"),
)
