"""The kernels against the definitions: bytes and decoded numbers bit for bit, attention within rounding."""

import torch

import kvdsl
from kvdsl import Scheme, Store, Uniform, per_token

mine = Scheme(both=Store(Uniform(5), scale=per_token(channels=32, range="absmax")))


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 2, 64, 64, generator=generator) for _ in range(2))  # (batch, kv_heads, tokens, head_dim)
    q = torch.randn(2, 4, 1, 64, generator=generator)  # two query heads for each kv head

    found, right = kvdsl.roundtrip(mine, k, v), kvdsl.reference.roundtrip(mine, k, v)
    assert all(torch.equal(a.double(), b) for a, b in zip(found, right, strict=True))
    print("every decoded number is what the definition says, bit for bit")

    out, lse = kvdsl.attend(mine, q, k, v)
    right_out, right_lse = kvdsl.reference.attend(mine, q, k, v)
    print(f"attention differs by {(out - right_out).abs().max():.1e}, lse by {(lse - right_lse).abs().max():.1e}")
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    print(f"quantization itself costs {(right_out - exact).abs().max():.1e}")

    # Every law that applies, on random shapes and numbers; a broken one raises with the smallest case.
    kvdsl.testing.check(mine, examples=3)
    print("all laws hold")


if __name__ == "__main__":
    main()
