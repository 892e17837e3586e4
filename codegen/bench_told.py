"""What `kvdsl bench` found, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

FORMATS = {
    "bits": "{:.2f}",
    "us": "{:.1f}",
    "gbps": "{:.0f}",
    "share": "{:.0%}",
    "share_own": "{:.0%}",
    "predicted_share": "{:.0%}",
    "gbps_hot": "{:.0f}",
    "slots": "{:.1f}",
    "speedup_fp16": "{:.2f}",
    "speedup_unpack": "{:.1f}",
    "error": "{:.0e}",
}
SCHEME = {
    "bits": "bits", "us": "us", "gbps": "GB/s", "share": "of the limit", "share_own": "of that at its bytes",
    "predicted_share": "predicted", "gbps_hot": "GB/s, hot", "speedup_fp16": "over fp16",
    "speedup_unpack": "over unpack + fp16", "error": "error",
}  # fmt: skip
PEER = {
    name: title for name, title in SCHEME.items() if name in ("bits", "us", "gbps", "share", "speedup_fp16", "error")
}
ONLY_GPU = ("us", "gbps", "share", "share_own", "predicted_share", "gbps_hot")


def told(found: Mapping[str, Any]) -> list[Table]:
    """On a CPU what is predicted, a row a scheme; then a row a scheme and shape; then a row a peer and shape."""
    limit, note = found["read_limit_gbps"], found["note"]
    title = note or f"{found['device']}, read limit {limit:.0f} GB/s, {_conditions(found)}"
    tables = [] if note is None or not found["predicted"] else [_predicted(found["predicted"])]
    tables.append(_table(title, "scheme", SCHEME, found["results"], note is None))
    if found["peers"]:
        tables.append(_table("other systems, one query a sequence", "peer", PEER, found["peers"], note is None))
    return tables


def _conditions(found: Mapping[str, Any]) -> str:
    clock = "" if found["sm_mhz"] is None else f" at {found['sm_mhz']} MHz"
    return f"{found['us_launch']:.1f} us for a launch{clock}"


def _table(title: str, kind: str, columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]], gpu: bool) -> Table:
    from rich.table import Table

    shown = {name: text for name, text in columns.items() if gpu or name not in ONLY_GPU}
    table = Table(kind, "shape", *shown.values(), title=title)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        table.add_row(row[kind], row["shape"], *cells(row, list(shown)))
    return _noted(table, kind, rows)


def _noted(table: Table, kind: str, rows: Iterable[Mapping[str, Any]]) -> Table:
    """Why rows are empty, beneath: sentences are longer than cells."""
    whose = dict[str, dict[str, None]]()
    for row in rows:
        if absent(row):
            whose.setdefault(row.get("missing") or f"failed: {row['failed']}", {})[row[kind]] = None
    table.caption = "\n".join(f"{', '.join(names)}: {why}" for why, names in whose.items()) or None
    table.caption_justify = "left"
    return table


def absent(row: Mapping[str, Any]) -> bool:
    """Whether nothing was measured."""
    return "failed" in row or "missing" in row


def cells(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """A row's figures."""
    if absent(row):
        text = "failed" if "failed" in row else row["missing"].partition(":")[0]
        return [text, *[""] * (len(names) - 1)]
    return ["" if row.get(name) is None else FORMATS[name].format(row[name]) for name in names]


def _predicted(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row a scheme, a column a GPU: slots and share."""
    from rich.table import Table

    gpus = list(dict.fromkeys(row["gpu"] for row in rows if "gpu" in row))
    title = "predicted from machine code, no GPU: instructions for 128 packed bytes, and the share of the read limit"
    table = Table("scheme", *gpus, title=title)
    for name in dict.fromkeys(row["scheme"] for row in rows):
        own = {row.get("gpu"): row for row in rows if row["scheme"] == name}
        table.add_row(name, *(_foretold(own.get(gpu)) for gpu in gpus))
    return _noted(table, "scheme", rows)


def _foretold(row: Mapping[str, Any] | None) -> str:
    return "" if row is None or row["share"] is None else f"{row['slots']:.1f}, {row['share']:.0%}"
