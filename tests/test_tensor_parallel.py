"""A model whose heads lie on several ranks: every rank caches its own as one process would cache them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import context_cases
import pytest
import tensor_parallel_cases as cases
import torch
from tensor_parallel_cases import REFUSED, SCHEMES, STATIC
from tiny import TEXT, characters, model, saved
from torch import Tensor

import kvdsl
from kvdsl.errors import ShapeError
from kvdsl.head_shares import MAPS, HeadShare, faults, params_of, scheme_of
from kvdsl.hf import measured, seen
from kvdsl.hf.layer import PackedLayer
from kvdsl.hf.tensor_parallel import shares
from kvdsl.params import checked, save
from kvdsl.scheme import (
    ALL,
    Block,
    Recent,
    Rotate,
    Router,
    Saliency,
    Scheme,
    Sparse,
    Store,
    Tier,
    Uniform,
    per_token,
)
from kvdsl.schemes import ALL as SHIPPED
from kvdsl.shape import Shape

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = Scheme(both=Store(Uniform(4), scale=per_token()))
PARTED = {
    "maps": SHIPPED["omniquant4"],
    "given maps": SHIPPED["omniquant4"],
    "channels": SHIPPED["turboquant_2p5"],
    "thresholds": Scheme(SHIPPED["kvquant3"].keys, PLAIN.values, recent=SHIPPED["kvquant3"].recent),
    "second level": PLAIN.with_(keys=SHIPPED["nvfp4"].keys.with_(**{"scale.scale.block.heads": 1})),
    "one number": SHIPPED["fp8_tensor"],
    "pairs": PLAIN.with_(**{"keys.transform": Rotate(heads=2), "values.scale.block.heads": 2}),
    "heads": PLAIN.with_(heads={(-1, 0): SHIPPED["omniquant4"], 2: SHIPPED["fp8_tensor"]}),
}
"""Schemes whose numbers have an axis of heads in every place there is, or none; and one of heads two by two."""


@pytest.mark.parametrize("name", PARTED)
def test_what_ranks_read_is_what_one_process_reads(name: str) -> None:
    """By each rank's part of the scheme and of the numbers, to the bit."""
    scheme, (k, v) = PARTED[name], torch.randn(2, 1, 4, 96, 64, generator=torch.Generator().manual_seed(1))
    k = k * torch.rand(4, 1, 64, generator=torch.Generator().manual_seed(2))
    rope = {"keys.transform[0]": 10000.0 ** -(torch.arange(0, 64, 2) / 64)} if scheme.keys.rope else None
    params = kvdsl.calibrate(scheme, k, v, params=rope, gradients=(k, v))
    if name == "given maps":
        params = {x: y for x, y in checked(scheme, Shape(64, 4), params).items() if x.rpartition(".")[2] in MAPS}
    whole = kvdsl.roundtrip(scheme, k, v, params=params, backend="torch")
    for rank in range(2):
        share = HeadShare(rank, 2, 4)
        mine = slice(share.first, share.first + share.count)
        assert not faults(scheme, share)
        own, cut = scheme_of(scheme, share), params_of(scheme, share, params)
        part = kvdsl.roundtrip(own, k[:, mine], v[:, mine], params=cut, backend="torch")
        assert all(torch.equal(got, want[:, mine]) for got, want in zip(part, whole, strict=True))


@dataclass(frozen=True, repr=False)
class Own(Router):
    """A user's: of a token's keys, alone or beside those of all heads."""

    every: int = 8
    together: bool = False

    def importance(self, keys: Tensor, values: Tensor) -> Tensor:
        size = keys.float().norm(dim=-1)
        return size - size.mean(1, keepdim=True) if self.together else size


def routed(router: Router) -> Scheme:
    return PLAIN.with_(tiers=(Tier(8, top=0.5), Tier(4)), router=router)


def test_what_spans_heads_of_several_ranks_is_refused_by_its_field() -> None:
    """Of 8 heads on 2 ranks four together are one rank's, on 4 ranks they are not; a group of a table may be."""
    token = Store(Uniform(4), scale=per_token())
    four = PLAIN.with_(keys=token.with_(transform=Rotate(heads=4)))
    every = PLAIN.with_(**{"values.scale.block.heads": ALL})
    sparse = PLAIN.with_(values=token.with_(outliers=Sparse(line=Block(heads=ALL))), recent=Recent(64))
    layer, own, together = routed(Saliency(per="layer")), routed(Own()), routed(Own(together=True))
    listed = PLAIN.with_(heads={(0, 1): every, (2, 5): layer})
    said = {
        ("keys.transform[0].heads", 4): four, ("values.scale.block.heads", 2): every,
        ("values.outliers.line.heads", 2): sparse, ("router.per", 2): layer, ("router", 2): together,
        ("heads[2].router.per", 2): listed,
    }  # fmt: skip
    for (place, ranks), scheme in said.items():
        found = [faults(scheme, HeadShare(rank, ranks, 8)) for rank in range(ranks)]
        assert [fault.place for fault in found[0]] == [place] and found == found[:1] * ranks
    (fault,) = faults(every, HeadShare(0, 2, 8))
    assert "over all 8 heads, of which a rank of 2 has 4; use heads=1 or 2 or 4, or fewer ranks" in str(fault)
    allowed = [four, own, PLAIN.with_(**{"values.scale.block.heads": 4}), routed(Saliency()), SHIPPED["int8_tensor"]]
    assert not any(faults(scheme, HeadShare(1, 2, 8)) for scheme in allowed)
    assert not faults(PLAIN.with_(heads={(0, 1): every}), HeadShare(0, 4, 8))


def test_ranks_have_whole_heads() -> None:
    """By the model's plan: an even number of heads each, all of them where keys are not cut, or an error."""
    plan = {"model.layers.*.self_attn.k_proj": "colwise"}
    mesh = SimpleNamespace(get_local_rank=lambda name: 1)
    cut = SimpleNamespace(config=model("llama").config, tp_size=2, tp_plan=plan, _device_mesh=mesh)
    assert shares(cut, 3) == [HeadShare(1, 2, 2)] * 3
    assert shares(SimpleNamespace(config=cut.config, tp_size=2, tp_plan={}), 2) == [None, None]
    assert shares(model("llama"), 2) == [None, None]
    with pytest.raises(ValueError, match="model: 4 ranks do not divide 2 kv heads; use as many ranks as divide them"):
        shares(SimpleNamespace(config=cut.config, tp_size=4, tp_plan=plan), 2)
    layer = PackedLayer(PLAIN, kv_heads=2)
    layer.update(*torch.zeros(2, 1, 4, 3, 32))
    with pytest.raises(ShapeError, match="keys: 4 heads, and by the model's tp_plan a rank has 2"):
        layer.settle()


def test_ranks_generate_what_one_process_generates(tmp_path: Path) -> None:
    """The same tokens on every rank; keys and values of a rank's heads but for a few codes, as sums of a model's
    products are in another order.  What spans ranks is refused by each of them before the first token.

    All in one test: processes take seconds to start."""
    pytest.importorskip("accelerate", reason="the extra `tp` is not installed")
    if torch._C._get_accelerator().type != "cpu":
        pytest.skip("here ranks of a model are GPUs")
    saved("llama", tmp_path / "model", **cases.SIZES)
    whole, scheme = cases.alone(tmp_path), SCHEMES["skvq2"]
    ids = torch.tensor([characters()(TEXT[:100])["input_ids"]])
    save(tmp_path / "skvq2.safetensors", scheme, measured(scheme, whole, seen(scheme, whole, ids)))
    ranks = context_cases.run(2, cases.all_of, tmp_path, tmp_path)
    for name, (tokens, *dense) in cases.held(whole, tmp_path).items():
        for rank, one in enumerate(ranks):
            assert torch.equal(one["held"][name][0], tokens), name
            for got, want in zip(one["held"][name][1:], dense, strict=True):
                want = want[:, 2 * rank : 2 * rank + 2]
                assert got.shape == want.shape and (got - want).norm() < 1e-2 * want.norm(), name
    assert all(torch.equal(one["static"], cases.in_place(whole)) for one in ranks), STATIC
    for said in (one["said"] for one in ranks):
        assert said.keys() == {*REFUSED, "calibrate"}
        assert "SchemeError: values.scale.block.heads: a scale is measured over all 4" in said["zipcache"]
        assert "values.outliers.line.heads: the largest numbers" in said["kvquant3"]
        assert "calibrate in one process, without tp_plan" in said["calibrate"]
