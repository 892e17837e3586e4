"""SQuat: KIVI's pages, keys coded so that what errs is not what queries ask (arXiv 2503.24358).

Q = S V^T of the 5 largest singular values of the prompt's queries that meet a kv head, A = I + 0.001 Q^T Q.  Channels
are coded in blocks of 64, as KIVI codes them; a block's error e moves the channels behind it by -A_LL^-1 A_Lb e, the
least |e|^2 + 0.001 |Q e|^2 that they can bring it to, before s and min of theirs are measured.  Reading is KIVI's.  Q
is of a sequence's first step, and stays for all that is packed later, where nothing of a prompt is packed yet, too.

Keys have their positions, as KIVI's and those of the released `squat_post`; the release has another form that stores
them without.  Values leave the window with the keys, 128 at a time, where KIVI lets them go one by one.  The released
quantizer moves channels in the very keys that it is given, and its scripts give all sequences of a batch the first
one's Q; here keys are never written to, and a sequence has its own.
"""

from kvdsl.scheme import Feedback, Recent, Scheme, Store, Tier, Uniform, per_channel, per_token

squat2 = Scheme(
    keys=Store(Uniform(2), scale=per_channel(tokens=32), feedback=Feedback(rank=5, weight=0.001, channels=64)),
    values=Store(Uniform(2), scale=per_token(channels=32)),
    recent=Recent(128, "whole"),
    tiers=(Tier(),),
    source="arXiv 2503.24358",
)
squat4 = squat2.with_(bits=4)
