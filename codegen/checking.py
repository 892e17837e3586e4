"""The laws, run on schemes: `kvdsl check`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvdsl.kernels import Backend
from kvdsl.scheme import Scheme

from .answer import progress


def results(
    schemes: Mapping[str, Scheme], *, examples: int | None, seed: int | None, backend: Backend | None
) -> list[dict[str, Any]]:
    """One result a scheme: scheme, passed, laws (law, place: "" or that of a layer's scheme, examples, passed, failure:
    the smallest counterexample)."""
    from kvdsl.extras import need

    need("hypothesis", "check")
    from kvdsl.testing import report

    asked: dict[str, Any] = {"examples": examples, "seed": seed}
    given = {name: value for name, value in asked.items() if value is not None}
    found = []
    for name, scheme in schemes.items():
        with progress(f"checking {name}"):
            laws = [
                {"law": r.law, "place": r.place, "examples": r.examples, "passed": r.passed, "failure": r.failure}
                for r in report(scheme, backend=backend, **given)
            ]
        found.append({"scheme": name, "passed": all(law["passed"] for law in laws), "laws": laws})
    return found


def told(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a scheme, and in full what failed."""
    lines = []
    for result in found:
        laws = result["laws"]
        count = sum(law["examples"] for law in laws)
        failed = [law for law in laws if not law["passed"]]
        verdict = f"{len(failed)} of {len(laws)} laws broken" if failed else f"{len(laws)} laws hold"
        lines.append(f"{result['scheme']}: {verdict}, {count} examples")
        for law in failed:
            where = f"{law['place']}: " if law["place"] else ""
            lines += ["", f"  {where}{law['law']}", *(f"    {line}" for line in str(law["failure"]).splitlines()), ""]
    return lines
