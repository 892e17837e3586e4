"""A spec is a value: equal, hashable, frozen, and the same after every way of writing it down."""

from __future__ import annotations

import copy
import dataclasses as dc
import pickle
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvdsl.scheme as language
from kvdsl.errors import SchemeError
from kvdsl.scheme import (
    ALL,
    Block,
    Codebook,
    Float,
    Recent,
    Scale,
    Scheme,
    Sinks,
    Store,
    Uniform,
    per_channel,
    per_token,
)
from kvdsl.schemes import ALL as SHIPPED
from kvdsl.schemes import fp16, fp32, int8_token_head, kivi2, kivi4

ODD = {
    "everything": Scheme(
        keys=Store(Uniform(3, levels=6, rounding="half_up"), scale=Scale(Block(32, 16), clip=0.875, dtype="bf16")),
        values=Store(Uniform(4, grid="cells"), scale=per_token(heads=2, range="absmax")),
        sinks=Sinks(4),
        recent=Recent(64, "whole"),
        prefill="stored",
        layers={range(0, 3): fp32, (5, 9): kivi4, -1: fp16},
        source='quotes " and \\ and \x7f and \n and \U0001f600',
    ),
    "calibrated": Scheme(both=Store(Uniform(8), scale=per_channel(range="absmax", when="calibrated"))),
    "weighted": Scheme(both=Store(Codebook(3, "calibrated", weights="fisher"), scale=per_token())),
    "matched": Scheme(both=Store(Codebook(2, "calibrated", match="moments"), scale=per_token())),
    "point": Scheme(both=Store(Uniform(4), scale=per_token(heads=ALL, zero="point"))),
}
SCHEMES = {**SHIPPED, **ODD}


@pytest.mark.parametrize("name", SCHEMES)
def test_every_way_of_writing_a_scheme_gives_it_back(name: str) -> None:
    scheme = SCHEMES[name]
    written = {
        "repr": eval(repr(scheme), vars(language).copy()),
        "dict": Scheme.from_dict(scheme.to_dict()),
        "JSON": Scheme.from_json(scheme.to_json()),
        "TOML": Scheme.from_toml(scheme.to_toml()),
        "pickle": pickle.loads(pickle.dumps(scheme)),
        "copy": copy.deepcopy(scheme),
    }
    assert {way: back == scheme and back.hash == scheme.hash for way, back in written.items()} == dict.fromkeys(
        written, True
    )
    assert {hash(back) for back in written.values()} == {hash(scheme)}


def test_repr_is_what_a_user_would_have_written() -> None:
    assert repr(kivi2) == (
        "Scheme(keys=Store(Uniform(2), scale=per_channel(tokens=32)), "
        "values=Store(Uniform(2), scale=per_token(channels=32)), "
        "recent=Recent(128), source='arXiv 2402.02750, section 3')"
    )
    assert repr(int8_token_head.with_(source="")) == (
        "Scheme(both=Store(Uniform(8), scale=per_token(range='absmax', dtype='fp32')))"
    )
    assert repr(Scale(Block(4, 8))) == "Scale(Block(4, channels=8))"
    assert repr(fp32.with_(source="", layers={range(0, 4): fp16.with_(source="")})) == (
        "Scheme(both=Store(Float('fp32')), layers={range(0, 4): Scheme(both=Store(Float('fp16')))})"
    )


def test_toml_names_a_part_only_where_several_can_stand() -> None:
    assert kivi2.to_toml().splitlines() == [
        'keys = { code = { part = "Uniform", bits = 2 }, scale = { block = { tokens = 32, channels = 1 } } }',
        'values = { code = { part = "Uniform", bits = 2 }, scale = { block = { channels = 32 } } }',
        "recent = { tokens = 128 }",
        'source = "arXiv 2402.02750, section 3"',
    ]


def test_a_dict_holds_what_differs_from_the_defaults() -> None:
    assert fp16.to_dict() == {"part": "Scheme", "both": {"part": "Store"}, "source": "baseline"}


def test_the_hash_is_of_the_meaning_and_does_not_move() -> None:
    assert (kivi2.hash, fp16.hash) == ("23482ee1b405", "dd83db60e237")
    assert kivi2.with_(source="elsewhere").hash == kivi2.hash
    assert fp32.with_(layers={0: fp16}).hash == fp32.with_(layers={0: fp16.with_(source="elsewhere")}).hash
    assert kivi2.with_(clip=1).hash == kivi2.hash
    fitted = Scheme(both=Store(Codebook(4, "calibrated"), scale=per_token()))
    assert fitted.hash == "c2d89e1b171c"
    assert len({fitted.hash, fitted.with_(weights="fisher").hash, fitted.with_(match="moments").hash}) == 3
    assert len({scheme.hash for scheme in SCHEMES.values()}) == len(SCHEMES)


def test_layer_tables_that_mean_the_same_are_equal() -> None:
    one = fp16.with_(layers={range(0, 3): kivi2, 7: fp32})
    other = fp16.with_(layers=[((7,), fp32), ([2, 1, 0], kivi2)])
    assert one == other and one.hash == other.hash


def test_layers_count_from_both_ends() -> None:
    scheme = fp16.with_(layers={0: kivi2, -1: kivi4})
    assert [scheme.for_layer(i, 4) for i in range(4)] == [kivi2, scheme, scheme, kivi4]
    assert fp16.with_(layers={40: kivi2}).for_layer(8, 32) != kivi2


def test_with_reaches_fields_by_name_and_by_path() -> None:
    assert kivi4.keys.code == kivi4.values.code == Uniform(4)
    mixed = kivi2.with_(**{"keys.scale.dtype": "bf16", "values.code.bits": 4})
    assert mixed.keys.scale == per_channel(tokens=32, dtype="bf16") and mixed.values.code == Uniform(4)
    assert kivi2.with_(both=Store()) == kivi2.with_(keys=Store(), values=Store())


@pytest.mark.parametrize("change", ["bitz", "keys.bitz", "sinks.tokens", "keys.", ""])
def test_with_refuses_a_name_that_nobody_has(change: str) -> None:
    with pytest.raises(TypeError, match="have no field"):
        kivi2.with_(**{change: 4})


def test_a_spec_is_frozen() -> None:
    with pytest.raises(dc.FrozenInstanceError):
        kivi2.recent = None  # type: ignore[misc]


TREES = [
    ({"both": {}, "recnt": 3}, "recnt: Scheme has no such field; use recent"),
    ({"both": {"part": "Stor"}}, "both.part: 'Stor' is no part that can stand here; use Store"),
    (
        {"both": {"code": {"bits": 2}}},
        "both.code.part: no part says what this is; use Uniform, Float, Codebook, Vectors, Additive, Sketch, Bands, "
        "LowRank or Shared",
    ),
    ({"both": {}, "recent": {}}, "recent.tokens: None is no number of tokens; use an int from 1 to 1048576"),
    ({"both": {}, "layers": 3}, "layers: 3 is no list; write [{ indices = [0, 1], scheme = {...} }]"),
    (
        {"both": {}, "layers": [{"indices": [0], "scheme": {}}]},
        "layers[0].keys: missing; write keys=Store(...) and values=Store(...), or both=Store(...)",
    ),
    ([], "spec: [] is a list, not a table; write both = {...}"),
]


@pytest.mark.parametrize(("tree", "sentence"), TREES)
def test_a_tree_that_is_no_spec_is_refused_in_these_words(tree: Any, sentence: str) -> None:
    with pytest.raises(SchemeError) as caught:
        Scheme.from_dict(tree)
    assert str(caught.value) == sentence


TEXTS = [("{", "JSON"), ('{"both": {}, "both": {}}', "JSON"), ("[" * 100_000, "JSON"), ("[" * 2_000_000, "JSON")]
TEXTS += [("both =", "TOML"), ("a = " + "[" * 100_000, "TOML"), ("both = {}\nboth = {}", "TOML")]


@pytest.mark.parametrize(("text", "form"), TEXTS, ids=[f"{form}: {text[:20]}" for text, form in TEXTS])
def test_text_that_is_no_spec_is_refused(text: str, form: str) -> None:
    with pytest.raises(SchemeError, match="^spec: "):
        Scheme.from_json(text) if form == "JSON" else Scheme.from_toml(text)


WORDS = ["keys.scale.range", "keys.scale.zero", "keys.scale.dtype", "keys.scale.when", "keys.code.grid"]
WORDS += ["values.code.rounding", "recent.flush", "prefill", "source", "keys", "values.scale", "layers", "sinks"]


@given(st.sampled_from(WORDS), st.text(max_size=200))
def test_any_text_in_any_field_is_taken_or_refused(field: str, text: str) -> None:
    try:
        scheme = kivi2.with_(**{field: text})
    except SchemeError as error:
        assert error.faults and "; " in str(error)
    else:
        assert Scheme.from_toml(scheme.to_toml()) == scheme == Scheme.from_json(scheme.to_json())


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("ALL"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "part",
                    "both",
                    "keys",
                    "code",
                    "scale",
                    "block",
                    "tokens",
                    "bits",
                    "layers",
                    "indices",
                    "scheme",
                    "odd",
                ]
            ),
            inner,
            max_size=4,
        )
        | st.dictionaries(st.just("part"), st.sampled_from(["Store", "Uniform", "Float", "Block"]))
    ),
    max_leaves=12,
)


@given(JUNK)
def test_any_tree_is_taken_or_refused(tree: Any) -> None:
    try:
        scheme = Scheme.from_dict(tree)
    except SchemeError as error:
        assert error.faults
    else:
        assert Scheme.from_dict(scheme.to_dict()) == scheme


def test_the_language_loads_no_heavy_package() -> None:
    heavy = "{'torch', 'triton', 'sympy', 'numpy'} & set(sys.modules)"
    names = "scheme, rules, text, cost, registry, schemes"
    code = f"import sys; from kvdsl import {names}; schemes.kivi2.hash; registry.names(); sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_float_is_said_even_where_it_is_the_default() -> None:
    assert repr(Store(Float("fp16"))) == "Store(Float('fp16'))"
