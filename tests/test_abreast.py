"""Which schemes' decode reads two tokens abreast, and what that leaves of the loop."""

from __future__ import annotations

import pytest

from kvdsl.codegen.plan import plan_for
from kvdsl.codegen.render_triton import render
from kvdsl.schemes import ALL
from kvdsl.shape import Shape


@pytest.mark.parametrize(
    ("name", "heads", "abreast"),
    [
        *[("token2", 4, True), ("token2", 1, True), ("token2", 8, False), ("kivi2", 4, True), ("quarot2", 4, True)],
        *[("token4", 4, False), ("bitdecoding2", 4, False), ("turboquant3", 4, False), ("channel2", 4, False)],
        *[("qjl", 4, False), ("kvquant3", 4, False), ("fp16", 4, False), ("exl3_7", 4, False), ("qjl_kv", 4, False)],
        ("kvtq", 4, False),
    ],
)
def test_two_tokens_stand_abreast_where_columns_would_be_idle(name: str, heads: int, abreast: bool) -> None:
    """Of up to four query heads a kv head, where `extend` has no more rows than decode had, and registers allow."""
    plan = plan_for(ALL[name], Shape(128, 8, 8 * heads))
    assert plan.of_decode.abreast is abreast
    assert (plan.rows(many=False) < 8) is abreast
    assert not plan.of_decode.at_edges.abreast  # tiles of 16 tokens are one product wide


def test_a_loop_has_half_as_many_scores() -> None:
    """One tile of scores of 64 rows, of two sub-tiles' products, where there was one of 128."""
    plan = plan_for(ALL["token2"], Shape(128, 8, 32))
    text = render(plan, "token2")
    decode, extend = (text[text.index(f"def {name}(") :].split("\ndef ")[0] for name in ("decode", "extend"))
    tile = "t0 = page_token + tl.arange(0, 64)"
    assert tile in decode and tile not in extend
    clean = decode[: decode.index("    else:")]
    assert clean.count("tl.dot(plane(k2_0_0") == clean.count("tl.dot(plane(k2_0_1") == 7
    assert clean.count("tl.max(s, 0)") == clean.count("tl.exp2(s * size") == 1
