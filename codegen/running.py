"""A real model through a scheme's packed cache: `kvdsl generate` and `kvdsl calibrate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from kvdsl.errors import SchemeError, ShapeError
from kvdsl.kernels import Backend
from kvdsl.scheme import Scheme


def generated(
    scheme: Scheme, name: str, model: str, prompt: str, tokens: int, params: Path | None, backend: Backend | None
) -> dict[str, Any]:
    """What kvdsl.generation.generate gives, the contract's keys first."""
    from kvdsl.generation import generate
    from kvdsl.params import load

    if params is None and _wants(scheme):
        raise ShapeError(
            "params: numbers of this scheme are calibrated; give --params F, a file that "
            f"`kvdsl calibrate {name} --model {model} --text FILE --out F` writes"
        )
    numbers = None if params is None else load(params, scheme)
    quiet()
    found = generate(scheme, model, prompt, tokens=tokens, params=numbers, backend=backend)
    return {**found, "scheme": name}


def told(found: dict[str, Any]) -> list[str]:
    """Both texts and what they took."""
    stats = found["stats"]
    ratio = found["baseline_bytes"] / found["cache_bytes"] if found["cache_bytes"] else float("inf")
    return [
        f"{found['scheme']}:",
        found["text"],
        "",
        "full precision:",
        found["baseline_text"],
        "",
        f"agreement   {found['agreement']:.0%} of the tokens are the same, the first {found['same_tokens']} in a row",
        f"bytes       {found['cache_bytes']} packed, {found['baseline_bytes']} in full precision: {ratio:.2f} times",
        f"bits        {stats['bits']:.2f} a number held, window and tables included, after {found['tokens']} tokens",
        f"fallbacks   {stats['fallbacks']}",
    ]


def calibrated(scheme: Scheme, model: str, text: str, out: Path, tokens: int) -> dict[str, Any]:
    """Run the text through the model, measure what each layer wants of its keys, values and queries, and of the loss's
    derivatives by them where a table is weighted; write the file.

    Raises SchemeError for a scheme that takes nothing from data or does not fit the model's layers.
    """
    import torch

    from kvdsl.api import calibrate
    from kvdsl.errors import Fault
    from kvdsl.fisher import Gradients, weighted
    from kvdsl.generation import opened
    from kvdsl.hf import completed, observed, weighed
    from kvdsl.params import ROPE, rope_of, save
    from kvdsl.rules import layer_faults, refuse_for
    from kvdsl.shape import Shape

    if not _wants(scheme):
        fault = Fault("scheme", "it takes no number from data", "there is nothing to calibrate; use it as it is")
        raise SchemeError((fault,))
    quiet()
    network, tokenizer = opened(model)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][:, :tokens].to(network.device)
    layers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Gradients | None]]
    if any(weighted(own) for own in _schemes(scheme)):
        layers = [*weighed(network, ids)]
    else:
        layers = [(*layer, None) for layer in observed(network, ids)]
    known = completed(scheme, network, None)
    if found := layer_faults(scheme, len(layers)):
        raise SchemeError(found)
    numbers: dict[str, torch.Tensor] = {}
    for index, (keys, values, queries, gradients) in enumerate(layers):
        own = scheme.for_layer(index, len(layers))
        refuse_for(own, Shape(keys.shape[3], keys.shape[1]))
        rope = {ROPE: known[f"layers.{index}.{ROPE}"]} if rope_of(own) is not None else None
        measured = calibrate(own, keys, values, queries, params=rope, gradients=gradients)
        numbers |= {f"layers.{index}.{name}": tensor for name, tensor in measured.items()}
    save(out, scheme, numbers)
    tokens = layers[0][0].shape[0] * layers[0][0].shape[2] if layers else 0
    counts = {"layers": len(layers), "tokens": tokens, "tensors": len(numbers)}
    return {"path": str(out), "hash": scheme.hash, **counts}


def quiet() -> None:
    """No progress bars of transformers where nobody watches."""
    if not sys.stderr.isatty():
        from kvdsl.extras import need

        need("transformers.utils.logging", "hf").disable_progress_bar()


def _wants(scheme: Scheme) -> bool:
    """Whether a layer takes anything from data."""
    from kvdsl.params import from_data
    from kvdsl.shape import Shape

    return any(from_data(own, Shape(128)) for own in _schemes(scheme))


def _schemes(scheme: Scheme) -> tuple[Scheme, ...]:
    """Of all layers."""
    return (scheme, *(inner for _, inner in scheme.layers))
