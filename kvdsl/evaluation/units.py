"""What all schemes are given alike: windows of a text, prompts that hide a key, passages to copy, prompts to continue.

A unit is token ids of which the first `context` are put into the cache at once, as a prompt.
"""

from __future__ import annotations

import hashlib
import json
import random
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .corpus import Corpus, encoded
from .settings import Settings

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
WIDTH = 200  # characters of a line at most
RETRIEVAL = ("passkey", "needle")


@dataclass(frozen=True)
class Unit:
    """One prompt of a task.

    ids      (N,): of a scored task ids[context + 1:] are what is to be predicted, ids[context] is put in first
    chunk    tokens put in at a time behind the context
    about    what is to be known of it: start; length, depth, key; tokens
    """

    task: str
    number: int
    ids: Tensor
    context: int
    chunk: int
    about: dict[str, Any]

    @property
    def digest(self) -> str:
        """Of all that a measurement depends on, but the model and the scheme."""
        told = [self.task, self.ids.tolist(), self.context, self.chunk, self.about]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def planned(settings: Settings, corpus: Corpus, tokenizer: Any, positions: int | None = None) -> list[Unit]:
    """The units of all tasks asked, in their order.

    ValueError where the text is too short for them, or a prompt is longer than the model's `positions`.
    """
    makers: dict[str, Callable[[], Iterator[Unit]]] = {
        "perplexity": lambda: _windows(settings, corpus),
        "passkey": lambda: _hidden("passkey", settings, corpus, tokenizer),
        "needle": lambda: _hidden("needle", settings, corpus, tokenizer),
        "copy": lambda: _copies(settings, corpus, tokenizer),
        "greedy": lambda: _starts(settings, corpus),
        "layers": lambda: _observed(settings, corpus),
    }
    units = [unit for task in settings.tasks for unit in makers[task]()]
    for unit in units:
        tokens = len(unit.ids) + unit.about.get("tokens", 0)
        if positions is not None and tokens > positions:
            what = "lengths" if unit.task in RETRIEVAL else "context"
            raise ValueError(
                f"{what}: a prompt of {unit.task} has {tokens} tokens, and the model {positions} positions"
            )
    return units


def places(ids: Tensor, length: int, count: int, seed: int, what: str) -> list[int]:
    """Where `count` pieces of `length` tokens begin: one at a random place of each of so many equal stretches.

    ValueError for a text with no room for them side by side.
    """
    stretch = len(ids) // count
    if stretch < length:
        raise ValueError(
            f"text: {len(ids)} tokens behind those that are calibrated on; {what} take {count} x {length}; give a "
            "longer text, or ask for less"
        )
    rng = random.Random(f"{what} {seed}")
    return [i * stretch + rng.randrange(stretch - length + 1) for i in range(count)]


def _windows(settings: Settings, corpus: Corpus) -> Iterator[Unit]:
    length = settings.context + settings.score + 1
    for i, start in enumerate(places(corpus.ids, length, settings.windows, settings.seed, "windows")):
        piece = corpus.ids[start : start + length]
        yield Unit("perplexity", i, piece, settings.context, settings.chunk, {"start": start})


def _observed(settings: Settings, corpus: Corpus) -> Iterator[Unit]:
    """The first window, with queries in place of scored tokens."""
    length = settings.context + settings.queries
    (start,) = places(corpus.ids, length, 1, settings.seed, "layers")
    piece = corpus.ids[start : start + length]
    yield Unit("layers", 0, piece, settings.context, settings.queries, {"start": start})


def _starts(settings: Settings, corpus: Corpus) -> Iterator[Unit]:
    for i, at in enumerate(places(corpus.ids, settings.start, settings.continued, settings.seed, "greedy")):
        about = {"start": at, "tokens": settings.new}
        yield Unit("greedy", i, corpus.ids[at : at + settings.start], settings.start - 1, 1, about)


def _copies(settings: Settings, corpus: Corpus, tokenizer: Any) -> Iterator[Unit]:
    """A passage, and the first of its tokens once more."""
    before, again = (encoded(tokenizer, s) for s in ("Read this passage:\n", "\n\nThe same passage again:\n"))
    for i, at in enumerate(places(corpus.ids, settings.passage, settings.copies, settings.seed, "copies")):
        passage = corpus.ids[at : at + settings.passage]
        prompt = torch.cat([before, passage, again])
        ids = torch.cat([prompt, passage[: settings.copied]])
        yield Unit("copy", i, ids, len(prompt) - 1, settings.chunk, {"start": at})


def _hidden(task: str, settings: Settings, corpus: Corpus, tokenizer: Any) -> Iterator[Unit]:
    """A key in every length and at every depth, between lines that are all alike, or of the text."""
    body = _lines(corpus.rest)
    number = 0
    for length in settings.lengths:
        for depth in settings.depths:
            for i in range(settings.keys):
                rng = random.Random(f"{task} {settings.seed} {length} {depth} {i}")
                key = rng.randrange(10000, 100000)
                prompt, answer = _hiding(task, tokenizer, body, length, depth, key, rng)
                ids = torch.cat([prompt, answer])
                about = {"length": length, "depth": depth, "key": key}
                yield Unit(task, number, ids, len(prompt) - 1, max(settings.chunk, len(answer)), about)
                number += 1


def _hiding(
    task: str, tokenizer: Any, body: Sequence[str], length: int, depth: float, key: int, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Token ids of a prompt of about `length` tokens, and of the answer.  ValueError where there is no room."""
    if task == "passkey":
        head = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it.\n"
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."
        tail, lines = "\nWhat is the pass key? The pass key is", _repeated()
    else:
        head, needle = "", f"The secret pass key is {key}. Remember it. {key} is the secret pass key."
        tail, lines = "\n\nThe secret pass key mentioned above is", _from(body, rng)
    left = length - sum(len(encoded(tokenizer, part)) for part in (head, needle + "\n", tail))
    taken = list[str]()
    for line in lines:
        left -= len(encoded(tokenizer, line + "\n"))
        if left < 0:
            break
        taken.append(line)
    else:
        raise ValueError(f"text: too short for a prompt of {length} tokens; give a longer one, or other lengths")
    if not taken:
        raise ValueError(f"lengths: {length} tokens have no room for a key and a line; give more")
    taken.insert(round(depth * len(taken)), needle)
    return encoded(tokenizer, head + "\n".join(taken) + tail), encoded(tokenizer, f" {key}")


def _repeated() -> Iterator[str]:
    while True:
        yield FILLER


def _from(lines: Sequence[str], rng: random.Random) -> Iterator[str]:
    """The lines from a random one on, then those before it."""
    begin = rng.randrange(len(lines)) if lines else 0
    yield from lines[begin:]
    yield from lines[:begin]


def _lines(text: str) -> list[str]:
    """The lines of a text that are not blank, long ones broken."""
    found = list[str]()
    for line in text.splitlines():
        found += [line] if len(line) <= WIDTH else textwrap.wrap(line, WIDTH)
    return [line for line in found if line.strip()]
