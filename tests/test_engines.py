"""What formats of serving engines do at their edges: ends of ranges, ranges far from 0, blocks of one number."""

from __future__ import annotations

import torch

from kvdsl import reference
from kvdsl.scheme import Scheme
from kvdsl.schemes import exl3_4


def read(scheme: Scheme, x: torch.Tensor) -> torch.Tensor:
    """Keys as they are read, by the definition: (tokens, channels) each."""
    return reference.roundtrip(scheme, x[None, None], x[None, None], window=False)[0][0, 0]


def test_the_largest_number_of_cells_is_read_half_a_step_too_small() -> None:
    """exllamav3: the code of max|y| would be 16, and is held to 15, whose cell's middle is 15/16 of it."""
    plain = exl3_4.with_(transform=())
    x = torch.linspace(-8, 8, 32)[None]
    assert read(plain, x)[0, -1] == 7.5 and read(plain, x)[0, 0] == -7.5
