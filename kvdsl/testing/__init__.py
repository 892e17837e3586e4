"""Checking a scheme: laws that its kernels and caches must obey, asked on random shapes, lengths and numbers.

    report      every law that applies to a scheme, and whether it held
    check       the same, raising LawBroken with the smallest case that breaks one
    few_shapes  what a scheme is asked at where no shapes are given
    schemes, routed_schemes, shapes, cases, faulty_schemes   hypothesis strategies to test with

A law is one function in `codes`, `extremes`, `low_rank`, `polar`, `sparse`, `splits` (packed bytes), `attention`,
`positions`, `received` (kernels), `caches` (caches over time) or `tiers` (caches of tiers, in place of all others);
`LAWS` holds all of them by name, each with the number of the property it states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from typing import Any

from kvdsl.kernels import Backend
from kvdsl.rules import shape_faults
from kvdsl.scheme import Scheme
from kvdsl.shape import Shape

from . import (  # noqa: F401  (they enter their laws)
    attention,
    caches,
    codes,
    extremes,
    low_rank,
    polar,
    positions,
    received,
    sparse,
    splits,
    tiers,
)
from .cases import LAWS, Case, Law, LawBroken
from .faulty import faulty_schemes
from .strategies import cases, schemes, shapes
from .tier_strategies import routed_schemes

__all__ = [
    "LAWS", "Case", "Law", "LawBroken", "Result", "applicable", "cases", "check", "faulty_schemes", "few_shapes",
    "report", "routed_schemes", "schemes", "shapes",
]  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One law asked of a scheme: in how many examples, and the smallest case that broke it, in words (None: none).

    `place`: where the scheme stands in the one that was given, such as "layers[0]"; "" for that one.
    """

    law: str
    examples: int
    failure: str | None = None
    place: str = ""

    @property
    def passed(self) -> bool:
        return self.failure is None


def applicable(scheme: Scheme) -> list[Law]:
    """The laws that are made of such a scheme."""
    return [law for law in LAWS.values() if law.applies(scheme)]


def report(
    scheme: Scheme, *, backend: Backend | None = None, examples: int = 25, seed: int = 0, laws: Sequence[str] = (),
    shapes: Sequence[Shape] = (),
) -> Iterator[Result]:  # fmt: skip
    """Ask every law (or those named) that applies, `examples` times each; the same seed asks the same.  Schemes of
    layers are asked after the scheme itself, each once.

    backend   as for `kvdsl.build`; None: Triton where there is a GPU or TRITON_INTERPRET=1, else torch
    shapes    which are drawn from; none: `few_shapes` of the scheme
    """
    for place, each in _each(scheme).items():
        at = shapes or few_shapes(each)
        for law in applicable(each):
            if not laws or law.name in laws:
                yield replace(_ask(law, each, backend, examples, seed, at), place=place)


def _each(scheme: Scheme) -> dict[str, Scheme]:
    """Place -> scheme: itself, and the different ones of its layers."""
    found = {"": scheme.with_(layers=(), heads=())}
    for field, table in (("layers", scheme.layers), ("heads", scheme.heads)):
        for key, inner in table:
            if inner not in found.values():
                found[f"{field}[{key[0]}]"] = inner
    return found


def check(
    scheme: Scheme, *, backend: Backend | None = None, examples: int = 25, seed: int = 0, laws: Sequence[str] = (),
    shapes: Sequence[Shape] = (),
) -> list[Result]:  # fmt: skip
    """`report`, raising LawBroken with the smallest case as soon as a law is broken."""
    results = []
    for result in report(scheme, backend=backend, examples=examples, seed=seed, laws=laws, shapes=shapes):
        if result.failure is not None:
            raise LawBroken(result.failure)
        results.append(result)
    return results


def _ask(
    law: Law, scheme: Scheme, backend: Backend | None, examples: int, seed: int, shapes: Sequence[Shape]
) -> Result:
    """Hypothesis looks for a case that breaks the law, and makes it as small as it can."""
    import hypothesis
    from hypothesis import strategies as st

    count, broken = 0, [""]

    def examine(data: Any) -> None:
        nonlocal count
        count += 1
        shape = data.draw(st.sampled_from(shapes))
        case = data.draw(cases(scheme, shape, backend, kinds=law.kinds))
        try:
            law(case)
        except LawBroken as failure:
            broken[0] = str(failure)
            raise

    everything = [check for check in hypothesis.HealthCheck]
    settings = hypothesis.settings(
        max_examples=examples, database=None, deadline=None, suppress_health_check=everything, print_blob=False,
        report_multiple_bugs=False, phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )  # fmt: skip
    test = hypothesis.seed(seed)(settings(hypothesis.given(st.data())(examine)))
    try:
        with _quiet():
            test()
    except LawBroken:
        return Result(law.name, count, broken[0])
    return Result(law.name, count)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hypothesis prints each falsifying example: the report says it instead.  One thread: tensors are small, and more
    threads wait for each other longer than they compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        torch.set_num_threads(threads)


def few_shapes(scheme: Scheme) -> list[Shape]:
    """A few shapes the scheme fits, each compiled once: small first; of tiers some for a sliding window."""
    own = scheme.head_dim  # of a scheme that says how long a key is there are no other shapes
    found = [
        Shape(own or dim, heads, heads * group, dtype, softcap, scheme.routed and placed)  # type: ignore[arg-type]
        for dim, heads, group, dtype, softcap, placed in (
            (32, 1, 1, "fp16", False, False), (64, 2, 3, "fp16", False, True), (128, 2, 4, "bf16", False, False),
            (80, 1, 8, "fp32", True, True), (96, 4, 1, "fp16", True, False), (256, 2, 2, "fp16", False, False),
        )
    ]  # fmt: skip
    return [shape for shape in found if not shape_faults(scheme, shape)][:4]
