"""What peers with pages have in common: page numbers in random order, and numbers brought into pages."""

from __future__ import annotations

import torch
from torch import Tensor

from kvdsl.bench import Size


def table(size: Size, page: int, device: torch.device) -> Tensor:
    """The page of each place, int32 (batch, pages a sequence), in random order."""
    generator = torch.Generator(device).manual_seed(0)
    each = -(-size.tokens // page)
    return torch.randperm(size.batch * each, generator=generator, device=device).to(torch.int32).view(size.batch, each)


def fill(pages: Tensor, at: Tensor, rows: Tensor) -> None:
    """Write rows (B, H, T, ...) into pages (pages, page, H, ...), page at[b, i] of tokens [i * page, ...) each; a
    sequence at a time, as a copy of all of them may not fit."""
    page = pages.shape[1]
    for b, own in enumerate(at):
        tokens = rows[b].transpose(0, 1)
        whole = len(tokens) // page
        pages[own[:whole].long()] = tokens[: whole * page].unflatten(0, (whole, page))
        if rest := tokens[whole * page :].shape[0]:
            pages[int(own[whole]), :rest] = tokens[whole * page :]


def take(pages: Tensor, own: Tensor, tokens: int) -> Tensor:
    """The first tokens of one sequence's pages, (H, tokens, ...)."""
    return pages[own.long()].flatten(0, 1)[:tokens].transpose(0, 1)


def quantized(x: Tensor, levels: float) -> tuple[Tensor, Tensor]:
    """(x / scale, float32 scales): symmetric, the largest number of each token and head becomes `levels`."""
    scale = x.abs().amax(-1).float() / levels
    return x.float() / scale[..., None], scale
