"""No quantization: the cache's own pages with the numbers themselves in them.

x^ = x rounded to the format.  The baseline of every comparison, and what `layers=` gives to a
layer that must stay exact.
"""

from kvdsl.scheme import Float, Scheme, Store

fp16 = Scheme(both=Store(Float("fp16")), source="baseline")
fp32 = Scheme(both=Store(Float("fp32")), source="baseline")
