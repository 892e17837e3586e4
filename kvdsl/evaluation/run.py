"""`evaluate`: every unit through every scheme, what schemes share computed once, finished rows taken from a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from kvdsl.cost import bits
from kvdsl.errors import BackendError, CacheError, SchemeError, ShapeError
from kvdsl.fisher import weighted
from kvdsl.generation import Loaded, called, digest_of, opened
from kvdsl.hf import completed, latent, measured, observed, seen
from kvdsl.interpreting import interpreted
from kvdsl.kernels import Backend, Params
from kvdsl.params import from_data, of_all_layers, takes_data
from kvdsl.registry import load, name_of
from kvdsl.rules import layer_faults, refuse_for
from kvdsl.scheme import Scheme

from . import layers as by_layers
from .corpus import Corpus, parted
from .filling import Prompt, unchanged
from .results import Evaluation, Model, Reads, SchemeResult, Storage, Tasks, Text, made
from .rows import Row, Rows, key
from .scoring import compared, greedy, reads, scored
from .settings import ROWS, Settings
from .storage import formula, series, shape_of
from .summary import tasks_of
from .units import Unit, planned

LEAVES_OUT = (SchemeError, ShapeError, CacheError, BackendError, ValueError)


def evaluate(
    schemes: Mapping[str, Scheme] | Iterable[Scheme | str],
    model: str | Path | Loaded,
    *,
    text: str | None = None,
    text_name: str = "text",
    settings: Settings | None = None,
    params: Mapping[str, Params] | None = None,
    backend: Backend | None = None,
    device: str | None = None,
    out: str | Path | None = None,
    leave_out: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """How good the model is through the packed cache of every scheme, beside full precision.

    schemes    names to schemes, or schemes and whatever kvdsl.load takes
    model      "smollm2", a GGUF file, a folder in the transformers format, or a loaded (model, tokenizer)
    text       what is read; default the novel of kvdsl.models.text.botchan
    settings   what is asked and how much of it, default Settings(); FULL is more
    params     calibrated numbers of schemes by their names; those of others are measured on the first part of the text
    out        a folder: rows go to its rows.jsonl as they come, and rows that are there already are not measured anew
    leave_out  whether a scheme that does not fit the model, or fails, is left out and told so, in place of raising
    say        told how far it is

    Prompts are attended in full precision and then packed, as caches do; what is scored reads packed entries.  Raises
    ValueError for a text that is too short or a prompt longer than the model takes, SchemeError, ModelError.
    """
    asked = settings or Settings()
    named = _named(schemes)
    if text is None:
        from kvdsl.models.text import botchan

        text, text_name = botchan(), "botchan"
    say("loading the model")
    network, tokenizer = opened(model, device)
    if "layers" in asked.tasks and latent.modules(network):
        raise ValueError(
            "tasks: layers compares keys and values, and this model caches latents in their place; leave layers out"
        )
    corpus = parted(tokenizer, text, text_name, asked.calibration)
    positions = getattr(network.config.get_text_config(decoder=True), "max_position_embeddings", None)
    units = planned(asked, corpus, tokenizer, positions)
    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    run = Run(network, corpus, asked, backend, Rows(None if folder is None else folder / ROWS), leave_out, say)
    with unchanged(network):
        for name, scheme in named.items():
            run.admit(name, scheme, (params or {}).get(name))
        for number, unit in enumerate(units):
            run.measure(unit, f"{unit.task} {unit.number + 1}, part {number + 1} of {len(units)}")
        for one in run.entries.values():
            run.count(one)
    found = tuple(_result(one, run, units, tokenizer) for one in run.entries.values())
    return Evaluation(
        model=called(model, network),
        text=corpus.name,
        about_model=_model(model, network, run.digest),
        about_text=Text(corpus.name, corpus.sha256, len(corpus.first) + len(corpus.ids), len(corpus.first)),
        settings=asked.to_dict(),
        versions=versions(),
        results=found,
        notes=_notes(asked, corpus, found, run.dtype),
    )


@dataclass
class Entry:
    """One scheme on its way: its calibrated numbers, made when they are first needed, and its rows by unit."""

    name: str
    scheme: Scheme
    params: Params | None
    identity: str
    rows: dict[str, Row] = field(default_factory=dict)
    sizes: list[Row] | None = None
    refused: str | None = None


@dataclass
class Run:
    """What schemes and units share."""

    model: Any
    corpus: Corpus
    settings: Settings
    backend: Backend | None
    rows: Rows
    leave_out: bool
    say: Callable[[str], None]
    entries: dict[str, Entry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.digest = digest_of(self.model)
        self.dtype = str(self.model.dtype).removeprefix("torch.")
        plain = self.model.device.type == "cpu" and not interpreted()
        self.where = [
            *versions().values(), self.digest, self.dtype, self.model.device.type,
            self.backend or ("torch" if plain else "triton"),
        ]  # fmt: skip
        self._seen = dict[bool, Any]()

    def admit(self, name: str, scheme: Scheme, params: Params | None) -> None:
        """Take a scheme in.  SchemeError or ValueError where it does not fit the model, unless those are left out."""
        numbers: list[str] = []
        if params is not None:
            from kvdsl.snapshot import params_digest

            numbers = [params_digest(params)]
        elif takes_data(scheme):
            numbers = [key(self.corpus.first.tolist())]
        entry = Entry(name, scheme, params, key(scheme.hash, numbers))
        self.entries[name] = entry
        self._trying(entry, lambda: self._fit(entry))

    def _fit(self, entry: Entry) -> None:
        count = self.model.config.get_text_config(decoder=True).num_hidden_layers
        if found := layer_faults(entry.scheme, count):
            raise SchemeError(found)
        for index in range(count):
            refuse_for(entry.scheme.for_layer(index, count), shape_of(self.model))
        completed(entry.scheme, self.model, None)

    def _trying(self, entry: Entry, act: Callable[[], None]) -> None:
        try:
            act()
        except LEAVES_OUT as error:
            if not self.leave_out:
                if isinstance(error, SchemeError) and len(self.entries) > 1:
                    faults = (replace(fault, place=f"{entry.name}: {fault.place}") for fault in error.faults)
                    raise SchemeError(tuple(faults)) from None
                raise
            entry.refused = str(error)

    def numbers(self, entry: Entry) -> Params | None:
        """Calibrated numbers of a scheme, measured the first time."""
        if entry.params is None and takes_data(entry.scheme):
            self.say(f"calibrating {entry.name}")
            by_loss = any(weighted(own) for own in of_all_layers(entry.scheme))
            if by_loss not in self._seen:
                self._seen[by_loss] = seen(entry.scheme, self.model, self.corpus.first[None].to(self.model.device))
            entry.params = measured(entry.scheme, self.model, self._seen[by_loss])
        return entry.params

    def measure(self, unit: Unit, told: str) -> None:
        """A row of every scheme, those that are known already taken as they are; full precision is run when a row is
        missing."""
        missing = list[tuple[Entry, str]]()
        for entry in self.entries.values():
            name = key(*self.where, unit.digest, entry.identity)
            if (row := self.rows.get(name)) is not None:
                entry.rows[unit.digest] = row
            elif entry.refused is None:
                missing.append((entry, name))
        if not missing:
            return
        self.say(f"{told}, full precision")
        act = _Act(self, unit)
        for entry, name in missing:
            if entry.refused is None:
                self.say(f"{told}, {entry.name}")
                self._trying(entry, lambda entry=entry, name=name: self._row(act, entry, name))  # type: ignore[misc]

    def _row(self, act: _Act, entry: Entry, name: str) -> None:
        params = self.numbers(entry)
        begin = time.perf_counter()
        row = act(entry.scheme, params)
        row["seconds"] = round(time.perf_counter() - begin, 3)
        entry.rows[act.unit.digest] = row
        self.rows.add(name, row, scheme=entry.name, task=act.unit.task, number=act.unit.number)

    def count(self, entry: Entry) -> None:
        """The bytes of a scheme over lengths."""
        if entry.refused is not None:
            return
        name = key(*self.where, "sizes", self.settings.sizes, entry.identity)
        if (row := self.rows.get(name)) is None:
            self.say(f"bytes of {entry.name}")

            def act() -> None:
                nonlocal row
                params = self.numbers(entry)
                row = {"sizes": series(entry.scheme, self.model, self.settings.sizes, params, self.backend)}
                self.rows.add(name, row, scheme=entry.name, task="sizes", number=0)

            self._trying(entry, act)
        entry.sizes = None if row is None else row["sizes"]


class _Act:
    """One unit, run in full precision, ready for any scheme."""

    def __init__(self, run: Run, unit: Unit) -> None:
        self.run, self.unit = run, unit
        if unit.task == "layers":
            self.layers = observed(run.model, unit.ids[None].to(run.model.device))
            return
        self.prompt = Prompt.of(run.model, unit)
        if unit.task == "greedy":
            self.tokens = greedy(self.prompt, self.prompt.in_full())
        else:
            self.prompt.weights  # noqa: B018  # now, so that no scheme's time has it

    def __call__(self, scheme: Scheme, params: Params | None) -> Row:
        run = self.run
        with unchanged(run.model):
            if self.unit.task == "layers":
                return by_layers.errors(scheme, run.model, self.layers, self.unit.context, params, run.backend)
            cache = self.prompt.packed(scheme, params, run.backend)
            row = (
                compared(greedy(self.prompt, cache), self.tokens)
                if self.unit.task == "greedy"
                else scored(self.prompt, cache)
            )
            return {**row, "reads": reads(cache)}


def _named(schemes: Mapping[str, Scheme] | Iterable[Scheme | str]) -> dict[str, Scheme]:
    if isinstance(schemes, Mapping):
        return dict(schemes)
    loaded = [(one, load(one)) for one in ([schemes] if isinstance(schemes, (str, Scheme)) else schemes)]
    return {one if isinstance(one, str) else name_of(scheme): scheme for one, scheme in loaded}


def _result(entry: Entry, run: Run, units: list[Unit], tokenizer: Any) -> SchemeResult:
    """Of a scheme that was left out the reason alone."""
    scheme = entry.scheme
    known: dict[str, Any] = {"scheme": entry.name, "hash": scheme.hash, "source": scheme.source}
    if entry.refused is not None:
        return SchemeResult(**known, bits=None, perplexity=None, delta=None, tasks=Tasks(), refused=entry.refused)
    shape, asked = shape_of(run.model), run.settings
    pairs = [(unit, entry.rows[unit.digest]) for unit in units]
    tasks = tasks_of(pairs, asked, lambda ids: str(tokenizer.decode(ids)))
    layers = run.model.config.get_text_config(decoder=True).num_hidden_layers
    whole = bits(scheme, shape.head_dim, shape.kv_heads, tokens=asked.context + asked.score, layers=layers)
    prompt = bits(scheme, shape.head_dim, shape.kv_heads, tokens=asked.context, layers=layers)
    told = [row["reads"] for _, row in pairs if "reads" in row]
    sums = {
        name: sum(one[name] for one in told) for name in ("packed_calls", "fresh_calls", "dense_calls", "fallbacks")
    }
    read = Reads(**sums, exact_share=sum(side.exact for side in prompt.sides) / 2)
    formulas = [formula(scheme, side, shape) for side in ("keys", "values")]
    return SchemeResult(
        **known,
        bits=whole.mean,
        perplexity=tasks.perplexity.perplexity if tasks.perplexity else None,
        delta=tasks.perplexity.delta if tasks.perplexity else None,
        tasks=tasks,
        storage=made(Storage, {"keys": formulas[0], "values": formulas[1], "sizes": entry.sizes or []}),
        reads=read if told else None,
        backend=told[0]["backend"] if told else run.where[-1],
        prompt="stored" if any(own.prefill != "exact" for own in of_all_layers(scheme)) else "exact",
        calibrated=tuple(dict.fromkeys(name for own in of_all_layers(scheme) for name in from_data(own, shape))),
        seconds=round(sum(row["seconds"] for _, row in pairs), 3),
    )


def _model(model: str | Path | Loaded, network: Any, digest: str) -> Model:
    config, shape = network.config.get_text_config(decoder=True), shape_of(network)
    assert shape.q_heads is not None
    return Model(
        name=called(model, network),
        digest=digest,
        kind=config.model_type,
        layers=config.num_hidden_layers,
        kv_heads=shape.kv_heads,
        q_heads=shape.q_heads,
        head_dim=shape.head_dim,
        dtype=str(network.dtype).removeprefix("torch."),
        device=network.device.type,
    )


def versions() -> dict[str, str]:
    """Of the packages that figures depend on: rows of others are measured anew."""
    return {name: _version(name) for name in ("kvdsl", "torch", "transformers")}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _notes(settings: Settings, corpus: Corpus, found: Iterable[SchemeResult], dtype: str) -> tuple[str, ...]:
    done = [one for one in found if one.refused is None]
    ran = ", ".join(sorted({str(one.backend) for one in done})) or "none"
    stored = [one.scheme for one in done if one.prompt == "stored"]
    notes = [
        f"backend {ran}, model in {dtype}; text {corpus.name}, sha256 {corpus.sha256}, no token put in front",
        f"prompts are attended exactly and then packed, as a real prompt is; tokens behind them follow in chunks of "
        f"{settings.chunk}, which see each other exactly and all before them as it is stored",
    ]
    if "perplexity" in settings.tasks and settings.windows > 1:
        notes.append(
            f"intervals are of 95 %, by {settings.resamples} resamples over windows; few windows make them too narrow"
        )
    if stored:
        notes.append(
            f"{', '.join(stored)}: the prompt's own attention reads what is stored, too, so errors add up in it"
        )
    if some := [one.scheme for one in done if one.calibrated]:
        notes.append(
            f"{', '.join(some)}: calibrated on the first {len(corpus.first)} tokens of the text; none of them is scored"
        )
    return tuple(notes)
