"""`kvdsl.sweep`: every member of a grid through its packed cache, kept as it comes, with predicted times and fronts."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvdsl.kernels import Backend
from kvdsl.registry import load, name_of
from kvdsl.scheme import Scheme
from kvdsl.sweeping.file import SweepFile
from kvdsl.sweeping.grid import Grid, LeftOut, Member
from kvdsl.sweeping.results import Figured, Sweep

from .roofline import card
from .sweep_engines import measured_by, refuse_engine
from .sweep_time import compiled_shares, predicted_time
from .sweep_worker import job

if TYPE_CHECKING:
    from kvdsl.evaluation.results import Evaluation
    from kvdsl.evaluation.settings import Settings
    from kvdsl.generation import Loaded

TOKENS, BATCH = 32768, 8  # of the predicted time
TOGETHER = 8  # members measured before the file is written: they share the full-precision run of a prompt
Say = Callable[[str], None]
Asked = Grid | Mapping[str, Any] | Iterable[Scheme | str] | str | Path


def grid_of(asked: Asked) -> Grid:
    """A grid, its table or TOML file, or schemes, and whatever kvdsl.load takes, to be measured as they are."""
    if isinstance(asked, Grid):
        return asked
    if isinstance(asked, Mapping):
        return Grid.of(asked)
    if isinstance(asked, (str, Path)):
        path = Path(asked)
        if path.suffix == ".toml" and path.is_file() and _is_grid(path):
            return Grid.read(path)
        return Grid.of({"base": str(asked)})
    schemes = [(one if isinstance(one, str) else name_of(one), load(one)) for one in asked]
    return Grid((), beside=tuple(schemes))


def _is_grid(path: Path) -> bool:
    """A TOML file is a spec where it has stores, and a grid where it has a base."""
    import tomllib

    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return False
    return not {"keys", "values", "both"} & told.keys() or bool({"base", "beside", "axes"} & told.keys())


def usual() -> Settings:
    """What a sweep asks: perplexity and divergence over three windows, bytes at one length."""
    from kvdsl.evaluation.settings import Settings

    return Settings(tasks=("perplexity",), windows=3, sizes=(1024,))


def sweep(
    grid: Asked,
    model: str | Path | Loaded,
    *,
    text: str | None = None,
    text_name: str = "text",
    settings: Settings | None = None,
    out: str | Path | None = None,
    sample: int | None = None,
    seed: int = 0,
    workers: int = 1,
    engine: str = "local",
    gpu: str = "H100",
    tokens: int = TOKENS,
    batch: int = BATCH,
    compiled: bool = True,
    backend: Backend | None = None,
    device: str | None = None,
    say: Say = lambda _: None,
) -> Sweep:
    """What the model loses through every member of a grid, bits, and predicted time; `.front()` is what none dominates.

    grid      a kvdsl.sweeping.Grid, its table ({"base": "kivi2", "axes": {"bits": [2, 4]}}), a TOML file, or schemes
    settings  of the evaluation, perplexity among its tasks; default three windows
    out       an SQLite file, see kvdsl.sweeping.file; rows are kept beside it in `<out>.rows` as they come, and a sweep
              that was stopped goes on from there
    sample    measures so many combinations, drawn at random with `seed`, in place of all
    workers   processes; engine "ray" takes a cluster's machines, see codegen/sweep_engines.py
    gpu, tokens, batch   of the predicted time, a step of decoding behind so many tokens
    compiled  predicts from machine code, some seconds a member; without, from bytes alone
    model, text, backend, device   as for kvdsl.evaluate

    What is no scheme, or does not fit the model, is left out and told why.  Raises ValueError for a grid, a file or a
    text that cannot be used, SchemeError for a value of a grid that cannot be read, ModelError, MissingExtra.
    """
    asked = settings or usual()
    if "perplexity" not in asked.tasks:
        raise ValueError("tasks: a sweep compares divergence; have perplexity among them")
    refuse_engine(engine, workers, model)
    on = card(gpu)
    members, left = grid_of(grid).members(sample, seed)
    run = Measuring(model, text, text_name, backend, device, workers, engine, say)
    about = {**run.about(asked), "gpu": on.name, "tokens": tokens, "batch": batch}
    with kept_in(out) as (path, rows):
        file = SweepFile(path, about)
        file.leave_out(left)
        known = {one.scheme.hash for one in file.read().members}
        missing = [(i, one) for i, one in enumerate(members) if one.scheme.hash not in known]
        run.ahead([one for _, one in missing], asked, rows)
        for begin in range(0, len(missing), TOGETHER):
            some = missing[begin : begin + TOGETHER]
            say(f"members {begin + 1} to {begin + len(some)} of {len(missing)}")
            found = run([one for _, one in some], asked, rows)
            for place, one in some:
                result = found[one.name]
                if isinstance(result, LeftOut):
                    file.leave_out([result])
                else:
                    file.add(place, result)
        shape = run.shape.deployed
        bare = [each.scheme for each in file.read().members if each.figures.get("microseconds") is None]
        shares = compiled_shares(bare, shape, run.layers, on, say) if compiled else {}
        for scheme in bare:
            options: dict[str, Any] = {"tokens": tokens, "batch": batch, "gpu": on, "compiled": shares}
            file.say(scheme.hash, predicted_time(scheme, shape, run.layers, **options))
        return _named(file.read(), members, left, None if out is None else path)


def _named(found: Sweep, members: Sequence[Member], left: Sequence[LeftOut], path: Path | None) -> Sweep:
    """Of a file that may hold more what was asked, under the names that it was asked by."""
    by_hash = {one.scheme.hash: one for one in found.members}
    mine = [(one, by_hash[one.scheme.hash]) for one in members if one.scheme.hash in by_hash]
    shown = tuple(replace(known, name=one.name, axes=one.axes) for one, known in mine)
    names = {one.name for one in members} | {one.name for one in left}
    return Sweep(found.about, shown, tuple(one for one in found.left_out if one.name in names), path)


@contextmanager
def kept_in(out: str | Path | None) -> Iterator[tuple[Path, Path]]:
    """The file and the folder of rows beside it: passing ones where none is named."""
    if out is not None:
        yield Path(out), Path(f"{out}.rows")
        return
    with tempfile.TemporaryDirectory(prefix="kvdsl-sweep-") as name:
        yield Path(name) / "sweep.sqlite", Path(name) / "rows"


class Measuring:
    """A model and a text, opened once, on which schemes are measured."""

    def __init__(
        self,
        model: str | Path | Loaded,
        text: str | None,
        text_name: str,
        backend: Backend | None,
        device: str | None,
        workers: int,
        engine: str,
        say: Say,
    ) -> None:
        from kvdsl.evaluation.storage import shape_of
        from kvdsl.generation import called, digest_of, opened

        if text is None:
            from kvdsl.models.text import botchan

            text, text_name = botchan(), "botchan"
        say("loading the model")
        self.model, self.text, self.text_name = model, text, text_name
        self.backend, self.device, self.workers, self.engine, self.say = backend, device, workers, engine, say
        self.loaded = opened(model, device)
        network = self.loaded[0]
        self.name, self.digest, self.shape = called(model, network), digest_of(network), shape_of(network)
        self.layers: int = network.config.get_text_config(decoder=True).num_hidden_layers

    def about(self, settings: Settings) -> dict[str, Any]:
        """Of what figures are."""
        from kvdsl.evaluation.run import versions

        shape = self.shape
        heads = {"head_dim": shape.head_dim, "kv_heads": shape.kv_heads, "q_heads": shape.q_heads}
        return {
            "model": self.name, "digest": self.digest, "text": self.text_name,
            "sha256": hashlib.sha256(self.text.encode()).hexdigest(), "settings": settings.to_dict(), "shape": heads,
            "layers": self.layers, "backend": self.backend, "versions": versions(),
        }  # fmt: skip

    def ahead(self, members: Sequence[Member], settings: Settings, rows: Path) -> None:
        """Have other processes measure, where some were asked for."""
        if self.workers > 1 or self.engine != "local":
            schemes = {one.name: one.scheme for one in members}
            told = job(schemes, str(self.model), self.text, settings.to_dict(), self.backend, self.device)
            measured_by(self.engine, self.workers, told, rows, self.say)

    def __call__(
        self, members: Sequence[Member], settings: Settings, rows: Path | None
    ) -> dict[str, Figured | LeftOut]:
        """Figures of every member by its name, or why there are none; rows that are known are taken as they are."""
        from kvdsl.evaluation.run import evaluate

        schemes = {one.name: one.scheme for one in members}
        options: dict[str, Any] = {"settings": settings, "backend": self.backend, "out": rows, "say": self.say}
        found: Evaluation = evaluate(
            schemes, self.loaded, text=self.text, text_name=self.text_name, leave_out=True, **options
        )
        return {
            one.name: LeftOut(one.name, result.refused)
            if result.refused is not None
            else Figured.of(one, result, self.shape)
            for one, result in zip(members, found.results, strict=True)
        }
