"""What a notebook shows of a scheme, of kernels and of an evaluation: small tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import markup

if TYPE_CHECKING:
    from .evaluation.results import Evaluation
    from .kernels import KernelSet
    from .scheme import Scheme


def of_scheme(scheme: Scheme) -> str:
    """What it is made of, and its bits at its own head_dim, else at 128 where it fits that."""
    return markup.facts([*_spec(scheme), *_bits(scheme)], "Scheme")


def _spec(scheme: Scheme) -> list[tuple[str, str]]:
    """The fields that a user would have written, tables of layers and of heads row by row."""
    import dataclasses

    told = list[tuple[str, str]]()
    for field in dataclasses.fields(scheme):
        value = getattr(scheme, field.name)
        if value == field.default:
            continue
        if field.name in ("layers", "heads"):
            told += [(f"{field.name} {', '.join(map(str, index))}", repr(own)) for index, own in value]
        else:
            told.append((field.name, value if isinstance(value, str) else repr(value)))
    return [*told, ("hash", scheme.hash)]


def _bits(scheme: Scheme) -> list[tuple[str, str]]:
    from .cost import bits
    from .errors import SchemeError
    from .shape import usual

    try:
        found = bits(scheme)
    except SchemeError:
        return []
    dim = usual(scheme).head_dim
    return [(f"bits, head_dim {dim}", f"keys {found.keys:.3f}, values {found.values:.3f}, mean {found.mean:.3f}")]


def of_kernels(kernels: KernelSet) -> str:
    """What was compiled, for which shape, and where its text lies."""
    pages = f"{kernels.page_bytes} bytes for {kernels.page_tokens} tokens"
    return markup.facts(
        [
            ("scheme", repr(kernels.scheme)),
            ("shape", repr(kernels.shape)),
            ("backend", f"{kernels.backend}: {kernels.why}"),
            ("page", pages),
            ("source", str(kernels.path)),
        ],
        "KernelSet",
    )


def of_evaluation(found: Evaluation) -> str:
    """The tables of `kvdsl eval`."""
    from .evaluation.tables import bits, losses, remarks

    sheets = [sheet for sheet in (losses(found), bits(found)) if sheet.rows]
    tables = [markup.table(sheet.heads, sheet.rows, sheet.title) for sheet in sheets]
    left = [text for kind, text in remarks(found) if kind == "left out"]
    return markup.element("div", *tables, *(markup.element("p", f"left out: {text}") for text in left))
