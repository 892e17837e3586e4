"""The schedule of decode, found by timing: the model's best few are launched over a filled cache, and the fastest is
kept for this kind of GPU: `kvdsl tune`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvdsl.errors import BackendError, Fault, SchemeError
from kvdsl.scheme import Scheme
from kvdsl.shape import Shape

from .answer import columns, progress
from .schedules import KERNEL, Bucket, Card, Schedule, keep, this_card

if TYPE_CHECKING:
    from kvdsl.timing import Clock

    from .run_triton import TritonModule

MOST, OWN = 5, 4  # schedules of the model's that are timed, and those of the depth that it takes
WORTH = 0.99  # of the time that the model's takes: another schedule is kept where it takes no more
BATCHES, TOKENS = (1, 8), (32768,)
NO_GPU = "tune: schedules are timed on a GPU, and there is none here; without files of it the model's are taken"


@dataclass(frozen=True)
class Tuned:
    """What was timed for one scheme and shape, and kept.

    seconds   of each schedule the median, the model's own first
    path      the file that holds `best`
    """

    scheme: Scheme
    shape: Shape
    card: Card
    bucket: Bucket
    seconds: Mapping[Schedule, float]
    best: Schedule
    path: Path

    @property
    def model(self) -> Schedule:
        """The schedule that the model of the GPU chooses."""
        return next(iter(self.seconds))


def tune(
    scheme: Scheme,
    shape: Shape,
    *,
    batch: int = 1,
    tokens: int = TOKENS[0],
    clock: Clock | None = None,
    card: Card | None = None,
) -> Tuned:
    """Time schedules of decoding one token of `batch` sequences of about `tokens` tokens, and keep the best one.

    Kernels of this scheme and shape that are built from then on take it for calls of this size, those that this process
    has built already at once.

    `clock` and `card` default to those of the GPU.  Raises SchemeError, BackendError where there is no GPU or nowhere
    to keep the file.
    """
    import torch

    from kvdsl.bench import Size, numbers
    from kvdsl.bench_cache import FilledPages, filled
    from kvdsl.inputs import DTYPES
    from kvdsl.timing import clock_of

    from . import build
    from .run_triton import TritonModule

    if scheme.routed:
        fault = Fault("tiers", "what all of them leave is merged at once, which is not timed", "tune one without tiers")
        raise SchemeError((fault,))
    if (card := card or this_card()) is None:
        raise BackendError(NO_GPU)
    kernels = build(scheme, shape, "triton")
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    size = Size(batch, shape.kv_heads, tokens, shape.group, shape.head_dim)
    normal = numbers(size, device, dtype=DTYPES[shape.dtype])
    query, full = normal(size.q_heads, 1), filled(kernels, batch, tokens, normal)
    assert isinstance(full, FilledPages) and isinstance(kernels.module, TritonModule)
    longest, module = full.cache.state().longest, kernels.module
    bucket, blocks = Bucket.of(batch, longest), -(-shape.group // kernels.plan.rows(many=False))
    seconds = timed_schedules(
        module, bucket, batch * shape.kv_heads * blocks, longest, lambda: full.attend(query), clock or clock_of(device)
    )
    best = fastest(seconds)
    module.schedules.card = card
    more = {"scheme": scheme.hash, "shape": repr(shape), "timed": in_microseconds(seconds)}
    path = keep(module.schedules, bucket, best, more)
    return Tuned(scheme, shape, card, bucket, seconds, best, path)


def in_microseconds(seconds: Mapping[Schedule, float]) -> list[dict[str, float]]:
    """Schedules and their times, as plain numbers."""
    return [{**one._asdict(), "us": time * 1e6} for one, time in seconds.items()]


def timed_schedules(
    module: TritonModule, bucket: Bucket, programs: int, longest: int, call: Callable[[], Any], clock: Clock
) -> dict[Schedule, float]:
    """Seconds that `call` takes under each schedule worth a try, the model's first; `programs` read a sequence's pages
    where they share none.  The module is left as it was."""
    from kvdsl.timing import timed

    best, before = module.schedules.best, module.schedules.best.get(bucket)

    def under(schedule: Schedule | None, act: Callable[[], Any]) -> Any:
        best.pop(bucket, None)
        if schedule is not None:
            best[bucket] = schedule
        return act()

    try:
        found = candidates(module, programs, longest, lambda schedule: under(schedule, call))
        return {one: under(one, lambda: timed(call, clock).median) for one in found}
    finally:
        under(before, lambda: None)


def candidates(
    module: TritonModule, programs: int, longest: int, launch: Callable[[Schedule | None], Any]
) -> list[Schedule]:
    """The model's schedule and those that it holds for the next best, then what it would choose at another depth that
    fits the GPU: MOST at most.  Behind them all numbers of programs that give the processors as many, as deep as the
    model has them and one deeper; then, as deep, the model's number of them and half of it with each number of warps.

    On an H200 the fastest took of the model's time: its fourth number of programs 0.78 (`kivi4`, 8 sequences of 4096
    tokens), 0.87 (`token4`) and 0.92 (one of 32768), the next depth 0.96 (8 of 32768), one deeper 0.97 (8 of 131072),
    two warps 0.85 (`iq4_nl`, one of 4096), two of half as many programs 0.91 (`kvtq`).
    """
    from .launches import stages

    launch(None)
    model = module.by_model(programs, longest)
    ranked = [model._replace(splits=splits) for splits in module.ranked(programs, longest)]
    ranked = list(dict.fromkeys([model, *ranked]))
    found = ranked[:OWN]
    for depth in stages(KERNEL, module.plan):
        if depth != model.stages and len(found) < MOST:
            # only a launch tells how many programs the GPU holds
            launch(model._replace(stages=depth))
            if module.fits(depth):
                found.append(model._replace(splits=module.ranked(programs, longest, depth)[0], stages=depth))
    found = (found + ranked[OWN:])[:MOST]
    found += [model._replace(splits=splits) for splits in module.filling(programs, longest)]
    deeper = model._replace(stages=model.stages + 1)
    launch(deeper)
    deep = module.fits(deeper.stages)
    if deep:
        found += [deeper._replace(splits=splits) for splits in module.filling(programs, longest, deeper.stages)]
    for warps in module.decode_warps:
        for one in (model, deeper)[: 1 + deep]:
            found += [one._replace(splits=splits, warps=warps) for splits in (model.splits, -(-model.splits // 2))]
    return list(dict.fromkeys(found))


def fastest(seconds: Mapping[Schedule, float]) -> Schedule:
    """The model's schedule, which stands first, unless another is faster than by chance."""
    model = next(iter(seconds))
    best = min(seconds, key=lambda one: seconds[one])
    return best if seconds[best] <= WORTH * seconds[model] else model


def results(
    schemes: Mapping[str, Scheme], shape_of: Callable[[Scheme], Shape], batches: Sequence[int], lengths: Sequence[int]
) -> list[dict[str, Any]]:
    """A row a scheme, or layer's scheme of its own, and size: device, bucket, schedules with their microseconds, which
    is the model's and which the best, the file; `failed` where one does not fit the memory.  BackendError without a
    GPU."""
    if this_card() is None:
        raise BackendError(NO_GPU)
    rows = []
    for name, scheme in _with_layers(schemes).items():
        for batch in batches:
            for tokens in lengths:
                with progress(f"tuning {name} for {batch} x {tokens} tokens"):
                    row = _row(scheme, shape_of(scheme), batch, tokens)
                    rows.append({"scheme": name, "batch": batch, "tokens": tokens, **row})
    return rows


def _row(scheme: Scheme, shape: Shape, batch: int, tokens: int) -> dict[str, Any]:
    import torch

    try:
        found = tune(scheme, shape, batch=batch, tokens=tokens)
    except torch.OutOfMemoryError as error:
        return {"failed": str(error).partition(". ")[0]}
    finally:
        torch.cuda.empty_cache()
    return row(found)


def row(found: Tuned) -> dict[str, Any]:
    """What was found, as plain values."""
    return {
        "device": str(found.card),
        "bucket": found.bucket._asdict(),
        "timed": in_microseconds(found.seconds),
        "model": found.model._asdict(),
        "best": found.best._asdict(),
        "gain": found.seconds[found.model] / found.seconds[found.best],
        "path": str(found.path),
    }


def _with_layers(schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """The schemes, and those of their layers that have one of their own, each once."""
    found = dict(schemes)
    for name, scheme in schemes.items():
        for layers, one in scheme.layers:
            if one not in found.values():
                found[f"{name} layers[{', '.join(map(str, layers))}]"] = one
    return found


def told(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for every schedule that was timed, and where the best ones are kept."""
    table = [("scheme", "size", "programs", "stages", "warps", "us", "")]
    for one in rows:
        size = f"{one['batch']} x {one['tokens']}"
        if "failed" in one:
            table.append((one["scheme"], size, "", "", "", "", f"failed: {one['failed']}"))
        for schedule in one.get("timed", ()):
            plain = {name: schedule[name] for name in Schedule._fields}
            notes = [note for note, which in (("the model's", "model"), ("kept", "best")) if one[which] == plain]
            figures = (*map(str, plain.values()), f"{schedule['us']:.1f}")
            table.append((one["scheme"], size, *figures, ", ".join(notes)))
    kept = [f"{one['scheme']}, {one['device']}: {one['path']}" for one in rows if "path" in one]
    return [*columns(table, right=(2, 3, 4, 5)), "", *kept]
