"""The texts of a side's functions, for either backend."""

from __future__ import annotations

from collections.abc import Sequence

from .codec import Body, Namespace, coding, counted, given, numbers, searched, statistics, stored_numbers, sums, tried
from .codec_codes import encode, levels_of, loss, products
from .codec_scales import measure, refit, word_lines
from .plan import SidePlan
from .text import WIDTH, Lines
from .triton_additive import functions as of_sums
from .triton_vectors import encode as encode_vectors


def functions(side: SidePlan, ns: Namespace) -> list[str]:
    """The texts of a side's functions, those that something calls."""
    if side.alphabet.vectors:
        return [encode_vectors(side)] if ns == "tl." else []
    under = coding(side) if side.store.measure is not None else []
    told = "The codes of x, int32." if ns == "tl." else "The codes of x, whole numbers."
    made = [] if side.alphabet.sums else [_Function("encode", ["x", *under], told, encode)]
    if _names_levels(side, ns):
        made.append(_Function("levels", ["c"], "What codes stand for, float32.", levels_of))
    if not side.static and side.store.measure is not None:
        stored = " and ".join(numbers(side))
        clip = ["clip"] if searched(side) else []
        told = f"The stored {stored} of blocks with these statistics."
        made.append(_Function("measure", [*statistics(side), *counted(side), *clip], told, measure))
        if side.scale.refit:
            told = "What is summed over a block to fit its scale to its codes."
            made.append(_Function("products", ["x", *numbers(side)], told, products))
            made.append(_Function("refit", ["scale", *sums(side)], "The stored scale that fits these sums.", refit))
        if searched(side):
            made.append(
                _Function(
                    "loss", ["x", *tried(side), *counted(side)], "Squares of what coding takes off x, or adds.", loss
                )
            )
        told = f"Stored {stored} as words: NaN where a block is spoilt."
        made.append(_Function("words", [*stored_numbers(side), "spoilt"], told, word_lines, takes_given=False))
    texts = [function.text(side, ns) for function in made]
    return texts + (of_sums(side) if side.alphabet.sums and ns == "tl." else [])


def unstored(side: SidePlan, ns: Namespace) -> list[str]:
    """The texts of what rounds numbers to those that codes stand for, where nothing is stored of them."""
    under = coding(side) if side.store.measure is not None else []
    made = [_Function("encode", ["x", *under], "The codes of x.", encode)]
    if under:
        told = "The scale of blocks with these statistics."
        made.insert(0, _Function("measure", statistics(side), told, measure))
    made.append(_Function("levels", ["c"], "What codes stand for, float32.", levels_of))
    return [function.text(side, ns) for function in made]


def _names_levels(side: SidePlan, ns: Namespace) -> bool:
    """Triton's kernels look known levels up in registers, and need the function for what packing fits or weighs."""
    if side.alphabet.sums:
        return False
    if ns == "torch." and side.alphabet.looked_up:
        return True
    if side.store.measure is None or side.scale.when != "online":
        return False
    return side.scale.refit is not None or (searched(side) and side.alphabet.looked_up)


class _Function:
    """One function: its arguments, what it says of itself, and what prints its body."""

    def __init__(self, name: str, takes: Sequence[str], told: str, body: Body, *, takes_given: bool = True) -> None:
        self.name, self.takes, self.told, self.body, self.takes_given = name, takes, told, body, takes_given

    def text(self, side: SidePlan, ns: Namespace) -> str:
        out = Lines()
        out.extend(["@triton.jit"] if ns == "tl." else [])
        body = self.body(side, ns)
        takes = [*self.takes, *(given(side, self.name) if self.takes_given else [])]
        out.extend(heading(f"{self.name}_{side.label}", takes))
        out.depth += 1
        out.add(f'"""{self.told}"""')
        out.extend(body)
        return str(out)


def heading(name: str, takes: Sequence[str]) -> list[str]:
    """The first lines of a function; long argument lists on lines of their own."""
    line = f"def {name}({', '.join(takes)}):"
    if len(line) <= WIDTH:
        return [line]
    return [f"def {name}(", f"    {', '.join(takes)}", "):"]
