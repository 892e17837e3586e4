"""`python tests/engine/expected.py FOLDER`: a tiny model, and what transformers makes of the prompts with each scheme.

Runs where kvdsl's own tests run: the engine pins another torch and another transformers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from prompts import MODEL, SCHEMES, TOKENS, prompts
from transformers import LlamaConfig, LlamaForCausalLM

from kvdsl.hf import cache
from kvdsl.registry import load
from kvdsl.serving import Served, served


@torch.no_grad()
def greedy(model: Any, prompt: list[int], how: Served) -> list[int]:
    """The likeliest tokens, the prompt given block by block, as the scheme is served."""
    held, ids, begin = cache(how.scheme, model), torch.tensor([prompt]), 0
    while begin < len(prompt):
        end = min(len(prompt), how.sinks + how.own_block(begin) + how.block) if how.waits else len(prompt)
        logits = model(ids[:, begin:end], past_key_values=held).logits
        begin = end
    found = []
    for _ in range(TOKENS):
        found.append(int(logits[0, -1].argmax()))
        logits = model(torch.tensor([found[-1:]]), past_key_values=held).logits
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**MODEL)).eval()  # type: ignore[no-untyped-call]
    model.save_pretrained(folder / "model")
    tokens = {name: [greedy(model, one, served(load(name))) for one in prompts()] for name in SCHEMES}
    (folder / "expected.json").write_text(json.dumps(tokens))


if __name__ == "__main__":
    main()
