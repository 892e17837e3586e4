"""Attention of one layer, as the engine calls it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from kvdsl.errors import BackendError
from kvdsl.head_shares import HeadShare, params_of, refuse_spanning
from kvdsl.inputs import DTYPES
from kvdsl.kernels import Params
from kvdsl.params import checked, within
from kvdsl.serving import ServedLayer
from kvdsl.shape import InputFormat, Shape

from .backend import compiled
from .metadata import Metadata, draft_of, slot_count
from .settings import settings

FORMATS: dict[torch.dtype, InputFormat] = {dtype: name for name, dtype in DTYPES.items()}  # type: ignore[misc]


class Attention(AttentionImpl[Metadata]):  # type: ignore[misc]
    """Keys and values go into pages, and queries read these."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        for name, value in {"alibi_slopes": alibi_slopes, "sinks": others.get("sinks")}.items():
            if value is not None:
                raise BackendError(f"{name}: the model adds them to its scores; these kernels do not")
        if kv_sharing_target_layer_name is not None:
            raise BackendError(
                f"kv sharing: the layer reads {kv_sharing_target_layer_name}'s cache; layers read their own"
            )
        if attn_type != AttentionType.DECODER:
            raise BackendError(f"attn_type: {attn_type}; a cache is a decoder's")
        config, asked = get_current_vllm_config(), settings()
        if asked.marked and kv_cache_dtype == "auto":
            asked = asked.left_alone(config.model_config.dtype)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype, self.sliding_window = kv_cache_dtype, sliding_window
        dtype, softcap = FORMATS[config.model_config.dtype], logits_soft_cap or None
        self._kernels = compiled(asked, Shape(head_size, self.num_kv_heads, num_heads, dtype, softcap is not None))
        self._given = asked.params
        self._share = _share(config, self.num_kv_heads)
        refuse_spanning(asked.how.scheme, self._share)
        device = torch.device(current_platform.device_type)
        ring = asked.how.block + draft_of(config)
        self._made = partial(
            ServedLayer, asked.how, self._kernels, scaling=self.scale, count=slot_count(config), ring=ring,
            device=device, softcap=softcap, window=sliding_window or None,
        )  # fmt: skip
        # Exact rows are taken now, so that the engine sees them when it looks how much memory is left for pages.
        self._layer = None if self._given else self._made(params=self._checked({}, device))

    def _checked(self, given: Params, device: torch.device) -> dict[str, Tensor]:
        return checked(self._kernels.scheme, self._kernels.shape, given, device)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of query (N, Hq, D) into output; without metadata, in the engine's first runs, zeros."""
        if attn_metadata is None:
            return output.fill_(0)
        if self._layer is None:
            given = within(self._given, f"layers.{extract_layer_index(layer.layer_name)}.")
            if self._share is not None:
                given = params_of(self._kernels.scheme, self._share, given)
            self._layer = self._made(params=self._checked(given, query.device))
        heads = (-1, self.num_heads, self.head_size)
        pool = kv_cache.view(-1, self._kernels.page_bytes)
        self._layer.forward(query.view(heads), key, value, pool, attn_metadata.step, output.view(heads))
        return output


def _share(config: Any, kv_heads: int) -> HeadShare | None:
    """Which of the model's kv heads this rank has; None: all of them, or, of fewer heads than ranks, one that others
    have, too."""
    ranks, every = config.parallel_config.tensor_parallel_size, config.model_config.get_total_num_kv_heads()
    return None if ranks == 1 or every < ranks else HeadShare(get_tensor_model_parallel_rank(), ranks, kv_heads * ranks)
