"""The vectors of published implementations and what it means to agree with one.

`vectors/origins.json` says for every vector which function of which repository ran and what agreement it allows.
exact: relative Frobenius error within the bound.  flips: only rounding ties and half-precision statistics differ, so
that the share of numbers that are not close is within the bound.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvdsl import reference
from kvdsl.scheme import Scheme, Store, Uniform

FOLDER = Path(__file__).parent / "vectors"
ORIGINS: dict[str, dict[str, Any]] = json.loads((FOLDER / "origins.json").read_text())["vectors"]
INPUTS = {name: torch.from_numpy(array) for name, array in np.load(FOLDER / "inputs.npz").items()}
K, V, Q_FULL = INPUTS["K"].float(), INPUTS["V"].float(), INPUTS["q_full"].float()
Q = Q_FULL[:, ::4]
SIDES = (("K", "keys", K), ("V", "values", V))


def published(name: str) -> dict[str, Tensor]:
    """The arrays of a vector."""
    system, vector = name.split("/")
    arrays = np.load(FOLDER / f"{system}.npz")
    return {key.split("__")[1]: torch.from_numpy(arrays[key]) for key in arrays if key.startswith(vector + "__")}


def agree(name: str, got: Tensor, right: Tensor) -> None:
    """Assert the level of agreement of a vector; `right` may hold only the first tokens."""
    level, tolerance = ORIGINS[name]["level"], ORIGINS[name]["tolerance"]
    right = right.double()
    got = got[:, :, : right.shape[2]] if right.dim() == 4 else got
    assert got.shape == right.shape
    if level == "exact":
        assert (got - right).norm() <= tolerance["rel_fro"] * right.norm()
    else:
        far = (got - right).abs() > tolerance["close"] * right.abs() + tolerance["close"] * right.abs().mean()
        assert far.double().mean() <= tolerance["flip"]


def same_codes(name: str, got: Tensor | None, right: Tensor) -> None:
    """Assert that codes are equal, but for the share of flips, by one, that the vector allows."""
    assert got is not None and got.shape == right.shape
    apart = got.long() - right.long()
    share = ORIGINS[name]["tolerance"].get("flip", 0) if ORIGINS[name]["level"] == "flips" else 0
    assert apart.abs().max() <= (1 if share else 0) and (apart != 0).double().mean() <= share


def both_sides(name: str, scheme: Scheme, *, window: bool = False) -> None:
    """Both sides of a scheme against K_hat and V_hat."""
    arrays = published(name)
    k_hat, v_hat = reference.roundtrip(scheme, K, V, window=window)
    agree(name, k_hat, arrays["K_hat"])
    agree(name, v_hat, arrays["V_hat"])


def fp32(bits: int, scale: Any, **code: Any) -> Store:
    """A uniform store whose metadata is fp32, as simulations keep it."""
    return Store(Uniform(bits, **code), scale=scale.with_(dtype="fp32"))
