"""The house rules: who imports whom, what an import costs, how a module looks, what is generated."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import kvdsl
from kvdsl.codegen import render
from kvdsl.codegen.launches import launches
from kvdsl.codegen.listing import rows
from kvdsl.codegen.plan import Plan, plan_for
from kvdsl.kernels import Backend
from kvdsl.rules import shape_faults
from kvdsl.schemes import ALL
from kvdsl.shape import Shape, usual

ROOT = Path(__file__).resolve().parent.parent
LINKS = ("codegen", "schemes")
SOURCES = sorted(
    [path for path in (ROOT / "kvdsl").rglob("*.py") if path.relative_to(ROOT / "kvdsl").parts[0] not in LINKS]
    + [path for name in (*LINKS, "examples") for path in (ROOT / name).rglob("*.py")]
)
FACES = {"kvdsl", "kvdsl.__main__"}
CALLERS = {
    "kvdsl.api",
    "kvdsl.routed_api",
    "kvdsl.saving",
    "kvdsl.tier_saving",
    "kvdsl.hf",
    "kvdsl.testing",
    "kvdsl.vllm",
}
"""Who else may ask the compiler for kernels, by `build` alone."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("kvdsl", *parts) if parts[0] in LINKS else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, *, lazy: bool = True) -> Iterator[str]:
    """Full names of what a module imports; without the lazy ones, only what importing it imports."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in walk(tree_of(path), lazy=lazy):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            home = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{home}.{name.name}" for name in node.names)


def walk(node: ast.AST, *, lazy: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not lazy and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from walk(child, lazy=lazy)


def own(names: Iterator[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "kvdsl"}


def inside(name: str, *homes: str) -> bool:
    return any(name == home or name.startswith(f"{home}.") for home in homes)


def python(code: str, **environment: str) -> str:
    """What a fresh Python prints."""
    import os

    given = {"PYTHONPATH": str(ROOT), **os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=given).stdout


# -- who imports whom ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [p for p in SOURCES if "reference" in p.parts], ids=module_of)
def test_the_reference_knows_the_language_and_nothing_of_the_compiler(path: Path) -> None:
    language = (
        "kvdsl.scheme",
        "kvdsl.codes",
        "kvdsl.transforms",
        "kvdsl.errors",
        "kvdsl.levels",
        "kvdsl.matrices",
        "kvdsl.rope",
        "kvdsl.tiers",
        "kvdsl.probes",
    )
    allowed = ("kvdsl.reference", *language)
    assert {name for name in own(imports(path)) if not inside(name, *allowed)} == set()
    assert not {"sympy", "triton"} & {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.parts[-2] == "schemes" and p.stem != "__init__"], ids=module_of
)
def test_a_scheme_imports_the_language_alone(path: Path) -> None:
    assert {name for name in imports(path) if not inside(name, "kvdsl.scheme")} == set()


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parts[-2] != "examples"], ids=module_of)
def test_the_ground_asks_the_compiler_for_kernels_and_for_nothing_else(path: Path) -> None:
    module = module_of(path)
    if inside(module, "kvdsl.codegen") or module in FACES:
        return
    taken = {name for name in own(imports(path)) if inside(name, "kvdsl.codegen")}
    asked = {"kvdsl.codegen.build", "kvdsl.codegen.build_tiers"}
    assert taken <= (asked if inside(module, *CALLERS) else set())


@pytest.mark.parametrize("face", sorted(FACES))
def test_a_face_looks_at_the_compiler_only_when_it_is_used(face: str) -> None:
    path = next(p for p in SOURCES if module_of(p) == face)
    assert not {name for name in own(imports(path, lazy=False)) if inside(name, "kvdsl.codegen")}


def test_inside_the_compiler_imports_are_relative_and_across_they_are_absolute() -> None:
    for path in SOURCES:
        if not inside(module_of(path), "kvdsl.codegen"):
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert not inside(node.module or "", "kvdsl.codegen"), path
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2, path


def test_no_module_hides_a_public_name() -> None:
    """Importing kvdsl/name.py would set kvdsl.name to the module."""
    for name, module in kvdsl._HOME.items():
        folder = ROOT / "kvdsl" / module
        assert not (folder.parent / f"{name}.py").exists() and not (folder / f"{name}.py").exists(), name


# -- what an import costs --------------------------------------------------------------------------------------------


def test_importing_kvdsl_loads_no_heavy_package() -> None:
    """What takes long to import is not there; how long the rest takes is no matter of a test."""
    modules = python("import sys, kvdsl; print(*sys.modules)").split()
    assert not {"torch", "triton", "sympy", "transformers", "numpy", "typer"} & set(modules)


def test_the_list_of_schemes_loads_no_heavy_package() -> None:
    modules = python("import sys; from kvdsl.codegen.cli import run; run(['list']); print(*sys.modules)").split()
    assert not {"torch", "triton", "sympy", "transformers"} & set(modules)


def test_the_language_the_cost_and_the_plan_need_no_torch() -> None:
    code = (
        "import sys, kvdsl; from kvdsl.codegen.plan import plan_for; from kvdsl.codegen import render\n"
        "render(plan_for(kvdsl.load('kivi2'), kvdsl.Shape(64)), 'triton', 'kivi2'); print(*sys.modules)"
    )
    assert not {"torch", "triton"} & set(python(code).split())


# -- how a module looks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_a_module_is_short_and_says_what_lives_in_it(path: Path) -> None:
    assert path.read_text(encoding="utf-8").count("\n") <= 400
    assert ast.get_docstring(tree_of(path))


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_nothing_runs_text_or_unpickles(path: Path) -> None:
    module = module_of(path)
    banned = {"pickle", "marshal", "shelve", "dill", "cloudpickle", *(() if module == "kvdsl.registry" else ("runpy",))}
    assert not banned & {name.split(".")[0] for name in imports(path)}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in (
                "eval",
                "exec",
                "compile",
                "__import__",
                "torch.load",
                "sp.sympify",
                "sympy.sympify",
            ), module
            assert not any(k.arg == "shell" for k in node.keywords), module
            allowing = [k for k in node.keywords if k.arg in ("trust_remote_code", "allow_pickle")]
            assert all(isinstance(k.value, ast.Constant) and k.value.value is False for k in allowing), module


@pytest.mark.parametrize("name", LINKS)
def test_the_folders_of_the_package_are_links_beside_it(name: str) -> None:
    link = ROOT / "kvdsl" / name
    assert link.is_symlink() and link.resolve() == ROOT / name
    assert (ROOT / name).is_dir() and not (ROOT / name).is_symlink()


def test_every_package_is_named_for_the_wheel() -> None:
    import tomllib

    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {module_of(path) for path in SOURCES if path.name == "__init__.py"}
    assert set(named) == found


# -- what is said about schemes --------------------------------------------------------------------------------------


def test_the_readme_holds_the_table_of_schemes_as_it_is() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in rows():
        bits = row["bits"]
        numbers = " | ".join(f"{bits[side]:.3f}" for side in ("keys", "values", "mean"))
        assert f"| `{row['name']}` | {row['system']} | {numbers} | {row['source']} |" in text
    listed = set(re.findall(r"^\| `(\w+)` \|.* \d+\.\d{3} \|", text, re.MULTILINE))
    assert listed == set(ALL)


def test_every_scheme_says_where_it_comes_from() -> None:
    for row in rows():
        assert row["source"] and row["system"] and "\n" not in row["system"]
        assert not row["system"].startswith("arXiv"), f"{row['name']}: begin its module's docstring with `Name: `"


# -- what is generated -----------------------------------------------------------------------------------------------

SHAPES = (Shape(128, 8, 32), Shape(64, 3, 9, "fp32"))


def texts(backend: Backend, *, every: int = 1) -> Iterator[tuple[str, Plan, str]]:
    """(name, plan, text) of every shipped scheme, or of one in `every`, at every shape that fits, or its own."""
    for name, scheme in [(name, scheme) for name, scheme in ALL.items() if not scheme.routed][::every]:
        for shape in [shape for shape in SHAPES if not shape_faults(scheme, shape)] or [usual(scheme)]:
            plan = plan_for(scheme, shape)
            yield f"{name}_{backend}_{shape.head_dim}", plan, render(plan, backend, name)


def loose_arguments(text: str) -> dict[str, set[str]]:
    """Of every kernel of a generated text the arguments that it is not specialized for."""
    kernels = re.findall(r"^@triton\.jit(?:\(do_not_specialize=\[(.*)\]\))?\ndef (\w+)", text, re.MULTILINE)
    return {name: set(re.findall(r"\w+", loose)) for loose, name in kernels}


def anew(plan: Plan, text: str) -> list[str]:
    """Kernels that would be compiled anew for another length: Triton does so where an argument that it may specialize
    becomes, or ceases to be, a multiple of 16.  Only numbers that belong to the parameters may be such."""
    loose, found = loose_arguments(text), []
    for launch in launches(plan, text):
        whole = {argument for argument, kind in launch.signature if kind == "i32"} - loose[launch.kernel]
        others = [argument for argument in whole if not re.fullmatch(r"(keys|values)\w*_(stride|shifts)", argument)]
        found += [f"{launch.kernel} is specialized for {others}"] if others else []
    return found


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_generated_text_is_clean(backend: Backend, tmp_path: Path) -> None:
    for name, plan, text in texts(backend):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        assert re.match(r'"""\w', text), name
        assert backend == "torch" or plan.shape == SHAPES[1] or not anew(plan, text), name
    select = ["--isolated", "--select", "F,E9", "--target-version", "py311"]
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", *select, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_generated_text_does_not_depend_on_the_process(backend: str) -> None:
    """What would be printed in another order is printed by shared code: one scheme in five has it all."""
    code = (
        "import hashlib, sys; sys.path.insert(0, 'tests'); from test_house import texts\n"
        f"print(hashlib.sha256(''.join(t for *_, t in texts({backend!r}, every=5)).encode()).hexdigest())"
    )
    first, second = (python(f"import os; os.chdir({str(ROOT)!r})\n{code}", PYTHONHASHSEED=seed) for seed in "12")
    assert first == second
