"""What is left of a vector, coded by a store of its own: language, definition, page, one map for all terms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import kvdsl
from kvdsl import reference
from kvdsl.codegen.layout import lay_out
from kvdsl.codegen.plan import plan_for
from kvdsl.codegen.show import View, show
from kvdsl.errors import SchemeError
from kvdsl.params import checked
from kvdsl.scheme import (
    ChannelScale,
    Codebook,
    Float,
    PreRope,
    Recent,
    Rotate,
    Scheme,
    Sketch,
    Store,
    Uniform,
    per_channel,
    per_tensor,
    per_token,
)
from kvdsl.schemes import turboquant_prod3
from kvdsl.shape import Shape

FOUR = Uniform(4)
SIGNS = Store(FOUR, scale=per_token(), residual=Sketch(dim=64))
TWICE = Store(
    Uniform(2), scale=per_token(), residual=Store(Uniform(1), scale=per_channel(tokens=32), residual=Sketch())
)


def of_keys(residual: Store, code: Store = SIGNS) -> Scheme:
    return Scheme(keys=code.with_(residual=residual), values=Store())


FAULTY: list[tuple[Callable[[], Scheme], str]] = [
    (
        lambda: of_keys(SIGNS, Store()),
        "keys.residual: fp16 leaves nothing to code; leave residual out, or lower the code's bits",
    ),
    (
        lambda: of_keys(Store(Float("fp32"))),
        "keys.residual.code: what is left takes as many bits in fp32 as the vector itself; leave residual out, and "
        "store the vector as Float('fp32')",
    ),
    (
        lambda: of_keys(SIGNS, Store(FOUR, scale=per_token(), transform=PreRope())),
        "keys.residual: what is left of keys without RoPE would have to be turned back token by token, too; leave it "
        "out, or leave out PreRope()",
    ),
    (
        lambda: of_keys(Store(FOUR, scale=per_token(), transform=PreRope())),
        "keys.residual.transform: RoPE comes off a vector, not off what is left of one; leave out PreRope()",
    ),
    (
        lambda: of_keys(Store(FOUR, scale=per_tensor(when="calibrated"))),
        "keys.residual.scale.when: what is left is known only once the store before it is calibrated; use "
        "when='online'",
    ),
    (
        lambda: of_keys(Store(Codebook(4, "calibrated"), scale=per_token())),
        "keys.residual.code.levels: what is left is known only once the store before it is calibrated; use "
        "levels='normal', or give numbers",
    ),
    (
        lambda: of_keys(Store(FOUR, scale=per_token(), transform=ChannelScale("absmax"))),
        "keys.residual.transform[0]: what is left is known only once the store before it is calibrated; move it to the "
        "outer store",
    ),
    (
        lambda: of_keys(Store(FOUR)),
        "keys.residual.scale: evenly spaced levels need a scale; say what shares one, as scale=per_token(channels=32)",
    ),
    (
        lambda: of_keys(Store(FOUR, scale=per_channel(tokens=32))),
        "keys.residual.scale.block.tokens: a group of 32 tokens must wait until it is full; add recent=Recent(32)",
    ),
    (
        lambda: of_keys(0.5),  # type: ignore[arg-type]
        "keys.residual: 0.5 is a float, not a Store; write residual=Sketch(basis='gaussian')",
    ),
]


@pytest.mark.parametrize(("build", "sentence"), FAULTY, ids=[text.split(":")[0] for _, text in FAULTY])
def test_what_is_refused(build: Callable[[], Scheme], sentence: str) -> None:
    with pytest.raises(SchemeError) as error:
        build()
    assert str(error.value) == sentence


def test_a_sketch_stands_for_its_store_in_every_text() -> None:
    scheme = Scheme(both=SIGNS)
    assert scheme.keys.residual == Store(Sketch(dim=64))
    assert Scheme.from_toml(scheme.to_toml()) == Scheme.from_json(scheme.to_json()) == scheme
    assert "residual=Store(Sketch(64))" in repr(scheme)
    assert scheme.hash != Scheme(both=SIGNS.with_(residual=None)).hash


def test_a_name_that_is_handed_down_does_not_reach_what_is_left() -> None:
    assert TWICE.with_(bits=3).residual == TWICE.residual


def test_by_hand() -> None:
    """One token of 0, 1.2, 2, 3 under two bits of step 1 leaves 0, 0.2, 0, 0: one bit of step 0.2 (in fp16) has it."""
    one = Store(Uniform(2), scale=per_token(dtype="fp32"), residual=Store(Uniform(1), scale=per_token()))
    x = torch.tensor([0.0, 1.2, 2.0, 3.0])[None, None, None]
    got = reference.quantize(one, x)
    assert got.residual is not None and got.codes is not None and got.residual.codes is not None
    assert got.codes.flatten().tolist() == [0, 1, 2, 3] and got.residual.codes.flatten().tolist() == [0, 1, 0, 0]
    step = torch.tensor(0.2).half().float().item()
    assert got.decoded.flatten().tolist() == [0, pytest.approx(1 + step, abs=1e-7), 2, 3]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_more_bits_of_what_is_left_leave_less(bits: int) -> None:
    """About a fifth less with one bit, a factor of 3 and of 15 in steps with two and four."""
    x = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(bits))
    store = Store(Uniform(2), scale=per_token())
    rest = Store(Uniform(bits), scale=per_token(channels=16, dtype="fp32"))
    alone, both = (reference.quantize(s, x).decoded - x for s in (store, store.with_(residual=rest)))
    assert both.norm() < alone.norm() * {1: 0.9, 2: 0.4, 4: 0.1}[bits]


def test_the_page_holds_what_is_counted() -> None:
    scheme, shape = Scheme(keys=TWICE, values=SIGNS, recent=Recent(32)), Shape(64, 2)
    layout, counted = lay_out(scheme, shape), kvdsl.bits(scheme, 64, 2)
    assert layout.page_bytes == counted.mean * 2 * 64 * 2 * layout.page_tokens / 8
    assert (
        counted.formula("values")
        == "4 + (16 + 16)/64 = 4.5 bits; of what is left 1 + 16/64 = 1.25 bits; together 5.75 bits"
    )
    assert [term.path for term in plan_for(scheme, shape).terms] == [
        "keys", "keys.residual", "keys.residual.residual", "values", "values.residual",
    ]  # fmt: skip


def test_a_scale_is_calibrated_whatever_waits_behind_it() -> None:
    """50 tokens are no whole number of the residual's blocks, which are nothing to the outer scale."""
    rest = Store(Uniform(2), scale=per_channel(tokens=32))
    scheme = Scheme(both=Store(FOUR, scale=per_tensor(when="calibrated"), residual=rest), recent=Recent(32))
    x = torch.randn(1, 2, 50, 64, generator=torch.Generator().manual_seed(0))
    assert kvdsl.calibrate(scheme, x, x)["keys.scale"][0].item() == pytest.approx(
        (x.max() - x.min()).item() / 15, rel=1e-3
    )


def test_one_map_reads_all_terms() -> None:
    """W of every term, the identity where one codes the vector as it is, side by side."""
    scheme, shape = Scheme(keys=SIGNS.with_(transform=Rotate()), values=SIGNS), Shape(64, 2)
    params = checked(scheme, shape, None)
    assert params["keys.read"].shape == params["values.read"].shape == (1, 64, 128)
    assert torch.equal(params["keys.read"], torch.cat((params["keys.decode"], params["keys.residual.decode"]), 2))
    assert torch.equal(params["values.read"][0, :, :64], torch.eye(64))


def test_what_is_shown_names_both() -> None:
    view = View("it", Scheme(both=SIGNS), Shape(64, 2))
    text = "\n".join(show(view, "normal-form")[1])
    assert "keys, what is left" in text and "sum_d q[d]*r[t, d] = sum_i (sum_d W[d, i]*q[d])*y[t, i]" in text
    assert "keys, what is left: r[t, d] = k[t, d] - all that is decoded before it" in "\n".join(show(view, "source")[1])
    assert [row["side"] for row in show(view, "layout")[0]["sections"]] == [
        "keys", "keys.residual", "values", "values.residual", "keys", "keys.residual", "values", "values.residual",
    ]  # fmt: skip


def test_turboquant_prod_is_two_terms() -> None:
    assert turboquant_prod3.keys.code == Codebook(2, "beta") and kvdsl.bits(turboquant_prod3).mean == 3.25
