"""What a training run will cost, before it is started, and what is wrong with it."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.data.pack import pack
from unweave.jobs.common import documents_of, load_lm, refuse_long_rows
from unweave.jobs.specs import DoctorSpec
from unweave.jobs.train import Member, members
from unweave.lm.model import LM, Tokens
from unweave.sae.train import SAETrainer

_FP32 = 4


@dataclass(frozen=True)
class Checkup:
    """What was found; has the two fields that every stage's outcome has."""

    path: Path
    result: dict[str, Any]
    reused: bool = False


def run(spec: DoctorSpec, runs: Path) -> Checkup:
    """Measures a little of everything and multiplies. Nothing is written."""
    problems: list[str] = []
    lm = _try(problems, lambda: load_lm(spec.model, spec.dtype, spec.device))
    found: dict[str, Any] = {"model": repr(lm) if lm else spec.model}
    if lm is not None:
        _try(problems, lambda: refuse_long_rows(lm, spec.data.pack.context))
        found_members = _try(problems, lambda: members(spec, lm))
        if found_members:
            found |= _cost(spec, lm, found_members, problems)
        _look_at_text(spec, lm, problems)
    _look_at_folder(runs, problems)
    found["disk_free_gb"] = round(shutil.disk_usage(_existing(runs)).free / 1e9, 1)
    if found.get("disk_gb", 0) > found["disk_free_gb"]:
        problems.append(f"needs {found['disk_gb']} GB of disk, {found['disk_free_gb']} GB are free: see stream.cache")
    if found.get("memory_gb", 0) > _memory_gb():
        problems.append(f"needs {found['memory_gb']} GB of memory, the machine has {_memory_gb()}: lower sae.expansion")
    found["problems"] = problems or ["none found"]
    return Checkup(runs, found)


def _try(problems: list[str], work: Any) -> Any:
    try:
        return work()
    except UnweaveError as error:
        problems.append(str(error))
        return None


def _look_at_text(spec: DoctorSpec, lm: LM, problems: list[str]) -> None:
    if spec.sae.tokens > spec.epochs * spec.data.tokens:
        problems.append(
            f"sae.tokens {spec.sae.tokens} is more than {spec.epochs:g} epochs over data.tokens {spec.data.tokens}: "
            "train on fewer, give more text, or allow more epochs"
        )
    for split, wanted in (("train", spec.data.tokens), ("heldout", spec.data.heldout_tokens)):
        _try(problems, lambda split=split, wanted=wanted: _enough(spec, lm, split, wanted))


def _enough(spec: DoctorSpec, lm: LM, split: str, wanted: int) -> None:
    """Packs the text, without keeping it, until there is enough."""
    found = 0
    for row in pack(documents_of(spec.data, split), lm.tokenizer, spec.data.pack):
        found += len(row.ids)
        if found >= wanted:
            return
    raise UnweaveError(
        f"the {split} text has only {found:,} tokens, {wanted:,} were asked for", remedy="give more text"
    )


def _look_at_folder(runs: Path, problems: list[str]) -> None:
    folder = _existing(runs)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        problems.append(f"{folder} is not a writable folder: choose another with --runs")


def _existing(path: Path) -> Path:
    path = Path(path).resolve()
    return next(p for p in (path, *path.parents) if p.exists())


def _memory_gb() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)


def _cost(spec: DoctorSpec, lm: LM, asked: list[Member], problems: list[str]) -> dict[str, Any]:
    """Times one harvest batch and a few training steps of every SAE."""
    sites = sorted({site for member in asked for site in (member.read, member.write)})
    context = spec.data.pack.context
    limit = getattr(lm.model.config, "max_position_embeddings", context)
    rows = max(1, spec.stream.batch_tokens // context)
    tokens = Tokens.of(
        torch.randint(0, lm.vocab_size, (rows, min(context, limit)), generator=torch.Generator().manual_seed(0))
    )
    seconds = 0.0
    for _ in range(2):  # the first is for warming up
        started = time.perf_counter()
        with lm.taps(read=sites, stop=max(sites)) as seen:
            lm(tokens)
        seconds = time.perf_counter() - started
    harvest = tokens.n_tokens / seconds
    x = {site: seen[site].flatten(0, 1).float() for site in sites}
    train = spec.sae.batch / sum(_step_seconds(member, x) for member in asked)
    width = sum(found.shape[1] for found in x.values())
    latents = sum(x[member.read].shape[1] * member.spec.expansion for member in asked)
    parameters = sum(x[m.read].shape[1] * m.spec.expansion * (x[m.read].shape[1] + x[m.write].shape[1]) for m in asked)
    cached = spec.data.tokens * width * _FP32 if spec.stream.cache else 0
    harvested = spec.data.tokens if spec.stream.cache else spec.sae.tokens
    model = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    memory = model + 4 * parameters * _FP32 + 3 * spec.stream.buffer_tokens * width * _FP32 + 1e9
    return {
        "saes": len(asked),
        "latents": latents,
        "distinct_tokens": spec.data.tokens,
        "training_tokens": spec.sae.tokens,
        "epochs": round(spec.sae.tokens / spec.data.tokens, 2),
        "harvest_tokens_per_second": round(harvest),
        "train_tokens_per_second": round(train),
        "minutes": round((harvested / harvest + spec.sae.tokens / train) / 60, 1),
        "memory_gb": round(memory / 1e9, 1),
        "disk_gb": round((cached + 4 * parameters * _FP32) / 1e9, 1),
    }


def _step_seconds(member: Member, x: dict[Site, torch.Tensor]) -> float:
    goal = None if member.read == member.write else x[member.write]
    trainer = SAETrainer(member.spec, x[member.read].shape[1], init_x=x[member.read], init_target=goal)
    count = len(x[member.read])
    chosen = torch.randint(0, count, (member.spec.batch,), generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(3):
        started = time.perf_counter()
        trainer.step(x[member.read][chosen], None if goal is None else goal[chosen])
        times.append(time.perf_counter() - started)
    return min(times)
