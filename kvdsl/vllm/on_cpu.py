"""The engine's processors without a GPU know one backend: that is ours where it is asked for, else the engine's own."""

from __future__ import annotations

from typing import Any

from . import NAME


def __getattr__(name: str) -> Any:
    """`Backend`, when the engine has read its configuration and asks for it."""
    if name != "Backend":
        raise AttributeError(name)
    from vllm.config import get_current_vllm_config_or_none
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from .backend import Backend

    config = get_current_vllm_config_or_none()
    asked = None if config is None else config.attention_config.backend
    return Backend if getattr(asked, "name", None) == NAME else CPUAttentionBackend
