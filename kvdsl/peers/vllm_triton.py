"""vLLM's Triton kernels over caches with a scale for each token and head: int8, fp8, int4, as its engine calls them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvdsl.bench import Size
from kvdsl.bench_cache import Numbers

from . import Decoded, Ready, missing
from .paged import fill, quantized, table, take

PAGE = 16  # its default
SEGMENTS = 16  # programs that share a sequence, where it splits any
PROGRAMS = 128  # it splits sequences while sequences x heads are no more
MEND = "pip install vllm (in an environment of its own: it pins torch)"
SCALE = 4  # bytes
MODES = {"int8": "INT8_PER_TOKEN_HEAD", "fp8": "FP8_PER_TOKEN_HEAD", "int4": "INT4_PER_TOKEN_HEAD"}
LEVELS = {"int8": (127.0, torch.int8), "fp8": (448.0, torch.float8_e4m3fn)}


@dataclass(frozen=True)
class Vllm:
    """unified_attention; of int4 with the rotations of queries and outputs, which belong to a step."""

    name: str
    bits: float
    kind: str

    def why_not(self, size: Size) -> str | None:
        return missing("vllm", MEND)

    def prepare(self, size: Size, normal: Numbers) -> Ready:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
        from vllm.v1.kv_cache_interface import KVQuantMode

        query = normal(size.q_heads, 1)[:, :, 0].contiguous()
        device, at, out = query.device, table(size, PAGE, query.device), torch.empty_like(query)
        (keys, key_scales), (values, value_scales) = (self._cache(size, normal, at) for _ in range(2))
        parts = (size.batch, size.q_heads, SEGMENTS)
        given = {
            "cu_seqlens_q": torch.arange(size.batch + 1, dtype=torch.int32, device=device), "max_seqlen_q": 1,
            "seqused_k": torch.full((size.batch,), size.tokens, dtype=torch.int32, device=device),
            "max_seqlen_k": size.tokens, "softmax_scale": size.head_dim**-0.5, "causal": True,
            "window_size": (-1, -1), "block_table": at, "softcap": 0.0,
            "q_descale": None, "k_descale": None, "v_descale": None,
            "seq_threshold_3D": max(1, PROGRAMS // size.kv_heads), "num_par_softmax_segments": SEGMENTS,
            "softmax_segm_output": torch.empty(*parts, size.head_dim, device=device),
            "softmax_segm_max": torch.empty(parts, device=device),
            "softmax_segm_expsum": torch.empty(parts, device=device),
            "kv_quant_mode": getattr(KVQuantMode, MODES[self.kind]),
            "k_scale_cache": key_scales, "v_scale_cache": value_scales,
        }  # fmt: skip

        def call() -> Tensor:
            unified_attention(query, keys, values, out, **given)
            return out

        def decoded(b: int) -> Decoded:
            found = [
                take(codes, at[b], size.tokens).float() * take(scales, at[b], size.tokens)[..., None]
                for codes, scales in ((keys, key_scales), (values, value_scales))
            ]
            return Decoded(query[b], *found)

        read = round(size.numbers * self.bits / 8) + size.numbers // size.head_dim * SCALE + at.nbytes
        return Ready(call, read, None if self.kind == "int4" else decoded)

    def _cache(self, size: Size, normal: Numbers, at: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (pages, page, H, bytes) of one side, and their scales, float32 (pages, page, H)."""
        places = (at.numel(), PAGE, size.kv_heads)
        if self.kind == "int4":
            codes = torch.randint(0, 256, (*places, size.head_dim // 2), dtype=torch.uint8, device=at.device)
            scales = torch.rand(places, device=at.device) * 0.2 + 0.1
            centre = torch.randint(6, 10, places, dtype=torch.int32, device=at.device)
            # the zero point stands in the lowest bits of the scale
            return codes, ((scales.view(torch.int32) & -16) | centre).view(torch.float32)
        most, dtype = LEVELS[self.kind]
        codes = torch.zeros(*places, size.head_dim, dtype=dtype, device=at.device)
        scales = torch.ones(places, device=at.device)
        rows, scale = quantized(normal(size.kv_heads, size.tokens), most)
        fill(codes, at, (rows.round() if dtype == torch.int8 else rows).to(dtype))
        fill(scales, at, scale)
        return codes, scales


VLLM = tuple(Vllm(f"vLLM {kind} token-head", bits, kind) for kind, bits in (("int8", 8), ("fp8", 8), ("int4", 4)))
