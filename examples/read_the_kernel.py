"""From a spec to the text of its kernel: the algebra that was proven, the page in memory, and the loop that reads it.

    python examples/read_the_kernel.py [SCHEME]

int8_token_head has the shortest loop; kivi2 is as instructive and long.
"""

from __future__ import annotations

import sys

import kvdsl
from kvdsl import Shape
from kvdsl.codegen.show import View, main_loop, show

SHAPE = Shape(head_dim=128, kv_heads=8, q_heads=32)


def main(name: str = "int8_token_head") -> None:
    view = View(name, kvdsl.load(name), SHAPE)
    print(view.scheme, "\n")
    # What attention asks of a decoded number, where each of its factors went, and what proves that they may go there.
    print("\n".join(show(view, "normal-form")[1]), "\n")
    # Codes first, then scales; a row of words is what one load of the loop takes.
    print("\n".join(show(view, "layout")[1]), "\n")
    # Codes go into the dot product as they lie in memory (`plane`, `upper`); an online softmax carries peak and mass.
    text = show(view, "source")[0]["text"]
    print(main_loop(text))
    print(f"\n{text.count(chr(10))} lines in all; `kvdsl emit {name} --out DIR` writes them to a file")


if __name__ == "__main__":
    main(*([] if hasattr(sys, "ps1") else sys.argv[1:]))  # a notebook's arguments are its own
