"""Text to measure on, free to use: a novel, and code that comes with Python."""

from __future__ import annotations

import inspect

from .fetch import Parcel, fetch

BOTCHAN = Parcel(
    requirement="sentencepiece==0.2.3",
    archive="sentencepiece-0.2.3.tar.gz",
    member="sentencepiece-0.2.3/test/botchan.txt",
    sha256="464bd5300c24fce16fcc4555d4231a57632caae4d0090ad6aa92854a3b227ba7",
    source=True,
)


def botchan() -> str:
    """Natsume Soseki, Botchan, English translation of 1919 (public domain), from chapter I on: 248,443 characters.

    Lines as they are.  Downloaded the first time; raises ModelError.
    """
    raw = fetch(BOTCHAN).read_text(encoding="utf-8-sig").replace("\r\n", "\n")
    body = raw[raw.index("CHAPTER I\n") :]
    return body[: body.index("*** END OF TH")]


def code() -> str:
    """The source of eight modules of Python's library; it changes with Python's version, so print its sha256 too."""
    import argparse
    import ast
    import asyncio.base_events
    import fractions
    import shutil
    import statistics
    import tarfile
    import zipfile

    modules = (argparse, asyncio.base_events, statistics, tarfile, zipfile, fractions, ast, shutil)
    return "\n\n".join(inspect.getsource(module) for module in modules)
