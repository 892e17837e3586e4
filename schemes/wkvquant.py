"""WKVQuant: channels smoothed once and for all, then levels for every token (arXiv 2402.12065, two-dimensional).

y = (x - m)/n with m and n of every channel from training; s = (max - min)/15, c = round((y - min)/s), y^ = s*c + min; s
and min in fp16, one block a token and head.  Only the past is coded: a token is exact in its own step.
The paper's groups are not known, a head's channels are one here; nor is its training, which `kvdsl calibrate` replaces
by a search.
"""

from kvdsl.scheme import ChannelScale, ChannelShift, Recent, Scheme, Store, Uniform, per_token

wkvquant4 = Scheme(
    both=Store(Uniform(4), scale=per_token(), transform=(ChannelShift("learned"), ChannelScale("learned"))),
    recent=Recent(1),
    source="arXiv 2402.12065, two-dimensional quantization; group chosen here",
)
