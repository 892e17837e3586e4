"""Laws of caches with tiers in models of transformers: real `generate`, ragged batches, beams, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import generated, left_padded, model, prompt

from kvdsl.errors import CacheError
from kvdsl.hf import cache, use
from kvdsl.scheme import (
    ALL,
    DROP,
    ChannelScale,
    Feedback,
    Float,
    PreRope,
    Probes,
    Recent,
    Saliency,
    Scheme,
    Sinks,
    Store,
    Tier,
    Uniform,
    per_channel,
    per_token,
)

EXACT = Store(Float("fp32"))
SCHEMES = {
    "zipcache": Scheme(
        keys=Store(Uniform(), scale=per_channel()),
        values=Store(Uniform(), scale=per_token(heads=ALL), transform=ChannelScale(when="online")),
        tiers=(Tier(4, top=0.6), Tier(2)),
        router=Saliency("normalized", probes=Probes(recent=0.3, random=0.3), every=4, moves="any"),
        requantize="on_flush",
    ),
    "evicting": Scheme(
        both=EXACT, recent=Recent(3), tiers=(Tier(top=4), DROP), router=Saliency("accumulated", moves="down")
    ),
    "streaming": Scheme(both=EXACT, sinks=Sinks(2), recent=Recent(4), tiers=(DROP,)),
    "fed": Scheme(
        keys=Store(Uniform(2), scale=per_channel(tokens=4), feedback=Feedback(weight=0.1, channels=8)),
        values=EXACT,
        recent=Recent(4, "whole"),
        tiers=(Tier(),),
    ),
}


@pytest.mark.parametrize("options", [{}, dict(num_beams=3)], ids=["greedy", "beams"])
def test_tiers_of_exact_tokens_give_the_library_s_tokens(options: dict[str, Any]) -> None:
    """Which tier a token is in is no matter where both keep its numbers."""
    network = model("llama")
    scheme = Scheme(both=EXACT, recent=Recent(2), tiers=(Tier(top=0.5), Tier()), router=Saliency(every=3))
    expected = generated(network, prompt(2), **options)
    packed = cache(scheme, network)
    assert torch.equal(generated(network, prompt(2), packed, **options), expected)
    stats = packed.stats()
    assert stats["fallbacks"] == 0 and all(min(layer["tiers"]) > 0 for layer in stats["layers"])


@pytest.mark.parametrize("name", SCHEMES)
def test_a_sequence_gets_in_a_ragged_batch_what_it_gets_alone(name: str) -> None:
    """P29, through padding on the left: neighbours reach neither labels nor tokens."""
    network = model("llama")
    ids, mask = left_padded()
    together = cache(SCHEMES[name], network)
    found = generated(network, ids, together, mask)
    assert together.stats()["fallbacks"] == 0
    for b, (row, real) in enumerate(zip(ids, mask.bool(), strict=True)):
        alone = cache(SCHEMES[name], network)
        only = generated(network, row[real][None], alone)
        assert torch.equal(found[b, ids.shape[1] :], only[0, int(real.sum()) :])
        for one, other in zip(together.packed_layers, alone.packed_layers, strict=True):
            length = other.packed.lengths[0]
            assert torch.equal(one.packed.labels[b, :, -length:], other.packed.labels[0])


def test_a_conversation_goes_on_and_branches() -> None:
    network, scheme = model("llama"), SCHEMES["zipcache"]
    packed = cache(scheme, network)
    first = generated(network, prompt(), packed)
    branch = copy.deepcopy(packed)
    longer = torch.cat([first, prompt(seed=5)], 1)
    assert torch.equal(generated(network, longer, packed), generated(network, longer, branch))


def test_numbers_of_dropped_tokens_are_refused() -> None:
    """Another attention would take them for zeros."""
    network = model("llama")
    packed = cache(SCHEMES["streaming"], network)
    generated(network, prompt(), packed)
    with pytest.raises(CacheError, match="some tokens were dropped"):
        packed.layers[0].dense("keys")


def test_what_was_sent_to_tiers_is_not_taken_back() -> None:
    network = model("llama")
    packed = cache(SCHEMES["streaming"], network)
    generated(network, prompt(), packed)
    with pytest.raises(CacheError, match="sent to tiers, which no router takes back"):
        packed.crop(-10)


def test_tiers_in_layers_with_sliding_windows_give_the_library_s_tokens() -> None:
    """Where both tiers keep numbers as they are, and keys before their positions are kept in float32, too."""
    network = model("mistral")
    expected = generated(network, prompt(2), max_new_tokens=24)
    for keys in (EXACT, EXACT.with_(transform=PreRope())):
        scheme = Scheme(
            keys=keys, values=EXACT, sinks=Sinks(1), recent=Recent(2), tiers=(Tier(top=0.5), Tier()),
            router=Saliency(every=3),
        )  # fmt: skip
        packed = cache(scheme, network)
        assert {layer.window for layer in packed.packed_layers} == {network.config.sliding_window}
        assert torch.equal(generated(network, prompt(2), packed, max_new_tokens=24), expected)
        stats = packed.stats()
        assert stats["fallbacks"] == 0 and all(min(layer["tiers"]) > 0 for layer in stats["layers"])


def test_only_some_layers_may_have_tiers() -> None:
    network = model("llama")
    scheme = Scheme(both=EXACT, layers={1: SCHEMES["evicting"]})
    with use(network, scheme) as used:
        network.generate(prompt(), attention_mask=torch.ones_like(prompt()), max_new_tokens=4, do_sample=False)
    assert used.cache is not None and used.cache.stats()["fallbacks"] == 0
