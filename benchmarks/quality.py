"""`python benchmarks/quality.py [ALL VARIANTS]`: docs/quality.md, what a real model loses through every shipped scheme.

ALL and VARIANTS are folders of `kvdsl eval --out`: of `--all`, and of the schemes in benchmarks/variants.py.  Their
figures are kept in benchmarks/results/quality/, without those of single layers; without folders the page is made from
there.  `--add FOLDER ...` takes in schemes that have come since.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import kvdsl
import kvdsl.schemes
from kvdsl.codegen.answer import finite, table_of
from kvdsl.errors import SchemeError
from kvdsl.evaluation.results import Evaluation, Perplexity, SchemeResult, Tasks
from kvdsl.evaluation.summary import standard_error
from kvdsl.evaluation.tables import done, losses, remarks
from kvdsl.scheme import Scheme
from kvdsl.search_pairs import front

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "results" / "quality"
NAMES = ("all", "variants")
PAGE = """# Quality

What a real model loses through every shipped scheme. Made by the commands below; not written by hand.

<!-- not run: takes minutes -->
```console
$ kvdsl eval --all --model smollm2 --workers 2 --out build/all
$ kvdsl eval $(python benchmarks/variants.py) --model smollm2 --tasks perplexity --out build/variants
$ python benchmarks/quality.py build/all build/variants
```

{about}

{count} schemes; {minutes} minutes of processes, two of which shared two cores with other work.

## Every scheme

The scheme that loses least stands first.

* bits: an element at this model's heads, of a sequence without end; at length: of {length} tokens, with those that
  stand there exactly.
* KL: of the next token's distribution from that in full precision, in nats a token, and its standard error over
  windows; same: the same likeliest token.
* passkey, needle: answers that are exact, and the loss of their tokens; copy: tokens of a passage that comes again.
* greedy: tokens equal to full precision, and how many before the first other one.
* errors: relative, means over layers and heads.
* A star: the scheme says that a prompt reads what is stored of itself. Others attend to a prompt exactly and then pack
  it. With a star errors pass from layer to layer, and the line tells of that, not of the code alone: `quarot4` is
  `token4_rotated` below otherwise.

{everything}

Nothing of {length} tokens is dropped or packed yet by {whole}. None of the others has fewer bits and less KL than, by
bits without end: {best}; by bits at length: {held_best}.

{left_out}

## Which scheme at 2, 3 and 4 bits

The three that lose least, by bits of a sequence without end. A long exact window costs nothing there, and much of a
thousand tokens.

{without_end}

By the bits that were held at this length:

{at_length}

"Behind the first" is of the same windows, with its standard error.

## What theory says, and what was measured

Of {laws} pairs {holding} are as theory has them, by more than two standard errors of the difference over windows. The
pairs that differ in one choice alone are in `benchmarks/variants.py`.

{theory}
"""
BUDGETS = (2.5, 3.5, 4.5)
EXACT = 16.0  # bits
HEADS = (64, 3)  # head_dim and kv heads of the model


def kept(name: str) -> Evaluation:
    """The figures of the page."""
    return Evaluation.from_dict(json.loads((KEPT / f"{name}.json").read_text()))


def keep(name: str, folder: Path) -> None:
    """A folder's results without what the page does not tell: errors layer by layer, places, texts."""
    _write(name, _of(folder))


def add(folders: Sequence[Path]) -> None:
    """Results of schemes that have come since, of the same model, text and settings, join those of all, or take their
    place; of a scheme that does not fit the model is said why."""
    found = kept(NAMES[0])
    results = {one.scheme: one for one in found.results}
    for more in map(_of, folders):
        if (more.about_model, more.about_text, more.settings) != (found.about_model, found.about_text, found.settings):
            raise SystemExit("the folders are of another model, text or settings than what is kept")
        results |= {one.scheme: one for one in more.results}
    for name, scheme in kvdsl.schemes.ALL.items():
        if name not in results:
            results[name] = _refused(name, scheme)
    _write(NAMES[0], dataclasses.replace(found, results=tuple(results[name] for name in kvdsl.schemes.ALL)))


def _refused(name: str, scheme: Scheme) -> SchemeResult:
    """Why it does not fit; SystemExit for a scheme that fits, and has not been measured."""
    try:
        kvdsl.bits(scheme, *HEADS)
    except SchemeError as error:
        known: dict[str, Any] = {"scheme": name, "hash": scheme.hash, "source": scheme.source, "refused": str(error)}
        return SchemeResult(**known, bits=None, perplexity=None, delta=None, tasks=Tasks())
    raise SystemExit(f"{name} is not measured")


def _of(folder: Path) -> Evaluation:
    return Evaluation.from_dict(json.loads((folder / "results.json").read_text()))


def _write(name: str, found: Evaluation) -> None:
    results = tuple(_reduced(one) for one in found.results)
    text = json.dumps(finite(dataclasses.replace(found, results=results).to_dict()), allow_nan=False)
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"{name}.json").write_text(text.replace('{"scheme": ', '\n{"scheme": ') + "\n")


def _reduced(one: SchemeResult) -> SchemeResult:
    changed = dict[str, Any]()
    if one.tasks.perplexity:
        changed["perplexity"] = dataclasses.replace(one.tasks.perplexity, kl_by_place=())
    if one.tasks.greedy:
        changed["greedy"] = dataclasses.replace(one.tasks.greedy, continuations=())
    if one.tasks.layers:
        grids = [field.name for field in dataclasses.fields(one.tasks.layers) if field.type == "Grid"]
        none: dict[str, Any] = dict.fromkeys([*grids, "outliers"], ())
        changed["layers"] = dataclasses.replace(one.tasks.layers, **none)
    return dataclasses.replace(one, tasks=dataclasses.replace(one.tasks, **changed))


@dataclasses.dataclass(frozen=True)
class Law:
    """`better` should lose less than `worse`: what theory says, by `why`.  `note`: why it is otherwise, if it is."""

    better: str
    worse: str
    why: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Compared:
    """How much KL `worse` has beyond `better`: the mean over windows, its standard error, and the ratio of means."""

    more: float
    error: float
    ratio: float

    @property
    def verdict(self) -> str:
        """Two standard errors count as a difference."""
        if abs(self.more) <= 2 * self.error:
            return "not told apart"
        return "yes" if self.more > 0 else "no"


LAWS = (
    Law("token4", "token3", "one bit more"),
    Law("token3", "token2", "one bit more"),
    Law("channel4", "channel3", "one bit more"),
    Law("channel3", "channel2", "one bit more"),
    Law("kivi4", "kivi2", "two bits more"),
    Law("nuq4", "nuq3", "one bit more"),
    Law("nuq3", "nuq2", "one bit more"),
    Law("kvquant4", "kvquant3", "one bit more"),
    Law("kvquant3", "kvquant2", "one bit more"),
    Law("turboquant4", "turboquant3", "one bit more"),
    Law("turboquant3", "turboquant2", "one bit more"),
    Law("turboquant2", "turboquant1", "one bit more"),
    Law("gear4", "gear2", "two bits more"),
    Law("q8_0", "q5_0", "three bits more"),
    Law("q5_0", "q4_0", "one bit more"),
    Law("q5_1", "q4_1", "one bit more"),
    Law("int8_token_head", "int4_token_head", "four bits more"),
    Law("quarot4", "quarot2", "two bits more"),
    Law("rotatekv4", "rotatekv2", "two bits more"),
    Law("zipcache_84", "zipcache", "8 and 4 bits over 4 and 2"),
    Law("zipcache", "zipcache_32", "4 and 2 bits over 3 and 2"),
    Law("kivi2", "kivi2_group64", "groups of 32 over groups of 64"),
    Law("token2_group32", "token2", "groups of 32 over groups of 64"),
    Law(
        "token4_group32",
        "token4",
        "groups of 32 over groups of 64",
        "at 4 bits two windows of five lose less in groups of 64; the mean hardly differs",
    ),
    Law("kivi2_window32", "kivi2_keys_by_token", "keys per channel over keys per token, values alike, 2 bits"),
    Law(
        "kivi4_window32",
        "kivi4_keys_by_token",
        "keys per channel over keys per token, values alike, 4 bits",
        "at 4 bits groups of 32 channels keep large channels apart well enough, and of keys per token 32 are always "
        "exact, of keys per channel 0 to 31",
    ),
    Law("kivi2_window32", "kivi2_values_by_channel", "values per token over values per channel, keys alike, 2 bits"),
    Law("kivi2", "token2", "KIVI over tokens with one scale, 2 bits"),
    Law("kivi2", "kivi2_window32", "128 exact tokens over 32"),
    Law("kivi2_sinks", "kivi2", "four sinks exact"),
    Law("token2_rotated", "token2", "a rotation before scales per token, 2 bits"),
    Law("token4_rotated", "token4", "a rotation before scales per token, 4 bits"),
    Law("kivi2_rotated_values", "kivi2", "a rotation before scales per token, values of 2 bits"),
    Law(
        "kivi2",
        "kivi2_rotated_keys",
        "a rotation spreads what scales per channel keep apart, keys of 2 bits",
        "rotated keys lose less under scales per channel, too. The papers' findings are of larger models with larger "
        "outlier channels; that was not measured here",
    ),
    Law("kvquant2", "nuq2", "one number in a hundred exact, 2 bits"),
    Law("kvquant4", "nuq4", "one number in a hundred exact, 4 bits"),
    Law(
        "gear2",
        "kivi2_window32",
        "low rank and sparse numbers for what KIVI left",
        "the difference varies as much between windows as it is large",
    ),
    Law("gear2", "gearl2", "sparse numbers beside low rank"),
    Law("q4_1", "q4_0", "a minimum beside the scale"),
    Law("nvfp4", "mxfp4", "scales of e4m3 for 16 numbers over powers of two for 32"),
    Law("nvfp4_4over6", "nvfp4", "two ranges to choose from"),
    Law(
        "iq4_nl",
        "q4_0",
        "levels where the numbers are",
        "both are read by the prompt itself, so that errors of layers add up, and differ more between windows than "
        "their levels do",
    ),
    Law("kitty_pro", "kitty", "twice as many channels of 4 bits"),
    Law("kitty", "kivi2", "some channels of keys with 4 bits"),
    Law(
        "zipcache",
        "h2o",
        "2 bits for tokens of little weight over none",
        "of 1024 tokens h2o holds 128 and a fifth of the others exactly, 4.9 bits an element to 3.6, and a page of a "
        "novel asks little of the tokens that it dropped; retrieval does (passkey and needle above)",
    ),
    Law("turboquant2", "turboquant_prod2", "all bits for levels over one bit for a sketch of what they left"),
)
"""What theory says of pairs; the first of a pair and the second differ by what `why` names, or by that above all."""


def scored(one: SchemeResult) -> Perplexity:
    """Its figures of the text, which every scheme here has."""
    found = one.tasks.perplexity
    if found is None:
        raise ValueError(f"{one.scheme}: it has no figures of the text; evaluate it with the task perplexity")
    return found


def compared(better: SchemeResult, worse: SchemeResult) -> Compared:
    """Window by window, so that what windows have in common does not count."""
    pairs = zip(scored(better).windows, scored(worse).windows, strict=True)
    more = [b.kl - a.kl for a, b in pairs]
    return Compared(statistics.fmean(more), standard_error(more) or 0.0, scored(worse).kl / scored(better).kl)


def short(name: str) -> str:
    """A scheme's name without the file that it stands in."""
    return name.rpartition(":")[2]


def by_name(*found: Evaluation) -> dict[str, SchemeResult]:
    return {short(one.scheme): one for each in found for one in done(each)}


def endless(one: SchemeResult, found: Evaluation) -> float:
    """Bits an element of a sequence without end, at the model's heads."""
    about = found.about_model
    return kvdsl.bits(kvdsl.load(one.scheme), about.head_dim, about.kv_heads).mean


def everything(found: Evaluation) -> Iterator[str]:
    """Every scheme, those that lose least first, as the command prints them."""
    sheet = losses(found)
    known = by_name(found)
    rows = {row[0]: row for row in sheet.rows}
    ordered = sorted(known.values(), key=lambda one: scored(one).kl)
    heads = ("scheme", "bits", "at length", *sheet.heads[2:])
    first, *_ = sheet.rows
    body = [(first[0], "", "", *first[2:])]
    for one in ordered:
        name, bits, *cells = rows[one.scheme]
        mark = "*" if one.prompt == "stored" else ""
        body.append((f"[`{name}`](systems/{name}.md){mark}", f"{endless(one, found):.3f}", bits, *cells))
    yield table_of(heads, body)


def compressed(found: Evaluation) -> dict[str, SchemeResult]:
    """The schemes that stored anything at this length in fewer than the 16 bits of an exact token."""
    return {name: one for name, one in by_name(found).items() if (one.bits or 0.0) < EXACT}


def winners(found: Evaluation, bits: dict[str, float]) -> Iterator[str]:
    """Within each budget, the three schemes that lose least."""
    known = compressed(found)
    rows = []
    for budget in BUDGETS:
        within = sorted((one for name, one in known.items() if bits[name] <= budget), key=lambda one: scored(one).kl)
        for place, one in enumerate(within[:3]):
            text = scored(one)
            more = compared(within[0], one)
            behind = f"{more.more:.4f} ± {more.error:.4f}, {more.ratio:.2f} times" if place else ""
            cells = (f"{bits[one.scheme]:.3f}", f"{text.kl:.4f} ± {text.kl_error:.4f}", f"{text.delta:+.2f}", behind)
            rows.append(("" if place else f"{budget:g}", f"`{one.scheme}`", *cells))
    heads = ("bits at most", "scheme", "bits", "KL", "perplexity", "behind the first")
    yield table_of(heads, rows, left=2)


def held(found: Evaluation, variants: Evaluation) -> list[tuple[Law, Compared]]:
    """Every law with what was measured."""
    known = by_name(found, variants)
    return [(law, compared(known[law.better], known[law.worse])) for law in LAWS]


def theory(laws: Sequence[tuple[Law, Compared]]) -> Iterator[str]:
    """A row a law, and the notes on those that do not hold."""
    rows = [
        (f"`{law.better}`", f"`{law.worse}`", law.why, f"{seen.ratio:.2f}", f"{seen.more:.4f} ± {seen.error:.4f}",
         seen.verdict)
        for law, seen in laws
    ]  # fmt: skip
    yield table_of(("should lose less", "than", "for", "KL times", "KL more", "holds"), rows, left=3)
    yield ""
    for law, seen in laws:
        if seen.verdict != "yes":
            yield f"* `{law.better}` and `{law.worse}`, {seen.verdict}: {law.note}"


def about(found: Evaluation) -> str:
    """Model, text, versions and settings in words."""
    model, text, asked = found.about_model, found.about_text, found.settings
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    return (
        f"{model.name} ({model.layers} layers, {model.kv_heads} kv heads of {model.head_dim}, {model.q_heads} query "
        f"heads; digest {model.digest}), {model.dtype}, {model.device}; {text.name}, {text.tokens} tokens, sha256 "
        f"{text.sha256}; seed {asked['seed']}; {asked['windows']} windows of {asked['context']} tokens and "
        f"{asked['score']} scored; {versions}."
    )


def page(found: Evaluation, variants: Evaluation) -> str:
    """The whole page."""
    known = by_name(found)
    at_length = {name: one.bits or 0.0 for name, one in known.items()}
    without_end = {name: endless(one, found) for name, one in known.items()}
    laws = held(found, variants)
    some = list(compressed(found).values())
    best, held_best = (
        ", ".join(f"`{some[place].scheme}`" for place in front([(bits[one.scheme], scored(one).kl) for one in some]))
        for bits in (without_end, at_length)
    )
    whole = ", ".join(f"`{name}`" for name in known if name not in compressed(found) and without_end[name] < EXACT)
    seconds = sum(one.seconds for one in known.values())
    return PAGE.format(
        about=about(found), count=len(known), minutes=f"{seconds / 60:.0f}", length=found.settings["context"]
        + found.settings["score"], everything="\n".join(everything(found)), best=best, held_best=held_best, whole=whole,
        left_out="\n".join(f"* {what}: {why}" for what, why in remarks(found)),
        without_end="\n".join(winners(found, without_end)), at_length="\n".join(winners(found, at_length)),
        laws=len(laws), holding=[seen.verdict for _, seen in laws].count("yes"), theory="\n".join(theory(laws)),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="of all schemes, and of the variants")
    parser.add_argument("--add", nargs="+", type=Path, default=[], metavar="FOLDER", help="of schemes that came since")
    given = parser.parse_args()
    if given.folders and len(given.folders) != len(NAMES):
        parser.error("give two folders of `kvdsl eval --out`, of all schemes and of the variants, or none")
    for name, folder in zip(NAMES, given.folders, strict=False):
        keep(name, folder)
    if given.add:
        add(given.add)
    (ROOT / "docs" / "quality.md").write_text(page(*map(kept, NAMES)), encoding="utf-8")


if __name__ == "__main__":
    main()
