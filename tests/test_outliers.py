"""Outlier channels with a store of their own: language, definition, accounts, calibration."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import kvdsl
from kvdsl import reference
from kvdsl.codegen.layout import lay_out
from kvdsl.codegen.plan import plan_for
from kvdsl.codegen.show import View, show
from kvdsl.errors import SchemeError, ShapeError
from kvdsl.params import checked, wanted
from kvdsl.scheme import (
    ChannelScale,
    Codebook,
    Float,
    Polar,
    PreRope,
    Rotate,
    Scheme,
    Sketch,
    Store,
    TopChannels,
    Uniform,
    per_tensor,
    per_token,
)
from kvdsl.schemes import turboquant_2p5
from kvdsl.shape import Shape

TWO = Store(Uniform(2), scale=per_token())
TOP = TopChannels(8, store=Store(Uniform(4), scale=per_token()))
PARTED = TWO.with_(outliers=TOP)


def of_keys(store: Store) -> Scheme:
    return Scheme(keys=store, values=Store())


FAULTY: list[tuple[Callable[[], Scheme], str]] = [
    (
        lambda: of_keys(TWO.with_(outliers=TopChannels(1.0))),
        "keys.outliers.n: 1.0 is no share of channels; use a share below 1, as 0.125, or a count, as 8",
    ),
    (
        lambda: of_keys(TWO.with_(outliers=TopChannels("8"))),  # type: ignore[arg-type]
        "keys.outliers.n: '8' is no number of channels; use an int from 1 to 248",
    ),
    (
        lambda: of_keys(TWO.with_(outliers=TOP.with_(by="size"))),
        "keys.outliers.by: 'size' is none of norm, absmean, absmax; use 'norm', 'absmean' or 'absmax'",
    ),
    (
        lambda: of_keys(TWO.with_(outliers=8)),
        "keys.outliers: 8 is an int, not a TopChannels or a Sparse; write outliers=TopChannels(8, store=Store(...))",
    ),
    (
        lambda: of_keys(Store(Sketch(64), outliers=TOP)),
        "keys.code: Sketch is of a whole vector, and outlier channels part it; use Uniform(bits=2) under a scale",
    ),
    (
        lambda: of_keys(TWO.with_(outliers=TopChannels(store=PARTED))),
        "keys.outliers.store.outliers: outlier channels are those of a vector as it came; leave outliers out",
    ),
    (
        lambda: of_keys(TWO.with_(outliers=TopChannels(store=TWO.with_(residual=Sketch(64))))),
        "keys.outliers.store.residual: what outlier channels leave is left of the whole vector; move residual to the "
        "outer store",
    ),
    (
        lambda: of_keys(PARTED.with_(transform=Rotate(heads=2))),
        "keys.transform[0].heads: the outlier channels of 2 heads are not the same; leave heads out",
    ),
    (
        lambda: of_keys(PARTED.with_(transform=PreRope())),
        "keys.outliers: outlier channels of keys without RoPE would have to be turned back on their own; leave it out, "
        "or leave out PreRope()",
    ),
    (
        lambda: of_keys(TWO.with_(outliers=TopChannels(store=TWO.with_(scale=per_tensor(when="calibrated"))))),
        "keys.outliers.store.scale.when: outlier channels are found in calibration data, and nothing else of them; use "
        "when='online'",
    ),
]


@pytest.mark.parametrize(("build", "sentence"), FAULTY, ids=[text.split(":")[0] for _, text in FAULTY])
def test_what_is_refused(build: Callable[[], Scheme], sentence: str) -> None:
    with pytest.raises(SchemeError) as error:
        build()
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("store", "sentence"),
    [
        (
            TWO.with_(outliers=TopChannels(0.1, store=TWO)),
            "keys.outliers.n: 6 of 64 channels are no multiple of 8 with 8 others beside it; use 8",
        ),
        (
            TWO.with_(outliers=TopChannels(64, store=TWO.with_(transform=Rotate(size=16))), transform=Rotate(size=16)),
            "keys.outliers.n: 64 of 64 channels are no multiple of 8 with 8 others beside it; use 56",
        ),
        (
            PARTED.with_(scale=per_token(channels=32)),
            "keys.scale.block.channels: groups of 32 channels do not divide the 56 channels of the store; use 8 or ALL",
        ),
        (
            TWO.with_(outliers=TopChannels(24, store=TWO.with_(transform=Rotate()))),
            "keys.outliers.store.transform[0]: a Hadamard rotation needs a power of two, 24 is none; use size=8 or "
            "kind='orthogonal'",
        ),
    ],
)
def test_what_does_not_fit_a_head(store: Store, sentence: str) -> None:
    with pytest.raises(SchemeError) as error:
        plan_for(of_keys(store), Shape(64, 2))
    assert str(error.value) == sentence


def test_every_text_holds_them() -> None:
    scheme = Scheme(both=PARTED)
    assert Scheme.from_toml(scheme.to_toml()) == Scheme.from_json(scheme.to_json()) == scheme
    assert eval(repr(scheme), vars(kvdsl.scheme)) == scheme
    assert scheme.hash != Scheme(both=TWO).hash


def test_by_hand() -> None:
    """Channels 1 and 6 of eight are coded exactly; of the others, 0 1 2 3 3 0, two bits of step 1 have every number."""
    store = TWO.with_(outliers=TopChannels(0.25))
    x = torch.tensor([0.0, 100, 1, 2, 3, 3, -50, 0])[None, None, None]
    got = reference.quantize(store, x, {"keys.outliers": torch.tensor([[6.0, 1.0]])})
    assert torch.equal(got.decoded, x.double())
    assert got.codes is not None and got.codes.flatten().tolist() == [0, 1, 2, 3, 3, 0]
    assert got.residual is not None and got.residual.coded.flatten().tolist() == [100, -50]


def test_the_page_holds_what_is_counted() -> None:
    scheme, shape = Scheme(keys=PARTED, values=TWO), Shape(64, 2)
    layout, counted = lay_out(scheme, shape), kvdsl.bits(scheme, 64, 2)
    assert layout.page_bytes == counted.mean * 2 * 64 * 2 * layout.page_tokens / 8
    assert counted.formula("keys") == (
        "56/64 x (2 + (16 + 16)/56) = 2.25 bits; of outlier channels 8/64 x (4 + (16 + 16)/8) = 1 bits; together "
        "3.25 bits"
    )
    assert counted.constants == 4 * 2 * 8  # which channels, of either head
    exact = kvdsl.bits(Scheme(both=TWO.with_(outliers=TopChannels(0.5))), 64, 2)
    assert exact.formula("keys").startswith("32/64 x (2 + (16 + 16)/32) = 1.5 bits; of outlier channels 32/64 x 16 = 8")


@pytest.mark.parametrize(("by", "first"), [("norm", 3), ("absmean", 5), ("absmax", 9)])
def test_calibration_finds_the_largest_channels(by: str, first: int) -> None:
    """One channel is large all the time, one half the time and more, one once and most: each measure has its own."""
    x = torch.randn(1, 2, 64, 32, generator=torch.Generator().manual_seed(0))
    x[:, :, :, 5] = 10
    x[:, :, ::3, 3] = 20
    x[:, :, 7, 9] = 60
    scheme = of_keys(TWO.with_(outliers=TopChannels(8, by=by, store=TWO)))  # type: ignore[arg-type]
    size = {"norm": x.norm(dim=2), "absmean": x.abs().mean(2), "absmax": x.abs().amax(2)}[by][0]
    found = kvdsl.calibrate(scheme, x, x)["keys.outliers"]
    assert (size.argmax(-1) == first).all()
    assert torch.equal(found.long(), size.topk(8).indices.sort().values)


def test_calibrated_transforms_are_of_the_other_channels() -> None:
    scheme = of_keys(PARTED.with_(transform=ChannelScale("absmax")))
    x = torch.randn(1, 2, 32, 64, generator=torch.Generator().manual_seed(0))
    x[..., 20:28] *= 50
    found = kvdsl.calibrate(scheme, x, x)
    others = torch.cat((x[..., :20], x[..., 28:]), -1)
    assert {name: tuple(x.shape) for name, x in found.items()} == wanted(scheme, Shape(64, 2))
    assert torch.equal(found["keys.transform[0]"], others.abs().amax((0, 2)))


@pytest.mark.parametrize("channels", [[0, 1, 2, 3, 4, 5, 6, 6], [0, 1, 2, 3, 4, 5, 6, 64], [0.5, 1, 2, 3, 4, 5, 6, 7]])
def test_channels_that_are_none(channels: list[float]) -> None:
    given = {"keys.outliers": torch.tensor([channels, list(range(8))])}
    with pytest.raises(ShapeError, match=r"keys.outliers.*different channels, whole numbers below 64"):
        checked(of_keys(PARTED), Shape(64, 2), given)
    with pytest.raises(ShapeError, match=r"keys.outliers.*missing; it is calibrated"):
        checked(of_keys(PARTED), Shape(64, 2), {})


def test_one_map_reads_both() -> None:
    given = {"keys.outliers": torch.arange(8.0).repeat(2, 1)}
    params = checked(of_keys(PARTED.with_(residual=Sketch(64))), Shape(64, 2), given)
    one = torch.eye(64)
    assert torch.equal(params["keys.read"][0, :, :64], torch.cat((one[:, 8:], one[:, :8]), 1))
    assert params["keys.read"].shape == (2, 64, 128)


def test_what_is_shown_names_both() -> None:
    view = View("it", turboquant_2p5, Shape(128, 2))
    text = "\n".join(show(view, "source")[1])
    assert "keys, outlier channels: o[t, d] = k[t, d] of these, 0 of the others; both are added up" in text
    sides = [row["side"] for row in show(view, "layout")[0]["sections"]]
    assert list(dict.fromkeys(sides)) == ["keys", "keys.outliers.store", "values", "values.outliers.store"]


def test_fewer_bits_lie_nearer_where_channels_are_large() -> None:
    """Eight channels ten times as large are the range of a token: without them two bits have a tenth of its step."""
    x = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    x[..., 8:16] *= 10
    given = {"keys.outliers": torch.arange(8.0, 16.0).repeat(2, 1)}
    whole = (reference.quantize(TWO, x).decoded - x)[..., :8].norm()
    parted = (reference.quantize(PARTED, x, given).decoded - x)[..., :8].norm()
    assert parted < whole / 4


def test_parts_compose() -> None:
    """Pairs of what is left in polar coordinates, a table, exact numbers of either part."""
    for main, top in (
        (Store(Float("fp16"), transform=Polar()), Store(Codebook(2, "normal"), scale=per_token())),
        (Store(Float("e4m3")), Store(Float("fp32"))),
    ):
        plan = plan_for(of_keys(main.with_(outliers=TopChannels(16, store=top))), Shape(64, 2))
        assert [term.dim for term in plan.keys.terms] == [48, 16]
