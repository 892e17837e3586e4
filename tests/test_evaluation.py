"""An evaluation on a tiny model: nothing lost where nothing is, packed entries read, bytes parted, rows taken again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import kvdsl
from kvdsl import Recent, Rotate, SchemeError, ShapeError
from kvdsl.cost import bits, page_parts
from kvdsl.evaluation import TASKS, Evaluation, Settings, evaluate
from kvdsl.evaluation.corpus import parted
from kvdsl.evaluation.filling import Prompt, unchanged
from kvdsl.evaluation.scoring import scored
from kvdsl.evaluation.settings import ROWS
from kvdsl.evaluation.storage import formula, parts_of, shape_of, stored
from kvdsl.evaluation.summary import interval, standard_error
from kvdsl.evaluation.units import Unit, places, planned
from kvdsl.models import ModelError, fetch, smollm2, text
from kvdsl.registry import load
from kvdsl.scheme import SIDES, Probes, Scheme
from kvdsl.schemes import ALL, int4_token_head, kivi2, zipcache
from kvdsl.shape import Shape

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = tiny.SETTINGS.with_(
    windows=3, lengths=(340,), depths=(0.0, 1.0), copies=1, passage=40, copied=16, continued=1, start=64, new=5,
    queries=8, sizes=(40, 150), resamples=200,
)  # fmt: skip
INT2 = int4_token_head.with_(bits=2)
KIVI = kivi2.with_(recent=Recent(32))
router = zipcache.router
assert router is not None
TIERS = zipcache.with_(router=router.with_(every=16, probes=Probes(recent=0.1, random=0.1)))
SCHEMES = {"exact": tiny.FP32, "int2": INT2, "kivi": KIVI, "tiers": TIERS}


def of(loaded: tiny.Loaded, schemes: Any = SCHEMES, settings: Settings = SMALL, **options: Any) -> Evaluation:
    return evaluate(schemes, loaded, text=tiny.TEXT, settings=settings, **options)


@pytest.fixture(scope="module")
def found(small: tiny.Loaded) -> Evaluation:
    return of(small)


def prompt_of(loaded: tiny.Loaded, tokens: int = 110, context: int = 96) -> Prompt:
    ids = parted(loaded[1], tiny.TEXT, "text", 60).ids[:tokens]
    return Prompt.of(loaded[0], Unit("perplexity", 0, ids, context, 4, {}))


# -- what is lost ----------------------------------------------------------------------------------------------------


def test_an_exact_scheme_loses_nothing(found: Evaluation) -> None:
    exact = found.results[0]
    tasks = exact.tasks
    assert tasks.perplexity and tasks.passkey and tasks.needle and tasks.copy and tasks.greedy and tasks.layers
    assert 0 <= tasks.perplexity.kl < 1e-8 and tasks.perplexity.same == 1
    assert abs(tasks.perplexity.delta) < 1e-3 and exact.perplexity == tasks.perplexity.perplexity
    assert tasks.perplexity.perplexity == pytest.approx(tasks.perplexity.full_perplexity, rel=1e-5)
    assert (tasks.greedy.same, tasks.greedy.equal, tasks.greedy.first) == (1, 1, SMALL.new)
    assert tasks.greedy.continuations[0].text == tasks.greedy.continuations[0].full_text != ""
    assert tasks.passkey.nll == pytest.approx(tasks.passkey.full_nll, rel=1e-5)
    assert tasks.copy.accuracy == tasks.copy.full_accuracy and tasks.copy.tokens == SMALL.copied
    assert all(
        x < 1e-5 for name in ("output", "score", "key", "value") for row in vars(tasks.layers)[name] for x in row
    )


def test_fewer_bits_lose_more_and_everything_was_read_from_packed_bytes(found: Evaluation) -> None:
    exact, int2, kivi, tiers = found.results
    for one in (int2, kivi, tiers):
        assert one.tasks.perplexity and one.tasks.layers and one.tasks.layers.mean_output and one.reads
        assert one.tasks.perplexity.kl > 1e-4 and one.tasks.layers.mean_output > 1e-3
        assert one.reads.packed_calls > 0 and one.reads.fallbacks == one.reads.dense_calls == 0
        assert one.backend == "torch" and one.bits is not None and one.bits < 16
        assert len(one.tasks.perplexity.windows) == 3 and len(one.tasks.perplexity.kl_by_place) == SMALL.score
        assert len(one.tasks.layers.output) == 2 and all(len(row) == 2 for row in one.tasks.layers.output)
    assert exact.reads and exact.reads.exact_share == 0 and tiers.reads and tiers.reads.exact_share == 0
    assert kivi.reads and kivi.reads.exact_share == pytest.approx(
        32 / 96 / 2
    )  # of values; keys are three whole windows
    assert {(c.length, c.depth, c.prompts) for c in int2.tasks.needle.cells} == {(340, 0.0, 1), (340, 1.0, 1)}  # type: ignore[union-attr]


@pytest.mark.parametrize("scheme", [KIVI, TIERS, load("quarot4"), load("h2o")], ids=["kivi", "tiers", "quarot", "h2o"])
def test_what_is_put_in_is_what_a_real_prompt_packs(scheme: Scheme, small: tiny.Loaded) -> None:
    """To the bit: bytes held, and what the model then says."""
    prompt, model = prompt_of(small), small[0]
    with unchanged(model):
        put = prompt.packed(scheme, None, None)
        run = kvdsl.cache(scheme, model)
        with torch.no_grad():
            model(input_ids=prompt.ids[None, : prompt.unit.context], past_key_values=run, use_cache=True)
        assert put.nbytes == run.nbytes
        first, second = (scored(prompt, cache) for cache in (put, run))
    assert first == second


def test_packed_bytes_are_what_is_read(small: tiny.Loaded) -> None:
    """Codes that are ruined change what the model says."""
    prompt = prompt_of(small)
    with unchanged(small[0]):
        right, ruined = (prompt.packed(load("int8_token_head"), None, None) for _ in range(2))
        for layer in ruined.packed_layers:
            page = layer.packed.pool.bytes[1:]
            page.copy_(torch.randint(0, 60, page.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
        first, second = (scored(prompt, cache) for cache in (right, ruined))
    assert sum(second["kl"]) > 20 * sum(first["kl"]) and first["full_nll"] == second["full_nll"]


def test_the_model_is_as_before(small: tiny.Loaded, found: Evaluation) -> None:
    assert found.results and small[0].config._attn_implementation == "eager"


def test_errors_of_outlier_channels_stand_apart(small: tiny.Loaded) -> None:
    """A channel of keys made large is the outlier, and one scale a token has its error in all the others."""
    from kvdsl.evaluation.layers import errors

    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 2, 72, 32, generator=generator) for _ in range(2))
    q = torch.randn(1, 4, 72, 32, generator=generator)
    k[:, 1, :, 5] *= 30
    with unchanged(small[0]):
        found = errors(INT2, small[0], [(k, v, q)] * 2, 64, None, None)
    assert found["outliers"] == [[0, 1]] * 2
    (plain, large), plain_outlier = found["key_other"][0], found["key_outlier"][0][0]
    assert plain_outlier == 0 and plain < large and found["key_outlier"][0][1] < large
    assert found["score_other"][0][0] == found["score"][0][0]
    assert found["score"][0][1] <= found["score_outlier"][0][1] + found["score_other"][0][1]


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2", "gemma3_text", "gpt_oss"])
def test_other_families_lose_nothing_through_an_exact_scheme_either(family: str) -> None:
    """Sliding windows, caps of scores and attention sinks among them."""
    loaded = tiny.plain(tiny.model(family)), tiny.characters()
    schemes = {"exact": tiny.FP32, "int2": INT2} | ({} if family == "gemma2" else {"tiers": TIERS})
    exact, *others = of(loaded, schemes, SMALL.with_(tasks=["perplexity", "greedy", "layers"], windows=1)).results
    assert exact.tasks.perplexity and exact.tasks.layers and exact.tasks.layers.mean_output is not None
    assert exact.tasks.perplexity.kl < 1e-8 and exact.tasks.greedy and exact.tasks.greedy.equal == 1
    assert exact.tasks.layers.mean_output < 1e-5 and exact.reads and exact.reads.fallbacks == 0
    for one in others:
        assert one.tasks.perplexity and one.tasks.perplexity.kl > 1e-4 and one.reads and one.reads.fallbacks == 0
    if family == "gemma2":
        with pytest.raises(SchemeError, match="softcap"):
            of(loaded, {"tiers": TIERS})


# -- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [*SCHEMES.values(), ALL["squat2"]], ids=[*SCHEMES, "squat2"])
@pytest.mark.parametrize("tokens", [1, 70, 161])
def test_bytes_are_those_of_a_real_cache_and_add_up(scheme: Scheme, tokens: int, small: tiny.Loaded) -> None:
    model = small[0]
    with unchanged(model):
        said = stored(scheme, model, tokens, None, None)
        cache = kvdsl.cache(scheme, model)
        with torch.no_grad():
            model(input_ids=tiny.prompt(1, tokens), past_key_values=cache, use_cache=True)
    assert sum(said["parts"].values()) == said["nbytes"] == cache.nbytes
    assert said["bits"] == pytest.approx(cache.stats()["bits"])
    assert all(size >= 0 for size in said["parts"].values())
    parts = [parts_of(layer.packed) for layer in cache.packed_layers]
    assert {name: sum(one[name] for one in parts) for name in parts[0]} == said["parts"]


def test_codes_and_metadata_are_as_many_bytes_as_the_spec_counts(small: tiny.Loaded) -> None:
    with unchanged(small[0]):
        said = stored(KIVI, small[0], 128, None, None)
    one = 2 * 2 * 32  # layers, heads, channels; all keys are packed, and values but for the newest 32
    assert said["parts"]["code"] == 2 * one * (128 + 96) // 8 and said["parts"]["metadata"] == one * (128 + 96) // 8
    assert said["parts"]["window"] == 4 * one * 32  # in float32
    assert said["parts"]["index"] == said["parts"]["labels"] == said["constants"] == 0
    assert (said["counted"]["keys"], said["counted"]["values"]) == (3, 3 * 0.75 + 16 * 0.25)


@pytest.mark.parametrize("name", [name for name, scheme in ALL.items() if not scheme.routed and not scheme.heads])
def test_parts_of_a_page_are_the_bits_that_are_counted(name: str) -> None:
    shape = Shape(ALL[name].head_dim or 128, 8)
    counted, parts = bits(ALL[name]), page_parts(ALL[name], shape)
    for side in SIDES:
        assert float(sum(parts[side].values())) == pytest.approx(counted.side(side).total)
        assert all(part >= 0 for part in parts[side].values())
    places_of = {"kvquant2", "kvquant3", "kvquant4", "gear2", "gear4", "kitty", "kitty_pro", "qjl", "qjl_kv"}
    if name in places_of - {"qjl_kv"}:
        assert parts["keys"]["index"] > 0
    elif name not in places_of:
        assert parts["keys"]["index"] == 0 or ALL[name].keys.outliers is not None


def test_formulas_say_what_is_packed_when(small: tiny.Loaded) -> None:
    shape = shape_of(small[0])
    assert formula(KIVI, "keys", shape).endswith(
        "for P = floor(T/32) x 32 packed tokens of T, 16 bits for the T - P others"
    )
    assert formula(INT2, "keys", shape).endswith("for all T tokens")
    assert "max(0, T - 32) packed" in formula(KIVI, "values", shape)
    assert "in tiers, for T - E tokens" in formula(TIERS, "keys", shape)


# -- intervals -------------------------------------------------------------------------------------------------------


def test_an_interval_is_that_of_its_seed() -> None:
    values = [1.0, 2.0, 4.0, 8.0, 9.0]

    def middle(chosen: Any) -> float:
        return float(sum(values[i] for i in chosen) / len(chosen))

    first = interval(5, middle, 0, 500)
    assert first == interval(5, middle, 0, 500) and interval(5, middle, 0, 40) != interval(5, middle, 1, 40)
    assert first is not None and 1 < first[0] < sum(values) / 5 < first[1] < 9
    assert interval(1, middle, 0, 500) is None and standard_error([3.0]) is None
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)


def test_figures_are_those_of_the_seed(small: tiny.Loaded, found: Evaluation) -> None:
    settings = SMALL.with_(tasks=["perplexity"])
    first = of(small, {"int2": INT2}, settings)
    other = of(small, {"int2": INT2}, settings.with_(seed=1))
    assert first.results[0].tasks.perplexity == found.results[1].tasks.perplexity
    assert first.results[0].tasks.perplexity != other.results[0].tasks.perplexity


# -- text and prompts ------------------------------------------------------------------------------------------------


def test_windows_lie_side_by_side_behind_what_is_calibrated_on() -> None:
    starts = places(torch.arange(100), 20, 4, 7, "windows")
    assert all(25 * i <= start <= 25 * i + 5 for i, start in enumerate(starts))
    assert starts == places(torch.arange(100), 20, 4, 7, "windows") != places(torch.arange(100), 20, 4, 8, "windows")
    corpus = parted(tiny.characters(), tiny.TEXT, "text", 60)
    assert len(corpus.first) == 60 and tiny.TEXT.endswith(corpus.rest) and len(corpus.ids) == len(corpus.rest)
    assert 60 <= len(tiny.TEXT) - len(corpus.rest) <= 70


def test_a_key_stands_once_where_it_should_and_is_asked_for() -> None:
    tokenizer = tiny.characters()
    corpus = parted(tokenizer, tiny.TEXT, "text", 60)
    for unit in planned(SMALL.with_(tasks=["passkey", "needle"]), corpus, tokenizer):
        told = "".join(tokenizer.convert_ids_to_tokens(unit.ids))
        key = str(unit.about["key"])
        assert (
            len(unit.ids) <= unit.about["length"] + len(key) + 1 and told.endswith(f" {key}") and told.count(key) == 3
        )
        assert unit.context == len(unit.ids) - len(key) - 2
        assert (told.index(key) < len(told) / 2) == (unit.about["depth"] == 0)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(tasks=["perplexity", "poetry"]), "tasks: 'poetry' is none of perplexity, passkey, needle, copy, greedy"),
        (dict(tasks=[]), "tasks: none is given; give some of perplexity"),
        (dict(windows=0), "windows: 0 is no whole number of 1 or more"),
        (dict(depths=[1.5]), "depths: .* are no shares"),
        (dict(lengths=[0]), "lengths: .* are no whole numbers of tokens"),
        (dict(copied=50), "copied: 50 tokens of a passage of 40"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMALL.with_(**changes)


def test_what_the_text_or_the_model_has_no_room_for_is_refused(small: tiny.Loaded) -> None:
    for changes, message in (
        (dict(windows=40), "text: .* tokens behind those that are calibrated on; windows take 40 x 109"),
        (dict(calibration=10**6), "text: .* tokens, of which the first 1000000 are calibrated on"),
        (dict(context=600, windows=1), "context: a prompt of perplexity has 613 tokens, and the model 512 positions"),
        (dict(lengths=[700]), "lengths: a prompt of passkey has .* tokens, and the model 512 positions"),
        (dict(lengths=[80]), "lengths: 80 tokens have no room for a key and a line"),
    ):
        with pytest.raises(ValueError, match=message):
            of(small, {"int2": INT2}, SMALL.with_(**changes))


def test_tasks_come_in_their_order_and_once() -> None:
    assert Settings(tasks=("copy", "perplexity", "copy")).tasks == ("perplexity", "copy")
    assert Settings().tasks == TASKS


# -- schemes that need more ------------------------------------------------------------------------------------------


def test_calibrated_schemes_are_measured_on_tokens_that_are_not_scored(small: tiny.Loaded) -> None:
    found = of(small, ["int8_tensor", "int8_token_head"], SMALL.with_(tasks=["perplexity"]))
    tensor, token = found.results
    assert tensor.calibrated == ("keys.scale", "values.scale") and token.calibrated == ()
    assert tensor.storage and tensor.storage.sizes[0].constants == 2 * 2 * 4
    assert found.notes[-1] == "int8_tensor: calibrated on the first 60 tokens of the text; none of them is scored"
    assert tensor.tasks.perplexity and tensor.tasks.perplexity.kl < 0.01
    model, _ = small
    given = {f"layers.{i}.{side}.scale": torch.full((1, 1), 10.0) for i in range(2) for side in SIDES}
    worse = of(small, ["int8_tensor"], SMALL.with_(tasks=["perplexity"]), params={"int8_tensor": given}).results[0]
    assert worse.tasks.perplexity and worse.tasks.perplexity.kl > 2 * tensor.tasks.perplexity.kl


def test_a_scheme_that_does_not_fit_is_refused_or_left_out(small: tiny.Loaded) -> None:
    settings, both = SMALL.with_(tasks=["perplexity"]), ["int8_token_head", "bitdecoding4"]
    with pytest.raises(SchemeError, match="bitdecoding4: .* groups of 128 channels do not divide head_dim 32"):
        of(small, both, settings)
    fits, left = of(small, both, settings, leave_out=True).results
    assert fits.refused is None and fits.perplexity and left.perplexity is None
    assert left.refused and "groups of 128 channels" in left.refused
    with pytest.raises(ShapeError):
        of(small, ["int8_tensor"], settings, params={"int8_tensor": {}})


def test_a_prompt_that_reads_what_is_stored_is_run_through_the_cache(small: tiny.Loaded) -> None:
    """Then errors add up in it, and the notes say so."""
    scheme = INT2.with_(prefill="stored")
    exact, stored_ = of(small, {"exact": INT2, "stored": scheme}, SMALL.with_(tasks=["perplexity"])).results
    assert (exact.prompt, stored_.prompt) == ("exact", "stored") and exact.reads and stored_.reads
    assert stored_.reads.packed_calls > exact.reads.packed_calls and stored_.perplexity != exact.perplexity
    notes = of(small, {"stored": scheme}, SMALL.with_(tasks=["perplexity"])).notes
    assert "stored: the prompt's own attention reads what is stored, too, so errors add up in it" in notes


# -- rows ------------------------------------------------------------------------------------------------------------


def same(a: Evaluation, b: Evaluation) -> bool:
    """But for the time it took."""
    first, second = ([{**one, "seconds": 0} for one in x.to_dict()["results"]] for x in (a, b))
    return first == second


def test_finished_rows_are_taken_from_the_file(
    small: tiny.Loaded, found: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert same(of(small, out=tmp_path), found)
    lines = (tmp_path / ROWS).read_text().splitlines()
    units = 3 + 2 + 2 + 1 + 1 + 1
    assert len(lines) == len(SCHEMES) * (units + 1)
    assert {json.loads(line)["scheme"] for line in lines} == set(SCHEMES)

    def not_again(*_: Any) -> None:
        raise AssertionError("measured a second time")

    monkeypatch.setattr("kvdsl.evaluation.run._Act", not_again)
    monkeypatch.setattr("kvdsl.evaluation.run.series", not_again)
    assert of(small, out=tmp_path) == of(small, out=tmp_path) and same(of(small, out=tmp_path), found)
    fewer = of(small, {"kivi": KIVI}, SMALL.with_(tasks=["perplexity", "copy"]), out=tmp_path)
    assert fewer.results[0].tasks.perplexity == found.results[2].tasks.perplexity
    with pytest.raises(AssertionError, match="a second time"):
        of(small, settings=SMALL.with_(seed=1), out=tmp_path)
    assert (tmp_path / ROWS).read_text().splitlines() == lines


def test_what_was_measured_before_an_interruption_is_kept(small: tiny.Loaded, tmp_path: Path) -> None:
    settings, said = SMALL.with_(tasks=["perplexity"]), list[str]()

    def stopping(text: str) -> None:
        said.append(text)
        if text == "perplexity 2, part 2 of 3, int2":
            raise KeyboardInterrupt

    two = {"exact": tiny.FP32, "int2": INT2}
    with pytest.raises(KeyboardInterrupt):
        of(small, two, settings, out=tmp_path, say=stopping)
    assert small[0].config._attn_implementation == "eager"
    rows = tmp_path / ROWS
    assert len(rows.read_text().splitlines()) == 3
    with rows.open("a") as file:
        file.write('{"key": "half a li')
    said.clear()
    found = of(small, two, settings, out=tmp_path, say=said.append)
    assert "perplexity 1, part 1 of 3, full precision" not in said and "perplexity 2, part 2 of 3, exact" not in said
    assert "perplexity 2, part 2 of 3, int2" in said and same(found, of(small, two, settings))
    assert len(rows.read_text().splitlines()) == 1 + 3 * 2 + 2


def test_results_come_back_from_their_document(found: Evaluation) -> None:
    assert Evaluation.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.about_model.layers == 2 and found.about_text.scored_from == 60 and found.settings["windows"] == 3
    with pytest.raises(ValueError, match="give a document that `kvdsl eval` wrote"):
        Evaluation.from_dict({"results": [{"scheme": "kivi2", "colour": "red"}]})


# -- the real model --------------------------------------------------------------------------------------------------


def fetched() -> bool:
    """Whether the model and the novel are in the user's cache folder."""
    return all((fetch.cache_folder() / parcel.name).is_file() for parcel in (smollm2.PARCEL, text.BOTCHAN))


@pytest.mark.skipif(not fetched(), reason="the model and the text are not in the cache folder")
def test_the_real_model_loses_in_the_published_order() -> None:
    try:
        settings = Settings(
            tasks=("perplexity", "needle"), windows=1, context=384, score=64, lengths=(512,), sizes=(64,)
        )
        turn = Rotate("random_hadamard", seed=0)
        names = ("int8_token_head", "token4", "kivi4", "kivi2", "token2")
        schemes = {name: load(name) for name in names}
        for name in ("token4", "token2"):
            one = schemes[name]
            schemes[f"{name} rotated"] = one.with_(keys=one.keys.with_(transform=turn))
        found = evaluate(schemes, "smollm2", settings=settings.with_(depths=(0.5,)))
    except ModelError as error:
        pytest.skip(str(error))
    kl = {one.scheme: one.tasks.perplexity.kl for one in found.results if one.tasks.perplexity}
    assert kl["int8_token_head"] < 0.005 and kl["kivi4"] < 0.02
    assert kl["int8_token_head"] < kl["kivi4"] < kl["token4"] / 1.5 and kl["kivi4"] < kl["kivi2"] < kl["token2"] / 4
    assert kl["token2 rotated"] < kl["token2"] / 2 and kl["token4 rotated"] < kl["token4"]
    lost = {one.scheme: one.tasks.needle for one in found.results}
    assert lost["kivi4"] and lost["token2"] and lost["kivi4"].exact == lost["kivi4"].full_exact == 1
    assert lost["token2"].nll > 3 * lost["kivi4"].nll
