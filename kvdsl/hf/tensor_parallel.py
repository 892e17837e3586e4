"""Which kv heads of every layer a rank has, where transformers has cut the model over several (`tp_plan`)."""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import get_head_shapes
from transformers.distributed.tensor_parallel import get_kv_heads_per_rank

from kvdsl.head_shares import HeadShare


def ranks_of(model: Any) -> int:
    """Over how many ranks the heads of a model are cut; 1 for a model that is whole."""
    return getattr(model, "tp_size", None) or 1


def shares(model: Any, layers: int) -> list[HeadShare | None]:
    """What this rank has of each of so many layers; None where it has all heads.  ValueError where heads would be cut
    in parts."""
    ranks = ranks_of(model)
    if ranks == 1:
        return [None] * layers
    heads, _ = get_head_shapes(model.config.get_text_config(decoder=True))
    here = get_kv_heads_per_rank(model.tp_plan, heads, ranks)
    if here is None:
        raise ValueError(f"model: {ranks} ranks do not divide {heads} kv heads; use as many ranks as divide them")
    if here == heads:
        return [None] * layers
    rank = model._device_mesh.get_local_rank("tp")
    return [HeadShare(rank, ranks, n) for n in (heads[:layers] if isinstance(heads, list) else [heads] * layers)]


def refuse_parts(model: Any) -> None:
    """ValueError for a model of which this rank has some heads, where all are to be measured."""
    if any(shares(model, 1)):
        raise ValueError(
            f"model: it is cut over {ranks_of(model)} ranks, and numbers are measured on all heads; "
            "calibrate in one process, without tp_plan, and give every rank the same params"
        )
