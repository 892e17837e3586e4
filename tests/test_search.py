"""The search for a map of bits: fronts, clusters, the loss it asks a model for, budgets, seeds, studies, refusals."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import kvdsl
from kvdsl.codegen.cli import run
from kvdsl.generation import perplexity
from kvdsl.hf import observed
from kvdsl.scheme import Recent
from kvdsl.schemes import ALL, kivi2
from kvdsl.search_layers import output_errors
from kvdsl.search_loss import CHUNK, Divergence
from kvdsl.search_maps import Found, at, mapped
from kvdsl.search_pairs import MOST, Cluster, Pair, clusters, front, pruned, spread
from kvdsl.search_start import ladder, probes, shares

Captured = pytest.CaptureFixture[str]
TEXT = "The cache of a model holds keys and values of all tokens that came before, layer by layer. " * 2
BASE = kivi2.with_(recent=Recent(32))
LAYERS, BITS = 3, (2, 4)
PAIRS: list[Pair] = [*product((2, 4, 8), (2, 4, 8))]
COST = {pair: sum(pair) / 2 for pair in PAIRS}

positive = st.floats(1e-3, 1.0)
errors_of_layers = st.lists(st.fixed_dictionaries(dict.fromkeys(PAIRS, positive)), min_size=1, max_size=6)


# -- pairs, clusters, where a search begins --------------------------------------------------------------------------


def dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and a != b


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_a_front_holds_what_nothing_dominates_once_and_in_order(points: list[tuple[float, float]]) -> None:
    found = [points[i] for i in front(points)]
    assert found == sorted({p for p in points if not any(dominates(other, p) for other in points)})


@given(errors_of_layers)
def test_a_pair_is_dropped_where_another_of_no_more_bits_is_clearly_better(errors: list[dict[Pair, float]]) -> None:
    for error in errors:
        kept, strict = pruned(COST, error, 1.5), pruned(COST, error, 1)
        assert {*strict} == {PAIRS[i] for i in front([(COST[p], error[p]) for p in PAIRS])} <= {*kept}
        assert min(PAIRS, key=lambda p: (COST[p], error[p])) in kept
        for pair in {*PAIRS} - {*kept}:
            assert any(COST[p] <= COST[pair] and 1.5 * error[p] <= error[pair] for p in PAIRS if p != pair)


@given(errors_of_layers)
def test_layers_of_a_cluster_are_offered_the_same_and_err_alike(errors: list[dict[Pair, float]]) -> None:
    costs = [COST] * len(errors)
    found = clusters(costs, errors, 1.5)
    assert sorted(layer for cluster in found for layer in cluster.layers) == [*range(len(errors))]
    for cluster in found:
        for a, b in product(cluster.layers, repeat=2):
            assert pruned(COST, errors[a]) == pruned(COST, errors[b]) == cluster.pairs
            assert all(errors[a][pair] <= 1.5 * errors[b][pair] for pair in cluster.pairs)
    assert len(clusters([COST] * 4, [errors[0]] * 4)) == 1


def test_clusters_are_few_where_layers_err_in_many_ways() -> None:
    errors = [{pair: 0.01 * 1.2**layer / sum(pair) for pair in PAIRS} for layer in range(40)]
    assert MOST / 2 < len(clusters([COST] * 40, errors)) <= MOST


@given(errors_of_layers)
def test_a_ladder_rises_from_the_fewest_bits_to_the_most_one_cluster_a_step(errors: list[dict[Pair, float]]) -> None:
    costs = [COST] * len(errors)
    offered = clusters(costs, errors)
    steps = ladder(offered, costs, [[sum(errors[i][p] for i in c.layers) for p in c.pairs] for c in offered])
    bits = [sum(COST[pair] for pair in spread(offered, step)) for step in steps]
    assert bits == sorted({*bits})
    assert bits[0] == 2 * len(errors)
    assert bits[-1] == sum(max(COST[p] for p in c.pairs) * len(c.layers) for c in offered)
    for one, other in zip(steps, steps[1:], strict=False):
        assert sum(a != b for a, b in zip(one, other, strict=True)) == 1


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=4))
def test_probes_tell_what_keys_and_values_of_a_cluster_cost(factors: list[tuple[float, float]]) -> None:
    """A loss that is such a sum is found as it is, whatever its factors."""
    error = {(k, v): 3 * 2.0**-k + 2.0**-v for k, v in PAIRS}
    offered = tuple(Cluster((i,), ((2, 2), (2, 4), (4, 2), (4, 4), (8, 8))) for i in range(len(factors)))

    def share(place: int, pair: Pair) -> float:
        a, b = factors[place]
        return a * error[pair[0], 8] ** 2 + b * error[8, pair[1]] ** 2

    tops = [share(i, (8, 8)) for i in range(len(offered))]
    losses = [sum(share(i, pair) for i, pair in enumerate(probe)) for probe in probes(offered)]
    found = shares(offered, [error] * len(offered), losses, sum(tops))
    for place, cluster in enumerate(offered):
        right = [share(place, pair) - tops[place] for pair in cluster.pairs]
        assert found[place] == pytest.approx(right, rel=1e-6, abs=1e-9)


def test_the_pairs_of_clusters_come_to_their_layers() -> None:
    offered = [Cluster((0, 2), ((2, 2),)), Cluster((1,), ((4, 2),))]
    assert spread(offered, [(2, 2), (4, 2)]) == ((2, 2), (4, 2), (2, 2))


# -- what is measured ------------------------------------------------------------------------------------------------


def network() -> Any:
    return tiny.plain(tiny.model("llama", num_hidden_layers=LAYERS))


def ids_of(text: str) -> Any:
    return tiny.characters()(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


def test_more_bits_of_either_side_err_less_in_every_layer() -> None:
    for layer in observed(network(), ids_of(TEXT)):
        error = output_errors(lambda pair: at(BASE, pair), layer, BITS)
        assert error[4, 4] < min(error[2, 4], error[4, 2]) < max(error[2, 4], error[4, 2]) < error[2, 2] < 1


@pytest.mark.parametrize("prefill", ["exact", "stored"])
def test_the_loss_is_the_divergence_that_text_through_the_cache_has(prefill: str) -> None:
    """What a prompt leaves in an empty cache is put there without running it again."""
    scheme = mapped(BASE.with_(prefill=prefill), [(2, 4), (4, 2), (2, 4)])
    ids, context = ids_of(TEXT)[:, :161], 96
    with tiny.one_thread():
        right = perplexity(network(), tiny.characters(), TEXT, scheme, context=context, score=64, chunk=CHUNK)
        model = network()
        found = Divergence(model, ids[0], observed(model, ids), context=context)(scheme)
    assert found == pytest.approx(right["kl"], rel=1e-3) and found > 0
    assert model.config._attn_implementation == "eager"


def test_a_map_gives_every_layer_its_pair_and_the_most_frequent_needs_no_row() -> None:
    pairs = [(2, 4), (4, 4), (2, 4), (8, 2)]
    scheme = mapped(kivi2, pairs, "here")
    assert scheme.source == "here" and [key for key, _ in scheme.layers] == [(1,), (3,)]
    for layer, pair in enumerate(pairs):
        own = scheme.for_layer(layer, 4)
        assert own.with_(layers=(), source="").hash == at(kivi2, pair).hash


# -- a search --------------------------------------------------------------------------------------------------------


def searched(bits: float = 4.25, trials: int = 12, **options: Any) -> Found:
    model = (network(), tiny.characters())
    with tiny.one_thread():
        return kvdsl.search(BASE, model, TEXT, **{"bits": bits, "pairs": BITS, "trials": trials, **options})


def test_a_map_keeps_to_its_budget_and_nothing_that_was_tried_dominates_the_front() -> None:
    found = searched()
    counted = kvdsl.bits(found.scheme, 32, 2, layers=LAYERS).mean
    assert counted == pytest.approx(found.best.bits) and 3 <= counted <= 4.25 and found.trials == 12
    points = [(p.bits, p.loss) for p in found.front]
    assert front(points) == [*range(len(points))] and found.best in found.front
    assert all(p.loss > found.best.loss for p in found.front if p.bits < found.best.bits)
    assert found.front[0].pairs == ((2, 2),) * LAYERS
    assert mapped(BASE, found.best.pairs).hash == found.scheme.hash


def test_the_ends_of_the_budget_are_the_ends_of_the_pairs() -> None:
    assert searched(bits=3, trials=2).best.pairs == ((2, 2),) * LAYERS
    assert searched(bits=5, trials=4).best.pairs == ((4, 4),) * LAYERS


def test_a_seed_gives_one_search_stopped_or_not(tmp_path: Path) -> None:
    whole = searched(trials=30, seed=3)
    assert whole == searched(trials=30, seed=3)
    first = searched(trials=5, seed=3, study=tmp_path / "half.db")
    assert first.trials == 5
    assert searched(trials=30, seed=3, study=tmp_path / "half.db") == whole
    measured: list[str] = []
    assert searched(trials=30, seed=3, study=tmp_path / "half.db", say=measured.append) == whole
    assert not [said for said in measured if said.startswith(("map", "layer"))]


def test_a_map_that_was_lost_halfway_is_tried_again(tmp_path: Path) -> None:
    import optuna

    path = tmp_path / "lost.db"
    searched(trials=4, study=path)
    lost = optuna.load_study(study_name="kvdsl", storage=f"sqlite:///{path}")
    lost.ask()
    assert searched(trials=8, study=path) == searched(trials=8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "another seed, 0 and not 1"),
        ({"bits": 4.5}, "another bits, 4.25 and not 4.5"),
        ({"pairs": (2, 8)}, "another pairs, 2 4 and not 2 8"),
        ({"tokens": 170}, "another text"),
    ],
)
def test_a_study_of_another_search_is_refused(changes: dict[str, Any], said: str, study: Path) -> None:
    with pytest.raises(ValueError, match=rf"study: .* is of a search with {said}"):
        searched(trials=1, study=study, **changes)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("studies") / "one.db"
    searched(trials=1, study=path)
    return path


def test_a_file_that_holds_no_study_is_refused(tmp_path: Path) -> None:
    other, text = tmp_path / "other.db", tmp_path / "text.db"
    with sqlite3.connect(other) as file:
        file.execute("create table bills (sum int)")
    text.write_text(TEXT)
    for path in (other, text):
        with pytest.raises(ValueError, match="holds no study; give a new file"):
            searched(trials=1, study=path)
    with pytest.raises(ValueError, match="study: there is no folder"):
        searched(trials=1, study=tmp_path / "none" / "one.db")


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "below": (lambda: searched(bits=2.9), "bits: 2.9 is no budget for .*, maps of it take 3 to 5 bits"),
    "above": (lambda: searched(bits=5.1), "bits: 5.1 is no budget"),
    "no number": (lambda: searched(bits=float("nan")), "bits: nan is no budget"),
    "one": (lambda: searched(pairs=(4,)), "pairs: .* is no choice"),
    "too many": (lambda: searched(pairs=(2, 9)), "code.bits: 9 bits are more than 8"),
    "trials": (lambda: searched(trials=0), "trials: 0 is no whole number of 1 or more"),
    "seed": (lambda: searched(seed=-1), "seed: -1 is no whole number of 0 or more"),
    "short": (lambda: searched(tokens=40), "text: 40 tokens, of which the scheme quantizes none; give at least 128"),
    "layers": (
        lambda: kvdsl.search(kivi2.with_(layers={0: ALL["kivi4"]}), "/none", TEXT, bits=4),
        "layers: they are what is searched for",
    ),
    "floats": (lambda: kvdsl.search("mxfp4", "/none", TEXT, bits=4), "keys.code: .* has no bits to change"),
    "calibrated": (lambda: kvdsl.search("nuq3", "/none", TEXT, bits=4), "is calibrated, for one number of bits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_searched_is_refused(case: str) -> None:
    call, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        call()


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"optuna is not installed; run: pip install 'kvdsl\[search\]'"):
        searched()


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("asked")
    (folder / "base.toml").write_text(BASE.to_toml())
    (folder / "text.txt").write_text(TEXT)
    model = tiny.saved("llama", folder / "model", num_hidden_layers=LAYERS)
    return ["search", f"{folder}/base.toml", "--model", model, "--text", f"{folder}/text.txt", "--pairs", "2,4"]


@pytest.mark.parametrize("kind", ["toml", "json"])
def test_the_command_saves_a_spec_that_loads_back(
    kind: str, asked: list[str], tmp_path: Path, capsys: Captured
) -> None:
    capsys.readouterr()
    out = tmp_path / f"map.{kind}"
    assert run([*asked, "--bits", "4", "--out", str(out), "--trials", "6", "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert not said.err and {"scheme", "model", "bits", "budget", "path", "front"} <= found.keys()
    assert (found["scheme"], found["budget"], found["path"]) == ("base", 4, str(out))
    scheme = kvdsl.load(str(out))
    assert kvdsl.bits(scheme, 32, 2, layers=LAYERS).mean == pytest.approx(found["bits"]) and found["bits"] <= 4
    best = next(point for point in found["front"] if point["bits"] == found["bits"])
    pairs = [(k, v) for k, v in best["layers"].values()]
    assert scheme == mapped(BASE, pairs, scheme.source)
    assert scheme.source.endswith("in bits by layer, as kvdsl search finds for model at 4 bits")


def test_the_command_shows_the_front_and_what_it_took(asked: list[str], tmp_path: Path, capsys: Captured) -> None:
    capsys.readouterr()
    out = str(tmp_path / "map.toml")
    assert run([*asked, "--bits", "4", "--out", out, "--trials", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["bits", "loss", "keys/values:", "layers"]
    assert lines[1].endswith("2/2: 0-2") and sum(line.endswith("<") for line in lines) == 1
    assert lines[-2].startswith("6 maps tried; ") and lines[-1] == f"saved {out}"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bits", "2", "--out", "map.toml"], "bits: 2 is no budget"),
        (["--bits", "4", "--out", "map.txt"], "out: 'map.txt' is no .toml or .json file; name one, as map.toml"),
        (["--bits", "4", "--out", "/none/map.toml"], "out: there is no folder /none"),
        (["--bits", "4", "--out", "map.toml", "--pairs", "2;4"], "pairs: '2;4' is no list of bits"),
        (["--bits", "4", "--out", "map.toml", "--study", __file__], f"study: {__file__} holds no study"),
        (["--bits", "4", "--out", "map.toml", "--model", "/none"], "model '/none': there is no such file"),
    ],
)
def test_wrong_use_gets_one_message_and_status_2(
    options: list[str], said: str, asked: list[str], capsys: Captured
) -> None:
    capsys.readouterr()
    assert run([*asked, *options]) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"kvdsl: {said}") and told.err.count("\n") == 1 and not told.out
    assert not Path("map.toml").exists()
