"""Random tiny models of six families, with logits far enough apart that equal numbers mean equal tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from kvdsl.evaluation.settings import Settings
from kvdsl.scheme import Float, Scheme, Store

transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]

FP32 = Scheme(both=Store(Float("fp32")))


def words(lines: int, end: str = " ") -> str:
    """A text of sentences that differ in their numbers alone."""
    said = "the cache of a model holds keys and values of all tokens before the"
    return "".join(f"{i}: {said} {i} th.{end}" for i in range(lines))


TEXT = words(40)
SETTINGS = Settings(calibration=60, context=96, score=12, chunk=4)
"""What such a text and model have room for."""
Loaded = tuple[Any, Any]
COMMON = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=96,
    initializer_range=0.25,
)
SLIDING = dict(sliding_window=8)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": SLIDING,
    "gemma2": dict(SLIDING, query_pre_attn_scalar=16),
    "gemma3_text": dict(SLIDING, query_pre_attn_scalar=16, sliding_window_pattern=2),
    "gpt_oss": dict(SLIDING, num_local_experts=4, num_experts_per_tok=2),
}


@cache
def model(family: str, **changes: Any) -> Any:
    """An untrained model with the library's own eager attention."""
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES.get(family, {}), **changes})
    torch.manual_seed(1)
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # type: ignore[no-untyped-call]
    return made.eval().requires_grad_(False)


@cache
def characters() -> Any:
    """A tokenizer whose tokens are the printable characters."""
    words = {chr(32 + i): i for i in range(95)} | {"[PAD]": 95, "[END]": 96}
    core = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", eos_token="[END]")  # type: ignore[no-untyped-call]


def saved(family: str, folder: Path, **changes: Any) -> str:
    """The folder with such a model and this tokenizer, the way a user's model comes."""
    model(family, **changes).save_pretrained(folder)
    characters().save_pretrained(folder)
    return str(folder)


def prompt(batch: int = 1, tokens: int = 13, *, seed: int = 3) -> Tensor:
    """Token ids (batch, tokens) without special ones."""
    return torch.randint(2, 90, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded() -> tuple[Tensor, Tensor]:
    """Three prompts of 8, 13 and 4 tokens: (ids, attention mask), both (3, 13)."""
    ids, mask = prompt(3), torch.ones(3, 13, dtype=torch.int64)
    mask[0, :5] = mask[2, :9] = 0
    return ids * mask, mask


def generated(network: Any, ids: Tensor, cache: Any = None, mask: Tensor | None = None, **options: Any) -> Tensor:
    """The tokens of `generate`, 10 new ones, from a fixed seed; with the library's cache unless one is given."""
    torch.manual_seed(5)
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, **options}
    mask = torch.ones_like(ids) if mask is None else mask
    cache = DynamicCache(config=network.config) if cache is None else cache
    out: Tensor = network.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    return out


def plain(network: Any) -> Any:
    """The model, back on the library's own attention."""
    network.set_attn_implementation("eager")
    return network


@contextmanager
def one_thread() -> Iterator[None]:
    """Operations this small lose most of their time to threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
