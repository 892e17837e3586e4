"""Generated text as the linter sees it: the parsed tree, and questions about its expressions."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from .launch import Launch

Fault = tuple[int, str]
Rule = Callable[["Text"], Iterator[Fault]]

_FP16_DEVICE = {"plane"}  # functions of kvdsl.codegen.device that return float16
_LAYOUT_ONLY = {"trans", "permute", "reshape", "broadcast_to"}


class Text:
    """Parsed text, and what the rules ask about it."""

    def __init__(self, source: str, launches: Sequence[Launch]) -> None:
        self.source = source
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of strings, which are refused or never read
            warnings.simplefilter("ignore", DeprecationWarning)
            self.tree = ast.parse(source)
        self._assignments: dict[ast.FunctionDef, dict[str, list[ast.expr]]] = {}
        self._nodes: dict[ast.AST, list[ast.AST]] = {}
        self.parents = {child: node for node in self.nodes(self.tree) for child in ast.iter_child_nodes(node)}
        self.functions = [node for node in self.tree.body if isinstance(node, ast.FunctionDef)]
        self.types: dict[str, dict[str, set[str]]] = {}  # kernel -> argument -> its types over the launches
        for launch in launches:
            kinds = self.types.setdefault(launch.kernel, {})
            for name, kind in launch.signature:
                kinds.setdefault(name, set()).add(kind)

    def nodes(self, tree: ast.AST) -> list[ast.AST]:
        """All of a function or of the whole text, listed once for all rules."""
        if tree not in self._nodes:
            self._nodes[tree] = list(ast.walk(tree))
        return self._nodes[tree]

    def pointers(self, function: ast.FunctionDef) -> set[str]:
        """Arguments that are pointers: as the launches say, else those called ..._ptr."""
        kinds = self.types.get(function.name)
        if kinds is not None:
            return {name for name, found in kinds.items() if any(kind.startswith("*") for kind in found)}
        return {argument.arg for argument in function.args.args if argument.arg.endswith("_ptr")}

    def assignments(self, function: ast.FunctionDef) -> dict[str, list[ast.expr]]:
        """Name -> every expression assigned to it in the function, tuples left out."""
        if function in self._assignments:
            return self._assignments[function]
        found = self._assignments.setdefault(function, {})
        for node in self.nodes(function):
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and node.value is not None:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        found.setdefault(target.id, []).append(node.value)
        return found

    def reaching(self, function: ast.FunctionDef, name: ast.Name) -> list[ast.expr]:
        """What a name may hold where it is read: the assignment before it if always passed, else all of them."""
        values = self.assignments(function).get(name.id, [])
        before = [value for value in values if value.lineno < name.lineno]
        if before:
            nearest = max(before, key=lambda value: value.lineno)
            block, around = self.parents[self.parents[nearest]], self.parents[name]
            # An `if` has two arms in one node, so what stands in one of them is not known to be passed.
            while around is not block and around in self.parents:
                around = self.parents[around]
            if around is block and not isinstance(block, ast.If):
                return [nearest]
        return values

    def derived(
        self, function: ast.FunctionDef, sources: set[str], hidden: Callable[[ast.AST], bool] | None = None
    ) -> set[str]:
        """`sources` and the names whose value is computed from them, not looking into loads or `hidden` parts."""
        known, size = set(sources), -1
        parts = {
            name: set().union(*(names(value, hidden or is_load) for value in values))
            for name, values in self.assignments(function).items()
        }
        while len(known) != size:
            size = len(known)
            known |= {name for name, read in parts.items() if known & read}
        return known


def line(node: ast.AST) -> int:
    return int(getattr(node, "lineno", 1))


def dotted(node: ast.AST) -> str:
    """A name or an attribute of names as it is written, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return before and f"{before}.{node.attr}"
    return ""


def calls(nodes: Iterable[ast.AST], function: str) -> Iterator[ast.Call]:
    """Calls of a function, which is named as it is written there."""
    for node in nodes:
        if isinstance(node, ast.Call) and dotted(node.func) == function:
            yield node


def keywords(call: ast.Call) -> set[str | None]:
    return {keyword.arg for keyword in call.keywords}


def names(node: ast.AST, skip: Callable[[ast.AST], bool] | None = None) -> set[str]:
    """Names in an expression, not looking into sub-expressions to `skip`."""
    found, todo = set(), [node]
    while todo:
        part = todo.pop()
        if skip is not None and skip(part):
            continue
        if isinstance(part, ast.Name):
            found.add(part.id)
        else:
            todo += ast.iter_child_nodes(part)
    return found


def is_load(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and dotted(node.func) == "tl.load"


def is_program(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and dotted(node.func) == "tl.program_id"


def is_constexpr(node: ast.stmt) -> bool:
    """`NAME: tl.constexpr = number` or `NAME = tl.constexpr(number)`."""
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node.annotation) == "tl.constexpr" and isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
        plain = len(node.value.args) == 1 and isinstance(node.value.args[0], ast.Constant) and not node.value.keywords
        return plain and dotted(node.value.func) == "tl.constexpr" and isinstance(node.targets[0], ast.Name)
    return False


def cast_type(node: ast.AST) -> str | None:
    """The type an expression is cast to by `.to(...)`, as text."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "to" and node.args:
        return ast.unparse(node.args[0])
    return None


def is_of(node: ast.expr, types: set[str], text: Text, function: ast.FunctionDef, depth: int = 8) -> bool:
    """The text shows that the expression is of one of the types."""
    if cast_type(node) is not None:
        return cast_type(node) in types
    if isinstance(node, ast.Name):
        values = text.reaching(function, node)
        return depth > 0 and bool(values) and all(is_of(v, types, text, function, depth - 1) for v in values)
    if isinstance(node, ast.Subscript):
        return is_of(node.value, types, text, function, depth)
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub, ast.Mult)):
        return all(is_of(side, types, text, function, depth) for side in (node.left, node.right))
    if isinstance(node, ast.Call):
        name = dotted(node.func)
        if name in _FP16_DEVICE:
            return "tl.float16" in types
        if name.startswith("tl.") and name.removeprefix("tl.") in _LAYOUT_ONLY and node.args:
            return is_of(node.args[0], types, text, function, depth)
        if isinstance(node.func, ast.Attribute) and node.func.attr in _LAYOUT_ONLY:
            return is_of(node.func.value, types, text, function, depth)
    return False


def is_widened(load: ast.Call, parents: Mapping[ast.AST, ast.AST]) -> bool:
    """The load stands as `tl.load(...).to(tl.float32)`, or its bits are taken."""
    attribute = parents[load]
    call = parents.get(attribute)
    if not (isinstance(attribute, ast.Attribute) and isinstance(call, ast.Call) and call.func is attribute):
        return False
    return cast_type(call) == "tl.float32" or (cast_type(call) == "tl.int16" and "bitcast" in keywords(call))


def is_wide(node: ast.AST) -> bool:
    return cast_type(node) == "tl.int64"


def has_wide(node: ast.AST, wide: set[str]) -> bool:
    """The value is 64 bits wide: a part of it was widened, or is one of the names `wide`; loads hide their address."""
    if is_wide(node) or isinstance(node, ast.Name) and node.id in wide:
        return True
    if is_load(node) or isinstance(node, ast.Compare):
        return False
    return any(has_wide(child, wide) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr))


def wide_names(assignments: Mapping[str, list[ast.expr]]) -> set[str]:
    """Names that are 64 bits wide wherever they are assigned."""
    wide, size = set(assignments), -1
    while len(wide) != size:
        size = len(wide)
        wide = {name for name in wide if all(has_wide(value, wide) for value in assignments[name])}
    return wide


def sum_around(node: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> ast.AST:
    """The largest arithmetic expression that a product stands in."""
    while isinstance(parents[node], (ast.BinOp, ast.Subscript, ast.UnaryOp)):
        node = parents[node]
    return node
