"""A real model through a scheme's packed cache: `kvdsl generate` and `kvdsl calibrate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from kvdsl.errors import SchemeError, ShapeError
from kvdsl.kernels import Backend
from kvdsl.rules import layer_faults
from kvdsl.scheme import Codebook, Scheme, Store


def generated(
    scheme: Scheme, name: str, model: str, prompt: str, tokens: int, params: Path | None, backend: Backend | None
) -> dict[str, Any]:
    """What kvdsl.generation.generate gives, the contract's keys first."""
    from kvdsl.generation import generate
    from kvdsl.params import load

    if params is None and _wants(scheme):
        raise ShapeError(
            "params: numbers of this scheme are calibrated; give --params F, which `kvdsl calibrate` writes"
        )
    numbers = None if params is None else load(params, scheme)
    _quiet()
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
    """Run the text through the model, measure each layer's keys and values, write the file.

    Raises SchemeError for a scheme without calibrated scales or one that does not fit the model's layers.
    """
    import torch

    from kvdsl.api import calibrate
    from kvdsl.errors import Fault
    from kvdsl.extras import need
    from kvdsl.generation import opened
    from kvdsl.params import save

    if not _wants(scheme):
        fault = Fault(
            "scale", "every scale is measured online", "there is nothing to calibrate; use the scheme as it is"
        )
        raise SchemeError((fault,))
    _quiet()
    network, tokenizer = opened(model)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][:, :tokens].to(network.device)
    cache = need("transformers", "hf").DynamicCache()
    with torch.no_grad():
        network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    count = len(cache.layers)
    if found := layer_faults(scheme, count):
        raise SchemeError(found)
    numbers: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(cache.layers):
        own = calibrate(scheme.for_layer(index, count), layer.keys, layer.values)
        numbers |= {f"layers.{index}.{name}": tensor for name, tensor in own.items()}
    save(out, scheme, numbers)
    return {"path": str(out), "hash": scheme.hash, "layers": count, "tokens": ids.shape[1], "tensors": len(numbers)}


def _quiet() -> None:
    """No progress bars of transformers where nobody watches."""
    if not sys.stderr.isatty():
        from kvdsl.extras import need

        need("transformers.utils.logging", "hf").disable_progress_bar()


def _wants(scheme: Scheme) -> bool:
    own = _calibrated(scheme.keys) or _calibrated(scheme.values)
    return own or any(_wants(inner) for _, inner in scheme.layers)


def _calibrated(store: Store) -> bool:
    scale = store.measure
    table = isinstance(store.code, Codebook) and store.code.levels == "calibrated"
    return table or (scale is not None and (scale.when == "calibrated" or scale.scale is not None))
