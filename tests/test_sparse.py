"""Single numbers that are kept as they are: language, definition, page, and that reading them makes no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from law_cases import SPARSE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kvdsl
from kvdsl import Block, Float, LowRank, PreRope, Recent, Scheme, Sparse, Store, Uniform, per_token, reference
from kvdsl.codegen import host_slots, render
from kvdsl.codegen.launches import launches
from kvdsl.codegen.lint import faults_in
from kvdsl.codegen.plan import plan_for
from kvdsl.codegen.show import View, show
from kvdsl.codes import SLOT_TOKENS, Fill
from kvdsl.errors import SchemeError
from kvdsl.reference.sparse import kept_numbers, pick, placed
from kvdsl.scheme import ALL, SIDES, Bands, Polar, Side, TopChannels
from kvdsl.schemes import gear2, kivi2
from kvdsl.shape import Shape

NEW, NAMES = Recent(64), vars(kvdsl.scheme)
TWO = Store(Uniform(2), scale=per_token())


def taken(*args: object, **fields: object) -> Store:
    return TWO.with_(outliers=Sparse(*args, **fields))


def of_keys(store: Store, recent: Recent | None = NEW) -> Scheme:
    return Scheme(keys=store, values=Store(), recent=recent)


FAULTY: list[tuple[Store, Recent | None, str]] = [
    (taken(line=Block(ALL, 1)), NEW,
     "outliers.line.tokens: a line of all tokens cannot be appended to; use a group, as 64, or when='calibrated'"),
    (taken(line=Block(ALL)), NEW,
     "outliers.line.tokens: a line of all tokens cannot be appended to; use a group, as 64"),
    (taken(line=Block(64, 1), when="calibrated"), NEW,
     "outliers.line: calibrated thresholds are a channel's, for all of its tokens; use Block(ALL, 1), or "
     "when='online'"),
    (taken(when="calibrate"), NEW, "outliers.when: 'calibrate' is none of online, calibrated; use 'calibrated'"),
    (taken().with_(transform=PreRope(), residual=TWO), NEW,
     "residual: what is left of keys without RoPE would have to be turned back token by token, too; leave it out, or "
     "leave out PreRope()"),
    (Store(Float("fp16"), outliers=Sparse()), NEW,
     "outliers: fp16 keeps every number as it is; leave outliers out, or lower the code's bits"),
    (TWO.with_(residual=taken()), NEW,
     "residual.outliers: single numbers are taken out of a vector as it came; move outliers to the outer store"),
    (Store(Bands((taken(), TWO)), transform=Polar()), NEW,
     "code.stores[0].outliers: single numbers are taken out of a vector as it came; move outliers to the outer store"),
    (TWO.with_(outliers=TopChannels(8, store=taken())), NEW,
     "outliers.store.outliers: single numbers are taken out of a vector as it came; leave outliers out"),
    (taken(0.6), NEW, "outliers.share: 0.6 is no share of a line's numbers; use a share below 0.5, as 0.01"),
    (taken(), None, "outliers: a group of 64 tokens must wait until it is full; add recent=Recent(64)"),
    (taken(), Recent(64, "rolling"),
     "outliers: a group of 64 tokens must wait until it is full, and a rolling window lets them go one by one; use "
     "Recent(64)"),
]  # fmt: skip


@pytest.mark.parametrize(("store", "recent", "said"), FAULTY, ids=[said for *_, said in FAULTY])
def test_what_is_refused(store: Store, recent: Recent | None, said: str) -> None:
    with pytest.raises(SchemeError) as error:
        of_keys(store, recent)
    assert str(error.value) == f"keys.{said}"


def test_of_every_line_one_is_taken_at_either_end_and_some_are_left() -> None:
    """However few numbers a small head has.  A line of one or two would have none left."""
    assert [Sparse(share).taken(128) for share in (0.01, 0.0313, 0.0469)] == [1, 2, 3]
    with pytest.raises(SchemeError, match="outliers.line: of the 2 numbers of a line none is left; use a longer line"):
        plan_for(of_keys(taken(0.01, Block(2, 1))), Shape(128, 8))
    assert plan_for(of_keys(taken(0.01, Block(1, 4))), Shape(128, 8)).keys.sparse


def test_every_text_holds_them() -> None:
    for scheme in (SPARSE, gear2, of_keys(taken())):
        read = (Scheme.from_toml(scheme.to_toml()), Scheme.from_json(scheme.to_json()), eval(repr(scheme), NAMES))
        assert read == (scheme, scheme, scheme)
    assert len({of_keys(store).hash for store in (TWO, taken(), taken(slots=3), taken(fill="zero"))}) == 4


def test_a_scheme_takes_them_with_one_word() -> None:
    """Both parts go to both sides, and the window has to hold a line.  With one number in a thousand forty times too
    large, KIVI's largest error is a quarter."""
    scheme = kivi2.with_(residual=LowRank(rank=2), outliers=Sparse(0.02, Block(128, 1)))
    both = (Sparse(0.02, Block(128, 1)), Store(LowRank(2)))
    assert all((store.outliers, store.residual) == both for store in (scheme.keys, scheme.values))
    with pytest.raises(SchemeError, match=r"keys.outliers: a window of 128 tokens is no whole .* use Recent\(256\)"):
        kivi2.with_(outliers=Sparse(0.02, Block(256, 1)))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 256, 64, generator=generator)
    x = torch.where(torch.rand(x.shape, generator=generator) < 1e-3, 40 * x, x)
    plain, parted = (kvdsl.roundtrip(one, x, x, backend="torch", window=False) for one in (kivi2, scheme))
    assert all((b - x).abs().max() < 0.3 * (a - x).abs().max() for a, b in zip(plain, parted, strict=True))


def row(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)[None, None, None]


EIGHT, TIES = row(0, 9, -4, 1, 2, 3, -1, 6), row(0, 5, -3, 5, 1, -3, 2, 1)
BY_HAND: dict[str, tuple[Tensor, Sparse, Tensor, list[int]]] = {
    "the mean stands in": (EIGHT, Sparse(0.25), row(0, 2, 2, 1, 2, 3, -1, 6), [1, 2]),
    "the nearest stands in": (EIGHT, Sparse(0.25, fill="clamp"), row(0, 6, -1, 1, 2, 3, -1, 6), [1, 2]),
    "zero stands in": (EIGHT, Sparse(0.25, fill="zero"), row(0, 0, 0, 1, 2, 3, -1, 6), [1, 2]),
    "of six the farthest two are kept": (EIGHT, Sparse(0.75), row(0, 2, 2, 1, 2, 3, -1, 6), [1, 2]),
    "of equal ones the later is larger": (TIES, Sparse(0.25), row(0, 5, 1, 1, 1, -3, 2, 1), [2, 3]),
    "of equally far ones the earlier is kept": (TIES, Sparse(0.25, slots=1), row(0, 5, 1, 5, 1, -3, 2, 1), [2]),
}


@pytest.mark.parametrize(("x", "code", "filled", "places"), BY_HAND.values(), ids=BY_HAND)
def test_by_hand(x: Tensor, code: Sparse, filled: Tensor, places: list[int]) -> None:
    """A token of eight channels: which are taken and kept, what stands in for them; all else is as it was."""
    found = pick(x, code, "keys")
    assert torch.equal(found.filled, filled) and found.places.flatten().tolist() == places
    assert int(found.taken.sum()) == 8 * code.share and int(found.kept.sum()) == len(places)
    assert torch.equal(placed(kept_numbers(x - 10, found, "keys"), found, "keys"), torch.where(found.kept, x - 10, 0))


def test_a_nan_is_never_taken() -> None:
    """It counts as 0, here the largest, so that nothing is taken at that end, and a slot is left."""
    found = pick(row(-1, -2, -3, -4, float("nan"), -5, -6, -7), Sparse(0.25), "keys")
    assert found.taken.flatten().nonzero().flatten().tolist() == [7]
    assert found.used.flatten().tolist() == [True, False] and found.places.flatten().tolist() == [7, 0]
    assert found.filled[..., 4].isnan().all() and float(found.filled[..., 7]) == -3.5


def test_values_have_slots_for_every_channel() -> None:
    """Two channels of 64 tokens: of three that are far two are kept, whichever tokens they are of."""
    x = torch.zeros(1, 1, 64, 2, dtype=torch.float64)
    x[0, 0, (5, 9, 60, 63), (0, 0, 0, 1)] = torch.tensor([8.0, -4, 6, 3], dtype=torch.float64)
    found = pick(x, Sparse(4 / 64, Block(64, 1), fill="zero"), "values")
    assert found.places[0, 0, 0, :, 0].tolist() == [5, 60] and found.places[0, 0, 0, 0, 1] == 63
    assert torch.equal(placed(kept_numbers(x, found, "values"), found, "values"), x - found.filled)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("fill", ["mean", "clamp", "zero"])
@pytest.mark.parametrize("line", [Block(), Block(heads=ALL), Block(64, 1), Block(32, 16, 2)], ids=str)
def test_what_is_packed_is_what_is_defined(line: Block, fill: Fill, side: Side) -> None:
    """Bit for bit, of numbers of which most have equals, some are infinite, and some NaN, which count as 0, the largest
    of almost any line; with too few slots, and many."""
    generator = torch.Generator().manual_seed(3)
    x, rest = (2 * torch.randn(2, 2, 2, 128, 32, generator=generator)).round() / 2
    odd = torch.rand(x.shape, generator=generator)
    x = torch.where(odd < 2e-3, float("nan"), torch.where(odd > 0.999, float("inf"), x - 4))
    for slots in (2, 20):
        code = Sparse(0.2, line, slots=slots, fill=fill)
        right, got = pick(x.double(), code, side), host_slots.split(x, code, side, None)
        found = (right.places, right.used, kept_numbers(rest.double() / 3, right, side))
        if side == "keys":
            found = tuple(part.unflatten(2, (-1, SLOT_TOKENS)).mT for part in found)
        assert torch.equal(got.places, found[0]) and torch.equal(got.used, found[1])
        assert torch.equal(host_slots.kept(rest / 3, got, side), found[2].half().view(torch.int16))
        torch.testing.assert_close(got.filled.double(), right.filled, rtol=0, atol=0, equal_nan=True)
        assert bool((right.kept != right.taken).any()) if slots == 2 else not bool(got.used.all())


@pytest.mark.parametrize("side", SIDES)
def test_what_is_read_is_the_sum_of_the_parts(side: Side) -> None:
    """The store's own codes are of what stands in, the slots of what these leave, and what is left is of both."""
    x = torch.randn(1, 2, 128, 64, generator=torch.Generator().manual_seed(4))
    store = SPARSE.side(side)
    found = pick(x.double(), store.outliers, side)  # type: ignore[arg-type]
    own = reference.quantize(store.with_(outliers=None, residual=None), found.filled.float(), side=side).decoded
    right = placed(kept_numbers((x - own).float().double(), found, side), found, side)
    if isinstance(store.residual, Store):
        left = ((x - own).float() - right).float()
        right = (right + reference.quantize(store.residual, left, side=side).decoded).float().double()
    right = (own + right).float().double()
    assert torch.equal(reference.quantize(store, x, side=side).decoded, right)
    got = kvdsl.roundtrip(SPARSE.with_(sinks=None), x, x, backend="torch", window=False)[SIDES.index(side)]
    assert torch.equal(got.double(), right)


def test_slots_hold_nine_in_ten() -> None:
    x = torch.randn(1, 8, 1024, 128, generator=torch.Generator().manual_seed(5)).double()
    keys, values = (pick(x, gear2.side(side).outliers, side) for side in SIDES)  # type: ignore[arg-type]
    share = [float(found.kept.sum() / found.taken.sum()) for found in (keys, values)]
    assert share == pytest.approx([0.89, 0.86], abs=0.01)


def test_a_product_makes_no_number_that_has_no_slot() -> None:
    """Scores read the query where slots say, outputs the weights: no place is compared with a token or a channel, no
    row of a token is read, and the tensor cores meet none of them."""
    text = render(plan_for(gear2, Shape(128, 8, 32)), "triton", "gear2")
    loop = text.partition("def decode(")[2].partition("for tile in")[2].partition("    else:")[0]
    lines = [line.strip().partition(" = ")[::2] for line in loop.splitlines() if " = " in line]
    own = [said for name, said in lines if name.startswith(("ko_", "vo_")) or name in ("so", "oo0")]
    assert sum("tl.load(gathered + ko_place[:, None]" in said for said in own) == 3
    assert sum("tl.gather(p, vo_index, 0)" in said for said in own) == 2
    assert not any(word in said for said in own for word in ("tl.dot(", "==", "tl.where("))
    slots = [said for said in own if "tl.load(ko_" in said or "tl.load(vo_" in said]
    assert len(slots) == 2 * (3 + 2) and not any("None" in said for said in slots)


def test_its_kernels_are_clean_text_and_proven() -> None:
    for plan in (plan_for(SPARSE, shape) for shape in (Shape(128, 8, 32), Shape(64, 2, 4, "fp32"))):
        text = render(plan, "triton", "mine")
        assert faults_in(text, launches(plan, text)) == []
    told = "\n".join(show(View("it", gear2, Shape(128, 2)), "normal-form")[1])
    assert "q . x[t] = sum_i n[t, i]*q[m[t, i]]   [exhaustive (16 cases)]" in told
    assert "sum_t p[t]*x[t, d] = sum_i n[i, d]*p[m[i, d]]   [exhaustive (16 cases)]" in told


class Elsewhere(TorchDispatchMode):
    """Remembers operations whose results are on another device."""

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.found = device, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.device.type != self.device:
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_step_copies_nothing_to_the_device(interleaved: bool) -> None:
    """Queries of keys before RoPE: a copy of the host's would wait for the device, and no CUDA graph takes it."""
    query = torch.randn(1, 4, 1, 32, device="meta")
    host_slots.by_turned_channel(query, 2, 16, interleaved)
    with Elsewhere("meta") as seen:
        host_slots.by_turned_channel(query, 2, 16, interleaved)
    assert seen.found == []
