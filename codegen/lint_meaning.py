"""Meaning of generated text: the interpreter and the compiler must agree on it, so what they are known to treat
differently, or what only a GPU would notice, is refused."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from .lint_text import (
    Fault,
    Rule,
    Text,
    calls,
    dotted,
    has_wide,
    is_load,
    is_of,
    is_program,
    is_widened,
    keywords,
    names,
    sum_around,
    wide_names,
)

_NARROW = {"tl.float16", "tl.int8", "tl.uint8"}


def masked_loads_say_what_else(text: Text) -> Iterator[Fault]:
    """A masked load without `other` is 0 in the interpreter and undefined on a GPU."""
    for call in calls(text.nodes(text.tree), "tl.load"):
        given = keywords(call)
        masked = len(call.args) > 1 or "mask" in given
        if masked and len(call.args) < 3 and "other" not in given:
            yield call.lineno, "tl.load with a mask but without other="
        if "volatile" in given:
            yield call.lineno, "a volatile load is refused by the assembler beside some cache modifiers"


def dots_keep_their_precision(text: Text) -> Iterator[Fault]:
    """The default of a float32 tl.dot is TF32 on a GPU and exact in the interpreter: say float16 or "ieee"."""
    for function in text.functions:
        for call in calls(text.nodes(function), "tl.dot"):
            precise = "input_precision" in keywords(call)
            # Triton refuses operands of different types, so knowing one is knowing both.
            if not precise and not any(is_of(operand, _NARROW, text, function) for operand in call.args[:2]):
                yield call.lineno, 'tl.dot of operands not seen to be float16, without input_precision="ieee"'


def bfloat16_is_widened_at_once(text: Text) -> Iterator[Fault]:
    """Arithmetic and tl.dot on bfloat16 are garbage in the interpreter: a load of it is followed by .to(tl.float32), or
    by nothing but a store as it is."""
    for function in text.functions:
        kinds = text.types.get(function.name, {})
        narrow = {name for name, found in kinds.items() if "*bf16" in found}
        reached = text.derived(function, narrow)
        nodes = text.nodes(function)
        loads = [call for call in calls(nodes, "tl.load") if call.args and reached & names(call.args[0], is_load)]
        stores = [call for call in calls(nodes, "tl.store") if len(call.args) > 1]
        stores = [call for call in stores if reached & names(call.args[0], is_load)]
        copied = _copied(function, text, loads, stores)
        for call in loads:
            if not is_widened(call, text.parents) and not _targets(text.parents[call]) & copied:
                yield call.lineno, "bfloat16 is loaded and not widened by .to(tl.float32) in the same expression"
        for call in stores:
            if ast.unparse(call.args[1]) not in copied and not is_of(call.args[1], {"tl.bfloat16"}, text, function):
                yield call.lineno, "a store to bfloat16 rounds wrongly in the interpreter; round to bits first"


def _copied(function: ast.FunctionDef, text: Text, loads: list[ast.Call], stores: list[ast.Call]) -> set[str]:
    """Names of numbers that such loads give and that are stored by such stores, and nothing else."""
    given = set[str]().union(*(_targets(text.parents[call]) for call in loads))
    found = {name for name in given if all(value in loads for value in text.assignments(function)[name])}
    kept = [call.args[1] for call in stores]
    read = (node for node in text.nodes(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))
    return found - {node.id for node in read if node not in kept}


def _targets(node: ast.AST) -> set[str]:
    """The name that an assignment gives, if it is one."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def no_rounding_casts(text: Text) -> Iterator[Fault]:
    """Casts to bfloat16 truncate in the interpreter, and 8-bit floats are wrong in it: only bits may become them."""
    for node in text.nodes(text.tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("float8"):
            yield node.lineno, "8-bit floats are handled as bytes"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("to", "cast"):
            to_bf16 = any(ast.unparse(argument) == "tl.bfloat16" for argument in node.args)
            if to_bf16 and "bitcast" not in keywords(node):
                yield node.lineno, "a cast to bfloat16 truncates in the interpreter; round to bits and bitcast"


def atomics_count(text: Text) -> Iterator[Fault]:
    """Atomics on floats make results depend on the order of programs; only integers may be counted."""
    for function in text.functions:
        for call in text.nodes(function):
            if isinstance(call, ast.Call) and (dotted(call.func) or ast.unparse(call.func)).startswith("tl.atomic_"):
                value = call.args[-1] if call.args else ast.Constant(None)
                counted = isinstance(value, ast.Constant) and isinstance(value.value, int)
                if not counted and not is_of(value, {"tl.int32", "tl.int64"}, text, function):
                    yield call.lineno, "an atomic operation on something not seen to be an integer"


def offsets_are_wide(text: Text) -> Iterator[Fault]:
    """Program numbers and page numbers are 32 bits: widen them before they are multiplied into an address."""
    for function in text.functions:
        assignments = text.assignments(function)
        wide = wide_names(assignments)
        programs = {name for name, values in assignments.items() if any(is_program(value) for value in values)}
        pages = {name for name, values in assignments.items() if any(is_load(value) for value in values)}
        narrow = text.derived(function, programs, _is_bounded) - wide | pages - wide
        pointers = text.derived(function, text.pointers(function))
        for node in text.nodes(function):
            if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
                continue
            factors = (node.left, node.right)
            small = not any(is_program(factor) or narrow & names(factor, _is_bounded) for factor in factors)
            if small or any(has_wide(factor, wide) for factor in factors):
                continue
            if pointers & names(sum_around(node, text.parents)) or any("stride" in name for name in names(node)):
                yield node.lineno, f"{ast.unparse(node)} may pass 2**31: widen by .to(tl.int64) first"


def functions_keep_their_names(text: Text) -> Iterator[Fault]:
    """A number named as a function hides it: what calls the function would call the number."""
    for function in text.functions:
        hidden = {argument.arg for argument in function.args.args} | set(text.assignments(function))
        for node in text.nodes(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in hidden:
                yield node.lineno, f"{node.func.id} is called and also the name of a number"


def _is_bounded(node: ast.AST) -> bool:
    """The value is small or unrelated to what it is computed from: a remainder, a comparison, a load."""
    return (
        is_load(node) or isinstance(node, ast.Compare) or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod))
    )


RULES: tuple[Rule, ...] = (
    masked_loads_say_what_else,
    dots_keep_their_precision,
    bfloat16_is_widened_at_once,
    no_rounding_casts,
    atomics_count,
    offsets_are_wide,
    functions_keep_their_names,
)
