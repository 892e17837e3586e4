"""Every shipped scheme by the definitions alone: the bits its pages take, and its distance from a normal vector."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from law_cases import PLAIN

import kvdsl
from kvdsl import reference
from kvdsl.params import ROPE
from kvdsl.rope import usual
from kvdsl.schemes import ALL
from kvdsl.schemes.saw_int4 import saw_int4_16
from kvdsl.shape import usual as of_table

README = Path(__file__).resolve().parent.parent / "README.md"
BITS = {
    name: float(mean)
    for name, mean in re.findall(r"^\| `(\w+)` \|.*\| (\d+\.\d{3}) \| [^|]+\|$", README.read_text(), re.MULTILINE)
}

# mean squared errors of keys and values of N(0, 1) at 128 channels; a sketch errs by (pi/2 d - 1)/rows or 0.565 d/rows
ERRORS: dict[str, tuple[float, float]] = {
    "qjl": (0.2422, 0.15456),
    "qjl_gauss": (0.7815, 0),
    "qjl_kv": (0.1412, 0.1412),
    "kvtq": (0.187, 0.187),
    "kvtq_2bit": (0.187, 0.187),
    # of 16 or 4 levels, less what two of 64 vectors have of it; of ranges without their ends
    "gear4": (0.00590, 0.00693),
    "gear2": (0.1495, 0.1495),
    "gearl4": (0.00748, 0.00934),
    "gearl2": (0.1898, 0.1892),
    # of 128 numbers in 4 levels, an eighth or a quarter of the channels, of larger numbers than others, in 16
    "kitty_pro": (0.1897, 0.2520),
    "kitty": (0.2214, 0.2520),
    "turboquant4": (0.00933, 0.00933),
    "turboquant3": (0.03396, 0.03396),
    "turboquant2": (0.1160, 0.1160),
    "turboquant1": (0.3610, 0.3610),
    # three quarters of the channels in a table of fewer bits, for vectors of 96, and a quarter in one for 32
    "turboquant_3p5": (0.02756, 0.02756),
    "turboquant_2p5": (0.09464, 0.09464),
    # a table's error times (pi/2 d - 1)/d, the error of a Gaussian sketch of what it left
    "turboquant_prod4": (0.0531, 0.0531),
    "turboquant_prod3": (0.1814, 0.1814),
    "turboquant_prod2": (0.5645, 0.5645),
    "vllm_k8v4": (7.05e-4, 0.00994),
    "vllm_4bit_nc": (0.00918, 0.00994),
    "vllm_k3v4_nc": (0.03380, 0.00994),
    "vllm_3bit_nc": (0.03380, 0.04565),
    # int8 tables, scaled so that the gain is 1; a table of 3 bits, and signs of what it leaves
    "octave_k3v4": (0.00897, 0.00929),
    "octave_k3v3": (0.00897, 0.03474),
    "octave_compact": (0.03474, 0.03474),
    "lmdeploy_k4v2": (0.01299, 0.1168),
    # a pair: (2 pi/16)^2/12 of the mean squared radius 2, and (3.15/16)^2/12 for the range of 128 radii
    "polar_pairs": (0.0143, 0.00994),
    # 2 (1 - product over the levels of the mean of cos(a - a^)), of angles on their laws
    "polar": (0.03208, 0.03208),
    "quarot4": (0.00994, 0.00994),
    "quarot2": (0.25032, 0.25032),
    # systems' own figures: of 2 bits, without the largest 5 or 10 of 128 sizes
    "kvarn_k4v2": (0.0098, 0.246),
    "kvarn_k2v2": (0.246, 0.246),
    "oscar2": (0.156, 0.127),
    "wush2": (0.157, 0.125),
    # 32 numbers in 4 bits, 64 in 2, 32 not at all, those that vary least among these very tokens
    "kvtc2": (0.249, 0.249),
    # a quarter, half and a quarter of the channels in tables of neighbouring bits; vectors as long as they were
    "block_gtq_k2v2": (0.1627, 0.1189),
    "block_gtq_k3v2": (0.0462, 0.1189),
    "block_gtq_k3v3": (0.0462, 0.0338),
    "saw_int4": (0.00994, 0.00994),
    "rotatekv4": (0.01008, 0.01008),
    "rotatekv2": (0.1715, 0.1715),
    # of 32 numbers, clip 0.92; e4m3 metadata adds 0.4 %
    "skvq2": (0.13044, 0.13044),
    "skvq_k2v1p5": (0.13044, 0.2917),
    "fp8_token_head": (6.61e-4, 6.61e-4),
    "mxfp4": (0.01321, 0.01321),
    "ultraquant4": (0.0177, 0.0177),
    "fp4_block16": (0.0127, 0.0127),
    "mxfp8": (7.13e-4, 7.13e-4),
    "mxfp8_queries": (7.13e-4, 7.13e-4),
    # of 512 numbers under 128 or 16 of them; those with positions are exact, or e4m3 under none
    "mla_fp8": (5.91e-4, 6.64e-4),
    "mla_nvfp4": (0.00812, 0.00905),
    "q8_0": (2.86e-5, 2.86e-5),
    "q4_0": (0.00739, 0.00739),
    "q4_1": (0.00612, 0.00612),
    "iq4_nl": (0.00619, 0.00619),
    # cells over the largest of 32 numbers: a quarter with each bit
    **{f"exl3_{b}": (0.0079 * 4.0 ** (4 - b), 0.0079 * 4.0 ** (4 - b)) for b in range(2, 9)},
    "int8_token_head": (4.18e-5, 4.18e-5),
    "int4_token_head_held": (0.0101, 0.0101),
    "int4_token_head_free": (0.0101, 0.0101),
    "kivi2": (0.15456, 0.15456),
    "kvtuner": (0.00618, 0.15456),
}


@pytest.mark.parametrize("name", PLAIN)
def test_pages_take_the_bits_that_the_table_says(name: str) -> None:
    tokens = reference.page_tokens(ALL[name])
    shape = of_table(ALL[name])
    numbers = 2 * tokens * shape.kv_heads * shape.head_dim
    bits = 8 * reference.page_bytes(ALL[name], shape) / numbers
    assert bits == pytest.approx(BITS[name], abs=5.1e-4)


@pytest.mark.parametrize("name", ERRORS)
def test_errors_on_normal_vectors(name: str) -> None:
    scheme, dim = ALL[name], of_table(ALL[name]).head_dim
    x = torch.randn(1, 1, 1024, dim, generator=torch.Generator().manual_seed(31))
    rope = {ROPE: usual(128)} if scheme.keys.rope is not None else {}  # turned, they are as normal as before
    both = x, x[..., : scheme.dim("values", dim)]
    given = kvdsl.calibrate(scheme, *both, x, params=rope)
    found = reference.roundtrip(scheme, *both, window=False, params=given)
    for got, x, right in zip(found, both, ERRORS[name], strict=True):
        assert (got - x).square().mean().item() == pytest.approx(right, rel=0.03, abs=1e-7)


def test_blocks_of_a_rotation_fit_heads_that_are_no_power_of_two() -> None:
    """SAW-INT4's smaller blocks: an outlier of each of 5 blocks is spread over its own 16 channels alone."""
    x = torch.randn(1, 1, 64, 80, generator=torch.Generator().manual_seed(3))
    x[..., ::16] *= 16
    turned, _ = reference.roundtrip(saw_int4_16, x, x)
    plain, _ = reference.roundtrip(ALL["token4"], x, x)
    assert (turned - x).square().mean() < 0.25 * (plain - x).square().mean()
