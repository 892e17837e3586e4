"""The main job on a real model: declare a scheme, generate its kernels, check them, generate text through its cache.

What `make demo` runs.  The model (SmolLM2-135M, 93 MB) and the novel it continues are fetched the first time.
"""

from __future__ import annotations

import time

import torch

import kvdsl
from kvdsl import Recent, Scheme, Shape, Store, Uniform, per_channel, per_token
from kvdsl.generation import generate, opened, perplexity
from kvdsl.models import SMOLLM2
from kvdsl.models.text import botchan

SCHEME = Scheme(
    keys=Store(Uniform(4), scale=per_channel(tokens=32)),
    values=Store(Uniform(4), scale=per_token(channels=32)),
    recent=Recent(128),
    source="arXiv 2402.02750, section 3",
)
PROMPT = 2000  # characters of the novel, cut behind a sentence


def check(scheme: Scheme, shape: Shape) -> None:
    """Decoded numbers bit for bit, attention within rounding, against the definitions in float64."""
    generator = torch.Generator().manual_seed(0)
    sizes = (1, shape.kv_heads, 320, shape.head_dim)
    k, v = (torch.randn(sizes, generator=generator) for _ in range(2))
    q = torch.randn(1, shape.q_heads or shape.kv_heads, 1, shape.head_dim, generator=generator)
    for name, got, want in zip(
        ("keys", "values"), kvdsl.roundtrip(scheme, k, v), kvdsl.reference.roundtrip(scheme, k, v), strict=True
    ):
        if not torch.equal(got.double(), want):
            raise SystemExit(f"{name}: the generated kernels decode other numbers than the definition")
    error = (kvdsl.attend(scheme, q, k, v)[0] - kvdsl.reference.attend(scheme, q, k, v)[0]).abs().max()
    print(f"   decoded numbers equal the definition bit for bit; attention differs by {error:.1e}")


def main() -> None:
    started = time.monotonic()
    print("1. the scheme")
    print(f"   {SCHEME}")
    print(f"   keys {kvdsl.bits(SCHEME, 64).formula('keys')}, values {kvdsl.bits(SCHEME, 64).formula('values')}")

    print("2. its kernels")
    shape = Shape(head_dim=64, kv_heads=3, q_heads=9, dtype="fp32")
    kernels = kvdsl.build(SCHEME, shape)
    print(f"   {kernels.why}: {kernels.source.count(chr(10))} lines in {kernels.path}")

    print("3. checked")
    check(SCHEME, shape)

    print("4. a real model through the packed cache")
    model = opened(SMOLLM2)
    start = botchan()[:PROMPT]
    found = generate(SCHEME, model, start[: start.rindex(".") + 1], tokens=32)
    print(f"   packed          {found['text'].strip()!r}")
    print(f"   full precision  {found['baseline_text'].strip()!r}")
    print(f"   {found['agreement']:.0%} of the tokens are the same; greedy texts part at the first near tie")
    stats = found["stats"]
    print(
        f"   cache after {found['tokens']} tokens: {found['cache_bytes']:,} bytes, full precision "
        f"({str(model[0].dtype).removeprefix('torch.')}) {found['baseline_bytes']:,}; {stats['bits']:.2f} bits a "
        f"number with the exact window, {stats['fallbacks']} fallbacks"
    )

    print("5. the novel itself, token by token, beside a scheme with codes of half the bits")
    for name, scheme in (("4 bits", SCHEME), ("2 bits", SCHEME.with_(bits=2))):
        quality = perplexity(*model, botchan(), scheme, context=512, score=64)
        print(
            f"   {name}: perplexity {quality['perplexity']:.3f}, full precision {quality['baseline_perplexity']:.3f}; "
            f"the same next token at {quality['top1']:.0%} of {quality['scored']} places"
        )
    print(f"done in {time.monotonic() - started:.0f} s")
    print(f"read the generated source: {kernels.path}")


if __name__ == "__main__":
    main()
