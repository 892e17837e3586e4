"""What schemes lose, in figures: `kvdsl study`, and the page of all schemes that it writes."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kvdsl import cost
from kvdsl.kernels import Backend
from kvdsl.scheme import SIDES, Scheme
from kvdsl.shape import Shape

from .answer import progress, row

if TYPE_CHECKING:
    from rich.table import Table

COMMAND = "kvdsl study --all --markdown"
HEAD_DIM = 128
HEADS = {
    "keys_mse": "mse keys",
    "values_mse": "mse values",
    "score_error": "score error",
    "output_error": "output error",
}
PAGE = f"""# Schemes

Made by `{COMMAND}`; not written by hand.

* bits: of a packed number at head_dim {HEAD_DIM}, or the scheme's own: those of its code + those of metadata and
  padding, without the exact window.
* mse: mean squared error of standard normal numbers through packed bytes.
* score error, output error: size of the error of q.k and of the output of causal attention, over the size of the exact
  ones. Keys have an offset in every channel and four outlier channels a head, 8 to 20 times larger; values are standard
  normal, so that the exact output is a small mean and its relative error large.
* Keys of schemes that store them before RoPE get rotary positions first, so that what is coded are the same numbers.
* All tokens are packed: nothing is kept exact by a window, sinks or other layers.
* calibrated: what is taken from data. It was measured on other tokens of the same kind, which random sums of their
  attention's outputs weigh where a model's loss would.
* lines: of the file in `schemes/`, of the statements that the scheme is made of.
* Schemes that draw something at random stand here with the mean over their seeds, below with the deviation.
"""


def results(schemes: Mapping[str, Scheme], *, seeds: int, backend: Backend | None) -> list[dict[str, Any]]:
    """One result a scheme: what is known of it, the number of runs, and mean and deviation of every measure."""
    from kvdsl.study import seeded, studied

    found = []
    for name, scheme in schemes.items():
        with progress(f"studying {name}"):
            spreads = studied(scheme, seeds, backend)
        found.append({**known(name, scheme), "runs": seeds if seeded(scheme) else 1, **spreads})
    return found


def known(name: str, scheme: Scheme) -> dict[str, Any]:
    """scheme, bits (in all, and of the code alone), calibrated, file and lines (None for a scheme that is not shipped),
    source."""
    from kvdsl.params import from_data

    bits, home = cost.bits(scheme), _home(scheme)
    return {
        "scheme": name,
        "bits": {"keys": bits.keys, "values": bits.values, "mean": bits.mean},
        "code_bits": {side: bits.side(side).code for side in SIDES},
        "calibrated": from_data(scheme, Shape(HEAD_DIM)),
        "file": None if home is None else f"{home.__name__.rpartition('.')[2]}.py",
        "lines": None if home is None else _lines(home, scheme),
        "source": scheme.source,
    }


def _home(scheme: Scheme) -> ModuleType | None:
    """The module in schemes/ that declares a scheme."""
    import kvdsl.schemes  # noqa: F401

    for module in list(sys.modules.values()):
        own = getattr(module, "__name__", "").startswith("kvdsl.schemes.")
        if own and any(value is scheme for value in vars(module).values()):
            return module
    return None


def _lines(module: ModuleType, scheme: Scheme) -> int:
    """Of the statement that names the scheme, and of those of the module whose names it uses."""
    made: dict[str, ast.stmt] = {}
    for part in ast.parse(inspect.getsource(module)).body:
        if isinstance(part, ast.FunctionDef):
            made[part.name] = part
        elif isinstance(part, (ast.Assign, ast.AnnAssign)):
            targets = part.targets if isinstance(part, ast.Assign) else [part.target]
            made |= {node.id: part for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    found, waiting = set[ast.stmt](), [name for name in made if vars(module).get(name) is scheme]
    while waiting:
        part = made[waiting.pop()]
        if part not in found:
            found.add(part)
            waiting += [node.id for node in ast.walk(part) if isinstance(node, ast.Name) and node.id in made]
    return sum((part.end_lineno or part.lineno) - part.lineno + 1 for part in found)


def told(found: Sequence[Mapping[str, Any]]) -> Table:
    """A table for the terminal: a row a scheme."""
    from rich.table import Table

    table = Table("scheme", "bits", "runs", *HEADS.values())
    for column in table.columns[1:]:
        column.justify = "right"
    for result in found:
        spreads = [_both(result, name) for name in HEADS]
        table.add_row(result["scheme"], f"{result['bits']['mean']:.3f}", str(result["runs"]), *spreads)
    return table


def page(found: Sequence[Mapping[str, Any]]) -> str:
    """The page docs/schemes.md: a row a scheme, then the deviations of those that draw something."""
    rows = [row(("name", "bits keys", "bits values", *HEADS.values(), "calibrated", "file", "lines", "source"))]
    rows += ["| --- |" + " ---: |" * (2 + len(HEADS)) + " --- | --- | ---: | --- |"]
    for result in found:
        first, rest = cells(result)
        rows.append(row((*first, *(_short(result[name]["mean"]) for name in HEADS), *rest)))
    drawn = [result for result in found if result["runs"] > 1]
    lines = [PAGE, *rows]
    if drawn:
        lines += [
            "",
            "## Over seeds",
            "",
            f"Mean and standard deviation over {drawn[0]['runs']} seeds, the data fixed.",
            "",
        ]
        lines += [row(("name", *HEADS.values())), "| --- |" + " ---: |" * len(HEADS)]
        lines += [row((f"`{result['scheme']}`", *(_both(result, name) for name in HEADS))) for result in drawn]
    return "\n".join(lines)


def cells(result: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is known of a scheme: the cells of its row before its figures, and those behind."""
    before = (f"`{result['scheme']}`", *(_bits(result["bits"][side], result["code_bits"][side]) for side in SIDES))
    taken = ", ".join(f"`{name}`" for name in result["calibrated"])
    return before, (
        taken,
        *("" if result[key] is None else str(result[key]) for key in ("file", "lines")),
        result["source"],
    )


def _bits(total: float, code: float) -> str:
    """Of the code and of all else, which may be nothing."""
    return f"{total:.3f}" + (f" = {code:g} + {total - code:.4g}" if total > code else "")


def _both(result: Mapping[str, Any], name: str) -> str:
    """Mean, and deviation where there is one."""
    mean, deviation = result[name]["mean"], result[name]["std"]
    return _short(mean) if result["runs"] == 1 else f"{_short(mean)} ± {deviation:.1g}"


def _short(number: float) -> str:
    return "0" if number < 1e-7 else f"{number:.4g}"
