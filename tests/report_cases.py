"""A small document of results, made without a model: every task, a scheme that was left out, names that need care."""

from __future__ import annotations

from kvdsl.evaluation.results import (
    Cell,
    Continuation,
    Copy,
    Counted,
    Evaluation,
    Greedy,
    Layers,
    Model,
    Parts,
    Perplexity,
    Reads,
    Retrieval,
    SchemeResult,
    Size,
    Storage,
    Tasks,
    Text,
    Window,
)
from kvdsl.evaluation.settings import Settings
from kvdsl.registry import load, names

ODD = "<script>alert('x')</script> & $b$ \"q\""
"""A name that is markup, a formula and a quotation."""


def grid(most: float, layers: int = 4, heads: int = 3) -> tuple[tuple[float | None, ...], ...]:
    return tuple(
        tuple(most * (1 + layer) * (1 + head) / (layers * heads) for head in range(heads)) for layer in range(layers)
    )


def perplexity(lost: float) -> Perplexity:
    windows = tuple(Window(100 * i, 2.5 + lost, 2.5, lost, 1 - lost) for i in range(3))
    return Perplexity(
        context=96, score=12, chunk=4, perplexity=12.18 * (1 + lost), full_perplexity=12.18, delta=12.18 * lost,
        interval=(11 * (1 + lost), 13.5 * (1 + lost)), full_interval=(11.0, 13.5),
        delta_interval=(11 * lost, 13.5 * lost), kl=lost, kl_error=lost / 7, same=1 - lost / 3, same_error=0.01,
        windows=windows, kl_by_place=(lost,) * 12,
    )  # fmt: skip


def retrieval(lost: float) -> Retrieval:
    cells = tuple(
        Cell(length, depth, 2, max(0.0, 1 - 2 * lost - depth / 4), 1.0, 0.1 + lost, 0.1, lost)
        for length in (340, 680)
        for depth in (0.0, 0.5, 1.0)
    )
    exact = sum(cell.exact for cell in cells) / len(cells)
    return Retrieval(12, exact, 1.0, 0.1 + lost, 0.1, lost, cells)


def storage(bits: float) -> Storage:
    sizes = []
    for tokens in (256, 1024, 4096):
        code = int(bits * tokens * 48)
        parts = Parts(code, code // 8, 0, code // 64, 4096, 0, 128, 8192)
        counted = Counted(bits, bits, bits, bits - 0.5, 0.5, 0.0, 128 / tokens)
        nbytes = sum(vars(parts).values())
        sizes.append(Size(tokens, nbytes, 8 * nbytes / (384 * tokens), parts, 64, counted))
    return Storage(f"{bits:g} bits", f"{bits:g} bits, for all T tokens", tuple(sizes))


def result(name: str, bits: float, lost: float) -> SchemeResult:
    known = name in names()
    errors = grid(lost)
    holes = ((None, *errors[0][1:]), *errors[1:])
    text = perplexity(lost)
    tasks = Tasks(
        perplexity=text, passkey=retrieval(lost), needle=retrieval(lost / 2),
        copy=Copy(2, 32, 1 - lost, 1.0, 0.1, 0.1, lost),
        greedy=Greedy(1, 5, 0.8, 3.5, 0.0, (Continuation(7, 0.8, 3, f"</pre> {name}", "as it is"),)),
        layers=Layers(
            96, 8, lost, lost / 2, errors, holes, errors, errors, errors, errors, errors, errors, ((0, 1, 0),) * 4
        ),
    )  # fmt: skip
    return SchemeResult(
        scheme=name, hash=load(name).hash if known else "0123abc",
        source=load(name).source if known else ODD, bits=bits,
        perplexity=text.perplexity, delta=text.delta, tasks=tasks, storage=storage(bits),
        reads=Reads(4, 4, 0, 0, 0.1), backend="torch", calibrated=("keys.scale",) if known else (), seconds=1.5,
    )  # fmt: skip


def evaluation(*results: SchemeResult) -> Evaluation:
    """Of three schemes and one that does not fit, unless others are given."""
    left = SchemeResult("bitdecoding4", "77", "paper", None, None, None, Tasks(), refused="groups do not divide\nmore")
    some = results or (result("kivi2", 3.25, 0.21), result("kivi4", 5.25, 0.013), result(ODD, 6.5, 0.034), left)
    return Evaluation(
        model=f"model {ODD}", text="some.txt", about_model=Model("m", "d1g", "llama", 4, 3, 9, 64, "float32", "cpu"),
        about_text=Text("some.txt", "5ha256", 4000, 512), settings=Settings(windows=3, seed=7).to_dict(),
        versions={"kvdsl": "0.1.0", "torch": "2.13.0"}, results=some, notes=(f"backend torch; {ODD}",),
    )  # fmt: skip
