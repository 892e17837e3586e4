"""What each rank of a tensor-parallel model runs, and the same in one process alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import generated, prompt
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from kvdsl.hf import cache, seen
from kvdsl.params import load
from kvdsl.schemes import ALL

SCHEMES = {
    "kivi2": ALL["kivi2"],
    "kivi4": ALL["kivi4"],
    "int4_token_head": ALL["int4_token_head"],
    "qjl": ALL["qjl"].with_(layers=()),
    "turboquant3": ALL["turboquant3"],
    "kivi2_sinks": ALL["kivi2_sinks"],
    "h2o": ALL["h2o"],
    "skvq2": ALL["skvq2"],
    "apart": ALL["int4_token_head"].with_(heads={(0, 1, -1): ALL["kivi4"]}),
}
SIZES = dict(num_attention_heads=8, num_key_value_heads=4)
STATIC = "kivi4"
REFUSED = ("zipcache", "kvquant3")


def alone(folder: Path, **options: Any) -> Any:
    """The whole model, without derivatives; under a `distributed_config` a rank's part of it."""
    made = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager", **options)
    return made.eval().requires_grad_(False)  # type: ignore[no-untyped-call]


def held(model: Any, folder: Path) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By scheme the tokens of two prompts and their successors, and the first layer's keys and values as decoded."""
    found = {}
    for name, scheme in SCHEMES.items():
        file = folder / f"{name}.safetensors"
        packed = cache(scheme, model, params=load(file, scheme) if file.exists() else None)
        tokens = generated(model, prompt(2, 150), packed)
        assert packed.stats()["fallbacks"] == packed.stats()["dense_calls"] == 0
        dense = [packed.layers[0].dense(side) for side in ("keys", "values") if name != "h2o"]  # which drops tokens
        found[name] = (tokens, *dense)
    return found


def in_place(model: Any) -> Tensor:
    """The tokens of steps in place."""
    return generated(model, prompt(2, 150), cache(STATIC, model, static=True, capacity=192), disable_compile=True)


def all_of(folder: Path) -> dict[str, Any]:
    """Everything that is asked of one group of processes, which take seconds to start."""
    model = alone(folder, distributed_config=DistributedConfig(tp_size=2))
    said = {}
    for name in REFUSED:
        try:
            cache(name, model)
        except ValueError as error:
            said[name] = f"{type(error).__name__}: {error}"
    try:
        seen(SCHEMES["skvq2"], model, prompt(1, 20))
    except ValueError as error:
        said["calibrate"] = str(error)
    return {"held": held(model, folder), "static": in_place(model), "said": said}
