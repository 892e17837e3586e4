"""What is legal of a residual: a store of what another one left is measured online, of the vector as it came."""

from __future__ import annotations

from collections.abc import Iterator

from .errors import Fault
from .scheme import Codebook, Float, PreRope, Rotate
from .sites import Site, rule


@rule("~.code", "~.residual")
def _something_is_left(site: Site) -> Iterator[Fault]:
    code = site.store.code
    if site.store.residual is not None and isinstance(code, Float) and code.plain:
        fact = f"{code.format} leaves nothing to code"
        yield site.fault("residual", fact, "leave residual out, or lower the code's bits")


@rule("~.code")
def _what_is_left_is_coded(site: Site) -> Iterator[Fault]:
    code = site.store.code
    if site.left and isinstance(code, Float) and code.plain:
        fact = f"what is left takes as many bits in {code.format} as the vector itself"
        yield site.fault("code", fact, f"leave residual out, and store the vector as Float({code.format!r})")


@rule("~.transform", "~.residual")
def _rotary_positions_stay_on(site: Site) -> Iterator[Fault]:
    if site.store.residual is not None and site.store.rope is not None:
        fact = "what is left of keys without RoPE would have to be turned back token by token, too"
        yield site.fault("residual", fact, "leave it out, or leave out PreRope()")
    elif site.inner and any(isinstance(part, PreRope) for part in site.store.transform):  # type: ignore[union-attr]
        fact = "RoPE comes off a vector, not off what is left of one"
        yield site.fault("transform", fact, "leave out PreRope()")


@rule("~.scale", "~.code", "~.transform")
def _what_is_left_is_measured_online(site: Site) -> Iterator[Fault]:
    if not site.inner:
        return
    scale, code = site.scale, site.store.code
    fact = "what is left is known only once the store before it is calibrated"
    fact = "outlier channels are found in calibration data, and nothing else of them" if site.apart else fact
    if scale is not None and scale.when == "calibrated":
        yield site.fault("scale.when", fact, "use when='online'")
    if scale is not None and scale.scale is not None:
        yield site.fault("scale.scale", fact, "leave the second level out")
    if isinstance(code, Codebook) and code.levels == "calibrated":
        yield site.fault("code.levels", fact, "use levels='normal', or give numbers")
    for position, part in enumerate(site.store.transform):  # type: ignore[arg-type]
        if getattr(part, "when", None) == "calibrated" and not isinstance(part, Rotate):
            yield site.fault(f"transform[{position}]", fact, "move it to the outer store")
