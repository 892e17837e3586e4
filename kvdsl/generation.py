"""A model run twice, through a packed cache and in full precision: what comes out, what it takes, how far apart."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .extras import need
from .kernels import Backend, Params
from .scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

Loaded = tuple[Any, Any]


def generate(
    scheme: Scheme | str,
    model: str | Path | Loaded,
    prompt: str,
    *,
    tokens: int = 64,
    params: Params | None = None,
    backend: Backend | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Greedy continuation of `prompt` by at most `tokens` tokens through the packed cache, beside full precision.

    model: "smollm2", a GGUF file, a folder in the transformers format, or a loaded (model, tokenizer).
    Returns scheme; text, baseline_text; agreement (share of places with the same token, from the first on); same_tokens
    (before the first difference); tokens; cache_bytes, baseline_bytes, baseline_tokens; stats (PackedCache.stats).
    Raises ModelError, SchemeError, MissingExtra.
    """
    from .hf import use

    network, tokenizer = opened(model, device)
    inputs = tokenizer(prompt, return_tensors="pt").to(network.device)
    options = dict(max_new_tokens=tokens, do_sample=False, num_beams=1, pad_token_id=tokenizer.pad_token_id)
    start = inputs["input_ids"].shape[1]
    with use(network, scheme, params=params, backend=backend) as used:
        found = network.generate(**inputs, **options)[0, start:].tolist()
    plain = full_cache(network)
    expected = network.generate(**inputs, past_key_values=plain, **options)[0, start:].tolist()
    assert used.cache is not None
    longest = max(len(found), len(expected))
    equal = [a == b for a, b in zip(found, expected, strict=False)]
    return {
        "scheme": _named(scheme),
        "text": tokenizer.decode(found, skip_special_tokens=True),
        "baseline_text": tokenizer.decode(expected, skip_special_tokens=True),
        "agreement": sum(equal) / longest if longest else 1.0,
        "same_tokens": next((i for i, same in enumerate(equal) if not same), len(equal)),
        "tokens": used.cache.get_seq_length(),
        "cache_bytes": used.cache.nbytes,
        "baseline_bytes": full_bytes(plain),
        "baseline_tokens": plain.get_seq_length(),
        "stats": used.cache.stats(),
    }


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    scheme: Scheme | str,
    *,
    context: int = 384,
    score: int = 64,
    windows: int = 1,
    chunk: int = 64,
    params: Params | None = None,
    backend: Backend | None = None,
) -> dict[str, Any]:
    """Teacher-forced text through the packed cache and in full precision, over `windows` places spread over the text.

    In a window `context` tokens go in as a prompt; then `score` tokens follow in chunks of `chunk`, each predicting its
    successor.  Tokens of a chunk see each other exactly, so a chunk should not be longer than the scheme's window.
    Returns perplexity, baseline_perplexity, delta (their difference), kl (mean of KL(full || packed) a token, in nats),
    top1 (share of tokens with the same most likely successor), scored, bits (a number, everything included), stats.
    """
    torch = need("torch", "hf")
    from .hf import cache as packed_cache

    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0].to(model.device)
    length = context + score + 1
    if ids.shape[0] < length:
        raise ValueError(f"text: {ids.shape[0]} tokens; context={context} and score={score} take {length}")
    spare = ids.shape[0] - length
    starts = [spare * i // max(1, windows - 1) for i in range(windows)] if windows > 1 else [0]
    sums = torch.zeros(4, dtype=torch.float64)
    stats: dict[str, Any] = {}
    before = model.config._attn_implementation
    for start in starts:
        window = ids[start : start + length]
        full = predictions(model, window, full_cache(model), context=context, chunk=chunk)
        try:
            packed = packed_cache(scheme, model, params=params, backend=backend)
            found = predictions(model, window, packed, context=context, chunk=chunk)
        finally:
            model.set_attn_implementation(before)
        stats = packed.stats()
        target = window[context + 1 :, None]
        kl = (full.exp() * (full - found)).sum(1)
        same = full.argmax(1) == found.argmax(1)
        sums += torch.stack([-found.gather(1, target).sum(), -full.gather(1, target).sum(), kl.sum(), same.sum()]).cpu()
    nll, base, kl_mean, top1 = (sums / (score * windows)).tolist()
    return {
        "perplexity": math.exp(nll),
        "baseline_perplexity": math.exp(base),
        "delta": math.exp(nll) - math.exp(base),
        "kl": kl_mean,
        "top1": top1,
        "scored": score * windows,
        "bits": stats["bits"],
        "stats": stats,
    }


def predictions(model: Any, ids: Tensor, cache: Any, *, context: int, chunk: int) -> Tensor:
    """Log-probabilities, float64 (len(ids) - 1 - context, vocabulary), of what follows ids[context] and each later."""
    with need("torch", "hf").no_grad():
        model(input_ids=ids[None, :context], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return continued(model, ids, cache, context=context, chunk=chunk)


def continued(model: Any, ids: Tensor, cache: Any, *, context: int, chunk: int) -> Tensor:
    """The same where the cache holds the first `context` tokens already."""
    torch = need("torch", "hf")
    rows = []
    with torch.no_grad():
        for begin in range(context, ids.shape[0] - 1, chunk):
            piece = ids[None, begin : min(begin + chunk, ids.shape[0] - 1)]
            logits = model(input_ids=piece, past_key_values=cache, use_cache=True).logits[0]
            rows.append(torch.log_softmax(logits.to(torch.float64), 1))
    result: Tensor = torch.cat(rows)
    return result


def opened(model: str | Path | Loaded, device: str | None = None) -> Loaded:
    """(model, tokenizer), loaded if it is a name or a path; on a GPU where there is one, unless `device` says else."""
    if isinstance(model, tuple):
        return model
    torch = need("torch", "hf")
    from .models import load

    return load(model, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))


def called(model: str | Path | Loaded, network: Any) -> str:
    """The name of a model, without the folders that lead to it."""
    given = network.config.name_or_path if isinstance(model, tuple) else str(model)
    return Path(given).name or str(network.config.model_type)


def digest_of(network: Any) -> str:
    """Of the names, shapes and first numbers of all weights."""
    found = hashlib.sha256()
    for name, weight in network.state_dict().items():
        found.update(f"{name} {tuple(weight.shape)}".encode())
        found.update(weight.flatten()[:64].float().cpu().numpy().tobytes())
    return found.hexdigest()[:12]


def full_cache(model: Any) -> Any:
    """The library's own cache for the model."""
    return need("transformers", "hf").DynamicCache(config=model.config)


def full_bytes(cache: Any) -> int:
    """Bytes of keys and values in the library's cache."""
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values) if t is not None)


def _named(scheme: Scheme | str) -> str:
    if isinstance(scheme, str):
        return scheme
    from .registry import name_of

    return name_of(scheme)
