"""What a training run will cost, before it is started, and what is wrong with it."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.data.pack import pack
from unweave.inputs.inputs import budget_of, documents_of, load_lm, refuse_long_rows
from unweave.lm.model import LM, Tokens
from unweave.methods.train import start
from unweave.methods.train.end_to_end import end_to_end_step
from unweave.methods.train.members import Member, members, sites_of
from unweave.methods.train.result import Checkup, Cost
from unweave.methods.train.spec import DoctorSpec
from unweave.methods.train.trainer import SAETrainer

_FP32 = 4
_CALIBRATION = 32_768
"""tokens that end-to-end training harvests, at least, before it begins"""


@dataclass(frozen=True)
class Examined:
    """The outcome, with what every run has."""

    path: Path
    result: Checkup
    reused: bool = False


def run(spec: DoctorSpec, runs: Path) -> Examined:
    """Measures a little of everything and multiplies. Nothing is written."""
    problems: list[str] = []
    lm = _try(problems, lambda: load_lm(spec.model, spec.dtype, spec.device))
    cost: Cost | None = None
    if lm is not None:
        _try(problems, lambda: refuse_long_rows(lm, spec.data.pack.context))
        every = _try(problems, lambda: members(spec, lm))
        if every:
            cost = _try(problems, lambda: _cost(spec, lm, every))
        _check_text(spec, lm, problems)
    runs = runs.resolve()
    folder = next(path for path in (runs, *runs.parents) if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        problems.append(f"{folder} is not a writable folder: choose another with --runs")
    free = round(shutil.disk_usage(folder).free / 1e9, 1)
    if cost is not None and cost.disk_gb > free:
        problems.append(f"needs {cost.disk_gb} GB of disk, {free} GB are free: see stream.cache")
    if cost is not None and cost.memory_gb > _memory_gb():
        problems.append(f"needs {cost.memory_gb} GB of memory, the machine has {_memory_gb()}: lower sae.expansion")
    return Examined(runs, Checkup(repr(lm) if lm else spec.model, cost, free, tuple(problems)))


def _try(problems: list[str], work: Any) -> Any:
    try:
        return work()
    except UnweaveError as error:
        problems.append(str(error))
        return None


def _check_text(spec: DoctorSpec, lm: LM, problems: list[str]) -> None:
    if spec.sae.tokens > spec.epochs * spec.data.tokens:
        problems.append(
            f"sae.tokens {spec.sae.tokens} is more than {spec.epochs:g} epochs over data.tokens {spec.data.tokens}: "
            "train on fewer, give more text, or allow more epochs"
        )
    for split in ("train", "heldout"):
        _try(problems, lambda split=split: _enough(spec, lm, split))


def _enough(spec: DoctorSpec, lm: LM, split: str) -> None:
    """Packs the text, without keeping it, until there is enough."""
    (budget, unit), amount, documents = budget_of(spec.data, split), 0, set()
    for row in pack(documents_of(spec.data, split), lm.tokenizer, spec.data.pack):
        documents.add(row.document)
        amount = len(documents) if unit == "documents" else amount + len(row.ids)
        if amount >= budget:
            return
    what = f"the {split} text has only {amount:,} {unit}, {budget:,} were asked for"
    raise UnweaveError(what, remedy="give more text")


def _memory_gb() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)


def _cost(spec: DoctorSpec, lm: LM, every: list[Member]) -> Cost:
    """Times one harvest batch and a few training steps of every SAE."""
    sites = sites_of(every)
    tokens = _random_tokens(spec, lm, spec.stream.batch_tokens)
    seconds = 0.0
    for _ in range(2):  # the first is for warming up
        started = time.perf_counter()
        with lm.taps(read=sites, stop=max(sites)) as seen:
            lm(tokens)
        seconds = time.perf_counter() - started
    harvest = tokens.n_tokens / seconds
    x = {site: seen[site].flatten(0, 1).float() for site in sites}
    timed = [_timed(spec, lm, member, x) for member in every]
    train = spec.sae.batch / sum(seconds for _, seconds in timed)
    width = sum(values.shape[1] for values in x.values())
    widths = [x[member.read].shape[1] + x[member.write].shape[1] for member in every]
    parameters = sum(n * both for (n, _), both in zip(timed, widths, strict=True))
    end_to_end = spec.objective == "end-to-end"  # which harvests no more than it begins from
    begun = min(spec.data.tokens, max(_CALIBRATION, spec.stream.buffer_tokens))
    distinct = begun if end_to_end else spec.data.tokens
    harvested = distinct if spec.stream.cache or end_to_end else spec.sae.tokens
    cached = distinct * width * _FP32 if spec.stream.cache else 0
    model = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    memory = model + 4 * parameters * _FP32 + 3 * spec.stream.buffer_tokens * width * _FP32 + 1e9
    return Cost(
        saes=len(every),
        latents=sum(n for n, _ in timed),
        distinct_tokens=spec.data.tokens,
        training_tokens=spec.sae.tokens,
        epochs=round(spec.sae.tokens / spec.data.tokens, 2),
        harvest_tokens_per_second=round(harvest),
        train_tokens_per_second=round(train),
        minutes=round((harvested / harvest + spec.sae.tokens / train) / 60, 1),
        memory_gb=round(memory / 1e9, 1),
        disk_gb=round((cached + 4 * parameters * _FP32) / 1e9, 1),
    )


def _random_tokens(spec: DoctorSpec, lm: LM, count: int) -> Tokens:
    """About ``count`` random tokens in rows as long as the text's."""
    context = spec.data.pack.context
    limit = getattr(lm.model.config, "max_position_embeddings", context)
    shape = (max(1, count // context), min(context, limit))
    return Tokens.of(torch.randint(0, lm.vocab_size, shape, generator=torch.Generator().manual_seed(0)))


def _timed(spec: DoctorSpec, lm: LM, member: Member, x: dict[Site, torch.Tensor]) -> tuple[int, float]:
    """How many latents a member has, and how many seconds a batch of it takes. UnweaveError where it cannot start."""
    sae, _ = start.opened(spec, lm, member.name, member.read, member.write)
    inputs, goal = member.of(x)
    batch, text = member.spec.batch, _random_tokens(spec, lm, member.spec.batch)
    enough = 4 * max(batch, text.n_tokens)  # a step more than are taken
    own = replace(member.spec, tokens=max(member.spec.tokens, enough))
    trainer = SAETrainer(own, inputs.shape[1], init_x=inputs, init_target=goal, device=lm.device, start=sae)
    chosen = torch.randint(0, len(inputs), (batch,), generator=torch.Generator().manual_seed(0))
    end_to_end, times = spec.objective == "end-to-end", []
    for _ in range(3):
        started = time.perf_counter()
        if end_to_end:
            end_to_end_step(lm, trainer, text, member.read, nonfinite="drop")
        else:
            trainer.step(inputs[chosen], None if goal is None else goal[chosen])
        times.append(time.perf_counter() - started)
    return trainer.d_sae, min(times) * (batch / text.n_tokens if end_to_end else 1)
