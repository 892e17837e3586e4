"""StreamingLLM: the first four tokens and the newest 1020 stay (arXiv 2309.17453).

Keys keep the positions that they came with; published code counts those of the tokens that are left anew.
"""

from kvdsl.scheme import DROP, Recent, Scheme, Sinks, Store

streaming = Scheme(both=Store(), sinks=Sinks(4), recent=Recent(1020), tiers=(DROP,), source="arXiv 2309.17453")
