"""Numbers of a scheme beside its pages: which it wants, whether they fit, and the file they are kept in.

Names are the parts' places in the spec: `keys.scale`, `keys.scale.scale` (a second level), `keys.code` (the levels of a
table), `values.transform[1]`, `keys.outliers` (which channels have a store of their own, or beyond which numbers of a
channel single ones are kept); in a file for a whole model each stands behind `layers.<i>.`.  Kernels take them made
ready: with the maps of the spaces that keys and values are coded in, `keys.encode` and so on (see spaces.py).
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
from .fisher import weighted
from .kernels import Params
from .measuring import LARGEST
from .scheme import SIDES, Additive, Codebook, Count, Float, PreRope, Scheme, Side, Store, Vectors
from .shape import Shape
from .spaces import calibrated, in_loop, maps, refuse_others

HASH = "kvdsl.scheme"
ROPE = "keys.transform[0]"
"""Where PreRope stands, and the name of its frequencies."""
LONGEST_HEADER = 1 << 20  # bytes of a file's description that are read


def wanted(scheme: Scheme, shape: Shape) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the numbers a scheme needs beside its pages: of a scale (kv heads or 1, groups of
    channels or 1), and (2, ...) = scale, offset where the range has an offset; of a second level (kv heads or 1, 1); of
    a table (levels,), or (2, levels) = those that numbers are compared with and those that codes are decoded at, where
    these match data; of vectors (kv heads, groups of channels, vectors, channels of one), or (kv heads, stages,
    vectors, head_dim) of sums; of a transform (kv heads, head_dim); of PreRope (head_dim / 2) frequencies, or fewer
    where not all channels are rotated; of outlier channels (kv heads, so many), the others being the head's for scales
    and transforms; of single numbers (2, kv heads, head_dim) = lower and upper thresholds.  Empty where nothing is
    calibrated."""
    found: dict[str, tuple[int, ...]] = {}
    if scheme.heads:
        from .head_params import wanted_of_heads

        return wanted_of_heads(scheme, shape)
    if scheme.routed:
        from .tier_params import wanted_of_tiers

        return wanted_of_tiers(scheme, shape)
    for side in SIDES:
        store = scheme.side(side)
        code, scale, width = store.code, store.measure, store.own.coded(shape.head_dim)
        found |= calibrated(store, side, shape.kv_heads, shape.head_dim)
        if scale is not None and scale.when == "calibrated":
            blocks = (_blocks(scale.block.heads, shape.kv_heads), _blocks(scale.block.channels, width))
            found[f"{side}.scale"] = (2, *blocks) if scale.range in ("minmax", "minmax_zero") else blocks
        if scale is not None and scale.scale is not None:
            found[f"{side}.scale.scale"] = (_blocks(scale.scale.block.heads, shape.kv_heads), 1)
        if isinstance(code, Codebook) and code.levels == "calibrated":
            found[f"{side}.code"] = (2,) * (code.match is not None) + (2 ** (code.bits or 0),)
        if isinstance(code, Additive):
            found[f"{side}.code"] = (shape.kv_heads, code.of(shape.head_dim).count, 2**code.bits, shape.head_dim)
        if isinstance(code, Vectors):
            found[f"{side}.code"] = (shape.kv_heads, code.groups(shape.head_dim), 2**code.bits, code.channels)
    return found


def from_data(scheme: Scheme, shape: Shape) -> list[str]:
    """The names among `wanted` of what is measured: all but the frequencies of PreRope, which are the model's."""
    if scheme.routed:
        from .tier_params import ropes_of_tiers

        return [name for name in wanted(scheme, shape) if name not in ropes_of_tiers(scheme)]
    return [name for name in wanted(scheme, shape) if name != ROPE or scheme.keys.rope is None]


def of_all_layers(scheme: Scheme) -> tuple[Scheme, ...]:
    """The scheme, and those of layers that have one of their own."""
    return (scheme, *(inner for _, inner in scheme.layers))


def takes_data(scheme: Scheme) -> bool:
    """Whether any layer takes a number from data, so that `kvdsl calibrate` has something to measure."""
    return any(from_data(own, Shape(128)) for own in of_all_layers(scheme))


def rope_of(scheme: Scheme) -> PreRope | None:
    """How the keys of a scheme, or of one of its tiers, are rotated, where they are stored without."""
    stores = (scheme.keys, *(tier.keys for tier in scheme.tiers if tier.keys is not None))
    return next((store.rope for store in stores if store.rope is not None), None)


def _blocks(size: Count, whole: int) -> int:
    return whole // size if isinstance(size, int) else 1


def checked(
    scheme: Scheme, shape: Shape, params: Params | None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """The wanted numbers as float32 on a device, tables of vectors as float16, and the maps made of them.

    A map given under its own name (`keys.encode` with `keys.decode`) stands for what it is made of; frequencies stay on
    the CPU, where cosines are made of them.  ShapeError names what is missing, of another shape or not finite.
    """
    params = {} if params is None else params
    if scheme.heads:
        from .head_params import checked_of_heads

        return checked_of_heads(scheme, shape, params, device)
    if scheme.routed:
        from .tier_params import checked_of_tiers

        parts = enumerate(checked_of_tiers(scheme, shape, params, device))
        return {f"tiers[{number}].{name}": x for number, part in parts for name, x in part.items()}
    taken = dict[str, Tensor]()
    mapped = [side for side in SIDES if f"{side}.encode" in params and f"{side}.decode" in params]
    for name, right in wanted(scheme, shape).items():
        if name not in params and name.partition(".transform")[0] in mapped:
            continue
        rope = name == ROPE and scheme.keys.rope is not None
        if name not in params:
            if rope:
                raise ShapeError(f"params[{name!r}]: missing; PreRope needs the model's frequencies, give its inv_freq")
            raise ShapeError(missing(scheme, name))
        given = params[name]
        if not isinstance(given, Tensor):
            raise ShapeError(f"params[{name!r}]: {type(given).__name__} is no tensor; give float32 of shape {right}")
        if rope and (given.dim() != 1 or not 1 <= len(given) <= right[0]):
            raise ShapeError(
                f"params[{name!r}]: shape {tuple(given.shape)}; give one frequency for each pair of channels, at most "
                f"{right[0]} for head_dim {shape.head_dim}"
            )
        if tuple(given.shape) != right and not rope:
            raise ShapeError(f"params[{name!r}]: shape {tuple(given.shape)}; the right one is {right}")
        given = given.to(torch.float32) if name.endswith(".outliers") else given
        if not given.is_floating_point() or not bool(torch.isfinite(given).all()):
            raise ShapeError(
                f"params[{name!r}]: it holds numbers that are no finite floats; calibrate on finite tensors"
            )
        if name.endswith(".scale.scale") and not bool((given > 0).all()):
            raise ShapeError(f"params[{name!r}]: {float(given.min())!r} is no scale to divide by; give numbers above 0")
        if ".transform" in name and given.dim() == 3:
            _orthonormal(name, given)
        if ".transform" in name and given.dim() == 4:
            _inverse(name, given)
        if name.endswith(".outliers") and given.dim() == 2:
            _distinct(name, given, shape.head_dim)
        elif name.endswith(".outliers") and bool((given[0] > given[1]).any()):
            raise ShapeError(f"params[{name!r}]: a lower threshold is above the upper one; give (lower, upper)")
        if name.endswith(".code") and given.dim() == 4:
            taken[name] = _halves(name, given).to(device).contiguous()
            continue
        if name.endswith(".code") and not bool((given.diff() > 0).all()):
            raise ShapeError(f"params[{name!r}]: the levels do not rise; sort them, each one different")
        taken[name] = given.detach().to("cpu" if rope else device, torch.float32).contiguous()
    for side in SIDES:
        made = maps(scheme.side(side), side, shape.kv_heads, shape.head_dim, params, device)
        _fit(made, side, scheme.side(side), shape)
        refuse_others(scheme.side(side), side, shape.head_dim, made)
        exact = shape.dtype == "fp32" or scheme.side(side).code == Float("fp32")
        taken |= made | in_loop(scheme.side(side), side, shape.kv_heads, shape.head_dim, made, exact=exact)
    return taken


def _halves(name: str, vectors: Tensor) -> Tensor:
    """Vectors as the numbers that kernels read.  ShapeError for those beyond float16."""
    if float(vectors.abs().max()) > LARGEST:
        fact = f"{float(vectors.abs().max())!r} is beyond float16, in which vectors are kept"
        raise ShapeError(f"params[{name!r}]: {fact}; give numbers within {LARGEST}")
    return vectors.detach().to(torch.float16)


def _orthonormal(name: str, basis: Tensor) -> None:
    """ShapeError unless rows are of length 1 and at right angles, as far as float32 or so tells."""
    rows = basis.detach().cpu().double()
    off = float((rows @ rows.mT - torch.eye(rows.shape[-1], dtype=torch.float64)).abs().amax())
    if off > 1e-4:
        fact = f"products of its rows are off by {off:.3g} from those of a rotation"
        raise ShapeError(f"params[{name!r}]: {fact}; give rows of length 1 at right angles")


def _inverse(name: str, pair: Tensor) -> None:
    """ShapeError unless the second matrix takes back what the first one does, as far as float32 or so tells."""
    there, back = pair.detach().cpu().double().unbind(1)
    sizes = there.abs() @ back.abs()  # of what cancels
    off = float(((there @ back - torch.eye(there.shape[-1], dtype=torch.float64)).abs() / sizes.clamp(min=1)).amax())
    if off > 1e-4:
        fact = f"products of its two matrices are off by {off:.3g} from those of a map and its inverse"
        raise ShapeError(f"params[{name!r}]: {fact}; give T and T^-1, one behind the other")


def _distinct(name: str, channels: Tensor, head_dim: int) -> None:
    """ShapeError unless every head's outlier channels are different ones of its own."""
    rows = channels.detach().cpu().double().sort(-1).values
    within = bool(((rows >= 0) & (rows < head_dim) & (rows == rows.round())).all())
    if not within or bool((rows[:, 1:] == rows[:, :-1]).any()):
        raise ShapeError(
            f"params[{name!r}]: {channels.tolist()}; give every head different channels, whole numbers below {head_dim}"
        )


def missing(scheme: Scheme, name: str) -> str:
    """What is said of a number that was not given."""
    balanced = any(getattr(part, "by", None) in ("balance", "attention", "energy") for _, part in scheme.walk())
    given, data = ("scheme, k, v, q", "k, v and q") if balanced else ("scheme, k, v", "k and v")
    if weighted(scheme):
        given, data = f"{given}, gradients=(dk, dv)", f"{data}, and of the loss's derivatives"
    return f"params[{name!r}]: missing; it is calibrated, give params=kvdsl.calibrate({given}) of typical {data}"


def _fit(made: Params, side: Side, store: Store, shape: Shape) -> None:
    """ShapeError for a given map that does not fit."""
    numbers, together = store.own.coded(shape.head_dim), store.joined
    sizes = {"encode": (numbers, together * shape.head_dim), "decode": (shape.head_dim, together * numbers)}
    sizes |= {"encode_shift": (numbers,), "decode_shift": (shape.head_dim,)}  # type: ignore[dict-item]
    for name, tensor in made.items():
        right = sizes.get(name.removeprefix(f"{side}."))
        if right is None:  # made here
            continue
        if tuple(tensor.shape[1:]) != right or tensor.shape[0] not in ((1,) * (together == 1) + (shape.kv_heads,)):
            common = f", or 1 in place of {shape.kv_heads}" * (together == 1)
            raise ShapeError(
                f"params[{name!r}]: shape {tuple(tensor.shape)}; the right one is {(shape.kv_heads, *right)}{common}"
            )


def within(params: Params, prefix: str) -> dict[str, Tensor]:
    """The numbers whose names stand behind a prefix, without it."""
    return {name.removeprefix(prefix): x for name, x in params.items() if name.startswith(prefix)}


def save(path: str | Path, scheme: Scheme, params: Params) -> None:
    """Write a safetensors file of float32 tensors that carries the scheme's hash; it appears complete or not at all."""
    from safetensors.torch import save as to_bytes

    path = Path(path)
    # Layers may share a tensor, which the format refuses.
    tensors = {name: x.detach().to("cpu", torch.float32, copy=True).contiguous() for name, x in params.items()}
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
