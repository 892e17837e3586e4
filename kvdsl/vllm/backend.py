"""The attention backend: what the engine asks of it before there is a model, and the bytes of a page."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionType
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from kvdsl.errors import SchemeError, ShapeError
from kvdsl.kernels import KernelSet
from kvdsl.shape import Shape

from . import NAME
from .settings import MARK, Settings, settings


class Backend(AttentionBackend):  # type: ignore[misc]
    """Pages are the scheme's, byte for byte; the tokens of a request's open block wait beside them."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", MARK]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[Any]:
        from .attention import Attention

        return Attention

    @staticmethod
    def get_builder_cls() -> type[Any]:
        from .metadata import Builder

        return Builder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [settings().how.block]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        try:
            Shape(head_size)
        except ShapeError:
            return False
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        return (KVCacheLayout.LBHNC,)  # a block is one run of bytes

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return bool(attn_type == AttentionType.DECODER)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return not settings().how.waits  # pages alone do not tell what stands in an open block

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The same with the scheme's pages: one slot for all heads, as some schemes have bytes that heads share."""
        if spec.state_content_bytes is not None:
            return spec
        asked = settings().of(spec, spec.dtype)
        kernels = compiled(asked, Shape(spec.head_size, spec.num_kv_heads, dtype="fp16"))
        content, rest = divmod(kernels.page_bytes, kernels.page_tokens)
        if rest:
            raise ShapeError(
                f"scheme {asked.name}: pages of {kernels.page_bytes} bytes for {kernels.page_tokens} tokens are no "
                f"whole number of bytes a token, as the engine counts; use another head_dim, or another scheme"
            )
        return replace(spec, dtype=torch.uint8, num_head_slots=1, state_content_bytes=content)


def compiled(asked: Settings, shape: Shape) -> KernelSet:
    """The scheme's kernels: Triton's on a GPU, torch's on the engine's CPU build."""
    from vllm.platforms import current_platform

    from kvdsl.codegen import build

    try:
        return build(asked.how.scheme, shape, "torch" if current_platform.is_cpu() else None)
    except SchemeError as error:
        raise ShapeError(f"scheme {asked.name}: it does not fit this model: {error}") from error
