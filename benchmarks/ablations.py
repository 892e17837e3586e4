"""`python benchmarks/ablations.py > docs/ablations.md`: ZipCache taken apart on a real model and a real text.

One choice of the scheme is changed at a time: by what tokens are ranked, which queries are asked, how long tokens wait,
and what values are scaled by.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

import kvdsl
from kvdsl.codegen.answer import row as markdown_row
from kvdsl.generation import full_cache, opened, predictions
from kvdsl.hf import observed
from kvdsl.models.text import botchan
from kvdsl.scheme import ALL, ChannelScale, Probes, Saliency, Scheme, Store, Uniform, per_token
from kvdsl.schemes import zipcache

CONTEXT, SCORE, CHUNK, WINDOWS = 384, 160, 16, 1
EVERY = 1 << 20  # more queries than there are
PAGE = f"""# ZipCache taken apart

Made by `python benchmarks/ablations.py`; not written by hand. SmolLM2-135M in float32, the torch backend, text of
"Botchan": {WINDOWS} place, a prompt of {CONTEXT} tokens, then {SCORE} more in chunks of {CHUNK}, which see each other
exactly and all before them as it is stored. One choice of `zipcache` is changed at a time; its own is named first.

* bits: an element of {CONTEXT + SCORE} tokens at this model's heads, the exact ones that wait at 16, what is measured
  of tiers, and where each token stood (a quarter of a bit at these heads of 64 channels), included.
* KL: of the next token's distribution from that in full precision, a token, in nats; top 1: the same likeliest token;
  perplexity of the text.
* time: of a processor, for the whole run over that of the same run in full precision: what packing, routing and reading
  take there beside the model itself, no figure of a GPU.
"""


def variants() -> Iterator[tuple[str, str, Scheme]]:
    """(what is changed, to what, the scheme)."""
    router = zipcache.router
    assert isinstance(router, Saliency)
    metrics = ("normalized", "accumulated", "last", "mean_std")
    for metric in metrics:
        probes = None if metric == "last" else router.probes
        yield "saliency", metric, zipcache.with_(router=router.with_(metric=metric, probes=probes))
    some = {
        "5 % newest and 5 % at random": router.probes,
        "10 % newest": Probes(recent=0.1),
        "10 % at random": Probes(random=0.1),
        "all": Probes(recent=EVERY),
    }
    for name, probes in some.items():
        yield "probes", name, zipcache.with_(router=router.with_(probes=probes))
    for every, name in ((100, "100 tokens wait"), (1, "none waits")):
        yield "buffer", name, zipcache.with_(router=router.with_(every=every))
    yield "re-decision", "any token moves", zipcache
    yield "re-decision", "as the released code", kvdsl.load("zipcache_code")
    values = {
        "channels apart, of each flush": zipcache.values,
        "channels apart, calibrated": Store(
            Uniform(), scale=per_token(heads=ALL), transform=ChannelScale("sqrt_absmax")
        ),
        "groups of 32 channels": Store(Uniform(), scale=per_token(channels=32)),
        "whole tokens": Store(Uniform(), scale=per_token(heads=ALL)),
    }
    for name, store in values.items():
        yield "scales of values", name, zipcache.with_(values=store)


def measured() -> Iterator[tuple[str, ...]]:
    """One row a variant; a scheme that stands there twice is run once."""
    torch.set_num_threads(1)
    model, tokenizer = opened("smollm2")
    ids = tokenizer(botchan(), add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    length = CONTEXT + SCORE + 1
    places = [ids[start : start + length] for start in range(0, WINDOWS * 10 * length, 10 * length)]
    layers = observed(model, ids[None, -CONTEXT:])
    config, known = model.config, dict[str, tuple[str, ...]]()
    heads = config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    begin = time.process_time()
    full = torch.cat([predicted(model, window, full_cache(model)) for window in places])
    usual = time.process_time() - begin
    target = torch.cat([window[CONTEXT + 1 :] for window in places])[:, None]
    for what, name, scheme in variants():
        if scheme.hash not in known:
            params: dict[str, Any] = {}
            for index, (k, v, q) in enumerate(layers):
                params |= {f"layers.{index}.{key}": x for key, x in kvdsl.calibrate(scheme, k, v, q).items()}
            begin = time.process_time()
            found = torch.cat([predicted(model, w, kvdsl.cache(scheme, model, params=params)) for w in places])
            spent = (time.process_time() - begin) / usual
            kl = (full.exp() * (full - found)).sum(1).mean().item()
            same = (full.argmax(1) == found.argmax(1)).double().mean().item()
            bits = kvdsl.bits(scheme, width, heads, tokens=length).mean
            known[scheme.hash] = (f"{bits:.3f}", f"{kl:.4f}", f"{same:.1%}", _perplexity(found, target), f"{spent:.1f}")
            print(what, name, *known[scheme.hash], file=sys.stderr, flush=True)
        yield what, name, *known[scheme.hash]
    yield "full precision", "", "16", "0", "100.0%", _perplexity(full, target), "1"


def predicted(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Log-probabilities of what follows each token behind the prompt."""
    return predictions(model, ids, cache, context=CONTEXT, chunk=CHUNK)


def _perplexity(found: torch.Tensor, target: torch.Tensor) -> str:
    return f"{math.exp(-found.gather(1, target).mean().item()):.3f}"


def main() -> None:
    print(PAGE)
    print(markdown_row(("changed", "to", "bits", "KL", "top 1", "perplexity", "time")))
    print("| --- | --- |" + " ---: |" * 5)
    for cells in measured():
        print(markdown_row(cells))


if __name__ == "__main__":
    main()
