"""What all layers of a step share: made once a step from what the engine tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from kvdsl.errors import BackendError
from kvdsl.serving import Requests, Served, Slots, Step

from .settings import MARK, settings


def slot_count(config: Any) -> int:
    """Slots for exact rows: see `Slots`."""
    return 2 * int(config.scheduler_config.max_num_seqs)


def draft_of(config: Any) -> int:
    """Tokens of a step that may turn out never to have been."""
    speculative = config.speculative_config
    return 0 if speculative is None else int(speculative.num_speculative_tokens or 0)


@dataclass
class Metadata(AttentionMetadata):  # type: ignore[misc]
    """A step's pieces."""

    step: Step
    num_actual_tokens: int


class Builder(AttentionMetadataBuilder[Metadata]):  # type: ignore[misc]
    """Cuts a step into pieces; one for each group of layers whose blocks are given out together."""

    _cudagraph_support: ClassVar[Any] = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        refuse(vllm_config, settings().how)
        self.how = settings().of(kv_cache_spec, vllm_config.model_config.dtype).how
        self.draft = draft_of(vllm_config)
        self.slots = Slots(slot_count(vllm_config)) if self.how.waits else None

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        """Reads block tables on the host: on a GPU that is one wait a step, not one a layer."""
        told = common_attn_metadata
        starts = told.query_start_loc_cpu[: told.num_reqs + 1].numpy().astype(np.int64)
        lengths = told.seq_lens_cpu_upper_bound if self.draft == 0 else None
        lengths = (told.seq_lens if lengths is None else lengths)[: told.num_reqs].cpu().numpy().astype(np.int64)
        table = told.block_table_tensor[: told.num_reqs].cpu().numpy().astype(np.int64)
        real = np.flatnonzero(np.diff(starts) > 0)  # a padded batch has requests without tokens behind the others
        names = None if told.req_idx is None else np.asarray(told.req_idx)[real]
        requests = Requests(lengths[real], np.append(starts[real], starts[-1]), table[real], names)
        ring = self.how.block + self.draft
        step = Step.of(requests, self.how, self.slots, ring, self.device, self.draft)
        return Metadata(step, int(told.num_actual_tokens))


def refuse(config: Any, how: Served) -> None:
    """BackendError for a mode of the engine that would change what requests get."""
    if not how.shares and config.cache_config.enable_prefix_caching:
        raise BackendError(
            f"enable_prefix_caching: True, but the first {how.sinks} tokens of a request stay exact beside its pages, "
            f"where no other request finds them; use --no-enable-prefix-caching"
        )
    if (skipped := config.cache_config.kv_cache_dtype_skip_layers) and config.cache_config.cache_dtype == "auto":
        raise BackendError(
            f"kv_cache_dtype_skip_layers: {skipped}, but all layers are of type auto, so that none can be told from "
            f"another; add --kv-cache-dtype {MARK}, which stands for the scheme"
        )
    if draft_of(config) >= how.block:
        raise BackendError(
            f"num_speculative_tokens: {draft_of(config)} are no fewer than a block of {how.block} tokens; draft fewer"
        )
