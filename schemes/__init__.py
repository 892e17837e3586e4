"""Every shipped scheme, by name: a scheme is one short file and one name here, and every law and table picks it up."""

from kvdsl.scheme import Scheme

from .baseline import channel2, channel3, channel4, token2, token3, token4
from .bitdecoding import bitdecoding2, bitdecoding4
from .int8 import int8_tensor
from .kivi import kivi2, kivi4
from .plain import fp16, fp32
from .token_head import int4_token_head, int8_token_head

ALL: dict[str, Scheme] = {
    "fp16": fp16,
    "fp32": fp32,
    "kivi2": kivi2,
    "kivi4": kivi4,
    "int8_token_head": int8_token_head,
    "int4_token_head": int4_token_head,
    "int8_tensor": int8_tensor,
    "bitdecoding4": bitdecoding4,
    "bitdecoding2": bitdecoding2,
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
    "int4_token_head",
    "int8_tensor",
    "int8_token_head",
    "kivi2",
    "kivi4",
    "token2",
    "token3",
    "token4",
]
