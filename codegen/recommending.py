"""`kvdsl.recommend`: a scheme for a model within a budget of bits, of those that are shipped or of a sweep's file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvdsl.kernels import Backend
from kvdsl.registry import load, name_of, names
from kvdsl.scheme import Scheme
from kvdsl.shape import Shape
from kvdsl.sweeping.choice import Beside, Recommendation, candidates, halved, named
from kvdsl.sweeping.file import SweepFile
from kvdsl.sweeping.grid import LeftOut, Member
from kvdsl.sweeping.results import Figured

from .roofline import Gpu, card
from .searching import WRITTEN
from .sweep_engines import refuse_engine
from .sweep_run import BATCH, TOKENS, Measuring, kept_in
from .sweep_time import compiled_shares, predicted_time

if TYPE_CHECKING:
    from kvdsl.evaluation.settings import Settings
    from kvdsl.generation import Loaded


def rounds(seed: int) -> tuple[Settings, ...]:
    """What each round asks: one short window, two whole ones, six."""
    from kvdsl.evaluation.settings import Settings

    whole = Settings(tasks=("perplexity",), seed=seed, sizes=(1024,))
    return (whole.with_(windows=1, context=512, score=64), whole.with_(windows=2), whole.with_(windows=6))


def recommend(
    model: str | Path | Loaded | None,
    *,
    bits: float,
    text: str | None = None,
    text_name: str = "text",
    sweep: str | Path | None = None,
    among: Iterable[Scheme | str] | Mapping[str, Scheme] | None = None,
    tokens: int | None = None,
    settings: Sequence[Settings] | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    keep: str | Path | None = None,
    workers: int = 1,
    engine: str = "local",
    gpu: str = "H100",
    compiled: bool = False,
    backend: Backend | None = None,
    device: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Recommendation:
    """The scheme within `bits` a number through which the model loses least, beside its neighbours, and why.

    bits      a number may take at most, metadata included, as kvdsl.bits counts for the model: of a sequence of
              `tokens` with what its window holds, or of one without end
    sweep     the file of a sweep: nothing is measured, its members are compared; the model may be None then
    among     candidates; default all that are shipped or registered
    settings  of the three rounds, default from a short window to six whole ones; all draw places with `seed`
    out       a .toml or .json file for the spec
    keep      an SQLite file for the figures of the last round, of which `sweep` can choose; rows of all rounds are kept
              beside it in `<keep>.rows` as they come, and what was stopped goes on from there
    gpu, compiled   as for kvdsl.sweep, of what was measured last; from bytes alone unless compiled
    model, text, workers, engine, backend, device   as for kvdsl.sweep

    Raises ValueError where nothing fits, for a file of another model or other settings, for an `out` that cannot be
    written.
    """
    if not isinstance(bits, (int, float)) or isinstance(bits, bool) or not bits > 0:
        raise ValueError(f"bits: {bits!r} is no budget; give a number of bits, as 3")
    path = _writable(out)
    if sweep is not None:
        if keep is not None:
            raise ValueError("keep: of a sweep's file nothing is measured that could be kept; leave one of both out")
        found = _of_sweep(Path(sweep), model, float(bits), tokens)
    else:
        if model is None:
            raise ValueError("model: none is given; name one, or give the file of a sweep")
        refuse_engine(engine, workers, model)
        on, asked = card(gpu), tuple(settings or rounds(seed))
        run = Measuring(model, text, text_name, backend, device, workers, engine, say)
        found = _of_model(run, _members(among), float(bits), tokens, asked, on, compiled, keep)
    if path is None:
        return found
    path.write_text(WRITTEN[path.suffix](found.scheme), encoding="utf-8")
    return replace(found, path=path)


def _writable(out: str | Path | None) -> Path | None:
    """ValueError for a file of no known kind, or in no folder, before anything is measured."""
    if out is None:
        return None
    path = Path(out)
    if path.suffix not in WRITTEN:
        raise ValueError(f"out: {str(path)!r} is no .toml or .json file; name one, as {path.stem}.toml")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"out: there is no folder {path.absolute().parent}; make it, or write elsewhere")
    return path


def _members(among: Iterable[Scheme | str] | Mapping[str, Scheme] | None) -> list[Member]:
    if isinstance(among, Mapping):
        return [Member(name, scheme) for name, scheme in among.items()]
    given = names() if among is None else among
    return [Member(one if isinstance(one, str) else name_of(one), load(one)) for one in given]


def _of_model(
    run: Measuring,
    members: Sequence[Member],
    budget: float,
    tokens: int | None,
    asked: Sequence[Settings],
    gpu: Gpu,
    compiled: bool,
    keep: str | Path | None,
) -> Recommendation:
    if len(asked) != 3:
        raise ValueError(f"settings: {len(asked)} of them are given; there are three rounds")
    within, beyond, left = candidates(members, budget, run.shape, run.layers, tokens, asked[0].context)
    about = {**run.about(asked[-1]), "gpu": gpu.name, "tokens": TOKENS, "batch": BATCH}
    with kept_in(keep) as (path, rows):
        file = SweepFile(path, about, "keep")

        def look(some: Sequence[Member], number: int) -> Mapping[str, Figured | LeftOut]:
            run.say(f"round {number} of 3, {len(some)} schemes")
            run.ahead(some, asked[number - 1], rows)
            return run(some, asked[number - 1], rows)

        last, looked, refused = halved(within, beyond, look)
        last = _timed(last, run, gpu, compiled)
        for place, one in enumerate(last):
            file.add(place, one.figured)
    chosen, beside, why = named(last, budget)
    about |= {"counted_at": tokens, "rounds": [one.to_dict() for one in asked]}
    more = f"{len(within)} schemes within the budget were looked at, {len(beyond)} up to a bit beyond it"
    return Recommendation(about, budget, chosen, beside, tuple(looked), (*left, *refused), (*why, more))


def _of_sweep(path: Path, model: str | Path | Loaded | None, budget: float, tokens: int | None) -> Recommendation:
    found = SweepFile(path).read()
    if model is not None:
        from kvdsl.generation import called

        name = called(model, model[0] if isinstance(model, tuple) else None)
        if name != found.about["model"]:
            raise ValueError(f"from: {path} is of the model {found.about['model']}, not of {name}; give its own")
    shape = Shape(**found.about["shape"])
    counted = [Beside("", _bits(one.scheme, shape, found.about["layers"], tokens), 1, one) for one in found.members]
    chosen, beside, why = named(counted, budget)
    about = {**found.about, "counted_at": tokens, "from": str(path)}
    left = [
        LeftOut(one.figured.name, f"{one.bits:.3f} bits are more than {budget:g}")
        for one in counted
        if one.bits > budget
    ]
    more = f"{len(counted)} members of {path.name}, {len(counted) - len(left)} of them within the budget"
    return Recommendation(about, budget, chosen, beside, tuple(counted), (*left, *found.left_out), (*why, more))


def _bits(scheme: Scheme, shape: Shape, layers: int, tokens: int | None) -> float:
    from kvdsl.cost import bits

    return bits(scheme, shape.head_dim, shape.kv_heads, tokens=tokens, layers=layers).mean


def _timed(last: Sequence[Beside], run: Measuring, gpu: Gpu, compiled: bool) -> list[Beside]:
    """With predicted times."""
    shape = run.shape.deployed
    schemes = [one.figured.scheme for one in last]
    shares = compiled_shares(schemes, shape, run.layers, gpu, run.say) if compiled else {}

    def timed(one: Beside) -> Beside:
        options: dict[str, Any] = {"tokens": TOKENS, "batch": BATCH, "gpu": gpu, "compiled": shares}
        more = predicted_time(one.figured.scheme, shape, run.layers, **options)
        return replace(one, figured=replace(one.figured, figures={**one.figured.figures, **more}))

    return [timed(one) for one in last]
