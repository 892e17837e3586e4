"""Inline assembly of the device functions, executed here instruction by instruction: it must give the bits that the
interpreter's form of the same function gives, for all codes and tables."""

from __future__ import annotations

import ast
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvdsl.codegen
from kvdsl.codegen.alphabet import SMALL, half_number, packed_table

FOLDER = Path(kvdsl.codegen.__file__).parent
WORD = 2**32


def assembly(module: str, function: str) -> list[tuple[str, str, int]]:
    """(text, constraints, elements a time) of the inline assembly of a function's compiled form."""
    tree = ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "tl.inline_asm_elementwise":
                    pack = next(word.value for word in call.keywords if word.arg == "pack")
                    text, constraints = (ast.literal_eval(argument) for argument in call.args[:2])
                    found.append((text, constraints, ast.literal_eval(pack)))
    return found


def prmt(a: int, b: int, selectors: int, _: int = 0) -> int:
    """Byte selection of PTX: nibble i of the selectors names byte i of the result among the eight of a and b."""
    both = [(a >> 8 * i) & 255 for i in range(4)] + [(b >> 8 * i) & 255 for i in range(4)]
    out = 0
    for i in range(4):
        nibble = (selectors >> 4 * i) & 15
        byte = both[nibble & 7]
        out |= (byte if nibble < 8 else 255 * (byte >> 7)) << 8 * i
    return out


def half_of_e4m3(byte: int) -> int:
    return SMALL["e4m3"].half(byte)


def of_halves(step: Callable[[float, float], float | bool]) -> Callable[[int, int], int]:
    """A step on the two float16 numbers of a register; of a comparison every bit says whether it holds."""

    def both(a: int, b: int) -> int:
        out = 0
        for shift in (0, 16):
            x, y = (struct.unpack("<e", struct.pack("<H", word >> shift & 0xFFFF))[0] for word in (a, b))
            found = step(x, y)
            bits = 0xFFFF * found if isinstance(found, bool) else struct.unpack("<H", struct.pack("<e", found))[0]
            out |= bits << shift
        return out

    return both


STEPS: dict[str, Callable[..., int]] = {
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "add.u32": lambda a, b: a + b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "prmt.b32": prmt,
    "set.eq.u32.f16x2": of_halves(lambda x, y: x == y),
    "max.f16x2": of_halves(max),
    "min.f16x2": of_halves(min),
    "cvt.rn.f16x2.e4m3x2": lambda a: half_of_e4m3(a & 255) | half_of_e4m3(a >> 8) << 16,
}


def execute(text: str, constraints: str, inputs: list[int]) -> list[int]:
    """The output registers of a piece of assembly."""
    outputs = constraints.count("=")
    assert constraints.count("r") == outputs + len(inputs), constraints
    registers = {f"${outputs + i}": value % WORD for i, value in enumerate(inputs)}
    for statement in text.strip("{} ").split(";"):
        words = re.split(r"[ ,]+", statement.strip())
        if words[0] in ("", ".reg"):
            continue
        if words[0] == "mov.b32" and len(words) == 3:  # a number
            registers[words[1]] = int(words[2], 0)
            continue
        if words[0] == "mov.b32":  # a register taken apart
            low, high, whole = (word.strip("{}") for word in words[1:])
            registers |= {low: registers[whole] & 0xFFFF, high: registers[whole] >> 16}
            continue
        values = [registers[word] if word in registers else int(word, 0) for word in words[2:]]
        registers[words[1]] = STEPS[words[0]](*values) % WORD
    return [registers[f"${i}"] for i in range(outputs)]


def elementwise(module: str, function: str, elements: list[int], *constants: int, wide: int = 0) -> list[int]:
    """The function's assembly over 16-bit elements; constants are 16 bits wide, the first `wide` of them 32."""
    choices = assembly(module, function)
    if len(choices) > 1:  # a field is shifted to the right where it is shifted that way at all
        choices = [choice for choice in choices if ("shr" in choice[0]) == bool(constants[0])]
        constants = (constants[0] or constants[1], *constants[2:])
    ((text, constraints, pack),) = choices
    out: list[int] = []
    for start in range(0, len(elements), pack):
        group = elements[start : start + pack]
        inputs = [(group[i] & 0xFFFF) | (group[i + 1] & 0xFFFF) << 16 for i in range(0, pack, 2)]
        for i, constant in enumerate(constants):
            narrow = (constant & 0xFFFF) * 0x10001
            inputs += [constant] * pack if i < wide else [narrow] * (pack // 2)
        for register in execute(text, constraints, inputs):
            out += [register & 0xFFFF, register >> 16]
    return out


def table(size: int, place: int, alone: bool) -> tuple[str, str, list[int], int]:
    """(text, constraints, constants behind the words, which output) of a table's assembly for a place of its words."""
    ((text, constraints, pack),) = assembly("device_codes", f"table{size}")
    assert pack == 2
    tree = ast.parse((FOLDER / "device_codes.py").read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == f"table{size}"]
    names: dict[str, Any] = {"PLACE": place, "ALONE": alone, "words": None, "full": lambda shape, value, dtype: value}
    names |= {letter: ord(letter) for letter in "ABCDEFGH"}
    lines = ast.unparse(functions[-1]).replace("tl.full(words.shape", "full(words").replace("tl.int32", "None")
    body = [line.strip() for line in lines.splitlines()]
    for line in body:
        if "full(" in line or line.startswith("zeros ="):
            exec(line, names)
    (given,) = re.findall(r"\[words, (.*?)\], dtype", lines)
    constants = [names[name] for name in given.split(", ") if name not in ("lowest", *"abcdefgh")]
    (which,) = re.findall(r"pack=2\)\[(.*)\]", lines)
    return text, constraints, constants, eval(which, names)


def looked_up(
    size: int, pair: list[int], lowest: list[int], place: int, entries: tuple[int, ...], alone: bool = False
) -> list[int]:
    """What a table's assembly finds of the codes at a place of a pair of words."""
    text, constraints, constants, which = table(size, place, alone)
    inputs = [pair[0] | pair[1] << 16] + [lowest[0] | lowest[1] << 16] * (size == 8)
    given = [constant for constant in (*constants, *packed_table(entries)) for _ in range(2)]
    out = execute(text, constraints, inputs + given)[which]
    return [out & 0xFFFF, out >> 16]


def packed(size: int, codes: list[int]) -> tuple[int, int]:
    """The 16-bit word that a table is asked for codes, and the word of their lowest bits where they stand apart."""
    if size != 8:
        return sum(code << (16 // len(codes) * i) for i, code in enumerate(codes)), 0
    lowest = sum((code & 1) << (i + i // 4 * 4) for i, code in enumerate(codes))
    return sum((code >> 1) << 2 * i for i, code in enumerate(codes)), lowest


@pytest.mark.parametrize("size", [4, 8, 16])
def test_tables_are_looked_up(size: int) -> None:
    chance = random.Random(size)
    count = 4 if size == 16 else 8
    for _ in range(20):
        entries = tuple(chance.randrange(2**16) for _ in range(size))
        codes = [[chance.randrange(size) for _ in range(count)] for _ in range(2)]
        words, lowest = zip(*(packed(size, word) for word in codes), strict=True)
        for place in range(count):
            for alone in (False, True):
                got = looked_up(size, list(words), list(lowest), place, entries, alone)
                assert got == [entries[word[place]] for word in codes]


@pytest.mark.parametrize("size", [4, 8, 16])
def test_a_look_up_needs_no_neighbours(size: int) -> None:
    """A thread that holds one word has undefined bits in the rest of the register."""
    chance = random.Random(size)
    entries = tuple(chance.randrange(2**16) for _ in range(size))
    for _ in range(50):
        codes = [chance.randrange(size) for _ in range(4 if size == 16 else 8)]
        word, lowest = packed(size, codes)
        # lowest bits are fields, under a mask that the whole register had
        other, rest = chance.randrange(2**16), chance.randrange(2**16) & 0x0F0F
        got = [looked_up(size, [word, other], [lowest, rest], place, entries)[0] for place in range(len(codes))]
        assert got == [entries[code] for code in codes]


@pytest.mark.parametrize("stream", [1, 2, 4])
def test_fields_are_taken_out_of_bytes(stream: int) -> None:
    words = [random.Random(stream).randrange(2**16) for _ in range(64)]
    for bit in range(0, 8, stream):
        for shift in (0, 1, 2):
            right, left = max(0, bit - shift), max(0, shift - bit)
            mask = (2**stream - 1) << shift
            got = elementwise("device_codes", "field", words, right, left, mask, wide=1)
            assert got == [((word & 255) >> bit & 2**stream - 1) << shift for word in words]


@pytest.mark.parametrize("name", SMALL)
def test_small_floats_become_float16(name: str) -> None:
    small = SMALL[name]
    for bit in range(0, 8, small.bits):
        codes = list(range(2**small.bits))
        words = [random.Random(code).randrange(2**8) << 8 | code << bit for code in codes]
        size, sign = 10 - small.mantissa - bit, 16 - small.bits - bit
        low = elementwise("device_codes", "field", words, 0, size, (2 ** (small.bits - 1) - 1) << (size + bit), wide=1)
        high = elementwise("device_codes", "field", words, 0, sign, 2**15, wide=1)
        pairs = [both for pair in zip(low, high, strict=True) for both in pair]
        halves = [pairs[i] | pairs[i + 1] for i in range(0, len(pairs), 2)]
        assert halves == [small.half(code) for code in codes] or small.converted
        for code, half in zip(codes, halves, strict=True):
            want = small.value(code)
            assert half_number(half) * 2.0 ** (small.least + 14) == want or want != want or small.name == "e5m2"


def test_the_nan_of_e4m3_is_one_in_float16() -> None:
    halves = [(code & 128) << 8 | (code & 127) << 7 for code in range(256)]
    for code, half in enumerate(elementwise("device_codes", "with_nan", halves)):
        number = half_number(half)
        assert (number != number) == (code & 127 == 127)
        assert number != number or half == halves[code]


def test_either_byte_of_two_words_is_converted() -> None:
    texts = {"$0, h;" in text: text for text, _, _ in assembly("device_codes", "e4m3_halves")}
    assert set(texts) == {False, True}
    for high, text in texts.items():
        for byte in range(256):
            other = byte * 7 % 256
            words = [byte << 8 | other, other << 8 | byte]
            (pair,) = execute(text, "=r,r", [words[0] | words[1] << 16])
            wanted = [word >> 8 if high else word & 255 for word in words]
            assert [pair & 0xFFFF, pair >> 16] == list(map(half_of_e4m3, wanted))


def test_planes_and_upper_bytes() -> None:
    words = [random.Random(1).randrange(2**16) for _ in range(64)]
    assert elementwise("device", "upper", words) == [word >> 8 for word in words]
    assert elementwise("device", "plane", words, 0x3C) == [word & 0x3C for word in words]


def test_every_float16_is_made_finite() -> None:
    """NaN becomes 0, infinities the largest numbers; all others stay, a zero's sign too."""
    found = elementwise("device", "finite_halves", list(range(2**16)))
    for bits, got in enumerate(found):
        size = bits & 0x7FFF
        assert got == (0 if size > 0x7C00 else bits - (size == 0x7C00)), hex(bits)
