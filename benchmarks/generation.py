"""`python benchmarks/generation.py speed|room BATCH TOKENS [NAME ...] [--json FILE]`: whole models on a GPU.

A Llama of random numbers in the shape of one of 8 billion: 32 layers, 4096 wide, 32 query and 8 kv heads of 128,
float16.  The library's dynamic cache stands beside, and its static one, of which generate() compiles a step.

speed   milliseconds a token of generate(), and the most memory beside the weights.  Of each scheme both its appends
        and its steps in place.  One number a run: the first one compiles.  What a token takes is the difference of a
        generation of one token and of 64 behind the same prompt, which is appended anew each time
room    the largest batch, a multiple of BATCH, that has room for TOKENS tokens a sequence and a step of the model.
        The cache is filled with normal numbers instead of a prompt's, which take as many bytes
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from kvdsl.hf import cache

NEW, RUNS = 64, 3
CHUNK = 8192  # tokens that are filled in at a time
Ways = dict[str, Callable[[], Any]]


def model() -> Any:
    """The model, on the GPU."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, head_dim=128, max_position_embeddings=1 << 17,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]


def attending(made: Any, way: str, names: list[str]) -> None:
    """The attention that reads the cache of this way."""
    made.set_attn_implementation("kvdsl" if way.partition(",")[0] in names else "sdpa")


# -- speed ------------------------------------------------------------------------------------------------------------


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


def speed(made: Any, batch: int, tokens: int, names: list[str]) -> Iterator[dict[str, Any]]:
    """A row a way: ms a token by run, and bytes at most beside the weights."""
    room = tokens + NEW
    ids = torch.randint(0, made.config.vocab_size, (batch, tokens), device="cuda")
    ways: Ways = {"dynamic": DynamicCache}
    ways["static, compiled"] = partial(StaticCache, config=made.config, max_cache_len=room)
    for name in names:
        ways[f"{name}, appends"] = partial(cache, name, made, capacity=room)
        ways[f"{name}, in place, compiled"] = partial(cache, name, made, capacity=room, static=True)
    for way, fresh in ways.items():
        attending(made, way, names)
        weights = emptied()
        found = timed(made, ids, fresh)
        yield {"way": way, "ms": found, "bytes": torch.cuda.max_memory_allocated() - weights}


def emptied() -> int:
    """Let go of what nobody holds; bytes that are held."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


# -- room -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fits(made: Any, held: Any, batch: int, tokens: int) -> bool:
    """Whether the filled cache and a step of the model fit."""
    sizes = (batch, made.config.num_key_value_heads, CHUNK, made.config.head_dim)
    try:
        for layer in range(made.config.num_hidden_layers):
            for begin in range(0, tokens, CHUNK):
                fresh = torch.randn(sizes, device="cuda")[:, :, : tokens - begin]
                held.layers[layer].update(fresh, fresh)
                held.layers[layer].get_seq_length()  # by now the tokens are stored
        made(torch.ones(batch, 1, dtype=torch.int64, device="cuda"), past_key_values=held)
        torch.cuda.synchronize()
    except (torch.cuda.OutOfMemoryError, MemoryError):
        return False
    return True


def most(made: Any, fresh: Callable[[], Any], step: int, tokens: int) -> int:
    """The largest batch that fits: doubled, then halved between the two."""

    def fitting(batch: int) -> bool:
        emptied()
        return fits(made, fresh(), batch, tokens)

    low, high = 0, step
    while fitting(high):
        low, high = high, 2 * high
    while high - low > step:
        middle = low + (high - low) // (2 * step) * step
        low, high = (middle, high) if fitting(middle) else (low, middle)
    return low


def room(made: Any, batch: int, tokens: int, names: list[str]) -> Iterator[dict[str, Any]]:
    """A row a way: the largest batch."""
    ways: Ways = {"dynamic": partial(DynamicCache, config=made.config)}
    ways |= {name: partial(cache, name, made, capacity=tokens + 1) for name in names}
    for way, fresh in ways.items():
        attending(made, way, names)
        yield {"way": way, "batch": most(made, fresh, batch, tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "room"])
    parser.add_argument("batch", type=int)
    parser.add_argument("tokens", type=int)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--json", type=Path, help="a file for the rows, with device, versions and date")
    asked = parser.parse_args()
    made, rows = model(), []
    versions = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(*versions.values(), asked.what, f"{asked.batch} x {asked.tokens} tokens")
    measured = {"speed": speed, "room": room}[asked.what]
    for found in measured(made, asked.batch, asked.tokens, asked.names):
        rows.append(found)
        times = " ".join(f"{one:8.2f}" for one in found.get("ms", []))
        print(f"{found['way']:32}", times or found["batch"], found.get("bytes", ""), flush=True)
        if asked.json:
            about = {**versions, "date": str(datetime.date.today()), "what": asked.what}
            shape = {"batch": asked.batch, "tokens": asked.tokens}
            asked.json.write_text(json.dumps({**about, **shape, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
