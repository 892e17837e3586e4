"""What the engine and transformers are both asked: prompts for a tiny random model, and how many tokens to give."""

from __future__ import annotations

import random
from typing import Any

LENGTHS = (5, 37, 70, 200, 131)
TOKENS = 40
SCHEMES = ("token4", "kivi4", "kivi2_sinks", "turboquant3")
MODEL: dict[str, Any] = dict(
    vocab_size=128, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, head_dim=32, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    initializer_range=0.2,
)  # fmt: skip


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 3) -> list[list[int]]:
    """Prompts of these lengths, without special tokens."""
    drawn = random.Random(seed)
    return [[drawn.randrange(3, 120) for _ in range(length)] for length in lengths]
