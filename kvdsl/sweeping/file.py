"""A sweep in one SQLite file: written as members come, read back by `kvdsl recommend --from` and by anything else.

about     name, value        of what it is, values as JSON
members   place, hash, name, spec, axes      spec as TOML, axes as JSON
measures  hash, measure, value               a row a member and measure, see results.MEASURES
windows   hash, start, kl                    divergence of each window of the text
left_out  name, why
figures   name, hash, measure, value         the same as measures, with names: a view
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from kvdsl.scheme import Scheme

from .grid import LeftOut
from .results import Figured, Sweep

_TABLES = """
create table if not exists about (name text primary key, value text not null);
create table if not exists members (
    hash text primary key, place integer not null, name text not null, spec text not null, axes text not null);
create table if not exists measures (
    hash text not null, measure text not null, value real, primary key (hash, measure));
create table if not exists windows (
    hash text not null, start integer not null, kl real, primary key (hash, start));
create table if not exists left_out (name text primary key, why text not null);
create view if not exists figures as
    select name, hash, measure, value from measures join members using (hash) order by place;
"""
ASKED = ("model", "digest", "text", "sha256", "settings", "shape", "layers", "backend", "versions")
"""What a file is of: figures under another one do not stand beside them."""
PREDICTED = ("gpu", "tokens", "batch")
"""What predictions in it are of: under another one they are made anew."""


class SweepFile:
    """A file that is there or is begun.  ValueError for one that no sweep wrote, or another one did; `option` is what
    named it."""

    def __init__(self, path: Path, about: Mapping[str, Any] | None = None, option: str = "out") -> None:
        self.path, self.option = path, option
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{option}: there is no folder {path.absolute().parent}; make it, or write elsewhere")
        if about is None and not path.is_file():
            raise ValueError(f"from: {path} is no file; give one that `kvdsl sweep --out` wrote")
        try:
            self._refuse_foreign()
            if about is not None:
                self._begin(about)
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path}: it is no file of a sweep ({error}); give another") from None

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path)) as file, file:
            yield file

    def _refuse_foreign(self) -> None:
        if not self.path.exists():
            return
        with self._open() as file:
            tables = {name for (name,) in file.execute("select name from sqlite_master where type = 'table'")}
        if tables and not {"about", "members", "measures"} <= tables:
            raise ValueError(f"{self.path}: it is no file of a sweep; give another")

    def _begin(self, about: Mapping[str, Any]) -> None:
        with self._open() as file:
            file.executescript(_TABLES)
        known = self.about()
        plain = json.loads(json.dumps(dict(about)))
        for name in ASKED if known else ():
            if known.get(name) != plain.get(name):
                before, now = _apart(known.get(name), plain.get(name))
                raise ValueError(
                    f"{self.option}: {self.path} is of another sweep, its {name} {before} and not {now}; ask the same "
                    "again, or give another file"
                )
        with self._open() as file:
            if known and any(known.get(name) != plain.get(name) for name in PREDICTED):
                file.execute("delete from measures where measure in ('share', 'microseconds')")
            rows = [(name, json.dumps(value)) for name, value in plain.items()]
            file.executemany("insert or replace into about values (?, ?)", rows)

    def about(self) -> dict[str, Any]:
        """Of what it is; empty where it has just been begun."""
        with self._open() as file:
            return {name: json.loads(value) for name, value in file.execute("select name, value from about")}

    def add(self, place: int, one: Figured) -> None:
        """Keep a member; it is in the file when this returns."""
        key, axes = one.scheme.hash, json.dumps(dict(one.axes))
        with self._open() as file:
            row = (key, place, one.name, one.scheme.to_toml(), axes)
            file.execute("insert or replace into members values (?, ?, ?, ?, ?)", row)
            file.executemany("insert or replace into measures values (?, ?, ?)", _rows(key, one.figures))
            file.executemany("insert or replace into windows values (?, ?, ?)", _rows(key, one.windows))
            file.execute("delete from left_out where name = ?", (one.name,))

    def say(self, key: str, figures: Mapping[str, float | None]) -> None:
        """More figures of a member that is there."""
        with self._open() as file:
            file.executemany("insert or replace into measures values (?, ?, ?)", _rows(key, figures))

    def leave_out(self, found: Sequence[LeftOut]) -> None:
        """Keep why members have no figures."""
        with self._open() as file:
            file.executemany("insert or replace into left_out values (?, ?)", [(one.name, one.why) for one in found])

    def read(self) -> Sweep:
        """All of it."""
        with self._open() as file:
            figures, windows = dict[str, dict[str, float | None]](), dict[str, dict[int, float]]()
            for key, measure, value in file.execute("select hash, measure, value from measures"):
                figures.setdefault(key, {})[measure] = value
            for key, start, kl in file.execute("select hash, start, kl from windows order by start"):
                windows.setdefault(key, {})[start] = kl
            rows = file.execute("select hash, name, spec, axes from members order by place, name").fetchall()
            left = tuple(LeftOut(*row) for row in file.execute("select name, why from left_out order by rowid"))
        members = tuple(
            Figured(name, Scheme.from_toml(spec), tuple(json.loads(axes).items()), figures[key], windows.get(key, {}))
            for key, name, spec, axes in rows
        )
        return Sweep(self.about(), members, left, self.path)


def _apart(before: Any, now: Any) -> tuple[Any, Any]:
    """Two values, of tables what differs."""
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return before, now
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return {name: before.get(name) for name in names}, {name: now.get(name) for name in names}


def _rows(key: str, told: Mapping[Any, float | None]) -> list[tuple[str, Any, float | None]]:
    return [(key, name, value) for name, value in told.items()]
