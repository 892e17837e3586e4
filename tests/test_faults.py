"""What can go wrong, and which test holds that it does not: every fault names its tests."""

from __future__ import annotations

import ast
from dataclasses import replace
from functools import cache
from pathlib import Path

import law_cases  # noqa: F401  (one thread)
import pytest
import torch

import kvdsl
from kvdsl.codegen.plan import plan_for
from kvdsl.scheme import Scheme
from kvdsl.schemes import ALL, kivi2, token2, token4
from kvdsl.shape import Shape
from kvdsl.testing import LAWS, Case
from kvdsl.testing.attention import attend, require_close, step_of

FENCES = "interpreted/test_fences.py::test_a_kernel_stays_inside_its_tensors"
SHIPPED = "test_laws.py::test_a_shipped_scheme_obeys_every_law"
RANDOM = "test_laws.py::test_any_legal_scheme_obeys_the_law"
REFUSED = "test_rules.py::test_a_faulty_spec_is_refused_in_these_words"
UNFIT = "test_rules.py::test_a_spec_that_does_not_fit_a_shape_is_refused_in_these_words"
INTERPRETED = "interpreted/test_faults_interpreted.py::test"
SLOWER = "interpreted/test_laws_interpreted.py::test_some_shipped_schemes_obey_the_slower_laws"
MISTAKE = "test_laws.py::test_one_mistake_is_refused_by_the_name_of_its_place"

FAULTS: dict[str, tuple[str, ...]] = {
    "a length that is no multiple of a tile or block": (
        SHIPPED, RANDOM, FENCES, "test_faults.py::test_every_length_up_to_two_tiles", f"{INTERPRETED}_any_length",
    ),
    "a chunk that crosses the border of a block or window": (
        "test_cache.py::test_bytes_do_not_depend_on_chunks", SHIPPED,
    ),
    "an append that fails half way": ("test_cache.py::test_a_failed_change_changes_nothing",),
    "a constant block": ("test_reference.py::test_p4_a_constant_block_is_itself", SHIPPED),
    "a NaN": (
        "test_reference.py::test_a_nan_spoils_its_block_only", "test_faults.py::test_a_nan_at_every_place", SHIPPED,
    ),
    "an infinity, or a range beyond float16": (SHIPPED, RANDOM),
    "a subnormal scale": (SHIPPED, RANDOM, "test_faults.py::test_a_subnormal_scale_needs_the_clamp"),
    "a channel ten thousand times larger": (SHIPPED, RANDOM, "test_faults.py::test_one_huge_channel"),
    "no token, no sequence, one token": (
        "test_cache_use.py::test_nothing_at_all", "test_api.py::test_nothing_gives_nothing",
        "test_reference.py::test_p34_a_block_of_one_number_is_lossless_and_refused", f"{INTERPRETED}_nothing_at_all",
    ),
    "an unusual head_dim": ("test_faults.py::test_every_head_dim_is_taken_or_refused",),
    "a group that does not divide": (UNFIT, REFUSED),
    "any number of query heads a kv head": (
        "test_faults.py::test_any_number_of_query_heads", "test_faults.py::test_query_heads_must_be_whole_groups",
        f"{INTERPRETED}_any_number_of_query_heads",
    ),
    "strided, expanded, sliced tensors": (
        "test_cache_use.py::test_any_strides_are_taken", "test_api.py::test_strided_tensors_are_read_as_they_are",
    ),
    "a wrong dtype or device, a tensor that wants gradients": (
        "test_cache_use.py::test_wrong_tensors_are_refused_first",
        "test_api.py::test_a_wrong_tensor_is_refused_in_words",
    ),
    "an element offset over 2^31": (
        "test_lint.py::test_lines_that_are_refused", f"{INTERPRETED}_a_page_far_away",
        "test_shipped_kernels.py::test_every_kernel_of_every_shipped_scheme_compiles_without_spills",
    ),
    "a ragged batch, padding on the left": (
        SHIPPED, RANDOM, "test_hf.py::test_padding_is_never_stored_wherever_it_stands",
    ),
    "neighbours in a batch": ("test_cache.py::test_neighbours_do_not_matter", SHIPPED, SLOWER),
    "no memory for a page": (
        "test_cache_use.py::test_a_full_cache_says_so", "test_pages.py::test_a_full_pool_keeps_its_pages",
        "test_cache.py::test_a_failed_change_changes_nothing",
    ),
    "a crop past a packed block": (
        "test_cache_changes.py::test_cropping_further_back",
        "test_cache_changes.py::test_cropping_a_draft_loses_nothing",
    ),
    "sinks, window and length in every order": (
        "test_cache.py::test_window_and_sinks_stay_exact", "test_reference_attention.py::test_packed_tokens_by_hand",
        "test_faults.py::test_short_sequences_are_exact_where_they_should_be",
        "test_faults.py::test_every_small_window_has_every_token_once",
    ),
    "a shared page that is written": (
        "test_cache_changes.py::test_reordering_shares_pages",
        "test_pages.py::test_copy_on_write_keeps_the_other", SHIPPED,
    ),
    "a table entry that leads nowhere": (
        "test_saving.py::test_tables_lead_somewhere", "test_pages.py::test_random_claims_never_share_a_written_page",
    ),
    "a query that sees nothing, two empty splits": (
        SHIPPED, RANDOM, "test_reference_attention.py::test_who_sees_what",
        "test_faults.py::test_a_query_that_sees_nothing", f"{INTERPRETED}_a_query_that_sees_nothing",
    ),
    "errors that add up over many tokens": ("test_faults.py::test_errors_do_not_add_up_over_many_tokens",),
    "an outlier in the query": (
        "test_faults.py::test_a_large_query_overflows_nothing", f"{INTERPRETED}_a_large_query",
    ),
    "arithmetic that the compiler fuses": (
        "test_lint.py::test_modules_that_are_refused", "test_cache_gpu.py::test_the_gpu_stores_what_the_cpu_stores",
    ),
    "generated text of another version": (
        "test_store.py::test_text_of_another_compiler_is_not_used",
        "test_store.py::test_text_of_another_plan_is_not_used",
    ),
    "many processes that compile at once": ("test_store.py::test_processes_that_build_at_once_agree",),
    "a damaged generated file": ("test_store.py::test_a_damaged_file_is_noticed_and_made_anew",),
    "a folder that is full, foreign, open to all, or a link": (
        "test_store.py::test_a_folder_that_others_may_write_is_not_trusted",
        "test_store.py::test_a_failed_write_leaves_nothing",
        "test_store.py::test_a_planted_link_is_not_followed",
        "test_store.py::test_a_full_disk_is_no_reason_to_stop",
        "test_store.py::test_a_home_that_is_none_is_no_reason_to_stop",
    ),
    "code in a name or string": (
        "test_lint.py::test_text_in_a_comment_or_docstring_never_becomes_code",
        "test_scheme.py::test_any_text_in_any_field_is_taken_or_refused",
    ),
    "numbers of the wrong kind or size": (REFUSED, MISTAKE),
    "a saved cache that is a pickle": (
        "test_saving.py::test_a_pickle_is_no_saved_cache", "test_house.py::test_nothing_runs_text_or_unpickles",
    ),
    "a saved cache that is damaged or lies": (
        "test_saving.py::test_every_damage_is_found", "test_saving.py::test_claims_are_checked_before_allocation",
    ),
}  # fmt: skip


@cache
def _tests(file: str) -> frozenset[str]:
    tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_has_its_tests(fault: str) -> None:
    assert FAULTS[fault]
    for test in FAULTS[fault]:
        file, _, name = test.partition("::")
        assert name.startswith("test_") and name in _tests(file), test


def test_every_length_up_to_two_tiles() -> None:
    for tokens in range(1, 2 * 64 + 2):
        for scheme in (token4, kivi2.with_(**{"recent.tokens": 32})):
            LAWS["decode_is_attention"](Case(scheme, Shape(32, 1, 2), "torch", tokens=tokens, seed=tokens))


@pytest.mark.parametrize("scheme", [token4, kivi2], ids=["token4", "kivi2"])
def test_a_nan_at_every_place(scheme: Scheme) -> None:
    """One NaN in each of 32 x 32 sequences, at another place in each: its block is NaN and nothing else."""
    k = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(1)).expand(1024, 1, 32, 32).clone()
    clean = kvdsl.roundtrip(scheme, k[:1], k[:1], window=False, backend="torch")
    k.view(1024, 1024).fill_diagonal_(torch.nan)
    bad = k.isnan()
    spoilt = {"token": bad.any(3, keepdim=True).expand_as(bad), "channel": bad.any(2, keepdim=True).expand_as(bad)}
    sides = ("token", "token") if scheme is token4 else ("channel", "token")
    found = kvdsl.roundtrip(scheme, k, k, window=False, backend="torch")
    for got, right, kind in zip(found, clean, sides, strict=True):
        assert torch.equal(got.isnan(), spoilt[kind])
        assert torch.equal(got[~spoilt[kind]], right.expand_as(got)[~spoilt[kind]])


def test_a_subnormal_scale_needs_the_clamp() -> None:
    """Ranges near 2e-7 have scales so coarse that rounding alone would give codes above the highest."""
    case = Case(token4, Shape(64, 1, 2), "torch", batch=3, tokens=64, kind="tiny", seed=1)
    x = case.pair(64)[0].double()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale, start = ((high - low) / 15).half().double(), low.half().double()
    unclamped = ((x - start) / scale).round()[(scale > 0).expand_as(x)]
    assert unclamped.numel() and (unclamped > 15).any()
    for law in ("words_equal_the_reference", "decoding_equals_the_reference", "errors_stay_within_the_bound"):
        LAWS[law](case)


@pytest.mark.parametrize("name", ["token4", "kivi2", "int8_token_head", "bitdecoding2"])
def test_one_huge_channel(name: str) -> None:
    from kvdsl.testing.bounds import bound

    scheme = ALL[name]
    k, v = Case(scheme, Shape(128, 2, 2), "torch", tokens=128).pair(128)
    k[..., 17] = (k[..., 17].float() * 1e4).clamp(-65504, 65504).half()
    found = kvdsl.roundtrip(scheme, k, v, window=False, backend="torch")
    for side, x, got in zip(("keys", "values"), (k, v), found, strict=True):
        assert ((got.double() - x.double()).abs() <= bound(scheme.side(side), x, {}, side)).all()  # type: ignore[arg-type]


def test_every_small_window_has_every_token_once() -> None:
    """All sinks, windows and lengths up to 12: sinks, packed and exact tokens follow each other and are all there."""
    from kvdsl.reference import packed_tokens
    from kvdsl.scheme import Recent, Sinks
    from kvdsl.window import windows

    whole = kivi2.with_(**{"keys.scale.block.tokens": 2, "recent.tokens": 2})
    for sinks in range(13):
        for window in range(13):
            some = {"sinks": Sinks(sinks) if sinks else None, "recent": Recent(window) if window else None}
            schemes = [token4.with_(**some)] + ([whole.with_(**some)] if window and window % 2 == 0 else [])
            for scheme in schemes:
                for side, policy in windows(scheme).items():
                    for tokens in range(13):
                        first, end = packed_tokens(scheme, side, tokens)
                        assert first == min(sinks, tokens) <= end <= tokens and end - first == policy.packed(tokens)
                        after = tokens - first
                        assert tokens - end == (after % window if policy.block > 1 else min(after, window))


@pytest.mark.parametrize("name", ["kivi2", "token4", "int8_tensor", "fp16"])
def test_a_query_that_sees_nothing(name: str) -> None:
    """Every token is hidden from one sequence, none from the other: zeros and -inf, and the neighbour as usual."""
    case = Case(ALL[name], Shape(64, 2, 4), "torch", batch=2, tokens=200)
    for queries in (1, 3):
        step = step_of(case, queries, ragged=False)
        step = replace(step, options={**step.options, "start": [200, 0]})
        out, lse = attend(case, step)
        assert not out[0].any() and bool((lse[0] == -torch.inf).all()) and bool(lse[1].isfinite().all())
        require_close(case, step, (out, lse))


def test_every_head_dim_is_taken_or_refused() -> None:
    from kvdsl.errors import ShapeError
    from kvdsl.rules import shape_faults

    taken = []
    for dim in range(1, 257):
        try:
            shape = Shape(dim, 1, 2)
        except ShapeError as refusal:
            assert str(dim) in str(refusal)
            continue
        if not shape_faults(token4, shape):
            taken.append(dim)
    assert {32, 64, 80, 96, 112, 128, 256} <= set(taken)
    for dim in taken:
        assert plan_for(token4, Shape(dim, 1, 2)).layout.head_dim == dim
    for dim in taken[:: max(1, len(taken) // 12)]:
        LAWS["words_equal_the_reference"](Case(token4, Shape(dim, 1, 2), "torch", batch=2, tokens=67))
        LAWS["decode_is_attention"](Case(token4, Shape(dim, 1, 2), "torch", batch=2, tokens=67))


@pytest.mark.parametrize("group", [1, 3, 5, 7, 8, 16, 71])
def test_any_number_of_query_heads(group: int) -> None:
    for law in ("decode_is_attention", "extend_is_attention"):
        LAWS[law](Case(kivi2, Shape(64, 2, 2 * group), "torch", batch=2, tokens=197))


def test_query_heads_must_be_whole_groups() -> None:
    from kvdsl.errors import ShapeError

    with pytest.raises(ShapeError, match="7"):
        Shape(64, 2, 7)


@pytest.mark.parametrize("name", ["kivi2", "int8_tensor", "channel3", "token4"])
def test_short_sequences_are_exact_where_they_should_be(name: str) -> None:
    from kvdsl.scheme import Sinks

    for sinks in (None, Sinks(1), Sinks(9)):
        for tokens in range(1, 13):
            scheme: Scheme = ALL[name].with_(sinks=sinks)
            LAWS["window_and_sinks_are_exact"](Case(scheme, Shape(128, 1, 1), "torch", tokens=tokens, seed=tokens))


@pytest.mark.parametrize("scheme", [token2, kivi2], ids=["token2", "kivi2"])
def test_errors_do_not_add_up_over_many_tokens(scheme: Scheme) -> None:
    LAWS["decode_is_attention"](Case(scheme, Shape(128, 1, 4), "torch", tokens=8200, kind="offset"))


@pytest.mark.parametrize("name", ["kivi2", "token4", "int8_tensor"])
def test_a_large_query_overflows_nothing(name: str) -> None:
    case = Case(ALL[name], Shape(64, 2, 4), "torch", batch=2, tokens=150)
    step = step_of(case, 1)
    step = replace(step, q=step.q * 1e4, options={"scaling": 1e-6})
    require_close(case, step, attend(case, step))
