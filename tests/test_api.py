"""kvdsl.roundtrip, scores, attend and calibrate, and the file of calibrated numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from api_cases import (
    BATCH,
    DIM,
    GROUP,
    HEADS,
    SCHEMES,
    TOKENS,
    agrees_on_attend,
    agrees_on_roundtrip,
    agrees_on_scores,
    tensors,
)

import kvdsl
from kvdsl import ShapeError
from kvdsl.params import checked, load, save, wanted
from kvdsl.shape import Shape

SHAPE = Shape(DIM, HEADS, HEADS * GROUP, "fp32")


@pytest.mark.parametrize("window", [True, False])
@pytest.mark.parametrize("name", SCHEMES)
def test_roundtrip_is_the_definition(name: str, window: bool) -> None:
    agrees_on_roundtrip(name, window, backend="torch")


@pytest.mark.parametrize("window", [True, False])
@pytest.mark.parametrize("name", SCHEMES)
def test_scores_are_near_the_definition(name: str, window: bool) -> None:
    agrees_on_scores(name, window, backend="torch")


@pytest.mark.parametrize("queries", [1, 7, TOKENS])
@pytest.mark.parametrize("window", [True, False])
@pytest.mark.parametrize("name", SCHEMES)
def test_attend_is_near_the_definition(name: str, window: bool, queries: int) -> None:
    agrees_on_attend(name, window, queries, backend="torch")


@pytest.mark.parametrize(
    "options",
    [{"scale": 0.3}, {"sliding": 20}, {"start": 11}, {"start": torch.tensor([0, 90])}, {"softcap": 5.0}],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("window", [True, False])
def test_attend_takes_what_the_reference_takes(window: bool, options: dict[str, Any]) -> None:
    agrees_on_attend("whole", window, 3, backend="torch", **options)


def test_a_scheme_that_was_loaded_by_name_goes_in() -> None:
    _, k, v = tensors()
    assert kvdsl.roundtrip(kvdsl.load("kivi2"), k, v, backend="torch")[0].shape == k.shape


@pytest.mark.parametrize("batch,tokens", [(0, 32), (1, 0)])
def test_nothing_gives_nothing(batch: int, tokens: int) -> None:
    k = torch.zeros(batch, HEADS, tokens, DIM)
    for window in (True, False):
        assert kvdsl.roundtrip(SCHEMES["whole"], k, k, window=window, backend="torch")[0].shape == k.shape


def test_the_inputs_are_not_changed() -> None:
    given = tensors()
    before = [x.clone() for x in given]
    kvdsl.attend(SCHEMES["whole"], *given, backend="torch")
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


def test_strided_tensors_are_read_as_they_are() -> None:
    _, k, v = tensors()
    strided = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    for window in (True, False):
        straight = kvdsl.roundtrip(SCHEMES["whole"], k, v, window=window, backend="torch")[0]
        assert torch.equal(kvdsl.roundtrip(SCHEMES["whole"], strided, v, window=window, backend="torch")[0], straight)


K = torch.zeros(BATCH, HEADS, TOKENS, DIM)
WRONG = {
    "k: list is no tensor": lambda s: kvdsl.roundtrip(s, [1], K),
    "k: shape (2, 96, 32) has 3 axes; give (batch, kv_heads, tokens, head_dim)": lambda s: kvdsl.roundtrip(
        s, K[:, 0], K
    ),
    "k: torch.float64 is none of float16, bfloat16, float32; convert it to one": lambda s: kvdsl.roundtrip(
        s, K.double(), K
    ),
    "v: shape (2, 2, 95, 32) is not": lambda s: kvdsl.roundtrip(s, K, K[:, :, 1:]),
    "v: torch.float16 is not the kernels' torch.float32": lambda s: kvdsl.roundtrip(s, K, K.half()),
    "k: it requires a gradient": lambda s: kvdsl.roundtrip(s, K.clone().requires_grad_(), K),
    "k: 95 tokens are no whole number of blocks of 32; give a multiple of 32": lambda s: kvdsl.roundtrip(
        s, K[:, :, 1:], K[:, :, 1:], window=False
    ),
    "shape.q_heads: 3 query heads are no multiple of 2 kv heads": lambda s: kvdsl.scores(
        s, torch.zeros(2, 3, 1, DIM), K
    ),
    "q: 97 queries for 96 tokens": lambda s: kvdsl.attend(s, torch.zeros(2, 2, 97, DIM), K, K),
    "sliding: 0 is no positive number of tokens": lambda s: kvdsl.attend(s, K[:, :, :1], K, K, sliding=0),
    "start: (3,) of torch.int64; give an integer": lambda s: kvdsl.attend(
        s, K[:, :, :1], K, K, start=torch.zeros(3).long()
    ),
    "shape.head_dim: 20 is no multiple of 8": lambda s: kvdsl.roundtrip(s, K[..., :20], K[..., :20]),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_tensor_is_refused_in_words(message: str) -> None:
    with pytest.raises(ShapeError) as caught:
        WRONG[message](SCHEMES["whole"])
    assert str(caught.value).startswith(message)


def test_a_backend_that_is_none_is_refused() -> None:
    with pytest.raises(kvdsl.BackendError, match="'cuda' is none of"):
        kvdsl.roundtrip(SCHEMES["whole"], K, K, backend="cuda")


# -- calibrated numbers ----------------------------------------------------------------------------------------------


def test_calibration_measures_the_largest_number_of_all_tokens() -> None:
    k = torch.zeros(2, HEADS, 5, DIM)
    k[1, 0, 3, 7], v = -254.0, torch.full_like(k, 3.0)
    found = kvdsl.calibrate(kvdsl.load("int8_tensor"), k, v)
    assert found["keys.scale"].tolist() == [[2.0]]
    assert found["values.scale"].tolist() == [[(torch.tensor(3.0) / 127).item()]]


def test_a_scheme_without_calibrated_scales_wants_nothing() -> None:
    assert kvdsl.calibrate(SCHEMES["whole"], K, K) == {} and wanted(SCHEMES["whole"], SHAPE) == {}


def test_an_offset_stands_behind_its_scale() -> None:
    _, k, v = tensors()
    found = kvdsl.calibrate(SCHEMES["static"], k, v)
    assert wanted(SCHEMES["static"], SHAPE) == {"keys.scale": (2, 1, 1), "values.scale": (2, 1, 1)}
    assert found["keys.scale"][1, 0, 0] == k.min()


@pytest.mark.parametrize(
    "name, place, call",
    [
        ("smoothquant8", r"keys.transform\[0\]", r"\(scheme, k, v, q\) of typical k, v and q"),
        ("omniquant4", r"keys.transform\[0\]", r"\(scheme, k, v\) of typical k and v"),
        ("nvfp4", "keys.scale.scale", r"\(scheme, k, v\) of typical k and v"),
    ],
)
def test_a_scheme_without_its_numbers_says_how_to_make_them(name: str, place: str, call: str) -> None:
    told = rf"^params\['{place}'\]: missing; it is calibrated, give params=kvdsl.calibrate{call}$"
    with pytest.raises(ShapeError, match=told):
        kvdsl.roundtrip(kvdsl.load(name), K, K)


def test_missing_numbers_and_wrong_ones_are_refused_in_words() -> None:
    scheme = SCHEMES["static"]
    with pytest.raises(ShapeError, match=r"params\['keys.scale'\]: missing; .*kvdsl.calibrate"):
        kvdsl.roundtrip(scheme, K, K)
    good = torch.ones(2, 1, 1)
    for bad, message in (
        (torch.ones(1, 1), r"shape \(1, 1\); the right one is \(2, 1, 1\)"),
        (torch.full((2, 1, 1), torch.nan), "no finite floats"),
        ([1.0], "list is no tensor"),
    ):
        with pytest.raises(ShapeError, match=message):
            checked(scheme, SHAPE, {"keys.scale": good, "values.scale": bad})  # type: ignore[dict-item]
    with pytest.raises(ShapeError, match="holds no token"):
        kvdsl.calibrate(scheme, K[:, :, :0], K[:, :, :0])
    with pytest.raises(ShapeError, match="no finite floats"):
        kvdsl.calibrate(scheme, torch.full_like(K, torch.nan), K)


def test_the_file_comes_back_and_knows_its_scheme(tmp_path: Path) -> None:
    _, k, v = tensors()
    numbers, path = kvdsl.calibrate(SCHEMES["static"], k, v), tmp_path / "scales.safetensors"
    save(path, SCHEMES["static"], numbers)
    found = load(path, SCHEMES["static"])
    assert found.keys() == numbers.keys() and all(torch.equal(found[name], numbers[name]) for name in found)
    with pytest.raises(ShapeError, match=rf"belongs to scheme {SCHEMES['static'].hash}, not to"):
        load(path, SCHEMES["whole"])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("raw", [b"", b"\xff" * 16, b"\x02\0\0\0\0\0\0\0{}", (1 << 30).to_bytes(8, "little") + b"{}"])
def test_a_file_of_another_kind_is_refused(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(ShapeError, match="x.safetensors"):
        load(path, SCHEMES["static"])
    with pytest.raises(ShapeError, match="no safetensors file"):
        load(tmp_path / "none", SCHEMES["static"])
