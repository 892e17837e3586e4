"""vLLM itself serves by kvdsl's pages: tokens are those of transformers with the same scheme, whatever the engine does.

Not part of the usual tests, as the engine pins its own torch: `make serve-test`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from prompts import LENGTHS, MODEL, SCHEMES, TOKENS, prompts
from run import ANSWER

import kvdsl
from kvdsl.serving import served

HERE = Path(__file__).resolve().parent
FOLDER = Path(os.environ.get("KVDSL_EXPECTED", ""))
pytest.importorskip("vllm", reason="the engine's own environment runs these: make serve-test")
if not (FOLDER / "expected.json").is_file():
    pytest.skip("transformers has not said what is expected: make serve-test", allow_module_level=True)
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
NO_PREFIXES = {"enable_prefix_caching": False}


def ran(scheme: str | None, *, fails: bool = False, **asked: Any) -> Any:
    """What an engine answers; or, where it fails, all that it printed."""
    ranks = asked.get("options", {}).get("tensor_parallel_size", 1)
    bound = {} if ranks == 1 else {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))}
    common = {"scheme": scheme, "prompts": prompts(), "tokens": TOKENS, "environment": bound}
    scenario = json.dumps({**common, **asked})
    command = [sys.executable, str(HERE / "run.py"), str(FOLDER)]
    done = subprocess.run(command, input=scenario, capture_output=True, text=True, timeout=900)
    lines = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    assert bool(lines) != fails, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr if fails else json.loads(lines[0].removeprefix(ANSWER))


@cache
def plain(scheme: str) -> Any:
    """Two passes over the prompts."""
    sinks = served(kvdsl.load(scheme)).sinks
    return ran(scheme, passes=2, options=NO_PREFIXES if sinks else {})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tokens_of_a_ragged_batch_are_those_of_transformers(scheme: str) -> None:
    assert plain(scheme)["passes"][0]["tokens"] == EXPECTED[scheme]


@pytest.mark.parametrize("scheme", ["token4", "kivi4"])
def test_a_second_pass_finds_packed_blocks_and_says_the_same(scheme: str) -> None:
    first, second = plain(scheme)["passes"]
    assert second["tokens"] == first["tokens"] and not sum(first["cached"])
    assert [found // 128 for found in second["cached"]] == [(n - 1) // 128 for n in LENGTHS]


def test_prompts_in_chunks_give_the_same_tokens() -> None:
    found = ran("kivi4", options={"max_num_batched_tokens": 48})
    assert found["passes"][0]["tokens"] == EXPECTED["kivi4"]


def test_two_ranks_give_the_same_tokens() -> None:
    """Each builds kernels for its own heads."""
    found = ran("kivi4", options={"tensor_parallel_size": 2})
    assert found["passes"][0]["tokens"] == EXPECTED["kivi4"]


@pytest.mark.parametrize("scheme", ["token4", "kivi4"])
def test_drafts_do_not_change_the_tokens(scheme: str) -> None:
    """Rejected tokens were in pages or in exact rows, across borders of blocks."""
    speculative = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    found = ran(scheme, options={"speculative_config": speculative})
    assert found["passes"][0]["tokens"] == EXPECTED[scheme] and found["drafts"] > 0


def test_layers_may_be_left_alone() -> None:
    """All of them: tokens are those of exact numbers.  One of two: a page more in float32, and room to the block."""
    every = {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0", "1"]}
    assert ran("kivi4", options=every)["passes"] == ran("fp32")["passes"]
    heads, dim = MODEL["num_key_value_heads"], MODEL["head_dim"]
    one = ran("kivi4", options={**every, "kv_cache_dtype_skip_layers": ["0"]})
    assert one["tokens"] == (1 << 30) // (2 * dim * heads * 128 * (32 + 5) // 8) * 128


@pytest.mark.parametrize("scheme", ["token4", "kivi4"])
def test_of_200_requests_none_is_lost_when_room_is_short(scheme: str) -> None:
    """Preempted requests are computed anew, and every one says what it says alone."""
    lengths = tuple(7 + 37 * i % 311 for i in range(200))
    options = {"num_gpu_blocks_override": 10, "enable_prefix_caching": False}
    found = ran(scheme, prompts=prompts(lengths, seed=4), tokens=24, alone=True, options=options)
    assert found["passes"][0]["tokens"] == found["alone"] and found["preemptions"] > 0


@pytest.mark.parametrize("scheme", ["token4", "kivi4", "turboquant3"])
def test_capacity_is_what_the_scheme_s_bits_say(scheme: str) -> None:
    """To the block: the engine's room over the bytes of a token."""
    heads, dim, layers = (MODEL[name] for name in ("num_key_value_heads", "head_dim", "num_hidden_layers"))
    bits = kvdsl.bits(served(kvdsl.load(scheme)).scheme, dim, kv_heads=heads)
    block = Fraction(bits.mean).limit_denominator(1 << 12) * 2 * dim * heads * layers * 128 / 8  # bytes
    assert plain(scheme)["tokens"] == (1 << 30) // block * 128


@pytest.mark.parametrize(
    ("scheme", "options", "said"),
    [
        ("kivi2_sinks", {"enable_prefix_caching": True}, "use --no-enable-prefix-caching"),
        ("token4", {"kv_cache_dtype_skip_layers": ["0"]}, "add --kv-cache-dtype fp8"),
        (str(HERE / "over_heads.py:mine"), {"tensor_parallel_size": 2}, "or fewer ranks"),
        ("zipcache", {}, "so where a token stands follows from the tokens after it"),
        ("kivi5", {}, "kivi4"),
    ],
)
def test_what_cannot_be_served_is_refused_in_words(scheme: str, options: dict[str, Any], said: str) -> None:
    assert said in ran(scheme, fails=True, options=options)
