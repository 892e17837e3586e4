"""A packed cache under lm-evaluation-harness, whose base class is stood in for: what is asked and answered is plain."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from kvdsl.evaluation.harness import language_model
from kvdsl.extras import MissingExtra
from kvdsl.generation import full_cache, predictions
from kvdsl.schemes import int4_token_head

CONTEXT, MORE = "the cache of a model holds keys", " and values"


class LM:
    """The harness's, as far as it is asked for here."""


@pytest.fixture(autouse=True)
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model")}
    modules["lm_eval.api.model"].LM = LM  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with tiny.one_thread():
        yield


def made(scheme: Any = tiny.FP32, **options: Any) -> Any:
    return language_model(scheme, (tiny.plain(tiny.model("llama")), tiny.characters()), **options)


def asking(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=arguments)]


def full(text: str, context: int) -> torch.Tensor:
    """Log-probabilities of what follows the first `context` characters of a text."""
    model, tokenizer = tiny.plain(tiny.model("llama")), tiny.characters()
    ids = torch.tensor(tokenizer(text)["input_ids"])
    logs = predictions(model, ids, full_cache(model), context=context - 1, chunk=64)
    return logs.gather(1, ids[context:, None])[:, 0]


def test_a_continuation_has_the_model_s_own_likelihood() -> None:
    lm = made()
    assert issubclass(type(lm), LM)
    right = full(CONTEXT + MORE, len(CONTEXT)).sum().item()
    for context, more in ((CONTEXT, MORE), (f"{CONTEXT} ", MORE.lstrip())):
        ((found, greedy),) = lm.loglikelihood(asking(context, more))
        assert found == pytest.approx(right, rel=1e-5) and greedy is False
    assert lm.model.config._attn_implementation == "eager"
    lossy = made(int4_token_head.with_(bits=2)).loglikelihood(asking(CONTEXT, MORE))[0][0]
    assert abs(lossy - right) > 1e-3


def test_what_is_generated_is_what_is_likeliest() -> None:
    lm = made(chunk=3)
    (told,) = lm.generate_until(asking(CONTEXT, {"max_gen_toks": 6, "until": []}))
    ids = lm._encoded("".join(told.split(" "))) if " " in told else lm._encoded(told)
    assert 0 < len(ids) <= 6
    (shorter,) = lm.generate_until(asking(CONTEXT, {"max_gen_toks": 6, "until": [told[2]]}))
    assert told.startswith(shorter) and told[2] not in shorter and len(shorter) <= 2
    with pytest.raises(ValueError, match="sampling is asked for, and generation is greedy"):
        lm.generate_until(asking(CONTEXT, {"temperature": 0.7}))


def test_a_text_alone_and_one_that_is_too_long() -> None:
    lm = made()
    lm.tokenizer = SimpleNamespace(bos_token_id=1, eos_token_id=96, decode=lm.tokenizer.decode)
    lm._encoded = lambda text: tiny.characters()(text)["input_ids"]
    (whole,) = lm.loglikelihood_rolling(asking("some words"))
    ((alone, _),) = lm.loglikelihood(asking("", "some words"))
    assert whole == pytest.approx(alone)
    lm.positions = 16
    (found,) = lm.loglikelihood(asking(CONTEXT, MORE))
    assert found[0] < 0
    cut = CONTEXT[-(16 - len(MORE)) :]
    assert found[0] == pytest.approx(full(cut + MORE, len(cut)).sum().item(), rel=1e-5)


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.delitem(sys.modules, name)
    if any(getattr(finder, "find_spec", None) and finder.find_spec("lm_eval", None) for finder in sys.meta_path):
        pytest.skip("it is installed")
    with pytest.raises(MissingExtra, match=r"lm_eval is not installed; run: pip install 'kvdsl\[lm-eval\]'"):
        made()
