"""One calibrated fp32 scale for a layer's keys and one for its values (vLLM, per-tensor scales from a checkpoint).

s = max|x|/127 over calibration data, x^ = s*c with c in -127..127; numbers beyond the calibrated range saturate.
"""

from kvdsl.scheme import Scheme, Store, Uniform, per_tensor

int8_tensor = Scheme(
    both=Store(Uniform(8), scale=per_tensor(range="absmax", dtype="fp32", when="calibrated")),
    source="vLLM, per-tensor int8",
)
