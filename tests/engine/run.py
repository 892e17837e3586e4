"""`python tests/engine/run.py FOLDER < SCENARIO`: one engine in a process of its own; its answer on a line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ANSWER = "ANSWER "
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip


def main() -> None:
    folder, asked = Path(sys.argv[1]), json.load(sys.stdin)
    for name, value in {**ENVIRONMENT, **asked.get("environment", {})}.items():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams

    options = dict(
        skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=8,
        disable_log_stats=False,
    )  # fmt: skip
    if asked["scheme"]:
        options |= dict(attention_backend="CUSTOM", additional_config={"kvdsl": asked["scheme"]})
    engine: Any = LLM(model=str(folder / "model"), **{**options, **asked.get("options", {})})
    said = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False)

    def generate(prompts: list[list[int]]) -> list[Any]:
        return engine.generate([dict(prompt_token_ids=one) for one in prompts], said, use_tqdm=False)

    passes = []
    for _ in range(asked.get("passes", 1)):
        found = generate(asked["prompts"])
        passes.append(
            {
                "tokens": [list(one.outputs[0].token_ids) for one in found],
                "cached": [one.num_cached_tokens for one in found],
            }
        )
    alone = [list(generate([one])[0].outputs[0].token_ids) for one in asked["prompts"]] if asked.get("alone") else []
    cache = engine.llm_engine.vllm_config.cache_config
    metrics = {one.name: one.value for one in engine.get_metrics() if hasattr(one, "value")}
    answer = {
        "passes": passes,
        "alone": alone,
        "tokens": cache.num_gpu_blocks * cache.block_size,
        "preemptions": metrics.get("vllm:num_preemptions", 0),
        "drafts": metrics.get("vllm:spec_decode_num_draft_tokens", 0),
    }
    print(ANSWER + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
