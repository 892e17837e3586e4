"""A spec as text: what a user would have written (repr), one tree for dict, JSON and TOML, and the hash of its meaning.

The tree holds non-default fields only, and `part` names the type of each part.  Reading it back never evaluates
anything; what it cannot read it names, with the closest thing it knows.
"""

from __future__ import annotations

import dataclasses as dc
import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from .errors import Fault, SchemeError
from .part import ALL, Part
from .saying import closest, listed, said
from .scheme import PARTS, Block, Scale, Scheme
from .tiers import ROUTERS

LANGUAGE = 1  # enters every hash: raise it when a default or a meaning changes
LONGEST_TEXT = 1 << 20  # characters
DEEPEST = 12

_WHERE = {"keys": "Store", "values": "Store", "both": "Store", "residual": "Store", "scale": "Scale"}
_WHERE |= {"outliers": "TopChannels Sparse", "store": "Store", "queries": "Store"}
_WHERE |= {"code": "Uniform Float Codebook Vectors Additive Sketch Bands LowRank Shared", "stores": "Store"}
_WHERE |= {"transform": "PreRope Rotate Eigenbasis ChannelScale ChannelShift Permute Polar Balance"}
_WHERE |= {"block": "Block", "line": "Block", "sinks": "Sinks", "recent": "Recent", "scheme": "Scheme"}
_WHERE |= {"tiers": "Tier", "probes": "Probes", "feedback": "Feedback"}
_TYPES = {field: tuple(names.split()) for field, names in _WHERE.items()}
_COUNTS = ("tokens", "per", "channels", "heads", "size", "dim")
_LISTS = ("transform", "levels", "clip", "stores", "tiers", "channels", "size")
TABLES = ("layers", "heads")
_SHOWN = {"code", "format"}  # worth reading even where they are the default


# repr


def spelled(part: Part) -> str:
    """What a user would have written: defaults left out, spellings of a scale, `both=`; eval gives the part back."""
    name, shown = type(part).__name__, list[str]()
    fields = {field.name: field for field in dc.fields(part)}  # type: ignore[arg-type]
    if isinstance(part, Scale) and isinstance(part.block, Block):
        name, block = _scale(part.block)
        shown += block
        del fields["block"]
    if isinstance(part, Scheme) and part.keys == part.values and fields.pop("keys") and fields.pop("values"):
        shown.append(f"both={part.keys!r}")
    for position, (field, about) in enumerate(fields.items()):
        value = getattr(part, field)
        if _plain_default(value, about.default) and field not in _SHOWN:
            continue
        text = _layers(value) if isinstance(part, Scheme) and field in TABLES else repr(value)
        shown.append(
            text if position == 0 and not about.kw_only and not isinstance(part, Scheme) else f"{field}={text}"
        )
    return f"{name}({', '.join(shown)})"


def _scale(block: Block) -> tuple[str, list[str]]:
    tokens, channels, heads = block.tokens, block.channels, block.heads
    if tokens is ALL and channels is ALL and heads is ALL:
        return "per_tensor", []
    if type(tokens) is int and tokens == 1:
        told = [] if channels is ALL else [f"channels={channels!r}"]
        return "per_token", told + ([] if type(heads) is int and heads == 1 else [f"heads={heads!r}"])
    if type(channels) is int and channels == 1 and type(heads) is int and heads == 1:
        return "per_channel", [] if tokens is ALL else [f"tokens={tokens!r}"]
    return "Scale", [repr(block)]


def _layers(table: Any) -> str:
    if not isinstance(table, tuple) or not all(isinstance(row, tuple) and len(row) == 2 for row in table):
        return repr(table)
    return "{" + ", ".join(f"{_key(key)}: {scheme!r}" for key, scheme in table) + "}"


def _key(key: Any) -> str:
    if len(key) == 1:
        return repr(key[0])
    if len(key) > 2 and all(type(i) is int for i in key) and key == tuple(range(key[0], key[-1] + 1)):
        return repr(range(key[0], key[-1] + 1))
    return repr(key)


def _plain_default(value: Any, default: Any) -> bool:
    """Whether a field can be left out.  Types count (1 is not True), and odd values (arrays) are never compared."""
    if value is default or (isinstance(value, Part) and value == default):
        return True
    plain = (int, float, str, tuple)
    return type(value) in plain and type(default) in plain and value == default


# the tree


def to_dict(part: Part) -> dict[str, Any]:
    """The part as dicts, lists, strings and numbers: `part`, and the fields that differ from their default."""
    tree: dict[str, Any] = {"part": type(part).__name__}
    fields = {field.name: field.default for field in dc.fields(part)}  # type: ignore[arg-type]
    if isinstance(part, Scheme) and part.keys == part.values and fields.keys() >= {"keys", "values"}:
        del fields["keys"], fields["values"]
        tree["both"] = to_dict(part.keys)
    for field, default in fields.items():
        value = getattr(part, field)
        if isinstance(part, Scheme) and field in TABLES:
            value = [{"indices": list(key), "scheme": to_dict(scheme)} for key, scheme in value]
            if value:
                tree[field] = value
        elif not _plain_default(value, default):
            tree[field] = _plain(value)
    return tree


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return to_dict(value) if isinstance(value, Part) else "ALL" if value is ALL else value


def from_dict(tree: Mapping[str, Any]) -> Scheme:
    """The scheme of a tree.  Raises SchemeError naming every unknown key and part, and every fault."""
    found = list[Fault]()
    scheme = None
    try:
        scheme = _read(tree, "", ("Scheme",), found, 0)
    except SchemeError as error:
        unread = {fault.place.removesuffix(".part").replace("both", "keys", 1) for fault in found}
        found += [fault for fault in error.faults if not any(fault.place.startswith(place) for place in unread)]
    if found:
        raise SchemeError(tuple(found))
    if not isinstance(scheme, Scheme):
        raise SchemeError(
            (Fault("spec", f"{said(tree)} is a {type(tree).__name__}, not a table", "write both = {...}"),)
        )
    return scheme


def part_of(tree: Mapping[str, Any], place: str) -> Part:
    """The part that a tree describes, where it stands at this place of a spec.  Raises SchemeError as `from_dict`."""
    found = list[Fault]()
    part = _read(tree, place, _types(place.rpartition(".")[2]), found, 0)
    if found or not isinstance(part, Part):
        raise SchemeError(tuple(found) or (Fault(place, f"{said(tree)} is no part", "write one, with its `part`"),))
    return part


def _read(tree: Any, path: str, types: tuple[str, ...], found: list[Fault], depth: int) -> Any:
    """The part that a tree describes; anything else as it is, for the rules to judge."""
    if not isinstance(tree, Mapping):
        return tree
    place = path or "spec"
    if depth > DEEPEST:
        found.append(Fault(place, f"nested deeper than {DEEPEST} parts", "flatten it"))
        return None
    name = tree.get("part", types[0] if len(types) == 1 else None)
    if not isinstance(name, str) or name not in types:
        fact = "no part says what this is" if name is None else f"{said(name)} is no part that can stand here"
        near = closest(name, types)
        found.append(Fault(f"{path}.part".lstrip("."), fact, f"use {near or listed(types)}"))
        return None
    kind = PARTS.get(name) or ROUTERS[name]
    known = [f.name for f in dc.fields(kind)] + ["both"] * (kind is Scheme)  # type: ignore[arg-type]
    fields = dict[str, Any]()
    for key, value in tree.items():
        here = f"{path}.{said(key)[1:-1] if isinstance(key, str) else said(key)}".lstrip(".")
        if key == "part":
            continue
        if key not in known:
            near = closest(key, known)
            found.append(Fault(here, f"{name} has no such field", f"use {near}" if near else f"use {listed(known)}"))
        elif kind is Scheme and key in TABLES:
            fields[key] = tuple(_rows(key, value, found, depth))
        else:
            whole = isinstance(value, str) and value == "ALL" and key in _COUNTS
            many = isinstance(value, (list, tuple)) and key in _LISTS
            if many:
                items = enumerate(value)
                fields[key] = tuple(_read(v, f"{here}[{i}]", _types(key), found, depth + 1) for i, v in items)
            else:
                fields[key] = ALL if whole else _read(value, here, _types(key), found, depth + 1)
    if name == "Recent" or name == "Sinks":
        fields.setdefault("tokens", None)
    if kind is Scheme and found:
        fields = {key: value for key, value in fields.items() if value is not None}
    return kind(**fields)


def _types(field: str) -> tuple[str, ...]:
    """The parts that may stand in a field; routers may be a user's own, once their class is defined."""
    return tuple(ROUTERS) if field == "router" else _TYPES.get(field, ())


def _rows(field: str, rows: Any, found: list[Fault], depth: int) -> Iterator[tuple[Any, Any]]:
    if not isinstance(rows, (list, tuple)):
        found.append(Fault(field, f"{said(rows)} is no list", "write [{ indices = [0, 1], scheme = {...} }]"))
        return
    for position, row in enumerate(rows):
        place = f"{field}[{position}]"
        if not isinstance(row, Mapping) or set(row) != {"indices", "scheme"} or not isinstance(row["indices"], list):
            found.append(Fault(place, f"{said(row)} is no row", "write { indices = [0, 1], scheme = {...} }"))
            continue
        try:
            yield tuple(row["indices"]), _read(row["scheme"], f"{place}.scheme", ("Scheme",), found, depth + 1)
        except SchemeError as error:
            found += [Fault(f"{place}.{fault.place}", fault.fact, fault.mend) for fault in error.faults]


# JSON, TOML, hash


def to_json(scheme: Scheme) -> str:
    """The tree as JSON, indented by two."""
    return json.dumps(to_dict(scheme), indent=2) + "\n"


def from_json(text: str) -> Scheme:
    """Raises SchemeError for text that is no JSON, names a key twice, or is no spec."""
    return _parsed(text, "JSON", lambda: json.loads(text, object_pairs_hook=_once))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError(f"a key is given twice among {said(sorted(key for key, _ in pairs))}")
    return table


def to_toml(scheme: Scheme) -> str:
    """The tree as TOML, one line a field; `part` only where a field admits several."""
    return "".join(f"{key} = {_toml(value, key)}\n" for key, value in to_dict(scheme).items() if key != "part")


def _toml(value: Any, field: str) -> str:
    if isinstance(value, dict):
        skip = "part" if len(_types(field)) == 1 else ""
        inner = ", ".join(f"{key} = {_toml(inner, key)}" for key, inner in value.items() if key != skip)
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(item, field) for item in value)}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def from_toml(text: str) -> Scheme:
    """Raises SchemeError for text that is no TOML or no spec."""
    return _parsed(text, "TOML", lambda: tomllib.loads(text))


def _parsed(text: str, language: str, parse: Any) -> Scheme:
    if len(text) > LONGEST_TEXT:
        fact = f"{len(text)} characters are more than {LONGEST_TEXT}"
        raise SchemeError((Fault("spec", fact, "a spec is a page of text"),))
    try:
        tree = parse()
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise SchemeError((Fault("spec", f"this is no {language}: {reason}", f"write it as {language}"),)) from None
    return from_dict(tree)


def digest(scheme: Scheme) -> str:
    """Twelve hex digits of the canonical JSON of the meaning, after the language's version; sources do not enter."""
    text = json.dumps(["kvdsl", LANGUAGE, _meaning(to_dict(scheme))], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _meaning(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _meaning(value) for key, value in tree.items() if key != "source"}
    return [_meaning(item) for item in tree] if isinstance(tree, list) else tree
