"""What runs on this machine and what does not, and why: `kvdsl doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from kvdsl.errors import BackendError
from kvdsl.kernels import Backend

from . import choose_backend, schedules, store

PACKAGES = (
    "kvdsl",
    "torch",
    "triton",
    "transformers",
    "sympy",
    "numpy",
    "safetensors",
    "hypothesis",
    "gguf",
    "tokenizers",
    "matplotlib",
)


def report() -> dict[str, Any]:
    """versions, gpu, folders, paths (each live or not, and why)."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "gpu": _gpu(),
        "folders": _folders(),
        "schedules": _schedules(),
        "paths": [
            _backend("torch"),
            _backend("triton"),
            _aot(),
            _extra("transformers", "hf"),
            _extra("hypothesis", "check"),
            _extra("matplotlib", "plot"),
        ],
        "default": choose_backend(None)[1],
    }


def told(found: dict[str, Any]) -> list[str]:
    """The report for people."""
    lines = [f"python {found['python']} on {found['platform']}"]
    lines += [f"{name:14s}{version or 'not installed'}" for name, version in found["versions"].items()]
    gpu = found["gpu"]
    lines += ["", f"gpu: {gpu['name']}, {gpu['arch']}" if gpu else "gpu: none that torch can use", ""]
    for folder in found["folders"]:
        state = folder["fault"] or ("in use" if folder["exists"] else "made when it is needed")
        lines.append(f"{folder['what']:22s}{folder['path']} ({state})")
    lines.append("")
    for path in found["paths"]:
        lines.append(f"{path['path']:22s}{'live' if path['live'] else 'not live'}: {path['why']}")
    lines += [f"{'schedules of decode':22s}{found['schedules']}"]
    lines += ["", f"what runs by default: {found['default']}"]
    return lines


def versions() -> dict[str, str | None]:
    """Package -> version, None where it is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "a checkout, not installed" if name == "kvdsl" else None


def _gpu() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return {"name": torch.cuda.get_device_name(), "arch": f"sm_{major}{minor}", "count": torch.cuda.device_count()}


def _folders() -> list[dict[str, Any]]:
    from kvdsl.models.fetch import cache_folder

    triton = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    rows = (
        ("generated code", store.folder()),
        ("tuned schedules", schedules.folder()),
        ("models and texts", cache_folder()),
        ("Triton's binaries", triton),
    )
    return [_folder(what, path) for what, path in rows]


def _schedules() -> str:
    """Where the schedules of decode come from."""
    card = schedules.this_card()
    if card is None:
        return "kvdsl tune finds them on a GPU; there is none that kernels are compiled for"
    kept = schedules.count(card)
    return f"{kept} tuned on {card}, else the model's" if kept else f"the model's; none is tuned on {card}"


def _folder(what: str, path: Path) -> dict[str, Any]:
    """A folder and what speaks against it; nothing is made."""
    fault = store.usable(path) if path.exists() else None
    if what == "Triton's binaries" and fault:
        fault += "; Triton loads what lies there unchecked, set TRITON_CACHE_DIR to a private folder"
    return {"what": what, "path": str(path), "exists": path.exists(), "fault": fault}


def _backend(name: Backend) -> dict[str, Any]:
    try:
        chosen, why = choose_backend(name)
    except BackendError as error:
        return {"path": f"backend {name}", "live": False, "why": str(error).removeprefix("backend: ")}
    return {"path": f"backend {chosen}", "live": True, "why": why}


def _aot() -> dict[str, Any]:
    live = _version("triton") is not None
    why = "kernels compile without a GPU" if live else "triton is not installed; pip install triton (Linux only)"
    return {"path": "kvdsl compile", "live": live, "why": why}


def _extra(package: str, extra: str) -> dict[str, Any]:
    live = _version(package) is not None
    command, what = {
        "hf": ("kvdsl generate", "models generate through a packed cache"),
        "check": ("kvdsl check", "the laws can be run"),
        "plot": ("kvdsl bench --plot", "bits and speed can be drawn"),
    }[extra]
    why = what if live else f"{package} is not installed; pip install 'kvdsl[{extra}]'"
    return {"path": command, "live": live, "why": why}
