"""How Triton gives a product's operands to a warp, in its own text of a kernel.

Each of four lanes takes `kWidth` neighbouring numbers of a row: 4 * kWidth of them, of a product that is no less deep.
Behind a load of bytes Triton 3.6 and 3.7 take twice as many for every join of two tensors that the operand comes from
as well, and of a product of 16 numbers ones that are not there: its sums are wrong, and nothing says so.
"""

from __future__ import annotations

import re

OPERAND = re.compile(r"tensor<(\d+)x(\d+)x(\w+), #ttg\.dot_op<\{opIdx = ([01]), parent = #mma\w*, kWidth = (\d+)\}>>")
LANES = 4  # that share a row
DEPTH = 16  # of the least product; what is less deep is spread over more columns first


def misread(text: str) -> str | None:
    """What is wrong with a kernel's operands (`.ttgir`); None if nothing is."""
    for rows, columns, dtype, which, width in set(OPERAND.findall(text)):
        depth, taken = int(columns if which == "0" else rows), LANES * int(width)
        if DEPTH <= depth < taken:
            return f"Triton takes {taken} numbers of each row of a {dtype} product of {depth}, so its sums are wrong"
    return None
