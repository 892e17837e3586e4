"""What is measured already: a row for each unit and scheme, kept in a file of JSON lines as it comes.

A row's key is a digest of all that it depends on, so a file may hold rows of several runs, and a run takes from it what
is its own.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
VERSION = 1  # of what rows mean: with another number, those of older files are measured anew


def key(*parts: object) -> str:
    """A digest of plain values."""
    return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()[:20]


class Rows:
    """Rows by key, in memory and, with a path, in its file."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.known = path, dict[str, Row]()
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                self._read(line)
        self.old = frozenset(self.known)
        """Keys that the file held when it was opened."""

    def _read(self, line: str) -> None:
        """A line that a stopped process has left half written is no row."""
        try:
            told = json.loads(line)
        except json.JSONDecodeError:
            return
        if isinstance(told, dict) and isinstance(told.get("key"), str) and isinstance(told.get("row"), dict):
            self.known[told["key"]] = told["row"]

    def get(self, name: str) -> Row | None:
        """The row of a key, if there is one."""
        return self.known.get(name)

    def add(self, name: str, row: Row, **about: object) -> None:
        """Keep a row; it is in the file when this returns.  `about` says in the file what it is of."""
        self.known[name] = row
        if self.path is not None:
            with self.path.open("a+b") as file:
                if file.tell() and not _ended(file):
                    file.write(b"\n")
                file.write(json.dumps({"key": name, **about, "row": row}).encode() + b"\n")


def _ended(file: Any) -> bool:
    file.seek(-1, 2)
    return bool(file.read(1) == b"\n")
