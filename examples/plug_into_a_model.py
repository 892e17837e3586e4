"""A packed cache in a model of the transformers library: two ways in, and the model is afterwards as it was.

The model is small and untrained, so that nothing is downloaded; a trained one is used in the same way.
"""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvdsl

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def main() -> None:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(CONFIG)
    model.eval()
    prompt = torch.randint(0, 256, (1, 200))

    # A cache of one's own, passed along.
    cache = kvdsl.cache("kivi4", model)
    model.generate(prompt, past_key_values=cache, max_new_tokens=16, do_sample=False)
    stats = cache.stats()
    print(f"{stats['tokens']} tokens in {stats['bytes']} bytes, {stats['fallbacks']} fallbacks")

    # Or every generate() inside a block.
    with kvdsl.use(model, "int8_token_head") as used:
        model.generate(prompt, max_new_tokens=16, do_sample=False)
    print(f"int8_token_head: {used.cache.stats()['bits']:.2f} bits a number, window and tables included")


if __name__ == "__main__":
    main()
