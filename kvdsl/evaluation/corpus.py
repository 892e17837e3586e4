"""A text for a tokenizer, parted in two: the first tokens are calibrated on, all that is scored comes behind them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Corpus:
    """name and sha256 of the text; `first` (N,) are token ids to calibrate on, `ids` (M,) those of `rest`, the text
    behind the characters that they were taken from."""

    name: str
    sha256: str
    first: Tensor
    ids: Tensor
    rest: str


def encoded(tokenizer: Any, text: str) -> Tensor:
    """Token ids (N,) of a text as it is: nothing put in front, nothing behind."""
    ids: Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0].long()
    return ids


def parted(tokenizer: Any, text: str, name: str, calibration: int) -> Corpus:
    """The text, cut behind about `calibration` tokens.  ValueError for one of no more tokens."""
    count = len(encoded(tokenizer, text))
    if count <= calibration:
        raise ValueError(f"text: {count} tokens, of which the first {calibration} are calibrated on; give a longer one")
    cut = min(len(text), math.ceil(1.1 * len(text) * calibration / count))  # a little more: tokens differ in length
    first, ids = encoded(tokenizer, text[:cut])[:calibration], encoded(tokenizer, text[cut:])
    return Corpus(name, hashlib.sha256(text.encode()).hexdigest(), first, ids, text[cut:])
