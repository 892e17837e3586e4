"""From a name to a scheme: shipped, registered by a package, in a module, in a file, or written as TOML or JSON."""

from __future__ import annotations

import importlib
import runpy
import warnings
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from .errors import Fault, SchemeError
from .saying import closest, listed, said
from .scheme import Scheme

GROUP = "kvdsl.schemes"
FORMS = 'a name from kvdsl.names(), "package.module:NAME", "file.py:NAME", or a .toml or .json file'


def load(name: str | Path | Scheme) -> Scheme:
    """The scheme of a name.

    Takes a shipped or registered name, "package.module:NAME", "path/to/file.py:NAME" (the file is run; ":NAME" can go
    where it holds one scheme), a path to a .toml or .json spec, or a Scheme, which comes back as it is.  Raises
    SchemeError for a name, a module, a file or a value that is none of these, naming the closest that is.
    """
    if isinstance(name, Scheme):
        return name
    text = str(name) if isinstance(name, (str, Path)) else ""
    if not text or "\0" in text:
        raise _refusal(name, "is no name of a scheme", f"use {FORMS}")
    if text in _shipped():
        return _shipped()[text]
    if text in (found := _registered()) and (scheme := _entered(found[text])) is not None:
        return scheme
    place, _, inner = text.rpartition(":") if _has_inner(text) else (text, "", "")
    if place.endswith(".py"):
        return _pick(_run(place), inner, text)
    if place.endswith((".toml", ".json")) and not inner:
        return _read(place)
    if inner:
        return _pick(_module(place, text), inner, text)
    raise _refusal(text, "is no scheme", _nearest(text, names()) or f"use {FORMS}")


def names() -> tuple[str, ...]:
    """Every shipped name, then every name registered under the entry-point group "kvdsl.schemes"."""
    return (*_shipped(), *sorted(_registered().keys() - _shipped().keys()))


def name_of(scheme: Scheme) -> str:
    """The shipped or registered name of a scheme of this meaning, else `scheme-` and its hash."""
    for name, shipped in _shipped().items():
        if shipped.hash == scheme.hash:
            return name
    for name, entry in sorted(_registered().items()):
        if (found := _entered(entry)) is not None and found.hash == scheme.hash:
            return name
    return f"scheme-{scheme.hash}"


def _shipped() -> Mapping[str, Scheme]:
    from .schemes import ALL

    return ALL


def _registered() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _entered(entry: EntryPoint) -> Scheme | None:
    """What a package registered; a broken one is warned about and passed over."""
    try:
        scheme = entry.load()
    except Exception as error:  # another package's import: anything can happen
        warnings.warn(f"the registered scheme {entry.name!r} ({entry.value}) does not load: {error!r}", stacklevel=3)
        return None
    if isinstance(scheme, Scheme):
        return scheme
    warnings.warn(f"the registered scheme {entry.name!r} ({entry.value}) is {said(scheme)}, no Scheme", stacklevel=3)
    return None


def _refusal(name: object, fact: str, mend: str) -> SchemeError:
    return SchemeError((Fault("name", f"{said(name)} {fact}", mend),))


def _nearest(name: str, known: tuple[str, ...]) -> str:
    near = closest(name, known)
    return f"use {near}" if near else ""


def _has_inner(text: str) -> bool:
    """Whether a colon separates a name from its module or file (and not a drive letter from its path)."""
    return ":" in text and text.rpartition(":")[2].isidentifier()


def _pick(found: Mapping[str, object], inner: str, text: str) -> Scheme:
    schemes = {name: value for name, value in found.items() if isinstance(value, Scheme) and not name.startswith("__")}
    if not inner:
        if len(schemes) == 1:
            return next(iter(schemes.values()))
        held = f"holds {len(schemes)} schemes" if schemes else "holds no scheme"
        mend = (
            f"put :NAME behind it, where NAME is {listed(list(schemes))}"
            if schemes
            else "define one, as mine = Scheme(...)"
        )
        raise _refusal(text, held, mend)
    if inner in schemes:
        return schemes[inner]
    if inner in found:
        raise _refusal(text, f"is {said(found[inner])}, no Scheme", _nearest(inner, (*schemes,)) or "name a Scheme")
    raise _refusal(text, f"names nothing: there is no {inner}", _nearest(inner, (*schemes,)) or "name a Scheme in it")


def _run(path: str) -> Mapping[str, object]:
    """The names that a file of the user's own defines.  What it raises, it raises here too."""
    _exists(path)
    return runpy.run_path(path)


def _module(module: str, text: str) -> Mapping[str, object]:
    try:
        return vars(importlib.import_module(module))
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and misses another
        raise _refusal(text, f"names no module: there is no {error.name}", f"use {FORMS}") from None
    except (TypeError, ValueError):  # "..module" and the like
        raise _refusal(text, "names no module", f"use {FORMS}") from None


def _read(path: str) -> Scheme:
    _exists(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise _refusal(path, "is no text in UTF-8", "write it as TOML or JSON") from None
    return Scheme.from_toml(text) if path.endswith(".toml") else Scheme.from_json(text)


def _exists(path: str) -> None:
    if not Path(path).is_file():
        beside = sorted(str(file) for file in Path(path).parent.glob(f"*{Path(path).suffix}"))[:100]
        raise _refusal(path, "is no file", _nearest(path, (*beside,)) or "give a path that exists")
