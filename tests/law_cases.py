"""Which laws are asked of which schemes, how often, and how a failure is told."""

from __future__ import annotations

import os

import hypothesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from kvdsl import schemes
from kvdsl.kernels import Backend
from kvdsl.scheme import (
    ALL,
    Additive,
    Bands,
    Block,
    ChannelShift,
    Codebook,
    Float,
    LowRank,
    Polar,
    PreRope,
    Recent,
    Rotate,
    Scale,
    Scheme,
    Shared,
    Sinks,
    Sketch,
    Sparse,
    Store,
    TopChannels,
    Uniform,
    Vectors,
    per_channel,
    per_token,
)
from kvdsl.shape import Shape
from kvdsl.testing import LAWS, applicable, report
from kvdsl.testing import schemes as schemes_of_any_kind

LAW_NAMES = sorted(name for name, law in LAWS.items() if not law.routed)
TIER_LAWS = sorted(name for name, law in LAWS.items() if law.routed)
PLAIN = {name: scheme for name, scheme in schemes.ALL.items() if not scheme.routed}
"""Shipped schemes that compile to one set of kernels."""
SIBLINGS = {"nuq3", "rotatekv3", "rotatekv2", "turboquant1", "turboquant_prod3", "turboquant_prod2"}
SIBLINGS |= {"vllm_3bit_nc", "vllm_k3v4_nc", "quarot2", "turboquant2", "q5_0", "q5_1", "q4_1", "token2", "token3"}
SIBLINGS |= {"channel2", "channel3", "bitdecoding2", "turboquant3", "turboquant_3p5", "kivi4", "skvq_k2v1p5", "gearl4"}
SIBLINGS |= {"gear4", "kvquant4", "kvquant2", "kitty_pro", "kvtuner", "mla_fp8", "mla_nvfp4"}
SIBLINGS |= {"mxfp8", "octave_k3v3", "octave_compact", "exl3_2", "exl3_3", "exl3_5", "exl3_6", "exl3_7", "exl3_8"}
SIBLINGS |= {"mxfp8_queries"}
SIBLINGS |= {"cq_2c8b", "cq_4c8b", "cq_8c8b"}
SIBLINGS |= {"commvq", "commvq_1bit"}
SIBLINGS |= {"saw_int4", "oscar2", "wush2", "kvarn_k4v2", "kvarn_k2v2", "kvarn_even"}
# stretches behind a map are among the rare ones
SIBLINGS |= {"block_gtq_k2v2", "block_gtq_k3v2", "block_gtq_k3v3", "kvtc2"}
"""They differ in their bits alone, or in their length, from others: KVDSL_PROFILE=thorough asks them as often, and the
interpreter asks them at all.  All take long together."""
THOROUGH = os.environ.get("KVDSL_PROFILE") == "thorough"
SMALL_BLOCKS = Scheme(
    keys=Store(Uniform(4), scale=Scale(Block(4, 32))),
    values=Store(Uniform(3), scale=Scale(Block(8, heads=2), range="absmax", dtype="bf16")),
    recent=Recent(16),
)
"""A few tokens share a scale: of groups of channels, and of two heads."""
SUMS = Scheme(
    keys=Store(
        Uniform(2),
        scale=per_channel(tokens=32),
        residual=Store(Uniform(2), scale=per_token(channels=32), transform=Rotate()),
    ),
    values=Store(
        Float("e4m3"), scale=per_token(), residual=Store(Uniform(1), scale=per_token(), residual=Sketch(dim=24))
    ),
    recent=Recent(32),
    sinks=Sinks(2),
)
"""What is left is coded, too: under another kind of scale, behind a map, and twice."""
BANDS = Scheme(
    keys=Store(
        Bands((
            Store(Uniform(8), scale=per_token(range="absmax")),
            Store(Uniform(5, grid="cells"), scale=per_channel(tokens=32)),
            Store(Codebook(3, "angle")),
        )),
        transform=Polar(levels=2),
    ),
    values=Store(
        Bands((Store(Uniform(8), scale=per_token(heads=ALL)), *4 * (Store(Uniform(8), scale=per_token()),))),
        transform=(ChannelShift(), Polar(levels=4)),
    ),
    recent=Recent(32),
)  # fmt: skip
"""Radii and angles under scales of all kinds, two levels and four."""
SEVERAL_HEADS = Scheme(
    keys=Store(
        Uniform(4),
        scale=per_token(zero="point"),
        transform=(PreRope(), Rotate("random_hadamard", heads=2, seed=1)),
    ),
    values=Store(Uniform(2), scale=per_channel(tokens=32), transform=Rotate("orthogonal", heads=2, seed=0)),
    recent=Recent(32),
    sinks=Sinks(1),
)
"""Rotated together: keys in the loop over tokens, values once per output."""
LOW_RANK = Scheme(
    keys=Store(Uniform(levels=3), scale=per_token(channels=64), residual=LowRank(2)),
    values=Store(LowRank(5, tokens=32, loops=2), residual=Store(Uniform(3), scale=per_token(), transform=Rotate())),
    recent=Recent(64, "whole"),
    sinks=Sinks(2),
)
"""As a user would write it: what ternary keys leave; before what is left, two blocks a tile."""
SPARSE = Scheme(
    keys=Store(Uniform(3), scale=per_token(), transform=Rotate(), outliers=Sparse(0.04, Block(heads=ALL), fill="zero")),
    values=Store(
        Uniform(2),
        scale=per_token(channels=16),
        outliers=Sparse(0.05, fill="clamp"),
        residual=LowRank(2),
    ),
    recent=Recent(64),
    sinks=Sinks(3),
)
"""As a user would write it: single numbers beside rotated keys; values with more of them than slots, then what is left
as vectors of low rank."""
THRESHOLDS = Scheme(
    keys=Store(
        Uniform(3),
        scale=per_token(channels=32),
        transform=(PreRope(interleaved=True), Rotate("orthogonal", seed=0)),
        outliers=Sparse(0.06, Block(ALL, 1), slots=3, fill="zero", when="calibrated"),
    ),
    values=Store(
        Uniform(2),
        scale=per_channel(tokens=32),
        outliers=Sparse(0.04, Block(ALL, 1), when="calibrated"),
        residual=Store(Uniform(1), scale=per_token()),
    ),
    recent=Recent(64),
    sinks=Sinks(2),
)
"""As a user would write it: single numbers beyond thresholds, of keys before RoPE beside a map that stays in the loop;
of values before what is left."""
MATCHED = Scheme(
    keys=Store(
        Codebook(2, "calibrated", match="moments"),
        scale=per_token(channels=32, range="absmax", clip=(1.0, 0.8)),
        residual=Store(Uniform(1), scale=per_token()),
    ),
    values=Store(Codebook(3, "calibrated", match="moments"), scale=per_channel(tokens=32, clip=(1.0, 0.9))),
    recent=Recent(32),
)
"""Codes are tried with decoded levels that are not those they are chosen by; what is left is of the decoded ones."""
CHOSEN = Scheme(
    keys=Store(
        Sketch(136, "gaussian"),
        outliers=TopChannels(3, per=64, by="absmax", store=Sketch(64, "gaussian", seed=1)),
        residual=Store(Uniform(2), scale=per_token()),
    ),
    values=Store(Uniform(2), scale=per_token(), residual=LowRank(2)),
    recent=Recent(64),
    sinks=Sinks(2),
)
"""Two sketches of unlike rows, of a few channels of every 64 tokens; what both leave is coded behind them."""
STRETCHES = Scheme(
    keys=Store(Bands((Store(Uniform(4), scale=per_token()), Store(Uniform(8), scale=per_token())), channels=(32, 32))),
    values=Store(
        Bands((Store(), Store(Uniform(8), scale=per_token(range="absmax"))), channels=(0.25, 0.75)),
        transform=Rotate("orthogonal", (0.25, 0.75), seed=0),
    ),
)
"""Channels of each side in stores of their own: of values shares of what is rotated, each within itself."""
RECORD = Scheme(
    keys=Store(
        Bands(
            (Store(Float("e2m1"), scale=per_token(channels=16, dtype="e4m3")), Store(), Store(Float("e5m2"))),
            channels=(64, 32, 32),
        )
    ),
    values=Store(Shared()),
    sinks=Sinks(2),
)
"""Values are the first channels of the keys."""
VECTORS = Scheme(
    keys=Store(Vectors(2, channels=8), transform=PreRope(interleaved=True)),
    values=Store(Vectors(3, channels=2), transform=Rotate("orthogonal", size=8, seed=0)),
    recent=Recent(8),
    sinks=Sinks(1),
)
"""Two words of a table a code, and half of one.  The codes of 8 bits that are shipped take the interpreter long."""
ADDITIVE = Scheme(
    keys=Store(Additive(3, stages=3, commuting=True), scale=per_token(heads=ALL), transform=PreRope()),
    values=Store(Additive(2, stages=0.0625), scale=per_token()),
    recent=Recent(8),
    sinks=Sinks(1),
)
"""Codes across the borders of bytes, and a byte that they do not fill.  What is shipped takes the interpreter long."""
ROUNDED = Scheme(
    keys=Store(Uniform(3), scale=per_token(channels=16), transform=(ChannelShift(), Rotate("orthogonal", seed=0))),
    values=Store(Uniform(4), scale=per_token()),
    queries=Store(Float("e4m3"), scale=per_token(channels=16, dtype="e8m0", exponent="ceil")),
    recent=Recent(8),
    sinks=Sinks(2),
)
"""Queries are rounded in groups, behind a map that also adds a vector; exact keys meet them as they are."""
RARE = {"small blocks": SMALL_BLOCKS, "sums": SUMS, "bands": BANDS, "several heads": SEVERAL_HEADS}
RARE |= {"low rank": LOW_RANK, "matched": MATCHED, "single numbers": SPARSE, "thresholds": THRESHOLDS}
RARE |= {"chosen channels": CHOSEN, "stretches": STRETCHES, "record": RECORD, "vectors": VECTORS, "additive": ADDITIVE}
RARE |= {"rounded": ROUNDED}
"""What no shipped scheme has."""


def holds(
    scheme: Scheme, backend: Backend, examples: int, leave_out: tuple[str, ...] = (), shapes: tuple[Shape, ...] = ()
) -> int:
    """Ask every law that applies but those left out, and fail with all that are broken; the number of examples.
    `shapes`: see `kvdsl.testing.report`.

    Schemes of layers are left to `kvdsl check`: most are shipped by themselves."""
    scheme = scheme.with_(layers=())
    names = [law.name for law in applicable(scheme) if law.name not in leave_out]
    results = list(report(scheme, backend=backend, examples=examples, laws=names, shapes=shapes))
    broken = [result.failure for result in results if result.failure is not None]
    assert not broken, "\n\n".join(broken)
    assert [result.law for result in results] == names
    return sum(result.examples for result in results)


def asked_of(law: str) -> st.SearchStrategy[Scheme]:
    """Legal schemes that a law is about, see `kvdsl.testing.schemes`.  Those of floats on both sides are so few that
    others are made such."""
    found = schemes_of_any_kind()
    if law == "plain_floats_are_plain_attention":
        floats = st.builds(Store, st.builds(Float, st.sampled_from(["fp16", "fp32"])))
        found = st.builds(
            lambda one, keys, values: one.with_(keys=keys, values=values, queries=None), found, floats, floats
        )
    return found.filter(LAWS[law].applies)


def fixed(examples: int) -> settings:
    """The same examples in every run, as many as given."""
    everything = list(HealthCheck)
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate, hypothesis.Phase.shrink)
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=everything,
        phases=phases,
    )  # fmt: skip
