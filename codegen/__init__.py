"""The compiler: a scheme and a shape in, proven kernels out.  `build` is the pipeline, read from top to bottom."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path

from kvdsl.errors import BackendError, Fault, SchemeError
from kvdsl.interpreting import interpreted
from kvdsl.kernels import Backend, KernelSet, Module
from kvdsl.scheme import Scheme
from kvdsl.shape import Shape
from kvdsl.tier_kernels import TierKernels

from . import store
from .plan import Plan, plan_for


def build_tiers(scheme: Scheme, shape: Shape, backend: Backend | None = None) -> TierKernels:
    """Compile a scheme with tiers for a shape, each tier as a scheme of its own; backend and errors as for `build`."""
    from kvdsl.tier_kernels import compiled

    return compiled(scheme, shape, backend, build)


def build(scheme: Scheme, shape: Shape, backend: Backend | None = None, name: str | None = None) -> KernelSet:
    """Compile a scheme without tiers for a shape.

    `backend` None: triton where there is a GPU or TRITON_INTERPRET=1, else torch; the KernelSet says which and why.
    Raises SchemeError (the scheme does not fit the shape), BackendError (the backend cannot run here), ProofError.
    """
    if scheme.heads:
        fault = Fault("heads", "each group of them compiles to kernels of its own", "build Scheme.by_heads one by one")
        raise SchemeError((fault,))
    if scheme.routed:
        fault = Fault("tiers", "each of them compiles to kernels of its own", "use kvdsl.build_tiers")
        raise SchemeError((fault,))
    chosen, why = choose_backend(backend)
    return _build(scheme, shape, chosen, why, name or _name_of(scheme))


@lru_cache(maxsize=256)
def _build(scheme: Scheme, shape: Shape, backend: Backend, why: str, name: str) -> KernelSet:
    plan = plan_for(scheme, shape)
    path = store.find(name, plan, backend)
    if path is None:
        path = store.keep(name, plan, backend, render(plan, backend, name))
    source = path.read_text(encoding="utf-8")
    module = bind(plan, backend, path, source)
    layout = plan.layout
    return KernelSet(
        scheme, shape, backend, why, source, path, plan, layout, layout.page_tokens, layout.page_bytes, module
    )


@lru_cache(maxsize=64)
def render(plan: Plan, backend: Backend, name: str) -> str:
    """The generated text of a plan; the last ones are kept."""
    if backend == "triton":
        from . import render_triton

        return render_triton.render(plan, name)
    from . import render_torch

    return render_torch.render(plan, name)


def bind(plan: Plan, backend: Backend, path: Path, source: str) -> Module:
    """The generated file, loaded, as something that takes tensors."""
    loaded = store.load(path)
    if backend == "triton":
        from .run_received import TritonReceived

        return TritonReceived(plan, loaded, source)
    from .torch_received import TorchReceived

    return TorchReceived(plan, loaded)


def choose_backend(backend: Backend | None) -> tuple[Backend, str]:
    """The backend to use and one sentence why.  Raises BackendError where it cannot run here."""
    if backend not in (None, "triton", "torch"):
        raise BackendError(f"backend: {backend!r} is none of 'triton', 'torch'")
    if backend == "torch":
        return "torch", "torch, as asked"
    gpu = _gpu()
    if backend is None and not interpreted() and not gpu:
        return "torch", "torch, since there is no GPU and TRITON_INTERPRET is not 1"
    if not interpreted() and not gpu:
        raise BackendError(
            "backend: 'triton' needs a GPU, and there is none; set TRITON_INTERPRET=1 before Python starts to "
            "interpret the kernels, or use backend='torch'"
        )
    try:
        import triton  # noqa: F401
    except ImportError as error:
        if backend is None:
            return "torch", "torch, since triton is not installed"
        raise BackendError("backend: 'triton' is not installed; pip install triton (Linux only)") from error
    device = sys.modules.get("kvdsl.codegen.device")
    if device is not None and interpreted() != device.INTERPRETED:
        raise BackendError(
            "backend: TRITON_INTERPRET changed after triton was imported; one process is interpreted or compiled, "
            "never both: start a new one"
        )
    return "triton", "triton, interpreted (TRITON_INTERPRET=1)" if interpreted() else "triton, compiled for the GPU"


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _name_of(scheme: Scheme) -> str:
    from kvdsl.registry import name_of

    return name_of(scheme) or f"scheme_{scheme.hash}"
