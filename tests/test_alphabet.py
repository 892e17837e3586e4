"""How codes become numbers: which alphabets are affine, that small floats are those of torch, that tables are found."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kvdsl.codegen import alphabet as alphabets
from kvdsl.codegen.alphabet import SMALL, alphabet_of, half_bits, half_number, packed_table, prove
from kvdsl.errors import ProofError
from kvdsl.scheme import Codebook, Float, Scale, Store, Uniform, per_tensor, per_token

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def of(code: object, **scale: Any) -> alphabets.Alphabet:
    measure: Scale = per_token(**scale)
    return alphabet_of(Store(code, scale=measure), 128)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FORMATS)
def test_small_floats_are_those_of_torch(name: str) -> None:
    for code in range(256):
        want = float(torch.tensor(code, dtype=torch.uint8).view(FORMATS[name]))
        got = SMALL[name].value(code)
        assert got == want or math.isnan(got) and math.isnan(want)


def test_four_bits_hold_the_numbers_of_the_standard() -> None:
    assert [SMALL["e2m1"].value(code) for code in range(16)] == [
        *(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
        *(-0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
    ]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (Uniform(4), "affine"),
        (Codebook(levels=(-1, 0, 1)), "affine"),
        (Codebook(1, "normal"), "affine"),
        (Codebook(levels=(0.25, 0.5, 0.75, 1.0)), "affine"),
        (Codebook(2, "normal"), "table"),
        (Codebook(4, "calibrated"), "table"),
        (Float("e4m3"), "pattern"),
        (Float("e2m1"), "pattern"),
    ],
    ids=str,
)
def test_evenly_spaced_levels_are_no_table(code: object, kind: str) -> None:
    assert of(code).kind == kind


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("law", ["normal", "beta"])
def test_every_table_is_found_again_in_its_registers(law: str, bits: int) -> None:
    found = of(Codebook(bits, law))  # type: ignore[arg-type]
    statements = prove(found)
    assert statements and statements[-1][1].startswith("exhaustive")
    if found.looked_up:
        assert alphabets._looked_up(found.words) == found.words
        assert len(packed_table(found.words)) == {2: 2, 3: 4, 4: 8}[bits]


def test_a_wrong_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alphabets, "_looked_up", lambda words: words[::-1])
    with pytest.raises(ProofError, match="is looked up as"):
        prove(of(Codebook(3, "normal")))


@pytest.mark.parametrize(
    ("store", "top"),
    [
        (Store(Float("e5m2"), scale=per_token()), 57344.0),
        (Store(Float("e2m1"), scale=per_token(clip=(1.0, 1.5))), 6.0),
        (Store(Codebook(levels=(-127, -3, 90)), scale=per_token(range="signed_absmax")), 127.0),
    ],
    ids=str,
)
def test_a_lifted_scale_stays_a_float16(store: Store, top: float) -> None:
    """Weights and queries carry the scale in float16: it must neither vanish nor overflow there."""
    found = alphabet_of(store, 128)
    assert store.measure is not None
    widest = max(store.measure.clip) if isinstance(store.measure.clip, tuple) else store.measure.clip
    largest = 65504.0 * widest / top * 2.0**found.lift
    assert 65504.0 / 4 < largest <= 65504.0


def test_a_given_scale_is_not_lifted() -> None:
    assert alphabet_of(Store(Codebook(4), scale=per_tensor(when="calibrated")), 128).lift == 0


def test_float16_bits_are_read_back() -> None:
    for number in (0.0, 1.5, -2.25, 65504.0, 2.0**-24):
        assert half_number(half_bits(number)) == number
