"""A combination that no paper has: rotated keys under a table of levels, and values scaled by their channels' size.

Declared, checked against the definitions, sent through packed bytes and attended to.
"""

from __future__ import annotations

import torch

import kvdsl
from kvdsl import ChannelScale, Codebook, Rotate, Scheme, Store, Uniform, per_token

# Keys: Hadamard's matrix after random signs, then the eight levels that suit a normal law best, under the norm.
# Values: each channel over the root of its largest size in typical data, then four even levels for 32 channels.
mine = Scheme(
    keys=Store(Codebook(3, "normal"), scale=per_token(), transform=Rotate("random_hadamard", seed=0)),
    values=Store(Uniform(2), scale=per_token(channels=32), transform=ChannelScale("sqrt_absmax")),
)


def tensors(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of 256 tokens; channels differ in size, as those of a model do."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, 256, 128, generator=generator) for heads in (4, 2, 2))
    size = torch.linspace(0.1, 2, 128)
    return q[:, :, -4:], k * size, v * size


def main() -> None:
    bits = kvdsl.bits(mine, head_dim=128)
    print(f"keys {bits.formula('keys')}, values {bits.formula('values')}")

    results = list(kvdsl.testing.report(mine, backend="torch", examples=3))
    assert all(result.passed for result in results), [result.failure for result in results]
    print(f"{len(results)} laws hold")

    _, typical_k, typical_v = tensors(seed=1)
    params = kvdsl.calibrate(mine, typical_k, typical_v)
    print(", ".join(f"{name} {tuple(numbers.shape)}" for name, numbers in params.items()), "from typical tensors")

    q, k, v = tensors(seed=2)
    for side, got, want in zip(
        ("keys", "values"),
        kvdsl.roundtrip(mine, k, v, params=params),
        kvdsl.reference.roundtrip(mine, k, v, params=params),
        strict=True,
    ):
        x = k if side == "keys" else v
        error = (got - x).square().mean() / x.square().mean()
        apart = (got.double() - want).abs().max()
        print(f"{side}: relative squared error {error:.4f}; {apart:.0e} from the definition")

    out, _ = kvdsl.attend(mine, q, k, v, params=params)
    want, _ = kvdsl.reference.attend(mine, q, k, v, params=params)
    print(f"attention: {(out.double() - want).abs().max():.0e} from the definition")


if __name__ == "__main__":
    main()
