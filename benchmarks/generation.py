"""`python benchmarks/generation.py BATCH TOKENS [NAME ...]`: milliseconds a token of generate() on a GPU.

A Llama of random numbers, 16 layers, 2048 wide, 32 query and 8 kv heads of 128, float16.  Beside the library's dynamic
cache, and its static one of which generate() compiles a step, stand each scheme's appends and its steps in place.  A
line has one number a run: the first one compiles.  What a token takes is the difference of a generation of one token
and of 64 behind the same prompt, which is appended anew each time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from kvdsl.hf import cache

NEW, RUNS = 64, 3


def model() -> Any:
    """The model, on the GPU."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=32000, head_dim=128, max_position_embeddings=1 << 17,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]


def seconds(made: Any, ids: torch.Tensor, held: Any, new: int) -> float:
    """Of one generation behind an empty cache."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    made.generate(ids, past_key_values=held, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def timed(made: Any, ids: torch.Tensor, fresh: Callable[[], Any]) -> list[float]:
    """Milliseconds a token, run by run."""
    held, found = fresh(), []
    for _ in range(RUNS):
        times = []
        for new in (1, NEW):
            if type(held) is DynamicCache:  # its memory grows as it is filled
                held = fresh()
            held.reset()
            times.append(seconds(made, ids, held, new))
        found.append(1e3 * (times[1] - times[0]) / (NEW - 1))
    return found


def main() -> None:
    batch, tokens, names = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    made, room = model(), tokens + NEW
    ids = torch.randint(0, made.config.vocab_size, (batch, tokens), device="cuda")
    ways: dict[str, Callable[[], Any]] = {
        "dynamic": DynamicCache,
        "static, compiled": partial(StaticCache, config=made.config, max_cache_len=room),
    }
    for name in names:
        ways[f"{name}, appends"] = partial(cache, name, made, capacity=room)
        ways[f"{name}, in place, compiled"] = partial(cache, name, made, capacity=room, static=True)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {batch} x {tokens} tokens, ms a token by run")
    for way, fresh in ways.items():
        made.set_attn_implementation("kvdsl" if way.partition(",")[0] in names else "sdpa")
        print(f"{way:32}", *(f"{one:8.2f}" for one in timed(made, ids, fresh)), flush=True)


if __name__ == "__main__":
    main()
