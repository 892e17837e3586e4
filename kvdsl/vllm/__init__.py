"""vLLM: any scheme whose routing is by position serves through `--attention-backend CUSTOM`.

`register` is called by vLLM in each of its processes, before it reads its arguments; nothing heavy is imported here.
"""

from __future__ import annotations

NAME = "CUSTOM"
"""The engine's own name for a backend from elsewhere.  One of ours would be made by `register`, but the engine's
processes read their configuration, which has the name, before they call it."""
BACKEND = "kvdsl.vllm.backend.Backend"
ON_CPU = "kvdsl.vllm.on_cpu.Backend"


def register() -> None:
    """Make the backend known to vLLM; a second call changes nothing."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not AttentionBackendEnum[NAME].is_overridden():  # or else another plugin's
        register_backend(AttentionBackendEnum[NAME], BACKEND)
    if current_platform.is_cpu():  # there the engine takes this one whatever it is told
        register_backend(AttentionBackendEnum.CPU_ATTN, ON_CPU)
