"""How attention reads packed tokens for many queries: what is chosen, that it is told, and that every form is right."""

from __future__ import annotations

from pathlib import Path

import form_cases
import place_cases
import pytest
import tier_cases
from compiled import spilled

from kvdsl.codegen import forms
from kvdsl.codegen.launch import Launch
from kvdsl.codegen.plan import plan_for
from kvdsl.codegen.show import View, show
from kvdsl.codegen.text import padded
from kvdsl.schemes import ALL
from kvdsl.shape import Shape

SHAPE = Shape(128, 8, 32)


@pytest.mark.parametrize(("name", "last"), [("token4", 22), ("kivi4", 16), ("token2", 22)])
def test_more_queries_are_read_for_in_passes_and_many_of_decoded_tokens(name: str, last: int) -> None:
    """4 query heads a kv head, 32768 tokens: 16 rows a program are taken where they are one pass, and worth it."""
    found = forms.thresholds(plan_for(ALL[name], SHAPE), 32768)
    few = {
        "token4": [("decode", 1, 2), ("extend", 3, 4), ("decode", 5, last)],
        "kivi4": [("decode", 1, last)],
        "token2": [("decode", 1, 1), ("extend", 2, last)],  # decode reads two tokens abreast, for one query
    }
    assert found == [*few[name], ("dense", last + 1, forms.MOST)]


@pytest.mark.parametrize(
    ("name", "queries", "pages", "dense"),
    [
        *[("token4", 2, 90, 717), ("token4", 4, 107, 716), ("token4", 16, 549, 726), ("token4", 64, 1682, 1065)],
        *[("kivi4", 2, 129, 733), ("kivi4", 4, 228, 734), ("kivi4", 8, 400, 735), ("kivi4", 64, 2888, 1077)],
        *[("token2", 4, 132, 762), ("token2", 16, 612, 768), ("token2", 64, 1560, 1100)],
    ],
)
def test_the_model_is_near_what_was_measured(name: str, queries: int, pages: float, dense: float) -> None:
    """Microseconds of the best form on an H200, 8 sequences of 8 kv heads and 32768 tokens."""
    plan = plan_for(ALL[name], Shape(128, 64, 256))
    assert forms.pages_form(plan, queries, 32768)[1] == pytest.approx(pages, rel=0.45)
    assert forms.dense_cost(plan, queries, 32768) == pytest.approx(dense, rel=0.1)


@pytest.mark.parametrize(
    "shape", [SHAPE, Shape(64, 4, 28, "bf16"), Shape(256, 2, 16), Shape(128, 8, 32, "fp32")], ids=str
)
def test_more_queries_never_turn_the_choice_back(shape: Shape) -> None:
    """From where on tokens are decoded once they are, for all that is more."""
    for name in ("token4", "token2", "kivi2", "quarot4", "turboquant4", "qjl"):
        plan = plan_for(ALL[name], shape)
        for tokens in (300, 32768):
            found = [forms.form(plan, queries, tokens) == "dense" for queries in range(1, 300)]
            assert found == sorted(found)


def test_few_tokens_are_not_worth_a_round_trip() -> None:
    plan = plan_for(ALL["token4"], SHAPE)
    assert forms.form(plan, 64, 32768) == "dense"
    assert forms.form(plan, 64, 256) == "decode"
    assert forms.form(plan, 64, 32768, window=100) == "decode"  # the others need not be read


def test_what_decoding_costs_is_counted() -> None:
    """A map that is no Hadamard matrix is worth its products only for many queries."""
    firsts = [
        forms.thresholds(plan_for(ALL[name], SHAPE), 32768)[-1][1] for name in ("token4", "quarot4", "turboquant4")
    ]
    assert firsts == sorted(firsts) and len(set(firsts)) == 3


def test_kernels_say_which_form_they_take() -> None:
    """The torch backend's is a matter of memory alone."""
    one = form_cases.case("token4", "torch", SHAPE)
    assert [one.kernels.form(queries, 32768) for queries in (1, 16, 256)] == ["decode", "extend", "dense"]


def test_the_plan_tells_where_each_form_begins() -> None:
    data, told = show(View("token4", ALL["token4"], SHAPE), "plan")
    assert data["forms"] == [("decode", 1, 2), ("extend", 3, 4), ("decode", 5, 22), ("dense", 23, forms.MOST)]
    at = told.index("queries  of a step, over 32768 packed tokens; chosen by what each form costs")
    assert [line.strip() for line in told[at + 1 : at + 5]] == [
        "up to 2: pages are read by decode, 8 query rows a program, in one pass",
        "3 to 4: pages are read by extend, 16 query rows a program, in one pass",
        "5 to 22: pages are read by decode, 8 query rows a program, in up to 11 passes",
        "from 23 on: packed tokens are decoded once, and all query rows attend to what they are",
    ]
    data, _ = show(View("token4", ALL["token4"], SHAPE, tokens=256), "plan")
    assert [form for form, *_ in data["forms"]] == ["decode", "extend", "decode"]


@pytest.mark.parametrize("name", ["kivi2", "quarot4", "gear2"])
def test_chunks_go_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form_cases.chunks_go_on(name, "torch", monkeypatch)


def test_segments_may_be_read_in_any_form() -> None:
    form_cases.segments_may_be_read_in_any_form("torch")


def test_rounded_queries_meet_decoded_keys() -> None:
    form_cases.rounded_queries_meet_decoded_keys("torch")


@pytest.mark.parametrize("name", place_cases.SCHEMES)
def test_places_may_be_any(name: str) -> None:
    form_cases.places_may_be_any(name, "torch")


@pytest.mark.parametrize("name", tier_cases.SHIPPED)
def test_tiers_may_be_decoded_once(name: str) -> None:
    form_cases.tiers_may_be_decoded_once(tier_cases.case(name, "torch"))


DENSE = {
    "of 128 rows": (Shape(128, 2, 8, "bf16"), 256, {}),
    "of 64 rows": (Shape(128, 2, 8), 64, {"GOES_ON": True}),
    "of a small head": (Shape(64, 2, 8), 256, {}),
    "of a wide head": (Shape(256, 2, 8), 256, {"CAPPED": True}),
    "of rounded queries": (Shape(128, 2, 8), 256, {"ROUNDED": True, "SHIFTED": True}),
    "of tokens in any order": (Shape(96, 2, 8), 256, {"PLACED": True, "CAPPED": True}),
}


def dense_launch(shape: Shape, rows: int, given: dict[str, bool]) -> Launch:
    """As `run_dense` launches it for a scheme that packs what float16 holds."""
    from kvdsl.codegen.device_dense import attend_dense
    from kvdsl.codegen.run_dense import WARPS, tiles

    sizes = tiles(plan_for(ALL["token4"], shape), rows)
    lanes, stages = padded(shape.head_dim), sizes.pop("STAGES")
    constants: dict[str, object] = {"HEADS": 2, "GROUP": 4, "DIM": shape.head_dim, "LANES": lanes, "SINKS": 4, **sizes}
    constants |= {"VALUE_DIM": shape.head_dim, "VALUE_LANES": lanes}
    constants |= dict.fromkeys(("CAPPED", "PLACED", "ROUNDED", "SHIFTED", "GOES_ON"), False) | given
    constants |= {} if given.get("PLACED") else {"place_ptr": None, "asked_ptr": None}
    constants |= {} if given.get("ROUNDED") else {"met_ptr": None, "more_ptr": None}
    kinds = dict.fromkeys(("query_ptr", "key_rows_ptr", "value_rows_ptr"), f"*{shape.dtype}")
    kinds |= {"keys_ptr": "*fp16", "values_ptr": "*fp16"}
    kinds |= dict.fromkeys(("partial_ptr", "lse_ptr", "met_ptr", "more_ptr"), "*fp32")
    kinds |= {"scaling": "fp32", "softcap": "fp32"} | dict.fromkeys([*constants, "STAGES"], "constexpr")
    names = attend_dense.arg_names
    signature = tuple((name, kinds.get(name, "*i32" if name.endswith("_ptr") else "i32")) for name in names)
    pointers = tuple(name for name, kind in signature if kind.startswith("*"))
    ordered = tuple((name, constants[name]) for name in names if name in constants)
    return Launch("attend_dense", signature, ordered, warps=WARPS, stages=(stages,), aligned=pointers)


@pytest.mark.parametrize("kind", DENSE)
def test_attention_to_decoded_tokens_compiles_and_spills_nothing(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from kvdsl.codegen import device_dense

    alone = tmp_path / f"dense {kind}.py"  # a file of its own, as generated ones are
    text = Path(device_dense.__file__).read_text(encoding="utf-8")
    alone.write_text(text.replace("from .device", "from kvdsl.codegen.device"), encoding="utf-8")
    assert not spilled([(alone, [dense_launch(*DENSE[kind])])], ["sm_90"], room=160 << 10)
