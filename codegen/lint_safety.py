"""Safety of generated text: whatever a scheme is called or holds, its text can reach nothing but Triton."""

from __future__ import annotations

import ast
import io
import math
import re
import tokenize
from collections.abc import Iterator

from . import text
from .lint_text import Fault, Rule, Text, dotted, is_constexpr, line, names

DEVICE = tuple(f"kvdsl.codegen.{module}" for module in text.DEVICE)

_IDENTIFIER = re.compile(r"_?[A-Za-z][A-Za-z0-9]*(_[A-Za-z0-9]+)*")
_NODES = (
    ast.Module, ast.Import, ast.ImportFrom, ast.alias, ast.FunctionDef, ast.arguments, ast.arg, ast.Return,
    ast.Assign, ast.AugAssign, ast.AnnAssign, ast.For, ast.If, ast.Pass, ast.Expr, ast.IfExp,
    ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Call, ast.keyword, ast.Attribute, ast.Subscript, ast.Slice,
    ast.Name, ast.Constant, ast.Tuple, ast.List, ast.Load, ast.Store,
    ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip
_BUILTINS = {"range", "min", "max", "float", "int", "True", "False", "None"}
_METHODS = {"to", "trans", "reshape", "permute", "broadcast_to", "shape", "dtype"}
_KEYWORD_STRINGS = {
    "input_precision": {"ieee"},
    "cache_modifier": {".ca", ".cg", ".cs", ".wb", ".wt"},
    "eviction_policy": {"evict_first", "evict_last", "evict_normal"},
    "sem": {"relaxed", "acquire", "release", "acq_rel"},
    "scope": {"cta", "gpu"},
}
_INFINITIES = {"float('inf')", "float('-inf')"}
_REFUSED = {
    "make_block_ptr": "block pointers are gone from Triton's newer interpreter; use plain pointers",
    "advance": "block pointers are gone from Triton's newer interpreter; use plain pointers",
    "extra": "libdevice fails in the interpreter; use kvdsl.codegen.device",
    "cat": "tl.cat may reorder; use join and reshape",
    "inline_asm_elementwise": "inline assembly fails in the interpreter; it belongs into kvdsl.codegen.device",
    "inline_asm": "inline assembly fails in the interpreter; it belongs into kvdsl.codegen.device",
    "device_print": "a kernel must not print",
    "static_print": "a kernel must not print",
    "dot_scaled": "not every supported Triton has it",
    "sort": "NaN breaks it, and differently by mode",
    "topk": "NaN breaks it, and differently by mode",
}


def only_plain_characters(text: Text) -> Iterator[Fault]:
    """Text is printable ASCII: no lookalikes, no control characters that hide code."""
    for number, row in enumerate(text.source.split("\n"), 1):
        if not (row.isascii() and row.isprintable()):
            yield number, "characters other than printable ASCII"


def only_plain_comments(text: Text) -> Iterator[Fault]:
    """No comment speaks to a tool (an encoding, a type, a linter)."""
    for token in tokenize.generate_tokens(io.StringIO(text.source).readline):
        if token.type == tokenize.COMMENT and re.match(r"#\s*(-\*-|vim?:|coding|type:|noqa|pragma)", token.string):
            yield token.start[0], "a comment that is an instruction to a tool"


def only_known_nodes(text: Text) -> Iterator[Fault]:
    """No statement or expression beyond what kernels need: no class, lambda, comprehension, while, try, del, await."""
    for node in text.nodes(text.tree):
        if not isinstance(node, _NODES):
            yield line(node), f"{type(node).__name__} has no place in a kernel"


def only_known_imports(text: Text) -> Iterator[Fault]:
    """`import triton`, `import triton.language as tl`, names from the modules of DEVICE, and nothing else."""
    for node in text.nodes(text.tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if (name.name, name.asname) not in (("triton", None), ("triton.language", "tl")):
                    yield node.lineno, f"import of {name.name}"
        if isinstance(node, ast.ImportFrom):
            renamed = any(name.name == "*" or name.name.startswith("_") or name.asname for name in node.names)
            if node.module not in DEVICE or node.level or renamed:
                yield node.lineno, f"import from {'.' * node.level}{node.module or ''} other than names of {DEVICE[0]}"
        if isinstance(node, (ast.Import, ast.ImportFrom)) and text.parents[node] is not text.tree:
            yield node.lineno, "import inside a function"


def only_kernels_at_the_top(text: Text) -> Iterator[Fault]:
    """A module is a docstring, imports, constexpr numbers and triton.jit functions: loading it runs nothing else."""
    for place, node in enumerate(text.tree.body):
        docstring = place == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, (ast.Import, ast.ImportFrom)) or docstring or is_constexpr(node):
            continue
        if not isinstance(node, ast.FunctionDef):
            yield node.lineno, f"{type(node).__name__} at the top of a module"
        elif len(node.decorator_list) != 1 or not _is_jit(node.decorator_list[0]):
            yield node.lineno, f"{node.name} must be decorated with triton.jit and nothing else"
    for inner in text.nodes(text.tree):
        if not isinstance(inner, ast.FunctionDef):
            continue
        if text.parents[inner] is not text.tree:
            yield inner.lineno, f"function {inner.name} inside a function"
        defaults = [*inner.args.defaults, *(one for one in inner.args.kw_defaults if one)]
        notes = [argument.annotation for argument in ast.walk(inner.args) if isinstance(argument, ast.arg)]
        if not all(isinstance(one, ast.Constant) for one in defaults) or inner.returns:
            yield inner.lineno, f"a default or a return type of {inner.name} that is computed when it is loaded"
        if any(note is not None and ast.unparse(note) != "tl.constexpr" for note in notes):
            yield inner.lineno, f"an argument of {inner.name} with a type other than tl.constexpr"


def only_known_names(text: Text) -> Iterator[Fault]:
    """Every name is an argument, a local, an import, a kernel, a constexpr of the module, or a harmless builtin."""
    top = set(_BUILTINS)
    for node in text.tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            top |= {name.asname or name.name for name in node.names}
        elif isinstance(node, ast.FunctionDef):
            top.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and is_constexpr(node):
            top |= names(node.targets[0] if isinstance(node, ast.Assign) else node.target)
    for function in text.functions:
        arguments = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
        if function.args.vararg or function.args.kwarg:
            yield function.lineno, f"{function.name} takes any number of arguments"
        written = {n.id for n in text.nodes(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for name in sorted(arguments | written | {function.name}):
            if not _IDENTIFIER.fullmatch(name) or name in ("tl", "triton", *_BUILTINS):
                yield function.lineno, f"{name!r} is no name for a kernel or a variable"
        known = top | arguments | written
        for statement in function.body:
            for inner in ast.walk(statement):
                if isinstance(inner, ast.Name) and inner.id not in known:
                    yield inner.lineno, f"{inner.id} is not defined in the kernel; globals must be constexpr"


def only_known_attributes(text: Text) -> Iterator[Fault]:
    """Attributes are public names of `tl`, triton.jit, or a few methods of tensors."""
    for node in text.nodes(text.tree):
        if not isinstance(node, ast.Attribute):
            continue
        # One level below `tl` only: its submodules lead to the rest of Python.
        known = bool(re.fullmatch(r"triton\.(jit|cdiv)|tl\.[A-Za-z]\w*", dotted(node)))
        if isinstance(node.ctx, ast.Store) or not (known or node.attr in _METHODS):
            yield node.lineno, f"attribute .{node.attr} is not one a kernel needs"
        if node.attr in _REFUSED:
            yield node.lineno, f"{node.attr}: {_REFUSED[node.attr]}"
        if node.attr == "autotune":
            yield node.lineno, "autotune needs a GPU; configurations are chosen by the planner"


def only_known_strings(text: Text) -> Iterator[Fault]:
    """No string but docstrings and the values of a few keywords."""
    for node in text.nodes(text.tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, (str, bytes)):
            continue
        parent = text.parents[node]
        owner = text.parents.get(parent)
        if isinstance(parent, ast.keyword) and node.value in _KEYWORD_STRINGS.get(parent.arg or "", ()):
            continue
        if isinstance(owner, (ast.Module, ast.FunctionDef)) and owner.body[0] is parent:
            continue
        if isinstance(owner, ast.keyword) and _is_argument(owner, node.value, text):
            continue
        if isinstance(parent, ast.Call) and ast.unparse(parent) in _INFINITIES:
            continue
        yield node.lineno, "a string that is no docstring and no known keyword value"


def only_finite_numbers(text: Text) -> Iterator[Fault]:
    """Literals are integers that fit 64 bits, finite floats, booleans, None or strings."""
    for node in text.nodes(text.tree):
        if isinstance(node, ast.Constant) and not isinstance(node.value, (str, bytes, type(None))):
            value = node.value
            most = 2**64 if isinstance(value, int) else 3.4e38
            if not isinstance(value, (int, float)) or not math.isfinite(value) or abs(value) >= most:
                yield node.lineno, f"{ast.unparse(node)} is no number a kernel can hold"


def _is_jit(decorator: ast.expr) -> bool:
    """`triton.jit`, alone or with do_not_specialize."""
    if isinstance(decorator, ast.Call) and not decorator.args:
        return _is_jit(decorator.func) and [one.arg for one in decorator.keywords] == ["do_not_specialize"]
    return ast.unparse(decorator) == "triton.jit"


def _is_argument(keyword: ast.keyword, name: object, text: Text) -> bool:
    """The name stands in a list that do_not_specialize is given, and is an argument of the kernel."""
    call = text.parents[keyword]
    kernel = text.parents[call]
    if (
        keyword.arg != "do_not_specialize"
        or not isinstance(kernel, ast.FunctionDef)
        or call not in kernel.decorator_list
    ):
        return False
    return name in {argument.arg for argument in kernel.args.args}


RULES: tuple[Rule, ...] = (
    only_plain_characters,
    only_plain_comments,
    only_known_nodes,
    only_known_imports,
    only_kernels_at_the_top,
    only_known_names,
    only_known_attributes,
    only_known_strings,
    only_finite_numbers,
)
