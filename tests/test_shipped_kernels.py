"""Every kernel of every shipped scheme: clean text that compiles for a GPU and keeps all of its numbers in registers.

Kernels that were compiled before are known, see compiled.py.
The fast profile takes one shape: a few schemes on three architectures, every other scheme of even levels on one of them
in turn, but for those that differ from another in their bits alone, of two in three only `decode` and `append`, which
has the lines that pack.
KVDSL_PROFILE=thorough takes every scheme, three shapes and three architectures.  Both have, beside the shipped schemes,
one that is not.  `reach` and `received` hold less than attention does, by whose lines they score tokens, and take as
long to compile: the fast profile has those of two schemes.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from compiled import BINARIES, digest, spilled
from law_cases import SIBLINGS

from kvdsl.codegen import render
from kvdsl.codegen.aot import CompiledKernel, compile_many, line
from kvdsl.codegen.front_end import ARCHES
from kvdsl.codegen.launch import Launch
from kvdsl.codegen.launches import launches
from kvdsl.codegen.lint import faults_in
from kvdsl.codegen.plan import Plan, plan_for
from kvdsl.codegen.static import untiered
from kvdsl.rules import shape_faults
from kvdsl.scheme import Float, Recent, Scheme, Store, Uniform, per_channel, per_token
from kvdsl.schemes import ALL
from kvdsl.shape import Shape

pytest.importorskip("triton")

THOROUGH = os.environ.get("KVDSL_PROFILE") == "thorough"
SHAPES = [Shape(128, 8, 32), Shape(64, 8, 8), Shape(128, 4, 64, dtype="bf16")] if THOROUGH else [Shape(128, 8, 32)]
CALLS = r"\b(measure|encode|levels|words|products|refit|loss)_(keys|values)\("  # these differ from text to text
FEW = ("kivi4",)
RECEIVED = ("reach", "received")
MOST = ("decode", "append")
TIERS = {"kvsink2_tiers_1", "zipcache_32_tiers_0", "innerq3_tiers_0"}
"""They are tiers of other schemes in other bits, or `kivi2`: thorough takes them.  Each takes long, as Triton looks
through a whole kernel for every load of it."""
MINE = Scheme(
    keys=Store(Uniform(3), scale=per_channel(tokens=64)),
    values=Store(Uniform(5), scale=per_token(channels=16)),
    recent=Recent(64),
)
"""As a user would write it: widths of two streams, many scales a token."""


@pytest.mark.parametrize("dim", [80, 192, 256])
@pytest.mark.parametrize("name", ["kivi4", "gear4", "channel2", "turboquant_2p5"])
def test_programs_have_a_power_of_two_of_warps(name: str, dim: int) -> None:
    """Which a GPU asks for and the interpreter does not: heads of 192 channels once asked for six."""
    if shape_faults(ALL[name], shape := Shape(dim, 8, 32)):
        pytest.skip("of a scheme whose blocks do not fit such heads")
    plan = plan_for(ALL[name], shape)
    found = {one.kernel: one.warps for one in launches(plan, render(plan, "triton", name))}
    assert {kernel: warps for kernel, warps in found.items() if warps & (warps - 1)} == {}


def new(name: str, plan: Plan, text: str, seen: set[object], turn: int) -> tuple[Launch, ...]:
    """The launches of kernels that differ from all seen so far in more than their names: `merge` is the same for every
    scheme, and with equal rows `extend` is `decode`."""
    found, received = [], THOROUGH or name in (*FEW, "fp16")
    every = THOROUGH or name in FEW or turn % len(ARCHES) == turn // len(ARCHES) % len(ARCHES)  # on each in turn
    for launch in launches(plan, text):
        if launch.kernel in RECEIVED and not received or not (every or launch.kernel in MOST):
            continue
        body = text.partition(f"def {launch.kernel}(")[2].partition("\n@")[0]
        assert body
        alone = not re.search(CALLS, body)
        key = (replace(launch, kernel=""), body) if alone else object()
        if key not in seen:
            seen.add(key)
            found.append(launch)
    return tuple(found)


def arches(name: str, scheme: Scheme, turn: int) -> tuple[str, ...]:
    """The architectures that a scheme is compiled for."""
    if THOROUGH or name in FEW:
        return ARCHES
    if name in SIBLINGS | TIERS:
        return ()
    even = all(evenly(store) for store in (scheme.keys, scheme.values))
    return (ARCHES[turn % len(ARCHES)],) if even else ()


def evenly(store: Store) -> bool:
    """Whether a side's numbers lie on even levels, or are kept as they are."""
    code = store.code
    return not store.turned and (isinstance(code, Uniform) or isinstance(code, Float) and code.plain)


def decode_of(name: str, arch: str, folder: Path) -> CompiledKernel:
    """The decode kernel of a shipped scheme."""
    plan = plan_for(ALL[name], Shape(128, 8, 32))
    text, path = render(plan, "triton", name), folder / f"{name}.py"
    path.write_text(text)
    decode = [launch for launch in launches(plan, text) if launch.kernel == "decode"]
    ((kernel,),) = compile_many([(path, decode)], (arch,), cache_folder=BINARIES)
    return kernel


@pytest.mark.skipif(not THOROUGH, reason="takes long: the thorough profile compiles it")
def test_keys_in_an_order_behind_their_positions_fit_the_registers_and_tensor_memory(tmp_path: Path) -> None:
    """The order taken back by a matrix would want more tensor memory than a B200 has; `extend` has the same body."""
    kernel = decode_of("skvq2", "sm_100", tmp_path)
    assert not kernel.spilled, line(kernel)


@pytest.mark.parametrize("name", ["q5_0", "mxfp8"])
def test_what_is_stored_of_a_token_is_asked_for_ahead(name: str, tmp_path: Path) -> None:
    """Scales of one or two bytes are too narrow for it, unless those of all groups come at once: the loop waits
    for nothing but the number of a page."""
    kernel = decode_of(name, "sm_90", tmp_path)
    assert {name: count for name, count in kernel.loads.items() if name.startswith("LDG.")} == {"LDG.32": 1}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.head_dim}x{shape.group}-{shape.dtype}")
def test_every_kernel_of_every_shipped_scheme_compiles_without_spills(shape: Shape, tmp_path: Path) -> None:
    sources: dict[tuple[str, ...], list[tuple[Path, tuple[Launch, ...]]]] = {}
    seen: dict[tuple[str, ...], set[object]] = {}
    for turn, (name, scheme) in enumerate({**untiered(ALL), "mine": MINE}.items()):
        targets = arches(name, scheme, turn)
        if shape_faults(scheme, shape) or not targets:
            continue
        plan = plan_for(scheme, shape)
        text = render(plan, "triton", name)
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        assert faults_in(text, launches(plan, text)) == []
        sources.setdefault(targets, []).append((path, new(name, plan, text, seen.setdefault(targets, set()), turn)))
    faults = [fault for targets, files in sources.items() for fault in spilled(files, targets, always=THOROUGH)]
    assert not faults, "\n" + "\n".join(faults)


def test_a_kernel_is_compiled_anew_where_anything_of_it_changes(tmp_path: Path) -> None:
    """Its own text, that of a function it calls or how it is launched, and not what others do; `token4` is compiled
    every time."""
    plan = plan_for(ALL["token4"], Shape(128, 8, 32))
    text, path = render(plan, "triton", "token4"), tmp_path / "token4.py"
    path.write_text(text)
    (pack,) = (one for one in launches(plan, text) if one.kernel == "pack_keys")
    assert spilled([(path, [pack])], ["sm_90"], always=True) == []
    first = digest(path, pack, "sm_90")
    for number, (before, behind, same) in enumerate(
        [
            ("def decode(", "def decode(  # of queries", True),
            ("def pack_keys(", "def pack_keys(  # of rows", False),
            ("def measure_keys(low, high)", "def measure_keys(high, low)", False),
        ]
    ):
        assert before in text
        (other := tmp_path / f"token4_{number}.py").write_text(text.replace(before, behind))
        assert (digest(other, pack, "sm_90") == first) is same
    assert digest(path, replace(pack, warps=8), "sm_90") != first
    assert digest(path, pack, "sm_80") != first
