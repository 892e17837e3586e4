"""How long a step of decoding takes at least to read a sequence's cache: by its bytes, or by the machine code too.

By bytes a GPU reads at 0.93 of what its memory gives, which is as near as the law of roofline.py lets any kernel come.
By machine code packed bytes are read at the share of the limit that the law predicts of the scheme's decode kernel,
exact rows at 0.93.  Neither was measured, and both are of one sequence among enough others to fill the GPU.  Models
in float32 are taken as they would be deployed, in float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvdsl.evaluation.results import Evaluation, Parts, SchemeResult
from kvdsl.evaluation.tables import Sheet, done

from .report_plots import divergences, pareto
from .report_svg import Drawn, listed
from .roofline import Gpu, reading_time

if TYPE_CHECKING:
    from kvdsl.scheme import Scheme
    from kvdsl.shape import InputFormat

USUAL = "H100"
FORMATS: dict[str, InputFormat] = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class Times:
    """Microseconds of a step by scheme, for one sequence of `tokens` tokens, and how they were come by."""

    gpu: str
    tokens: int
    how: str
    by_scheme: dict[str, float]

    def sheet(self) -> Sheet:
        """As a table."""
        rows = tuple((name, f"{time:.2f}") for name, time in self.by_scheme.items())
        return Sheet(
            f"microseconds a step and sequence, {self.how}", ("scheme", f"{self.gpu}, {self.tokens} tokens"), rows
        )


def of_bytes(found: Evaluation, gpu: Gpu) -> Times | None:
    """What memory alone allows; None where no bytes were counted."""
    tokens = _longest(found)
    if tokens is None:
        return None
    times = {
        one.scheme: reading_time(gpu, _packed(parts) + _exact(found, parts))
        for one in done(found)
        if (parts := _parts(one, tokens)) is not None
    }
    return Times(gpu.name, tokens, "by bytes alone, exact rows in 16 bits: what memory allows", times)


def of_code(found: Evaluation, gpu: Gpu) -> Times:
    """What machine code allows, compiled here and now for the model's heads; of the schemes that kvdsl knows under
    their names, without tiers or tables of layers and heads.  ValueError where there are none."""
    from kvdsl.shape import Shape

    from .predicting import predicted

    tokens, schemes = _longest(found), _known(found)
    if tokens is None or not schemes:
        raise ValueError("gpu: none of these schemes is known by name and without tiers and tables; leave --gpu out")
    about = found.about_model
    if about.dtype not in FORMATS:
        raise ValueError(f"gpu: no kernels are compiled for a model in {about.dtype}; leave --gpu out")
    shape = Shape(about.head_dim, about.kv_heads, about.q_heads, FORMATS[about.dtype]).deployed
    rows = predicted(schemes, shape, [gpu])
    shares = {row["scheme"]: row["share"] for row in rows if row.get("share") is not None}
    if not shares:
        raise ValueError(f"gpu: {next((row['failed'] for row in rows if 'failed' in row), 'no share is predicted')}")
    times = {}
    for one in done(found):
        parts = _parts(one, tokens)
        if parts is not None and one.scheme in shares:
            packed = reading_time(gpu, _packed(parts), shares[one.scheme])
            times[one.scheme] = packed + reading_time(gpu, _exact(found, parts))
    return Times(gpu.name, tokens, f"predicted from machine code of {shape.dtype}", times)


def plot(found: Evaluation, times: Times) -> Drawn | None:
    """Time against divergence."""
    missing = [one.scheme for one in done(found) if one.scheme not in times.by_scheme]
    left = f"; without {listed(missing)}" if missing else ""
    return pareto(
        "time-kl", "Time of a step and divergence", divergences(found, times.by_scheme),
        f"microseconds a step and sequence of {times.tokens} tokens, {times.gpu}",
        "KL from full precision, nats a token", f"time {times.how}; nothing was timed{left}", divergence=True,
    )  # fmt: skip


def _known(found: Evaluation) -> dict[str, Scheme]:
    """Schemes by name; only names that are shipped or registered, so that no file of a document is run."""
    from kvdsl.registry import load, names

    schemes, known = dict[str, "Scheme"](), set(names())
    for one in done(found):
        if one.scheme not in known:
            continue
        scheme = load(one.scheme)
        if scheme.hash == one.hash and not (scheme.routed or scheme.layers or scheme.heads):
            schemes[one.scheme] = scheme
    return schemes


def _longest(found: Evaluation) -> int | None:
    return max((s.tokens for one in done(found) if one.storage for s in one.storage.sizes), default=None)


def _parts(one: SchemeResult, tokens: int) -> Parts | None:
    sizes = one.storage.sizes if one.storage is not None else ()
    return next((size.parts for size in sizes if size.tokens == tokens), None)


def _packed(parts: Parts) -> int:
    """Bytes of packed tokens that attention reads: no padding, nothing reserved."""
    return parts.code + parts.metadata + parts.index


def _exact(found: Evaluation, parts: Parts) -> float:
    """Bytes of exact rows in 16 bits."""
    return parts.window / (2 if found.about_model.dtype == "float32" else 1)
