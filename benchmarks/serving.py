"""`python benchmarks/serving.py FOLDER [NAME ...] [--json FILE]`: vLLM on a CPU with its own cache and with schemes'.

Runs in the engine's environment (`make serve-test` makes it); FOLDER is a model in the transformers format, as
`python benchmarks/serving.py FOLDER --save` in the usual environment writes the small real one.

1, 8 and 32 requests at a time, prompts of 256 tokens, each engine in a process of its own, one thread.  A step gives a
token to all; times are medians, and of the processor, so that what else the machine does does not count.  Apart
from it stands what the attention's kernels take, packing included: the rest is the model, the engine and what leads to
the kernels, and is to be much the same for all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONCURRENT, PROMPT, NEW = (1, 8, 32), 256, 24
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip
OWN = "the engine's own"


class Watch:
    """Seconds of the processor within some functions, and how often they were called."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def put(self, owner: Any, name: str) -> None:
        """Time what `owner` calls by this name from now on."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.thread_time()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - begin
                self.calls += 1

        setattr(owner, name, timed)


def measure(folder: str, name: str) -> dict[str, Any]:
    """One engine: seconds a step, of which so many in kernels, by how many requests run; tokens it has room for."""
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {}
    watch = Watch()
    if name == OWN:
        from vllm import _custom_ops

        for one in ("cpu_attention_with_kv_cache", "cpu_attn_reshape_and_cache"):
            watch.put(_custom_ops, one)
    else:
        from kvdsl.kernels import KernelSet

        options = {"attention_backend": "CUSTOM", "additional_config": {"kvdsl": name}}
        for one in ("attend", "pack"):
            watch.put(KernelSet, one)
    engine: Any = LLM(
        model=folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=512,
        max_num_seqs=max(CONCURRENT), max_num_batched_tokens=1 << 14, enable_prefix_caching=False, **options,
    )  # fmt: skip
    drawn = random.Random(0)
    prompts = [{"prompt_token_ids": [drawn.randrange(3, 1000) for _ in range(PROMPT)]} for _ in range(max(CONCURRENT))]

    said = SamplingParams(temperature=0, max_tokens=1 + NEW, ignore_eos=True, detokenize=False)
    steps = {}
    for count in CONCURRENT:
        for place, prompt in enumerate(prompts[:count]):
            engine.llm_engine.add_request(f"{count}.{place}", prompt, said)
        taken = []
        while engine.llm_engine.has_unfinished_requests():
            inner, begin = watch.seconds, time.thread_time()
            engine.llm_engine.step()
            taken.append((time.thread_time() - begin, watch.seconds - inner))
        steps[count] = [statistics.median(part) for part in zip(*taken[-NEW + 1 :], strict=True)]
    assert watch.calls
    cache = engine.llm_engine.vllm_config.cache_config
    return {"name": name, "steps": steps, "room": cache.num_gpu_blocks * cache.block_size}


def table(found: list[dict[str, Any]]) -> str:
    """Ratios over the engine's own, as Markdown."""
    own = found[0]
    lines = ["| cache | tokens it has room for | requests | a step | kernels | the rest |", "| --- |" + " ---: |" * 5]
    for one in found:
        for count, (step, kernels) in one["steps"].items():
            base, inner = own["steps"][count]
            ratios = (step / base, kernels / inner, (step - kernels) / (base - inner))
            room = f"{one['room'] / own['room']:.3f}"
            lines.append(f"| {one['name']} | {room} | {count} | " + " | ".join(f"{x:.2f}" for x in ratios) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("names", nargs="*", default=["int8_token_head", "token4", "kivi4"])
    parser.add_argument("--save", action="store_true", help="write the small real model to the folder, and end")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.save:
        from kvdsl.models import load

        for part in load("smollm2"):
            part.save_pretrained(asked.folder)
    elif asked.one:
        print(json.dumps(measure(asked.folder, asked.one)))
    else:
        found = []
        for name in (OWN, *asked.names):
            command = [sys.executable, __file__, asked.folder, "--one", name]
            done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=True, stdout=subprocess.PIPE)
            found.append(json.loads(done.stdout.splitlines()[-1]))
        if asked.json:
            asked.json.write_text(json.dumps(found, indent=1) + "\n")
        print(table(found))


if __name__ == "__main__":
    main()
