"""`python benchmarks/cpu.py [NAME]`: decoding on a CPU through a scheme's cache beside the library's own.

SmolLM2-135M in float32, 1,024 tokens of context, one sequence, two threads, the torch backend.  Both caches take turns,
a token each, so that whatever else the machine does slows both; times are medians.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

import kvdsl.hf
from kvdsl.codegen.run_torch import TorchModule
from kvdsl.generation import full_bytes, full_cache, opened
from kvdsl.hf.layer import PackedLayer
from kvdsl.models.text import botchan

CONTEXT, STEPS, WARM, THREADS = 1024, 60, 5, 2
PARTS = (
    (PackedLayer, "append", "taking the token in"),
    (TorchModule, "pack", "packing"),
    (TorchModule, "_attended", "attention"),
    (TorchModule, "_scores_of_codes", "scores of codes"),
    (TorchModule, "_sums_of_codes", "sums of codes"),
)
"""What is timed, and what it is called; one that another one calls is told apart from it."""


class Watch:
    """Seconds that functions take, by name, those of others that they call not counted."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._within: list[float] = []

    def watched(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*given: Any, **named: Any) -> Any:
            self._within.append(0.0)
            begin = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                passed = time.perf_counter() - begin
                self.seconds[name] += passed - self._within.pop()
                if self._within:
                    self._within[-1] += passed

        return timed

    def watch(self) -> None:
        """Time all parts from now on."""
        for owner, name, called in PARTS:
            setattr(owner, name, self.watched(getattr(owner, name), called))


class Decoding:
    """A model that continues a text greedily through one cache."""

    def __init__(self, network: Any, ids: torch.Tensor, cache: Any, attention: str) -> None:
        self.network, self.cache, self.attention = network, cache, attention
        self.seconds: list[float] = []
        self.next = ids
        self.step()
        self.seconds.clear()

    def step(self) -> None:
        """One token more."""
        self.network.set_attn_implementation(self.attention)
        begin = time.perf_counter()
        logits = self.network(self.next, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.seconds.append(time.perf_counter() - begin)
        self.next = logits[:, -1:].argmax(-1)

    @property
    def median(self) -> float:
        """Milliseconds a token."""
        return 1e3 * statistics.median(self.seconds[WARM:])


def main(name: str = "kivi4") -> None:
    """Measure one scheme, and print what came out."""
    torch.set_num_threads(THREADS)
    network, tokenizer = opened("smollm2", "cpu")
    ids = tokenizer(botchan(), add_special_tokens=False, return_tensors="pt")["input_ids"][:, :CONTEXT]
    with torch.inference_mode():
        plain = Decoding(network, ids, full_cache(network), "sdpa")
        packed = Decoding(network, ids, kvdsl.hf.cache(name, network), "kvdsl")
        for _ in range(STEPS):
            plain.step()
            packed.step()
        ratio = plain.median / packed.median
        print(f"{name}, {CONTEXT} tokens and {STEPS} more, {THREADS} threads, torch {torch.__version__}")
        print(f"a token     {packed.median:.1f} ms, DynamicCache {plain.median:.1f} ms")
        print(f"tokens/s    {ratio:.2f} of DynamicCache's")
        held, full = packed.cache.nbytes, full_bytes(plain.cache)
        print(f"bytes       {held} held, DynamicCache {full} in float32: {full / held:.2f} times")
        watch, before = Watch(), len(packed.seconds)
        watch.watch()
        for _ in range(STEPS):
            packed.step()
        total = sum(packed.seconds[before:])
        for _, _, called in PARTS:
            print(f"{called:20}{watch.seconds[called] / total:5.1%}")
        print(f"{'model, library':20}{1 - sum(watch.seconds.values()) / total:5.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
