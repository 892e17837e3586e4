"""docs/questions.md: it is what its figures make, its sentences hold in them, and a question is asked end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import questions
import questions_facts as facts
import questions_members as members
import questions_page
import tiny
from questions_qjl import cheapest, decoding
from questions_tables import Question, kl, score

from kvdsl.evaluation import Settings
from kvdsl.evaluation.summary import standard_error
from kvdsl.levels import table
from kvdsl.matrices import estimator
from kvdsl.scheme import Codebook, Sketch

ROOT = Path(__file__).resolve().parent.parent
SMALL = Settings(
    tasks=("perplexity", "layers"), calibration=60, windows=2, context=256, score=12, chunk=4, queries=8, sizes=(40,)
)  # fmt: skip


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return questions.read()


def test_the_page_is_what_its_figures_make(figures: dict[str, Any]) -> None:
    """When this fails, `python benchmarks/questions.py --page > docs/questions.md` writes it anew."""
    assert (ROOT / "docs" / "questions.md").read_text(encoding="utf-8") == questions_page.page(figures)


@pytest.mark.parametrize("name", members.MEMBERS)
def test_figures_are_of_the_schemes_that_are_named(name: str, figures: dict[str, Any]) -> None:
    """When this fails, `python benchmarks/questions.py NAME` measures what is missing."""
    asked, found = list(members.MEMBERS[name]()), figures[name]["members"]
    assert [one.scheme.hash for one in asked] == [row["hash"] for row in found]
    assert [dict(one.axes) for one in asked] == [{key: row[key] for key in asked[0].axes} for row in found]


def test_a_file_of_figures_is_read_back(figures: dict[str, Any]) -> None:
    assert json.loads(questions.written(figures)) == figures
    assert questions.FIGURES.read_text(encoding="utf-8") == questions.written(figures)
    assert len(questions.written(figures)) < 200_000


def test_a_question_is_asked_end_to_end(tmp_path: Path) -> None:
    """Two members on a tiny model, and then from the rows that were kept."""
    some = [one for one in members.sides() if one.axes["keys"] == one.axes["values"]][1::3]
    with tiny.one_thread():
        model = tiny.plain(tiny.model("llama")), tiny.characters()
        said = list[str]()
        options: dict[str, Any] = {"text": tiny.words(60), "text_name": "words", "out": tmp_path}
        found = questions.asked(some, model, SMALL, say=said.append, **options)
        told = list[str]()
        again = questions.asked(some, model, SMALL, say=told.append, **options)
    assert again == found and any("perplexity" in text for text in said) and not any("full" in text for text in told)
    question = Question(json.loads(json.dumps(found)))
    for one in some:
        row = question.one(**one.axes)
        assert len(row["kl"]) == SMALL.windows and row["hash"] == one.scheme.hash and row["score_error"] > 0
    assert question.told("a command").startswith("Made by `a command`: ")


# -- what the page says ----------------------------------------------------------------------------------------------


def error(row: Any) -> float:
    found = standard_error(row["kl"])
    assert found is not None
    return found


def lost(question: Question, **axes: Any) -> float:
    return kl(question.one(**axes))


def test_what_is_said_of_kivi(figures: dict[str, Any]) -> None:
    question, counted = Question(figures["kivi"]), figures["bits"]["kivi"]
    at = {(row["bits"], row["group"]): kl(row) for row in question.members}
    for width in (2, 4):
        assert at[width, 32] < at[width, 64] < at[width, 128]
    assert at[4, 128] < at[2, 32] / 10
    by_place = {(row["bits"], row["group"], row["head_dim"], row["tokens"]): row for row in counted}
    for (width, group, _, tokens), row in by_place.items():
        assert row["padding"] == 0
        if tokens is None and group <= row["head_dim"]:
            assert row["metadata"] == 32 / group and row["code"] == width
    own = {tokens: by_place[2, 32, 128, tokens] for tokens in (1024, 4096, 32768)}
    assert own[4096]["window"] < own[4096]["metadata"] / 2
    assert all(row["window"] > row["metadata"] for row in counted if row["tokens"] == 1024)


def test_what_is_said_of_ternary_rules(figures: dict[str, Any]) -> None:
    question, m = Question(figures["ternary"]), members
    short, long, channel = m.LAYOUTS
    rules = [rule for rule in m.RULES if "bit" not in rule]

    def order(layout: str) -> list[str]:
        return sorted(rules, key=lambda rule: lost(question, rule=rule, layout=layout))

    for layout in (short, long):
        assert order(layout)[0] == m.HALF_FITTED
        assert lost(question, rule=m.FITTED, layout=layout) > 2 * lost(question, rule=m.HALF_FITTED, layout=layout)
        assert lost(question, rule=m.HALF, layout=layout) > 1.5 * lost(question, rule=m.HALF_FITTED, layout=layout)
    assert set(order(channel)[:2]) == {m.MIDDLE, m.TUNED}
    middle, tuned = (question.one(rule=rule, layout=channel) for rule in (m.MIDDLE, m.TUNED))
    assert abs(kl(middle) - kl(tuned)) < 2 * max(map(error, (middle, tuned)))
    assert (middle["key_bits"], tuned["key_bits"]) == (2.75, 2.25)
    near, far = (question.one(rule=rule, layout=channel) for rule in (m.LLOYD_FITTED, m.TUNED))
    assert kl(near) > 1.5 * kl(far) and abs(score(near) / score(far) - 1) < 0.05
    assert order(long)[-1] == m.MIDDLE
    assert lost(question, rule=m.FITTED, layout=channel) > 2 * lost(question, rule=m.TUNED, layout=channel)
    assert lost(question, rule=m.TWO_BITS, layout=channel) < lost(question, rule=m.MIDDLE, layout=channel) / 2
    two, one = (question.one(rule=rule, layout=long) for rule in (m.TWO_BITS, m.HALF_FITTED))
    assert kl(one) < kl(two) and one["key_bits"] == 2.0 and two["key_bits"] == 2.5
    for layout in m.LAYOUTS:
        assert lost(question, rule=m.SIGN, layout=layout) > lost(question, rule=order(layout)[0], layout=layout) * 2


def test_what_is_said_of_sides(figures: dict[str, Any]) -> None:
    question, m = Question(figures["sides"]), members
    for layout in (m.CHANNELS, m.TOKENS):
        for width in (2, 3, 4):
            of_keys = lost(question, layout=layout, keys=width, values=16)
            assert of_keys > 2 * lost(question, layout=m.CHANNELS, keys=16, values=width)
        for low, high in ((2, 3), (2, 4), (3, 4), (4, 8)):
            assert lost(question, layout=layout, keys=low, values=high) > lost(
                question, layout=layout, keys=high, values=low
            )
    two, four = (
        [lost(question, layout=layout, keys=width, values=16) for layout in (m.CHANNELS, m.TOKENS)] for width in (2, 4)
    )
    assert two[1] > 3 * two[0] and four[1] < 2 * four[0]
    both = lost(question, layout=m.CHANNELS, keys=2, values=2)
    apart = lost(question, layout=m.CHANNELS, keys=2, values=16) + lost(question, layout=m.CHANNELS, keys=16, values=2)
    assert 0.75 * both < apart < 1.25 * both


def test_which_schemes_give_keys_more() -> None:
    spent = {row[0].strip("`"): (float(row[1]), float(row[2])) for row in facts.spent()}
    assert all(spent[name][0] > spent[name][1] for name in ("qjl", "kvtuner", "skvq_k2v1p5", "kitty", "vllm_k8v4"))
    assert spent["vllm_k3v4_nc"][0] < spent["vllm_k3v4_nc"][1]
    assert all(spent[name][0] == spent[name][1] for name in ("kivi2", "quarot4", "turboquant3"))


def test_what_is_said_of_zipcache() -> None:
    rows = {(row[0], row[1]): float(row[3]) for row in questions_page.ablation_rows()}
    own = rows["buffer", "100 tokens wait"]
    assert rows["buffer", "none waits"] > 8 * own and 2.5 * own < rows["probes", "10 % at random"] < 3 * own
    for (choice, _), one in rows.items():
        if choice in ("saliency", "re-decision", "scales of values"):
            assert one < 1.5 * own


@pytest.fixture(scope="module")
def asked(figures: dict[str, Any]) -> Question:
    return Question(figures["qjl"])


def losses(asked: Question, family: str, bits: int) -> list[float]:
    """Of every seed."""
    return [kl(row) for row in asked.rows(family=family, bits=bits)]


def test_what_is_said_of_sketches_beside_plain_codes(asked: Question) -> None:
    m = members

    def below(family: str, bits: int, other: str) -> bool:
        """Every seed of the one below every seed of the other, in each window."""
        one, two = (asked.rows(family=name, bits=bits) for name in (family, other))
        windows = range(len(asked.full))
        return all(max(row["kl"][i] for row in one) < min(row["kl"][i] for row in two) for i in windows)

    for bits in range(1, 9):
        assert below(m.ORTHOGONAL, bits, m.GAUSSIAN)
    first = cheapest(asked, m.ORTHOGONAL, fmean(losses(asked, m.GAUSSIAN, 8)))
    assert first is not None and first <= 4
    assert fmean(losses(asked, m.NORMAL, 1)) < fmean(losses(asked, m.ORTHOGONAL, 1)) / 2
    assert below(m.NORMAL, 1, m.ORTHOGONAL) and below(m.NORMAL, 2, m.ORTHOGONAL) and below(m.CHANNEL, 2, m.ORTHOGONAL)
    assert below(m.ORTHOGONAL, 2, m.EVEN) and below(m.ORTHOGONAL, 2, m.TOKEN)
    for bits in range(3, 9):
        for family in (
            m.EVEN,
            m.CHANNEL,
            m.QUAROT,
            *((m.NORMAL,) if bits < 5 else ()),
            *((m.TOKEN,) if bits > 3 else ()),
        ):
            assert below(family, bits, m.ORTHOGONAL)
    best = [cheapest(asked, family, fmean(losses(asked, m.ORTHOGONAL, 8))) for family in (m.EVEN, m.CHANNEL, m.TOKEN)]
    assert all(one is not None and one <= 4 for one in best)


def test_one_bit_behind_a_rotation_is_read_smaller_than_a_sketch() -> None:
    """Rows of a sketch are as long as the root of head_dim, those of a rotation 1."""
    level = estimator(Sketch(64), 64) * math.sqrt(64)
    assert level / table(Codebook(1, "normal"), 64)[1] == pytest.approx(math.pi / 2, rel=0.01)


def test_what_is_said_of_errors_and_seeds(asked: Question) -> None:
    m = members
    of = {
        (family, bits): fmean(score(row) for row in asked.rows(family=family, bits=bits))
        for family in (m.ORTHOGONAL, m.EVEN)
        for bits in (4, 8)
    }
    assert of[m.EVEN, 4] / of[m.EVEN, 8] > 10 and 1.3 < of[m.ORTHOGONAL, 4] / of[m.ORTHOGONAL, 8] < 1.5
    for bits in (2, 8):
        fast, other = (fmean(losses(asked, family, bits)) for family in (m.FAST, m.ORTHOGONAL))
        assert 0.7 < fast / other < 1.4
    for rows in (1, 2):
        assert fmean(losses(asked, m.APART, rows)) < fmean(losses(asked, m.ORTHOGONAL, 2 * rows))
        assert fmean(losses(asked, m.CHANNEL, rows + 1)) < fmean(losses(asked, m.APART, rows))
        plain, apart = (
            asked.rows(family=family, bits=of)[0] for family, of in ((m.CHANNEL, rows + 1), (m.APART, rows))
        )
        assert plain["key_bits"] < apart["key_bits"]


def test_what_is_said_of_values(asked: Question) -> None:
    m = members
    assert max(losses(asked, m.OF_VALUES, 1)) < min(losses(asked, m.ORTHOGONAL, 1)) / 10
    assert max(losses(asked, m.OF_VALUES, 1)) < min(losses(asked, m.NORMAL_VALUES, 1)) / 2
    two, normal = (fmean(losses(asked, family, 2)) for family in (m.OF_VALUES, m.NORMAL_VALUES))
    assert 0.7 < two / normal < 1.4
    assert max(losses(asked, m.NORMAL_VALUES, 4)) < min(losses(asked, m.OF_VALUES, 4)) / 5
    for bits in (4, 8):
        keys, values, both = (fmean(losses(asked, family, bits)) for family in (m.ORTHOGONAL, m.OF_VALUES, m.BOTH))
        assert values < keys / 5 and both < 1.5 * keys


def test_what_is_said_of_bytes_and_machine_code(figures: dict[str, Any]) -> None:
    for row in figures["matrices"]["matrices"]:
        assert row["bytes"] == 2 * 4 * row["rows"] * row["head_dim"] ** 2
    for row in figures["bits"]["sketches"]:
        assert row["constants"] == row["padding"] == 0
        if row["family"] == members.ORTHOGONAL:
            assert (row["code"], row["metadata"]) == (row["rows"], 16 / row["head_dim"])
    code = {(row["family"], row["bits"]): row for row in figures["code"]["rows"]}
    exact = code["float16", 16]["products"] / 2
    for rows in (1, 2, 4, 8):
        assert code[members.ORTHOGONAL, rows]["products"] - exact == pytest.approx(rows * exact, rel=0.01)
    assert code[members.ORTHOGONAL, 2]["turn"] > 50 * code[members.EVEN, 4]["turn"]
    loop = {key: decoding(figures["code"], row) for key, row in code.items()}
    assert loop[members.ORTHOGONAL, 8] > 4 * loop[members.EVEN, 8]
    assert loop[members.ORTHOGONAL, 1] == pytest.approx(loop[members.EVEN, 2], rel=0.1)
    assert all(row["share"] > 0.9 for row in code.values())
    assert [key for key, row in code.items() if row["spills"]] == [(members.ORTHOGONAL, 8)]
