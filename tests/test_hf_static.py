"""Decoding in place through transformers' generate(): compiled whole, once, and the tokens of the dynamic cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import FAMILIES, FP32, model
from transformers import CompileConfig

from kvdsl.errors import CacheError
from kvdsl.hf import cache
from kvdsl.scheme import PreRope, Recent, Scheme, Sinks, Store, Uniform, per_channel, per_token

WHOLE = Scheme(
    keys=Store(Uniform(bits=8), scale=per_channel(tokens=16)),
    values=Store(Uniform(bits=8), scale=per_token()),
    recent=Recent(16),
    sinks=Sinks(2),
)
IDS = torch.randint(2, 90, (2, 23), generator=torch.Generator().manual_seed(0))


def tokens(made: Any, held: Any, padded: int, **options: Any) -> Any:
    """60 tokens behind the prompts, the second of which is padded on the left."""
    mask = torch.ones_like(IDS)
    mask[1, :padded] = 0
    held.reset()
    sizes = dict(max_new_tokens=60, min_new_tokens=60, do_sample=False)
    return made.generate(IDS, attention_mask=mask, past_key_values=held, **sizes, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_one_graph_for_all_lengths_and_prompts(family: str) -> None:
    """generate() with everything of a step in one traced graph, which is traced once, gives the tokens that it gives
    with appends, for prompts of either kind and again behind them."""
    made = model(family)
    for scheme in (FP32, WHOLE):
        torch._dynamo.reset()
        graphs = torch._dynamo.utils.counters["stats"]
        graphs.clear()
        compiled = CompileConfig(backend="eager", fullgraph=True, mode=None)  # type: ignore[arg-type]
        compiled._compile_all_devices = True  # type: ignore[assignment]
        plain, static = cache(scheme, made, capacity=96), cache(scheme, made, capacity=96, static=True)
        for padded in (0, 7):
            wanted = tokens(made, plain, padded)
            assert torch.equal(tokens(made, static, padded, compile_config=compiled), wanted)
            held = static.stats()
            assert held["fallbacks"] == held["dense_calls"] == 0 and held["tokens"] == plain.stats()["tokens"]
        assert graphs["unique_graphs"] == 1


def test_a_conversation_goes_on() -> None:
    """Chunks, steps in place and chunks again hold the same tokens as appends."""
    made = model("llama")
    plain, static = (cache(WHOLE, made, capacity=96, static=on) for on in (False, True))
    for begin, end in ((0, 9), (9, 10), (10, 11), (11, 17), (17, 18)):
        logits = [made(IDS[:, begin:end], past_key_values=held).logits for held in (plain, static)]
        assert torch.equal(logits[0].argmax(-1), logits[1].argmax(-1))
    assert plain.stats()["tokens"] == static.stats()["tokens"] == 36


def test_what_cannot_go_in_place_is_refused() -> None:
    """No capacity, tokens that the host sends to tiers, keys packed by their positions; another batch; too many."""
    made = model("llama")
    with pytest.raises(ValueError, match="static: no capacity"):
        cache(WHOLE, made, static=True)
    with pytest.raises(ValueError, match="static: layer 0 sends tokens to tiers"):
        cache("h2o", made, capacity=64, static=True)
    turned = WHOLE.with_(keys=WHOLE.keys.with_(transform=PreRope()))
    with pytest.raises(ValueError, match="static: layer 0 packs keys without their positions"):
        cache(turned, made, capacity=64, static=True)
    held = cache(WHOLE, made, capacity=30, static=True)
    with pytest.raises(CacheError, match="capacity: 30 tokens"):
        tokens(made, held, 0)
        held.stats()
    held.reset()  # type: ignore[no-untyped-call]
    made(IDS, past_key_values=held)
    with pytest.raises(CacheError, match="1 sequences, it holds 2"):
        made(IDS[:1], past_key_values=held)
