"""Every shipped scheme, by name: a scheme is one short file and one name here, and every law and table picks it up."""

from kvdsl.scheme import Scheme

from .baseline import channel2, channel3, channel4, token2, token3, token4
from .bitdecoding import bitdecoding2, bitdecoding4
from .fp4 import mxfp4, nvfp4, nvfp4_4over6
from .fp8 import fp8_tensor, fp8_token_head
from .gear import gear2, gear4, gearl2, gearl4
from .h2o import h2o
from .hf_quantized import hf_quanto4
from .innerq import innerq, innerq3
from .int8 import int8_tensor
from .kitty import kitty, kitty_pro
from .kivi import kivi2, kivi2_sinks, kivi4
from .kvarn import kvarn_even, kvarn_k2v2, kvarn_k4v2
from .kvquant import kvquant2, kvquant3, kvquant4, nuq2, nuq3, nuq4
from .kvsink import kvsink2
from .kvtq import kvtq, kvtq_2bit
from .kvtuner import kvtuner
from .llama_cpp import iq4_nl, q4_0, q4_1, q5_0, q5_1, q8_0
from .mikv import mikv
from .omniquant import omniquant4
from .oscar import oscar2
from .plain import fp16, fp32
from .polar import polar, polar_pairs
from .qjl import qjl, qjl_gauss, qjl_kv
from .quarot import quarot2, quarot4
from .roco import roco
from .rotatekv import rotatekv2, rotatekv3, rotatekv4
from .saw_int4 import saw_int4
from .skvq import skvq2, skvq_k2v1p5
from .smoothquant import smoothquant8
from .snapkv import snapkv
from .streaming import streaming
from .token_head import int4_token_head, int8_token_head
from .turboquant import (
    turboquant1,
    turboquant2,
    turboquant3,
    turboquant4,
    turboquant_2p5,
    turboquant_3p5,
    turboquant_prod2,
    turboquant_prod3,
    turboquant_prod4,
)
from .vllm_turboquant import vllm_3bit_nc, vllm_4bit_nc, vllm_k3v4_nc, vllm_k8v4
from .wkvquant import wkvquant4
from .zipcache import zipcache, zipcache_32, zipcache_84, zipcache_code

ALL: dict[str, Scheme] = {
    "fp16": fp16,
    "fp32": fp32,
    "kivi2": kivi2,
    "kivi4": kivi4,
    "kivi2_sinks": kivi2_sinks,
    "int8_token_head": int8_token_head,
    "int4_token_head": int4_token_head,
    "int8_tensor": int8_tensor,
    "bitdecoding4": bitdecoding4,
    "bitdecoding2": bitdecoding2,
    "qjl": qjl,
    "qjl_gauss": qjl_gauss,
    "qjl_kv": qjl_kv,
    "kvtq": kvtq,
    "kvtq_2bit": kvtq_2bit,
    "nuq4": nuq4,
    "nuq3": nuq3,
    "nuq2": nuq2,
    "kvquant4": kvquant4,
    "kvquant3": kvquant3,
    "kvquant2": kvquant2,
    "gear4": gear4,
    "gearl4": gearl4,
    "gear2": gear2,
    "gearl2": gearl2,
    "kitty_pro": kitty_pro,
    "kitty": kitty,
    "kvsink2": kvsink2,
    "kvtuner": kvtuner,
    "turboquant4": turboquant4,
    "turboquant3": turboquant3,
    "turboquant2": turboquant2,
    "turboquant1": turboquant1,
    "turboquant_3p5": turboquant_3p5,
    "turboquant_2p5": turboquant_2p5,
    "turboquant_prod4": turboquant_prod4,
    "turboquant_prod3": turboquant_prod3,
    "turboquant_prod2": turboquant_prod2,
    "vllm_k8v4": vllm_k8v4,
    "vllm_4bit_nc": vllm_4bit_nc,
    "vllm_k3v4_nc": vllm_k3v4_nc,
    "vllm_3bit_nc": vllm_3bit_nc,
    "polar": polar,
    "polar_pairs": polar_pairs,
    "quarot4": quarot4,
    "quarot2": quarot2,
    "rotatekv4": rotatekv4,
    "rotatekv3": rotatekv3,
    "rotatekv2": rotatekv2,
    "innerq3": innerq3,
    "innerq": innerq,
    "kvarn_k4v2": kvarn_k4v2,
    "kvarn_k2v2": kvarn_k2v2,
    "kvarn_even": kvarn_even,
    "oscar2": oscar2,
    "saw_int4": saw_int4,
    "skvq2": skvq2,
    "skvq_k2v1p5": skvq_k2v1p5,
    "smoothquant8": smoothquant8,
    "omniquant4": omniquant4,
    "wkvquant4": wkvquant4,
    "zipcache": zipcache,
    "zipcache_84": zipcache_84,
    "zipcache_32": zipcache_32,
    "zipcache_code": zipcache_code,
    "mikv": mikv,
    "h2o": h2o,
    "roco": roco,
    "streaming": streaming,
    "snapkv": snapkv,
    "hf_quanto4": hf_quanto4,
    "fp8_tensor": fp8_tensor,
    "fp8_token_head": fp8_token_head,
    "mxfp4": mxfp4,
    "nvfp4": nvfp4,
    "nvfp4_4over6": nvfp4_4over6,
    "q8_0": q8_0,
    "q5_1": q5_1,
    "q5_0": q5_0,
    "q4_1": q4_1,
    "q4_0": q4_0,
    "iq4_nl": iq4_nl,
    "token2": token2,
    "token3": token3,
    "token4": token4,
    "channel2": channel2,
    "channel3": channel3,
    "channel4": channel4,
}

__all__ = [
    "ALL",
    "bitdecoding2",
    "bitdecoding4",
    "channel2",
    "channel3",
    "channel4",
    "fp16",
    "fp32",
    "fp8_tensor",
    "fp8_token_head",
    "gear2",
    "gear4",
    "gearl2",
    "gearl4",
    "h2o",
    "hf_quanto4",
    "innerq",
    "innerq3",
    "int4_token_head",
    "int8_tensor",
    "int8_token_head",
    "iq4_nl",
    "kitty",
    "kitty_pro",
    "kivi2",
    "kivi2_sinks",
    "kivi4",
    "kvarn_even",
    "kvarn_k2v2",
    "kvarn_k4v2",
    "kvquant2",
    "kvquant3",
    "kvquant4",
    "kvsink2",
    "kvtq",
    "kvtq_2bit",
    "kvtuner",
    "mikv",
    "mxfp4",
    "nuq2",
    "nuq3",
    "nuq4",
    "nvfp4",
    "nvfp4_4over6",
    "omniquant4",
    "oscar2",
    "polar",
    "polar_pairs",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
    "qjl",
    "qjl_gauss",
    "qjl_kv",
    "quarot2",
    "quarot4",
    "roco",
    "rotatekv2",
    "rotatekv3",
    "rotatekv4",
    "saw_int4",
    "skvq2",
    "skvq_k2v1p5",
    "smoothquant8",
    "snapkv",
    "streaming",
    "token2",
    "token3",
    "token4",
    "turboquant1",
    "turboquant2",
    "turboquant3",
    "turboquant4",
    "turboquant_2p5",
    "turboquant_3p5",
    "turboquant_prod2",
    "turboquant_prod3",
    "turboquant_prod4",
    "vllm_3bit_nc",
    "vllm_4bit_nc",
    "vllm_k3v4_nc",
    "vllm_k8v4",
    "wkvquant4",
    "zipcache",
    "zipcache_32",
    "zipcache_84",
    "zipcache_code",
]
