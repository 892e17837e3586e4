"""A scheme is found by name, in a module, in a file; what is not found is named with its closest."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from kvdsl import registry
from kvdsl.errors import SchemeError
from kvdsl.registry import load, name_of, names
from kvdsl.schemes import ALL as SHIPPED
from kvdsl.schemes import fp16, kivi2, kivi4

FILE = "from kvdsl.schemes import kivi2\nmine = kivi2.with_(bits=3)\ndel kivi2\n"


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {
        "theirs": EntryPoint("theirs", "kvdsl.schemes.kivi:kivi4", registry.GROUP),
        "broken": EntryPoint("broken", "no_such_package:x", registry.GROUP),
        "odd": EntryPoint("odd", "json:dumps", registry.GROUP),
    }
    monkeypatch.setattr(registry, "_registered", lambda: entries)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_name_loads_and_is_found_again(name: str) -> None:
    assert load(name) is SHIPPED[name]
    assert name_of(SHIPPED[name]) == name and name in names()


def test_a_scheme_passes_through() -> None:
    assert load(kivi2) is kivi2


def test_a_module_holds_schemes() -> None:
    assert load("kvdsl.schemes.kivi:kivi4") == kivi4


def test_a_file_holds_schemes(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    assert load(f"{file}:mine") == load(file) == kivi2.with_(bits=3)
    file.write_text(FILE + "other = mine\n")
    with pytest.raises(SchemeError, match="holds 2 schemes; put :NAME behind it, where NAME is mine or other"):
        load(file)


@pytest.mark.parametrize("form", ["toml", "json"])
def test_a_spec_is_read_from_text(tmp_path: Path, form: str) -> None:
    file = tmp_path / f"mine.{form}"
    file.write_text(kivi2.to_toml() if form == "toml" else kivi2.to_json())
    assert load(file) == load(str(file)) == kivi2


def test_a_registered_scheme_loads_by_its_name(plugins: None) -> None:
    assert load("theirs") == kivi4
    assert names()[-3:] == ("broken", "odd", "theirs")


@pytest.mark.parametrize("name", ["broken", "odd"])
def test_a_broken_plugin_only_warns(plugins: None, name: str) -> None:
    with pytest.warns(UserWarning, match=f"the registered scheme '{name}'"), pytest.raises(SchemeError):
        load(name)
    assert load("kivi2") is kivi2


def test_an_unnamed_scheme_is_named_by_its_hash() -> None:
    assert name_of(fp16.with_(source="mine")) == "fp16"
    unnamed = kivi2.with_(bits=3)
    assert name_of(unnamed) == f"scheme-{unnamed.hash}"


UNKNOWN = [
    ("kiwi2", "name: 'kiwi2' is no scheme; use kivi2"),
    ("KIVI2", "name: 'KIVI2' is no scheme; use kivi2"),
    ("kvdsl.schemes.kivi:kivi3", "name: 'kvdsl.schemes.kivi:kivi3' names nothing: there is no kivi3; use kivi4"),
    ("json:dumps", "name: 'json:dumps' is <function dumps at"),
    ("no_such:x", "name: 'no_such:x' names no module: there is no no_such; use a name from kvdsl.names()"),
    ("schemes/kvi.py", "name: 'schemes/kvi.py' is no file; use schemes/kivi.py"),
    ("..:x", "name: '..:x' names no module; use a name"),
    ("", "name: '' is no name of a scheme; use a name"),
    (3, "name: 3 is no name of a scheme; use a name"),
    ("a\0.py", "name: 'a\\x00.py' is no name of a scheme; use a name"),
]


@pytest.mark.parametrize(("name", "sentence"), UNKNOWN)
def test_an_unknown_name_is_refused_with_its_closest(name: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(SchemeError) as caught:
        load(name)
    assert str(caught.value).startswith(sentence)
