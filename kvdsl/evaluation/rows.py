"""What is measured already: a row for each unit and scheme, kept in a file of JSON lines as it comes.

A row's key is a digest of all that it depends on, so a file may hold rows of several runs, and a run takes from it what
is its own.
"""

from __future__ import annotations

import hashlib
import json
import os
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
        self._before = ""
        if path is not None and path.is_file():
            told = path.read_text(encoding="utf-8", errors="replace")
            self._before = "" if told.endswith("\n") or not told else "\n"  # behind a line that is half written
            for line in told.splitlines():
                self._read(line)

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
        """Keep a row; it is in the file when this returns.  `about` says in the file what it is of.

        One line is one write at the end of the file, so processes may share it.
        """
        self.known[name] = row
        if self.path is None:
            return
        line = json.dumps({"key": name, **about, "row": row}) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(file, (self._before + line).encode())
        finally:
            os.close(file)
        self._before = ""
