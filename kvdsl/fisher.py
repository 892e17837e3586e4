"""How much a loss cares for a number: its derivatives by keys and values, which weigh what tables are fitted to."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ShapeError
from .scheme import Codebook, Scheme, Side, Store, Vectors

Gradients = tuple[Tensor, Tensor]
"""Of a loss by keys and by values, (B, H, T, D) each."""


def weighted(part: Scheme | Store) -> bool:
    """Whether a table is fitted with weights.  Of a scheme with layers its own stores count."""
    return any(isinstance(code, (Codebook, Vectors)) and code.weights is not None for _, code in part.walk())


def coded(
    store: Store,
    x: Tensor,
    gradient: Tensor,
    params: dict[str, Tensor],
    side: Side,
    at: int,
    single: Tensor | None = None,
) -> Tensor:
    """The loss's derivative by what is coded of x (B, H, T, D), float64 of that shape: through what reading undoes,
    from the derivative by x.  `at`: the position of the first token.  `single`: which numbers are read as they were,
    whatever is coded in their places.

    Raises ShapeError for derivatives that are not finite, or all 0.
    """
    from .reference.quantize import encoded_rows
    from .reference.spaces import cartesian, maps, restored, with_rope

    name = f"gradients[{side!r}]"
    if not bool(torch.isfinite(gradient).all()):
        raise ShapeError(f"{name}: it holds numbers that are not finite; take the loss in float32")
    if not bool(gradient.any()):
        raise ShapeError(f"{name}: all are 0, so that every table is as good as another; give a loss that depends on x")
    if not store.turned:
        return gradient.double() if single is None else gradient.double().masked_fill(single, 0)
    with torch.enable_grad():
        y = encoded_rows(store, x, params, side, at).double().requires_grad_()
        vectors = restored(cartesian(store, y), maps(store, x.shape[3], x.shape[1], params, side))
        vectors = vectors if single is None else vectors.masked_fill(single, 0)
        (found,) = torch.autograd.grad(with_rope(store, vectors, params, side, at), y, gradient.double())
    return found


def of_outputs(q: Tensor, k: Tensor, v: Tensor) -> Gradients:
    """Where there is no model: the derivatives of <u, out>, out (B, Hq, Q, D) the causal attention of q (B, Hq, Q, D),
    the last of the T tokens of k and v (B, H, T, D), u standard normal from a fixed seed.  Their squares' means are the
    Fisher information of outputs that are seen with normal errors."""
    with torch.enable_grad():
        k, v = (x.detach().float().requires_grad_() for x in (k, v))
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(k.shape[2] - q.shape[2] + 1)
        scores = (q.float() @ keys.mT * q.shape[3] ** -0.5).masked_fill(hidden, -torch.inf)
        out = scores.softmax(-1) @ values
        u = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        dk, dv = torch.autograd.grad(out, (k, v), u)
    return dk, dv
