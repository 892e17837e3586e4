"""A model through a packed cache for the tasks of lm-evaluation-harness:
`lm_eval.simple_evaluate(model=language_model("kivi2", "smollm2"), tasks=[...])`.

One request at a time; a context is run in full precision once and packed for each of its continuations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvdsl.extras import need
from kvdsl.generation import Loaded, continued, opened
from kvdsl.hf import cache as packed_cache
from kvdsl.kernels import Backend, Params
from kvdsl.registry import load
from kvdsl.scheme import Scheme

from .filling import Prompt, unchanged
from .scoring import likeliest
from .units import Unit

TOKENS = 256  # generated at most where a task does not say


def language_model(
    scheme: Scheme | str,
    model: str | Path | Loaded,
    *,
    params: Params | None = None,
    backend: Backend | None = None,
    device: str | None = None,
    chunk: int = 32,
) -> Any:
    """An lm_eval.api.model.LM.  A context is put into the packed cache of `scheme`, its continuation follows in chunks
    of `chunk` tokens, which see each other exactly, and reads it as it is stored; generation is greedy, token by token.

    Arguments as for kvdsl.evaluate.  MissingExtra where lm_eval is not installed.
    """
    base = need("lm_eval.api.model", "lm-eval").LM
    kind = type("PackedLM", (_Packed, base), {})
    made = kind()
    made.begin(load(scheme), opened(model, device), params, backend, chunk)
    return made


class _Packed:
    """What the harness calls; its own base class is put beside when one is made."""

    def begin(self, scheme: Scheme, loaded: Loaded, params: Params | None, backend: Backend | None, chunk: int) -> None:
        """Take what every request needs."""
        self.scheme, (self.model, self.tokenizer) = scheme, loaded
        self.params, self.backend, self.chunk = params, backend, chunk
        config = self.model.config.get_text_config(decoder=True)
        self.positions: int = getattr(config, "max_position_embeddings", 2048)
        self._prompt: Prompt | None = None

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether it is what greedy generation gives) of every request."""
        return [self._likelihood(*self._pair(*request.args)) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of every text, in pieces as long as the model takes, each behind the token that begins a text."""
        found = []
        for request in requests:
            ids, size = self._encoded(request.args[0]), self.positions - 1
            pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
            found.append(sum(self._likelihood([self._first], piece)[0] for piece in pieces))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of every context, up to one of the texts that end it.  ValueError for sampling."""
        return [self._generated(*request.args) for request in requests]

    @property
    def _first(self) -> int:
        """What stands before a text's first token."""
        tokenizer = self.tokenizer
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return int(begin)

    def _encoded(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both; blanks between them are the continuation's, since a word's token begins with its blank."""
        kept = context.rstrip()
        continuation, context = context[len(kept) :] + continuation, kept
        if not context:
            return [self._first], self._encoded(continuation)
        before = self._encoded(context)
        return before, self._encoded(context + continuation)[len(before) :]

    def _filled(self, context: list[int], room: int) -> tuple[Any, list[int]]:
        """A cache with all of a context but its last token, its newest tokens where it is too long; what was taken."""
        context = context[-max(1, self.positions - room) :]
        if len(context) == 1:
            return packed_cache(self.scheme, self.model, params=self.params, backend=self.backend), context
        ids = torch.tensor(context)
        if self._prompt is None or not torch.equal(self._prompt.unit.ids, ids):
            self._prompt = Prompt.of(self.model, Unit("harness", 0, ids, len(context) - 1, self.chunk, {}))
        return self._prompt.packed(self.scheme, self.params, self.backend), context

    def _likelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        if not continuation:
            return 0.0, True
        with unchanged(self.model):
            cache, context = self._filled(context, len(continuation))
            ids = torch.tensor(context + continuation).to(self.model.device)
            logs = continued(self.model, ids, cache, context=len(context) - 1, chunk=self.chunk)
        target = ids[len(context) :, None]
        return logs.gather(1, target).sum().item(), bool((logs.argmax(1) == target[:, 0]).all())

    def _generated(self, context: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") or options.get("temperature"):
            raise ValueError("harness: sampling is asked for, and generation is greedy; set do_sample to false")
        asked = options.get("until") or []
        ends = [asked] if isinstance(asked, str) else [*asked]
        most, found = int(options.get("max_gen_toks", TOKENS)), list[int]()
        with unchanged(self.model):
            cache, ids = self._filled(self._encoded(context) or [self._first], most)
            token = torch.tensor(ids[-1]).to(self.model.device)
            while len(found) < most:
                token = likeliest(self.model, token, cache)
                if int(token) == self.tokenizer.eos_token_id:
                    break
                found.append(int(token))
                told = str(self.tokenizer.decode(found))
                if any(end in told for end in ends):
                    return min((told.split(end)[0] for end in ends if end), key=len)
        return str(self.tokenizer.decode(found))
