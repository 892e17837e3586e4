"""Calibrated numbers of a scheme: which it wants, whether they fit, and the file they are kept in.

Names are the paths of parts in the spec: `keys.scale`, `keys.scale.scale` (a second level), `keys.code` (the levels of
a table); in a file for a whole model each stands behind `layers.<i>.`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .errors import ShapeError
from .kernels import Params
from .scheme import SIDES, Codebook, Count, Scheme
from .shape import Shape

HASH = "kvdsl.scheme"
LONGEST_HEADER = 1 << 20  # bytes of a file's description that are read


def wanted(scheme: Scheme, shape: Shape) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the numbers a scheme needs beside its pages: of a scale (kv heads or 1, groups of
    channels or 1), and (2, ...) = scale, offset where the range has an offset; of a second level (kv heads or 1, 1); of
    a table (levels,).  Empty where nothing is calibrated."""
    found: dict[str, tuple[int, ...]] = {}
    for side in SIDES:
        code, scale = scheme.side(side).code, scheme.side(side).measure
        if scale is not None and scale.when == "calibrated":
            blocks = (_blocks(scale.block.heads, shape.kv_heads), _blocks(scale.block.channels, shape.head_dim))
            found[f"{side}.scale"] = (2, *blocks) if scale.range in ("minmax", "minmax_zero") else blocks
        if scale is not None and scale.scale is not None:
            found[f"{side}.scale.scale"] = (_blocks(scale.scale.block.heads, shape.kv_heads), 1)
        if isinstance(code, Codebook) and code.levels == "calibrated":
            found[f"{side}.code"] = (2 ** (code.bits or 0),)
    return found


def _blocks(size: Count, whole: int) -> int:
    return whole // size if isinstance(size, int) else 1


def checked(
    scheme: Scheme, shape: Shape, params: Params | None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """The wanted numbers as float32 on a device.  ShapeError names what is missing, of another shape or not finite."""
    taken = dict[str, Tensor]()
    for name, right in wanted(scheme, shape).items():
        if params is None or name not in params:
            raise ShapeError(
                f"params[{name!r}]: missing; it is calibrated, give params=kvdsl.calibrate(scheme, k, v) of "
                f"typical k and v"
            )
        given = params[name]
        if not isinstance(given, Tensor):
            raise ShapeError(f"params[{name!r}]: {type(given).__name__} is no tensor; give float32 of shape {right}")
        if tuple(given.shape) != right:
            raise ShapeError(f"params[{name!r}]: shape {tuple(given.shape)}; the right one is {right}")
        if not given.is_floating_point() or not bool(torch.isfinite(given).all()):
            raise ShapeError(
                f"params[{name!r}]: it holds numbers that are no finite floats; calibrate on finite tensors"
            )
        if name.endswith(".scale.scale") and not bool((given > 0).all()):
            raise ShapeError(f"params[{name!r}]: {float(given.min())!r} is no scale to divide by; give numbers above 0")
        if name.endswith(".code") and not bool((given[1:] > given[:-1]).all()):
            raise ShapeError(f"params[{name!r}]: the levels do not rise; sort them, each one different")
        taken[name] = given.detach().to(device, torch.float32).contiguous()
    return taken


def save(path: str | Path, scheme: Scheme, params: Params) -> None:
    """Write a safetensors file of float32 tensors that carries the scheme's hash; it appears complete or not at all."""
    from safetensors.torch import save as to_bytes

    path = Path(path)
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in params.items()}
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(to_bytes(tensors, {HASH: scheme.hash}))
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def load(path: str | Path, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors that `save` wrote for the same scheme.  ShapeError for a file of another scheme or kind."""
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        raw = Path(path).read_bytes()
        tensors = from_bytes(raw)
        written = _description(raw).get(HASH)
    except (OSError, SafetensorError, ValueError) as error:
        raise ShapeError(f"{path}: no safetensors file can be read there ({error})") from None
    if written != scheme.hash:
        whose = f"belongs to scheme {written}" if written else "does not say to which scheme it belongs"
        raise ShapeError(f"{path}: it {whose}, not to {scheme.hash}; run `kvdsl calibrate` for this scheme")
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}


def _description(raw: bytes) -> Mapping[str, str]:
    size = int.from_bytes(raw[:8], "little")
    if size > LONGEST_HEADER:
        raise ValueError(f"its header of {size} bytes is longer than {LONGEST_HEADER}")
    found = json.loads(raw[8 : 8 + size]).get("__metadata__")
    return found if isinstance(found, dict) else {}
