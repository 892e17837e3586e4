"""The sentences of docs/questions.md, with places for its tables and figures."""

from __future__ import annotations

HEAD = """# Open questions of the seed papers

Made by `python benchmarks/questions.py --page` of `benchmarks/questions.json`, which `python benchmarks/questions.py`
measures; not written by hand. What reviewers asked of QJL, KIVI, ZipCache and KVTQ and their papers leave open, answered
on SmolLM2-135M and the text of "Botchan", on a processor, by the torch kernels, whose bytes are those of the Triton ones.

* KL: of the next token's distribution from that in full precision, a token, in nats, with its standard error over
  windows. Perplexity: of the scored tokens, in brackets the interval of 95 % of what it is above full precision, by a
  bootstrap over windows.
* score error, error of outputs: size of the error of q.k, of attention's output, over the size of the exact ones, every
  layer on exact inputs, mean over layers and kv heads.
* bits: an element, scales and norms included, without exact tokens.
* The model has heads of {head_dim} channels, so what a vector has one of costs twice as many bits a number as at 128, and
  no group of a token's channels is longer than {head_dim}. It is a small model, and its weights were of 4 bits: what is
  compared here are ways to store its cache, and not models.
"""

KIVI = """## 3. KIVI: bits of overhead

Is the overhead of groups "1 to 2 bits"? Beside b bits a group of G has a scale and a least number in fp16, 32/G bits a
number: 1 bit at 32, 1/2 at 64, 1/4 at 128. So 1 bit is what KIVI has as its paper runs it, at G = 32; 2 bits take groups
of 16, or fp32 beside groups of 32. "2 bits" is 3.0 and "4 bits" is 5.0 in the measure in which QJL calls itself 3 bits.

The exact window is the other overhead, and below some thousand tokens the larger one: the newest 128 values are at 16
bits, and of keys 0 to 127, until 128 leave together. At 1k tokens it has {window_1024} bits a number of the whole, at 4k
{window_4096}, at 32k {window_32768}. Bits by `kvdsl.bits` at head_dim 128, in the limit and as the mean over the 128
lengths around each:

{kivi_bits}

`python benchmarks/questions.py bits`. What the groups are worth:

{kivi_quality}

{kivi_made} Values have no group of 128: a head has {head_dim} channels, so that the last row of either width has groups of
{head_dim} there.

Metadata is not wasted: from groups of 128 to groups of 32 the divergence falls {kivi2_ratio} times at 2 bits and
{kivi4_ratio} times at 4. But a bit of codes is worth more than a bit of metadata: 4 bits in groups of 128 lose
{kivi4_128}, 2 bits in groups of 32 {kivi2_32}, for 1.25 to 1.5 bits more.
"""

TERNARY = """## 4. KVTQ: which ternary rule

Of KVTQ only the abstract is public: "-1, 0, +1 by fine-grained dynamic quantization". It names neither threshold nor
scale nor group. The language says the rules below with a code, a range, a clip and a refit: `Codebook(levels=(-1, 0, 1))`
makes a number 0 below half of its scale; `refit` then takes another scale for the codes that came out. "Best of eight"
takes of eight shares of the largest number that which leaves the least squared error. The rule of ternary weight networks
is "0.7 of the mean, least squares" (`kvtq`), "half of the mean" that of BitNet b1.58.

A cell has bits of either side, then KL; groups of channels of a token on both sides, or of 32 tokens of a channel of keys
and 32 channels of a token of values.

{rules}

{ternary_made}

Perplexity and errors in the last layout:

{rule_errors}

* The rule decides. In the last layout ternary rules of one size are {rules_apart} times apart, the best of them is not
  that of normal numbers: "0.7 of the mean, least squares", nearly the best for those, loses {fitted_channel},
  "best of eight" {tuned_channel}.
* In groups along a token, where a few large channels stand beside small ones, the largest number has to be kept: "half of
  the largest, least squares" loses {half_fitted_short} in groups of 32 and {half_fitted_long} in groups of 64, the rule of
  ternary weight networks {fitted_short} and {fitted_long}. The refit is half of it: without it the same codes lose
  {half_short} and {half_long}.
* Along channels of keys three even levels from the least to the largest number do best ({middle_channel}); along tokens
  the same rule is the worst one in groups of 64 ({middle_long}), as a range without a level near 0 makes all small
  numbers large.
* Ternary digits are no bargain where groups are good: with keys along channels 2 bits lose {two_channel} at 3.0 bits a
  number, the best ternary rule {middle_channel} at 2.75. In groups of 64 of a token it is the other way round: {two_long}
  at 2.5 bits, {half_fitted_long} at 2.0.
* A sign alone loses {sign_channel} at 1.5 bits in the last layout, {sign_short} along tokens.

A ternary digit has log2 3 = 1.585 bits. Five in a byte are 1.6, and a token's row of digits is a whole number of 16-bit
words, which adds up to half of a word:

{digits}

`python benchmarks/questions.py bits`.
"""

SIDES = """## 5. Keys against values

Groups of 32 everywhere; keys along channels (KIVI) or along tokens, values along tokens in both. 16 is the number itself.
Rows are bits of keys, columns bits of values; cells are KL. Keys per channel:

{side_channels}

Keys per token:

{side_tokens}

{sides_made}

The same bits in all, more of them on one side or on the other; the ratio is how many times as much is lost where values
get more:

{swapped}

* Keys need the bits. Alone at 2 bits they lose {keys_channel_2} per channel and {keys_token_2} per token, values alone
  {values_2}: {ratio_channel_2} and {ratio_token_2} times as much. At 4 bits it is {keys_channel_4} and {keys_token_4}
  against {values_4}, {ratio_channel_4} and {ratio_token_4} times.
* Grouping keys along channels is worth most at few bits, as KIVI says, and little at 4: keys alone at 2 bits lose
  {keys_token_2} per token, {keys_channel_2} per channel; at 4 bits {keys_token_4} and {keys_channel_4}.
* What both sides lose is nearly the sum of what each loses alone: at 2 bits per channel {sides_both}, the two alone
  {sides_sum}. So bits can be given to sides, and to layers, one by one.

It agrees with papers that give keys more (QJL, KVTuner, Kitty, SKVQ) and is against equal bits; `vllm_k3v4_nc` gives
values more. What shipped schemes spend at head_dim 128:

{spent}
"""

WORDS = HEAD + "\n" + "\n".join((KIVI, TERNARY, SIDES))
