"""The linter of generated text: clean kernels pass, and each rule has texts that it refuses."""

from __future__ import annotations

import importlib.util

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdsl.codegen.launch import Launch
from kvdsl.codegen.lint import MOST_LINES, RULES, faults_in

HEAD = '''"""A kernel."""

import triton
import triton.language as tl
from kvdsl.codegen.device import plane

WIDTH: tl.constexpr = 16


'''
KERNEL = '''@triton.jit(do_not_specialize=["tokens"])
def copy(in_ptr, out_ptr, table_ptr, tokens, stride, STAGES: tl.constexpr):
    """Copies."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) % 8
    page = tl.load(table_ptr + b).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    peak = tl.full([WIDTH], -1.0e30, tl.float32)
    for t in tl.range(0, tokens, WIDTH, num_stages=STAGES):
        words = tl.load(in_ptr + page * 4096 + h * 512 + t * 16 + lane, mask=lane < 8, other=0)
        q = words.to(tl.float16)
        peak = tl.maximum(peak, tl.dot(plane(words, 15), q[:, None]))
    tl.store(out_ptr + b * stride + lane, tl.where(peak > 0.0, peak, float("-inf")), mask=lane < 8)
'''
LAUNCH = Launch(
    "copy",
    (
        ("in_ptr", "*bf16"),
        ("out_ptr", "*fp32"),
        ("table_ptr", "*i32"),
        ("tokens", "i32"),
        ("stride", "i32"),
        ("STAGES", "constexpr"),
    ),
)


def in_kernel(line: str) -> str:
    """A clean module with one more line at the start of its kernel."""
    return HEAD + KERNEL.replace("    lane = ", f"    {line}\n    lane = ", 1)


def test_a_clean_kernel_has_no_faults() -> None:
    assert faults_in(HEAD + KERNEL) == []


def test_every_rule_says_what_it_forbids() -> None:
    assert all(rule.__doc__ for rule in RULES)
    assert len({rule.__name__ for rule in RULES}) == len(RULES)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("x = __import__", "is not defined"),
        ("x = open", "is not defined"),
        ("x = eval", "is not defined"),
        ("x = missing + 1", "is not defined"),
        ("x = tl.core.sys", "attribute .sys"),
        ("x = lane.__class__", "attribute .__class__"),
        ("x = triton.runtime", "attribute .runtime"),
        ("lane.shape = 1", "attribute .shape"),
        ("import os", "import of os"),
        ("from os import path", "import from os"),
        ("x = lambda: 1", "Lambda"),
        ("x = [i for i in range(3)]", "ListComp"),
        ("x = (y := 1)", "NamedExpr"),
        ("x = f'{tokens}'", "JoinedStr"),
        ("while True: pass", "While"),
        ("global WIDTH", "Global"),
        ("assert tokens", "Assert"),
        ("del tokens", "Delete"),
        ("x = 'text'", "a string"),
        ("x = b'text'", "a string"),
        ("x = float('1e999')", "a string"),
        ("x = tl.dot(q, q, input_precision='tf32')", "a string"),
        ("x = 1e999", "no number"),
        ("x = 1e39", "no number"),
        ("x = 1j", "no number"),
        ("x = 18446744073709551616", "no number"),
        ("__x = 1", "no name for"),
        ("tl = 1", "no name for"),
        ("pass  # type: ignore", "instruction to a tool"),
        ("pass  # \u00e9", "printable ASCII"),
        ("pass\x0c", "printable ASCII"),
        ("x = tl.load(in_ptr + 1, mask=tokens > 0)", "without other="),
        ("x = tl.load(in_ptr + 1, tokens > 0)", "without other="),
        ("x = tl.load(in_ptr + 1, volatile=True)", "volatile"),
        ("x = tl.make_block_ptr(in_ptr)", "block pointers"),
        ("x = tl.extra", "libdevice"),
        ("x = tl.cat(tokens, tokens)", "may reorder"),
        ("x = tl.inline_asm_elementwise(tokens)", "inline assembly"),
        ("x = tl.sort(tokens)", "NaN"),
        ("x = triton.autotune", "autotune"),
        ("x = tl.dot(tokens, tokens)", "tl.dot of operands"),
        ("x = tokens.to(tl.float32)\n    y = tl.dot(x, x)", "tl.dot of operands"),
        ("x = tokens.to(tl.float16)\n    if h > 1:\n        x = tokens\n    y = tl.dot(x, x)", "tl.dot of operands"),
        ("x = tokens.to(tl.float16)\n    y = tl.dot(x * tokens, x + tokens)", "tl.dot of operands"),
        ("x = tokens.to(tl.bfloat16)", "truncates"),
        ("x = tokens.to(tl.float8e4nv)", "8-bit floats"),
        ("tl.atomic_add(out_ptr, 1.0)", "atomic"),
        ("tl.atomic_max(out_ptr, tokens)", "atomic"),
        ("x = in_ptr + tl.program_id(1) * 4096", "may pass 2**31"),
        ("n = tl.program_id(1)\n    m = n // 8\n    x = in_ptr + m * 4096", "may pass 2**31"),
        ("n = tl.program_id(1)\n    x = n * stride", "may pass 2**31"),
        ("n = tl.load(table_ptr)\n    x = in_ptr + n * 4096", "may pass 2**31"),
        ("plane = tl.arange(0, 16)", "is called and also the name"),
    ],
)
def test_lines_that_are_refused(line: str, part: str) -> None:
    faults = faults_in(in_kernel(line))
    assert any(part in fault for fault in faults), faults


@pytest.mark.parametrize(
    "line",
    [
        "x = tl.dot(tokens, tokens, input_precision='ieee')",
        "x = tokens.to(tl.int8)\n    y = tl.dot(tl.trans(x), tokens)",
        "x = tokens.to(tl.float16)\n    x = x - x * x\n    y = tl.dot(tokens, x)",
        "x = tokens.to(tl.int16).to(tl.bfloat16, bitcast=True)",
        "tl.atomic_add(out_ptr, 1)",
        "x = tokens\n    x = tokens.to(tl.float16)\n    y = tl.dot(x, tokens)\n    x = tokens",
        "n = tl.program_id(1).to(tl.int64)\n    x = in_ptr + (n * 8 + h) * 4096",
        "n = tl.program_id(1)\n    x = in_ptr + (n % 8) * 4096",
        "n = tl.program_id(1)\n    x = in_ptr + (n // 8).to(tl.int64) * 4096",
        "n = tl.load(table_ptr)\n    x = tl.where(n * 2 > tokens, n, 0)",
    ],
)
def test_lines_that_are_accepted(line: str) -> None:
    assert faults_in(in_kernel(line)) == []


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("x = 1\n", "Assign at the top"),
        ("tl.load(1)\n", "Expr at the top"),
        ("import os\n", "import of os"),
        ("import triton.language as language\n", "import of triton.language"),
        ("from kvdsl.codegen.device import *\n", "import from"),
        ("from kvdsl.codegen.device import os as plane\n", "import from"),
        ("from .device import plane\n", "import from"),
        ("class A: pass\n", "ClassDef"),
        ("def f(): pass\n", "must be decorated"),
        ("@triton.jit\n@triton.jit\ndef f(): pass\n", "must be decorated"),
        ("@tl.load\ndef f(): pass\n", "must be decorated"),
        ("@triton.jit(noinline=True)\ndef f(): pass\n", "must be decorated"),
        ("@triton.jit(do_not_specialize=['g'])\ndef f(x): pass\n", "a string"),
        ("@triton.jit\ndef f(x=open(1)): pass\n", "a default"),
        ("@triton.jit\ndef f(x: open): pass\n", "an argument"),
        ("@triton.jit\ndef f() -> open: pass\n", "a default or a return type"),
        ("@triton.jit\ndef f(*x): pass\n", "any number of arguments"),
        ("@triton.jit\nasync def f(): pass\n", "AsyncFunctionDef"),
        ("@triton.jit\ndef f():\n    def g(): pass\n", "inside a function"),
        ("\tx = (\n", "no Python text"),
        ("\x00", "no Python text"),
        ("(" * 500 + ")" * 500, "no Python text"),
        ("\n" * (MOST_LINES + 1), "more than"),
    ],
)
def test_modules_that_are_refused(text: str, part: str) -> None:
    faults = faults_in(text)
    assert any(part in fault for fault in faults), faults


def test_bfloat16_must_be_widened_where_it_is_loaded() -> None:
    narrow = faults_in(HEAD + KERNEL, [LAUNCH])
    assert [fault for fault in narrow if "bfloat16 is loaded" in fault]
    widened = (HEAD + KERNEL).replace("other=0)", "other=0).to(tl.float32)")
    assert faults_in(widened, [LAUNCH]) == []


def test_bfloat16_must_be_stored_as_bits() -> None:
    through = in_kernel("place = in_ptr + 1\n    tl.store(place, peak)").replace("other=0)", "other=0).to(tl.float32)")
    assert any("rounds wrongly" in fault for fault in faults_in(through, [LAUNCH]))


def test_bfloat16_may_be_copied() -> None:
    """As `append` does with a new token's row: nothing is done with it."""
    copy = "y = tl.load(in_ptr + 1)\n    tl.store(in_ptr + 2, y)"
    for said, faults in ((copy, 0), (f"{copy}\n    z = y + peak", 2)):
        text = in_kernel(said).replace("other=0)", "other=0).to(tl.float32)")
        assert len(faults_in(text, [LAUNCH])) == faults, faults_in(text, [LAUNCH])


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=60))
def test_text_in_a_comment_or_docstring_never_becomes_code(text: str) -> None:
    """A name that breaks out of the heading meets a rule: whatever it holds, the imports stay the only effects."""
    module = f'"""Scheme {text}."""\n# {text}\n' + HEAD.split('"""', 2)[2].lstrip() + KERNEL
    clean = text.isascii() and text.isprintable() and '"""' not in text and "\\" not in text
    if clean and not text.startswith(("coding", "type:", "noqa", "pragma", "-*-", "vi")) and not text.endswith('"'):
        assert faults_in(module) == []
    else:
        faults_in(module)  # a fault or not, but never an exception


def test_the_device_functions_that_generated_text_may_import_exist() -> None:
    spec = importlib.util.find_spec("kvdsl.codegen.device")
    assert spec is not None and spec.origin is not None
    with open(spec.origin, encoding="utf-8") as file:
        assert "def plane(" in file.read()
