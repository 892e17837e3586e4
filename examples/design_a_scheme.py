"""A scheme of one's own, from its first line to figures: written, read, tested, measured, and made better step by step.

    python examples/design_a_scheme.py [MODEL] [--windows N]

MODEL is a folder in the transformers format, a GGUF file, or smollm2, which is fetched the first time (93 MB).
"""

from __future__ import annotations

import argparse
import sys

import kvdsl
from kvdsl import Codebook, Recent, Rotate, Scheme, SchemeError, Shape, Sinks, Store, Uniform, per_channel, per_token
from kvdsl.codegen.show import View, main_loop, show
from kvdsl.evaluation import Evaluation, Settings

SHAPE = Shape(head_dim=64, kv_heads=3, q_heads=9)

# Keys and values in 2 bits, the newest 128 tokens exact: a scale for every token, of values one for 32 channels.
FIRST = Scheme(
    keys=Store(Uniform(2), scale=per_token()),
    values=Store(Uniform(2), scale=per_token(channels=32)),
    recent=Recent(128),
)
# A few channels of keys are large and take all the levels.  Hadamard's matrix behind random signs spreads them.
TURNED = FIRST.with_(**{"keys.transform": (Rotate("random_hadamard", seed=0),)})
# Turned numbers lie as by a normal law: levels that suit it, and the norm of the token alone beside them.
LEVELS = TURNED.with_(**{"keys.code": Codebook(2, "normal")})
# The first tokens of a text receive much attention wherever it goes.
BEST = LEVELS.with_(sinks=Sinks(4))


def main(model: str = "smollm2", windows: int = 1) -> Evaluation:
    print("1. what it is, and what it is not")
    print(FIRST.to_toml())
    assert Scheme.from_toml(FIRST.to_toml()) == FIRST
    try:
        FIRST.with_(recent=None, **{"keys.scale": per_channel(tokens=32)})
    except SchemeError as error:  # in words, with the mend
        print("refused:", error)

    print("\n2. its bits, its algebra, the loop of its kernel")
    bits = kvdsl.bits(FIRST, SHAPE.head_dim)
    print(f"keys   {bits.formula('keys')}\nvalues {bits.formula('values')}")
    print("\n".join(show(View("first", FIRST, SHAPE), "normal-form")[1]))
    loop, turned = (main_loop(show(View("mine", one, SHAPE), "source")[0]["text"]) for one in (FIRST, TURNED))
    print("", *loop.split("\n")[:24], f"    # ... of {loop.count(chr(10)) + 1} lines", sep="\n")
    assert loop == turned
    print("the same loop with turned keys: the query is turned instead, once")

    print("\n3. its laws, on random shapes and numbers")
    # Packed bytes and decoded numbers to the bit, attention within rounding; a broken law raises with a small case.
    for name, one in (("first", FIRST), ("best", BEST)):
        print(f"{name}: {len(kvdsl.testing.check(one, examples=2))} laws hold")

    print("\n4. what a model loses")
    schemes = {"first": FIRST, "turned": TURNED, "and levels": LEVELS, "and sinks": BEST, "kivi2": kvdsl.load("kivi2")}
    settings = Settings(tasks=("perplexity",), windows=windows, context=512, score=64, sizes=(1024,))
    found = kvdsl.evaluate(schemes, model, settings=settings)
    print(f"{'scheme':12}{'bits':>7}{'perplexity':>12}{'KL':>9}")
    for result in found.results:
        text = result.tasks.perplexity
        assert text is not None
        packed = kvdsl.bits(schemes[result.scheme], SHAPE.head_dim).mean
        print(f"{result.scheme:12}{packed:7.3f}{text.perplexity:12.2f}{text.kl:9.4f}")
    print("bits: an element of head_dim 64, the newest tokens not counted")
    return found


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--windows", type=int, default=1)
    return parser.parse_args([] if hasattr(sys, "ps1") else None)  # a notebook's arguments are its own


if __name__ == "__main__":
    found = main(**vars(asked()))  # in a notebook `found` is shown as a table
