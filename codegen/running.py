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
    from kvdsl.params import load, takes_data

    if params is None and takes_data(scheme):
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
    from kvdsl.errors import Fault
    from kvdsl.generation import opened
    from kvdsl.hf import measured, seen
    from kvdsl.params import save, takes_data

    if not takes_data(scheme):
        fault = Fault("scheme", "it takes no number from data", "there is nothing to calibrate; use it as it is")
        raise SchemeError((fault,))
    quiet()
    network, tokenizer = opened(model)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][:, :tokens].to(network.device)
    layers = seen(scheme, network, ids)
    numbers = measured(scheme, network, layers)
    save(out, scheme, numbers)
    tokens = layers[0][0].shape[0] * layers[0][0].shape[2] if layers else 0
    counts = {"layers": len(layers), "tokens": tokens, "tensors": len(numbers)}
    return {"path": str(out), "hash": scheme.hash, **counts}


def quiet() -> None:
    """No progress bars of transformers where nobody watches."""
    if not sys.stderr.isatty():
        from kvdsl.extras import need

        need("transformers.utils.logging", "hf").disable_progress_bar()
