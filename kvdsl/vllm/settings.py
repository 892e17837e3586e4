"""What is asked of the backend: the scheme, by the engine's configuration or the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kvdsl.errors import BackendError
from kvdsl.kernels import Params
from kvdsl.params import load as load_params
from kvdsl.registry import load
from kvdsl.serving import Served, served

VARIABLE = "KVDSL_SCHEME"
MARK = "fp8"
"""The engine's type of cache that stands for the scheme, where layers of type "auto" are to be left alone."""
KEY = "kvdsl"
USE = (
    f'give --additional-config \'{{"{KEY}": {{"scheme": "kivi4"}}}}\', or set {VARIABLE}=kivi4, '
    "or the file of a scheme of yours"
)


@dataclass(frozen=True)
class Settings:
    """The scheme as it is served, and calibrated parameters of all layers, where it has any.

    marked   layers that are left alone can be told: the engine's type of cache is MARK for the others
    """

    name: str
    how: Served
    params: Params = field(default_factory=dict)
    marked: bool = False

    def left_alone(self, dtype: torch.dtype) -> Settings:
        """Of a layer that keeps its numbers as they are, in blocks as long as those of other layers."""
        name = "fp32" if dtype == torch.float32 else "fp16"
        return Settings(name, replace(_made(name, None).how, block=self.how.block))

    def of(self, spec: Any, dtype: torch.dtype) -> Settings:
        """Of the layers that the engine describes so."""
        return self.left_alone(dtype) if self.marked and not spec.kv_quant_mode else self


_known: list[Settings] = []


def settings() -> Settings:
    """Those of the engine that is being built, else the ones that were asked for last: some questions of the engine
    come when it has no configuration at hand.  BackendError where no scheme is named."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    asked = None if config is None else (config.additional_config or {}).get(KEY)
    if asked is None and config is None and _known:
        return _known[-1]
    found = _read(asked)
    if config is not None:
        found = replace(found, marked=config.cache_config.cache_dtype != "auto")
    _known[:] = [found]
    return found


def _read(asked: Any) -> Settings:
    if asked is None:
        asked = os.environ.get(VARIABLE)
    if isinstance(asked, str):
        asked = {"scheme": asked}
    if not isinstance(asked, dict) or not isinstance(asked.get("scheme"), str):
        raise BackendError(f"{KEY}: {asked!r} names no scheme; {USE}")
    if others := set(asked) - {"scheme", "params"}:
        raise BackendError(f"{KEY}.{sorted(others)[0]}: no setting of this name; there are scheme and params")
    return _made(asked["scheme"], asked.get("params"))


@cache
def _made(name: str, file: str | None) -> Settings:
    scheme = load(name)
    params = load_params(Path(file), scheme) if file else {}
    return Settings(name, served(scheme), params)
