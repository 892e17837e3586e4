"""Keys stored before rotation in models of transformers: whose frequencies, of which layer, at which positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import FAMILIES, generated, left_padded, model, plain, prompt
from torch import Tensor
from transformers import DynamicCache

from kvdsl import calibrate
from kvdsl.errors import ShapeError
from kvdsl.hf import cache, completed, observed, use
from kvdsl.hf.rotary import Probe
from kvdsl.params import ROPE
from kvdsl.rope import turned
from kvdsl.scheme import Float, PreRope, Scheme, Store, Uniform, per_channel, per_token

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = Scheme(keys=Store(Float("fp32"), transform=PreRope()), values=Store(Float("fp32")))
PAIRED = EXACT.with_(keys=EXACT.keys.with_(transform=PreRope(interleaved=True)))
BYTES = Scheme(
    keys=Store(Uniform(8), scale=per_channel(when="calibrated"), transform=PreRope()),
    values=Store(Uniform(8), scale=per_token()),
)
SCHEMES = {
    "exact": EXACT,
    "bytes of tokens": BYTES.with_(keys=Store(Uniform(8), scale=per_token(), transform=PreRope())),
    "bytes of channels": BYTES,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}  # fmt: skip
MEDIA = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}
MODELS: dict[str, tuple[str, dict[str, Any], Scheme]] = {
    **{name: (name, {}, EXACT) for name in FAMILIES},
    "yarn": ("llama", dict(rope_parameters=YARN), EXACT),
    "llama3": ("llama", dict(rope_parameters=LLAMA3), EXACT),
    "linear": ("llama", dict(rope_parameters=LINEAR), EXACT),
    "partial": ("phi", {}, EXACT),
    "partial and paired": ("glm", {}, PAIRED),
    "paired": ("cohere", {}, PAIRED),
    "some layers": ("smollm3", dict(num_hidden_layers=4), EXACT),
}


class Frozen(dict[str, Any]):
    """A dictionary that `tiny.model` can be cached by."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(str(self))


def made(family: str, changes: dict[str, Any]) -> Any:
    return plain(model(family, **{key: Frozen(x) if isinstance(x, dict) else x for key, x in changes.items()}))


def frequencies(network: Any, scheme: Scheme) -> list[Tensor]:
    found = completed(scheme, network, None)
    return [found[f"layers.{i}.{ROPE}"] for i in range(network.config.num_hidden_layers)]


@pytest.mark.parametrize("options", [{}, dict(prefill_chunk_size=5)], ids=["whole", "chunked"])
@pytest.mark.parametrize("name", MODELS)
def test_exact_codes_give_the_library_s_tokens(name: str, options: dict[str, Any]) -> None:
    """With the model's own frequencies in every layer, in batches with padding, also in windows that slide."""
    family, changes, scheme = MODELS[name]
    network = made(family, changes)
    ids, mask = left_padded()
    expected = generated(network, ids, mask=mask, **options)
    packed = cache(scheme, network)
    assert torch.equal(generated(network, ids, packed, mask, **options), expected)
    stats = packed.stats()
    assert stats["fallbacks"] == stats["dense_calls"] == 0 < stats["packed_calls"]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "yarn", "llama3", "linear", "partial", "some layers"])
def test_what_is_coded_is_what_the_projection_gave(name: str) -> None:
    """R_t^-1 k_t of a stored token, t its place without padding, is a layer's key before RoPE, times yarn's factor."""
    family, changes, scheme = MODELS[name]
    network = made(family, changes)
    projected: list[Tensor] = []
    layers = [layer.self_attn for layer in network.model.layers]
    hooks = [
        getattr(layer, "k_norm", layer.k_proj).register_forward_hook(lambda m, i, out: projected.append(out))
        for layer in layers
    ]
    ids, mask = left_padded()
    packed = cache(scheme, network)
    projected.clear()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    network(ids, attention_mask=mask, position_ids=positions, past_key_values=packed)
    for hook in hooks:
        hook.remove()
    factor = getattr(network.model.rotary_emb, "attention_scaling", 1.0)
    assert (factor != 1) == (name == "yarn")
    for index, rotation in enumerate(frequencies(network, scheme)):
        before = projected[index]
        before = before if before.dim() == 4 else before.unflatten(-1, (2, 32)).transpose(1, 2)
        stored = packed.layers[index].packed.dense("keys")
        for b, count in enumerate((8, 13, 4)):
            kept = stored[b : b + 1, :, -count:]
            found = turned(kept, rotation, torch.arange(13 - count, 13) - (13 - count), False, back=True)
            torch.testing.assert_close(found.float()[0], before[b, :, -count:] * factor, rtol=1e-4, atol=1e-4)


def test_layers_have_tables_of_their_own() -> None:
    local, whole = frequencies(model("gemma3_text"), EXACT)
    assert local[1] == pytest.approx(1e4 ** (-1 / 16)) and whole[1] == pytest.approx(1e6 ** (-1 / 16))
    rotated = frequencies(model("smollm3", num_hidden_layers=4), EXACT)
    assert [bool(f.any()) for f in rotated] == [True, True, True, False]
    mixed = EXACT.with_(layers={1: Scheme(both=Store())})
    assert set(completed(mixed, model("llama"), None)) == {f"layers.0.{ROPE}"}


@pytest.mark.parametrize("counted", [False, True], ids=["own positions", "padding has positions"])
@pytest.mark.parametrize("scheme", ["exact", "bytes of tokens", "bytes of channels"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_scores_are_right_wherever_a_sequence_begins(family: str, scheme: str, counted: bool) -> None:
    """Scores depend on differences of positions: where padding has positions, what is coded is turned by as many, which
    is put back."""
    network, own = plain(model(family)), SCHEMES[scheme]
    params: dict[str, Tensor] = {}
    for index, numbers in enumerate(frequencies(network, own)):
        seen = observed(network, prompt(1, 480, seed=9))[index]
        found = calibrate(own, *seen, params={ROPE: numbers})
        params |= {f"layers.{index}.{name}": x for name, x in found.items()}
    ids, mask = left_padded()
    new, longer = prompt(3, 6, seed=7), torch.ones(3, 19, dtype=torch.int64)
    longer[:, :13] = mask
    positions = torch.arange(19).expand(3, 19) if counted else (longer.cumsum(1) - 1).clamp(min=0)
    logits = []
    for name in ("eager", "kvdsl"):
        start: Any = cache(own, network, params=params) if name == "kvdsl" else DynamicCache(config=network.config)
        network.set_attn_implementation(name)
        network(ids, attention_mask=mask, position_ids=positions[:, :13], past_key_values=start)
        logits.append(network(new, attention_mask=longer, position_ids=positions[:, 13:], past_key_values=start).logits)
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert error < 1e-5 if scheme == "exact" else 1e-4 < error < 0.1
    plain(network)


@pytest.mark.parametrize(
    ("family", "changes", "scheme", "words"),
    [
        ("cohere", {}, EXACT, r"layer 0: RoPE pairs neighbouring channels; use PreRope\(interleaved=True\)"),
        ("llama", {}, PAIRED, r"RoPE pairs channels half of the rotated ones apart; use PreRope\(interleaved=False\)"),
        ("llama", dict(rope_parameters=DYNAMIC), EXACT, "'rope_type'. is 'dynamic', whose frequencies change"),
        ("llama", dict(rope_parameters=LONG), EXACT, "'rope_type'. is 'longrope', whose frequencies change"),
        ("llama", dict(rope_parameters=MEDIA), EXACT, "'mrope_section', so positions of images"),
        ("gpt2", {}, EXACT, "none of the model's 0 tables of frequencies explains"),
    ],
    ids=["paired", "halves", "dynamic", "longrope", "media", "no rope"],
)
def test_rotations_of_another_kind_are_refused(
    family: str, changes: dict[str, Any], scheme: Scheme, words: str
) -> None:
    network = made(family, changes)
    with pytest.raises(ValueError, match=words):
        cache(scheme, network)
    with pytest.raises(ValueError, match=words), use(network, scheme):
        pass
    assert network.config._attn_implementation == "eager"


def test_given_frequencies_are_held_against_the_model_s() -> None:
    network = plain(model("llama"))
    right = frequencies(network, EXACT)[0]
    ids = prompt()
    expected = generated(network, ids)
    assert torch.equal(generated(network, ids, cache(EXACT, network, params={ROPE: right})), expected)
    with pytest.raises(ShapeError, match=r"'layers.0.keys.transform\[0\]'\]: .* other frequencies; leave it"):
        cache(EXACT, network, params={ROPE: right * 1.01})
    with pytest.raises(ShapeError, match="layers.1.keys.* other frequencies"):
        cache(EXACT, network, params={f"layers.1.{ROPE}": right[:8]})
    with pytest.raises(ShapeError, match="at most 16 for head_dim 32"):
        cache(EXACT, network, params={ROPE: torch.ones(17)})
    short = made("llama", dict(rope_parameters=DYNAMIC))
    held = dict(short.model.rotary_emb.named_buffers())["inv_freq"]
    expected = generated(short, ids)
    assert torch.equal(generated(short, ids, cache(EXACT, short, params={ROPE: held})), expected)
    with pytest.raises(ShapeError, match="other frequencies"):
        cache(EXACT, short, params={ROPE: held.flip(0)})
    plain(network), plain(short)


def test_a_model_is_asked_once_in_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    network, asked, of = plain(model("llama")), [0], Probe.of

    def counted(model: Any) -> Probe:
        asked[0] += 1
        return of(model)

    monkeypatch.setattr(Probe, "of", counted)
    with use(network, EXACT):
        for _ in range(2):
            network.generate(prompt(), max_new_tokens=2)
    assert asked == [1]
    cache("kivi2", network)
    assert asked == [1]
    plain(network)


def test_a_model_that_cannot_be_run_on_tokens_says_so() -> None:
    network = plain(model("llama"))
    forward, network.forward = network.forward, lambda **_: 1 / 0
    try:
        with pytest.raises(ValueError, match="this LlamaForCausalLM cannot be run so .ZeroDivisionError"):
            cache(EXACT, network)
    finally:
        network.forward = forward
