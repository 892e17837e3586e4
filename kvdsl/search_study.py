"""The search itself: an Optuna study of two objectives, bits and loss, that can be stopped and gone on with.

Every trial is drawn by a sampler of its own, seeded with the search's seed and the number of finished trials, from the
finished trials alone.  So a search that was stopped, and one that was not, come to the same.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from .extras import need
from .search_pairs import Cluster, Figures, Pair
from .search_start import Map

NAME = "kvdsl"
POPULATION = 12
Measure = Callable[[Map], tuple[float, float]]
"""From a map to bits and loss."""


@dataclass(frozen=True)
class Trial:
    """A map that was tried: a pair for each cluster, what it takes and what it costs."""

    pairs: tuple[Pair, ...]
    bits: float
    loss: float


def opened(path: Path | None, asked: Mapping[str, Any]) -> Any:
    """The study in a file, or a new one there, or one in memory.

    `asked` holds whatever decides where a search goes.  ValueError for a file that holds something else, or a study
    that was asked another thing.
    """
    optuna = need("optuna", "search")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if path is not None:
        _refuse_foreign(path)
    storage = None if path is None else f"sqlite:///{path.absolute()}"
    study = optuna.create_study(
        storage=storage, study_name=NAME, directions=["minimize", "minimize"], load_if_exists=True
    )
    before = study.user_attrs.get("asked")
    if before is None:
        study.set_user_attr("asked", dict(asked))
    for key, value in asked.items():
        if before is not None and before.get(key) != value:
            raise ValueError(
                f"study: {path} is of a search with another {key}, {before.get(key)} and not {value}; "
                "ask the same again, or give another file"
            )
    return study


def errors_of(study: Any, made: Callable[[], Sequence[Figures]]) -> list[dict[Pair, float]]:
    """The errors of every layer at every pair: those that the study was begun with, else `made()`."""
    kept = study.user_attrs.get("errors")
    if kept is None:
        kept = [[[*pair, error] for pair, error in layer.items()] for layer in made()]
        study.set_user_attr("errors", kept)
    return [{(keys, values): error for keys, values, error in layer} for layer in kept]


def run(
    study: Any,
    offered: Sequence[Cluster],
    starts: Callable[[Sequence[Trial]], Sequence[Map]],
    measure: Measure,
    *,
    budget: float,
    trials: int,
    seed: int,
    say: Callable[[int, int], None],
) -> list[Trial]:
    """All finished trials once there are `trials`: first those of `starts`, which may name more when some have come in;
    then what NSGA-II breeds from the best of them within the budget.

    A map that comes again is not measured again.
    """
    optuna = need("optuna", "search")
    names = [f"layers {' '.join(map(str, cluster.layers))}" for cluster in offered]
    state = optuna.trial.TrialState
    for lost in study.get_trials(deepcopy=False, states=(state.RUNNING,)):  # the process was ended in the middle of it
        study.tell(lost.number, state=state.FAIL)
    while len(done := _finished(study, names)) < trials:
        say(len(done), trials)
        begun = starts(done)
        start = dict(zip(names, map(_told, begun[len(done)]), strict=True)) if len(done) < len(begun) else {}
        study.sampler = _sampler(optuna, Random(f"{seed} {len(done)}").getrandbits(32), start)
        trial = study.ask()
        taken = [
            trial.suggest_categorical(name, [*map(_told, cluster.pairs)])
            for name, cluster in zip(names, offered, strict=True)
        ]
        pairs = tuple(map(_read, taken))
        known = next(((t.bits, t.loss) for t in done if t.pairs == pairs), None)
        bits, loss = measure(pairs) if known is None else known
        trial.set_constraint("bits", bits - budget)
        study.tell(trial, [bits, loss])
    return done


def _finished(study: Any, names: Sequence[str]) -> list[Trial]:
    optuna = need("optuna", "search")
    found = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    return [Trial(tuple(_read(trial.params[name]) for name in names), *trial.values) for trial in found]


def _sampler(optuna: Any, seed: int, start: Mapping[str, str]) -> Any:
    """NSGA-II, for one trial: it takes `start` where there is one.  (Of an enqueued trial no sampler is asked, and it
    would have no part in any generation.)"""

    class Sampler(optuna.samplers.NSGAIISampler):  # type: ignore[misc]
        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            bred = super().sample_relative(study, trial, search_space)
            return {} if start else bred

        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            return start[name] if start else super().sample_independent(study, trial, name, distribution)

    return Sampler(population_size=POPULATION, seed=seed)


def _told(pair: Pair) -> str:
    return f"{pair[0]} {pair[1]}"


def _read(text: str) -> Pair:
    keys, values = text.split()
    return int(keys), int(values)


def _refuse_foreign(path: Path) -> None:
    """ValueError for a file that no search wrote, and where none can be."""
    if not path.absolute().parent.is_dir():
        raise ValueError(f"study: there is no folder {path.absolute().parent}; make it, or give another file")
    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(path)) as file:
            tables = {name for (name,) in file.execute("select name from sqlite_master where type = 'table'")}
    except sqlite3.Error:
        tables = {"?"}
    if tables and "studies" not in tables:
        raise ValueError(f"study: {path} holds no study; give a new file, or one that a search wrote")
