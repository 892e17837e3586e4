"""GGUF files of the llama architecture: weights widened once to a float dtype, and the tokenizer the file describes.

The file keeps rotary pairs of the query and key projections interleaved (2i, 2i + 1); transformers wants halves
(i, i + d/2).  Without the exchange a model loads and talks nonsense.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvdsl.extras import need

if TYPE_CHECKING:
    import torch

PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL = 3
"""The token type of the file's special tokens."""


class Fields:
    """The key-value part of a GGUF file."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def get(self, key: str, default: Any = None) -> Any:
        """The contents of a field, or `default` where the file lacks it."""
        field = self.reader.get_field(key)
        return default if field is None else field.contents()


def load_gguf(path: Path, *, dtype: torch.dtype) -> tuple[Any, Any]:
    """(LlamaForCausalLM, PreTrainedTokenizerFast) of a GGUF file.

    Raises ModelError for what is no GGUF file or of another architecture, MissingExtra without gguf or tokenizers.
    """
    from . import ModelError

    gguf = need("gguf", "demo")
    try:
        reader = gguf.GGUFReader(path)
    except ValueError as error:
        raise ModelError(f"model {str(path)!r}: not a GGUF file ({error})") from error
    fields = Fields(reader)
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ModelError(
            f"model {str(path)!r}: GGUF architecture {architecture!r}, only llama is read; convert it to a folder"
        )
    unknown = [t.name for t in reader.tensors if _target(t.name) is None]
    if unknown or fields.get("llama.rope.scaling.type", "none") != "none":
        what = f"tensor {unknown[0]}" if unknown else "rope scaling"
        raise ModelError(f"model {str(path)!r}: {what} is not understood; convert the file to a folder")
    return _model(reader, fields, dtype), _tokenizer(fields, path)


def _target(name: str) -> str | None:
    """The transformers name of a tensor, None if there is none."""
    stem, _, kind = name.rpartition(".")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.{kind}"
    block, _, rest = stem.partition(".")
    layer, _, part = rest.partition(".")
    return f"model.layers.{layer}.{PARTS[part]}.{kind}" if block == "blk" and part in PARTS else None


def _config(reader: Any, fields: Fields) -> Any:
    from transformers import LlamaConfig

    heads = fields.get("llama.attention.head_count")
    size = fields.get("llama.embedding_length")
    names = {t.name for t in reader.tensors}
    end = fields.get("tokenizer.ggml.eos_token_id")
    return LlamaConfig(
        vocab_size=len(fields.get("tokenizer.ggml.tokens")),
        hidden_size=size,
        intermediate_size=fields.get("llama.feed_forward_length"),
        num_hidden_layers=fields.get("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
        head_dim=fields.get("llama.attention.key_length", size // heads),
        max_position_embeddings=fields.get("llama.context_length"),
        rms_norm_eps=fields.get("llama.attention.layer_norm_rms_epsilon"),
        tie_word_embeddings="output.weight" not in names,
        attention_bias="blk.0.attn_q.bias" in names,
        rope_parameters={"rope_type": "default", "rope_theta": fields.get("llama.rope.freq_base", 10000.0)},
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=end,
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id", end),
    )


def _model(reader: Any, fields: Fields, dtype: torch.dtype) -> Any:
    import torch
    from gguf import dequantize
    from transformers import LlamaForCausalLM

    from . import ModelError

    config = _config(reader, fields)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        # A copy: the array may lie in the mapped file, which torch must not write to.
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = halves(weight, heads[part])
        name = _target(tensor.name)
        assert name is not None
        state[name] = weight.to(dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    absent = set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    if absent or unexpected:
        raise ModelError(
            f"model: the file lacks {sorted(absent)} and holds {sorted(unexpected)}; it is no complete llama model"
        )
    model.tie_weights()
    # Its buffer was made on the meta device; it stays float32 in every dtype, as in a loaded folder.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    trained = model.eval()  # type: ignore[no-untyped-call]
    return trained


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a projection (heads * d, ...) with interleaved rotary pairs -> the same rows, pair i at (i, i + d/2)."""
    d = weight.shape[0] // heads
    return weight.reshape(heads, d // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def _tokenizer(fields: Fields, path: Path) -> Any:
    """Byte-level BPE as the file's `tokenizer.ggml.pre` says; no token is put before or after a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from . import ModelError

    kind, rule = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if (kind, rule) != ("gpt2", "smollm"):
        raise ModelError(
            f"model {str(path)!r}: tokenizer {kind!r} with rule {rule!r} is not read; convert the file to a folder"
        )
    tokens = fields.get("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in fields.get("tokenizer.ggml.merges")]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    core.decoder = decoders.ByteLevel()
    special = [t for t, k in zip(tokens, fields.get("tokenizer.ggml.token_type"), strict=True) if k == CONTROL]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])

    def named(key: str) -> str | None:
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        return None if index is None else str(tokens[index])

    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        bos_token=named("bos"),
        eos_token=named("eos"),
        pad_token=named("padding") or named("eos"),
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
