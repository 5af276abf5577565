"""Fine-tuning under a condition: opened, trained, measured without and with the edit, saved."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from unweave.core.dist import refuse_shared_device
from unweave.core.errors import UnweaveError
from unweave.core.progress import say
from unweave.core.site import Site
from unweave.core.stage import Context, stage
from unweave.core.writing import disk_free, write_file
from unweave.inputs.inputs import load_lm
from unweave.inputs.saes import open_saes
from unweave.inputs.spec import OfSAEsSpec
from unweave.inputs.subject import Subject
from unweave.latents import selection as selections
from unweave.latents.selection import Selection
from unweave.lm.model import LM
from unweave.methods.finetune.card import card
from unweave.methods.finetune.checkpoint import Checkpoints
from unweave.methods.finetune.conditions import open_condition
from unweave.methods.finetune.loop import Plan, finetune
from unweave.methods.finetune.result import Finetuned, Split, Weights
from unweave.methods.finetune.spec import FinetuneSpec
from unweave.methods.finetune.splits import Setting, choices_of, open_data
from unweave.methods.finetune.starts import lowest, starts_at
from unweave.methods.finetune.weights import Trainable, trainable
from unweave.sae.module import SAE
from unweave.show.pieces import counted

_STATES = 3
"""a checkpoint holds each trained weight and two moments"""
_PASSES = 3
"""forward passes that a training step costs"""


@stage("finetune-run", version=1, together=True)
def run(spec: FinetuneSpec, ctx: Context) -> Finetuned:
    """Trains under the condition; the run holds ``model/`` or ``adapter/`` with its model card."""
    group = ctx.group
    refuse_shared_device(spec.device, group)
    choices = choices_of(spec)  # refused before the model loads
    selection = None if spec.selection is None else selections.read(spec.selection)
    for _ in group.in_turn():
        lm = load_lm(spec.model, spec.dtype, spec.device)
    _refuse_quantised(spec, lm)
    saes, subject = _saes(spec, selection, lm)
    for _ in group.in_turn():
        data = open_data(spec, choices, lm, ctx.runs)
    condition = open_condition(spec.condition, selection, lm, saes, data.texts())
    plan = Plan(len(data.train.lengths), spec.learning, spec.seed, spec.checks.per_epoch)
    with trainable(lm, spec.weights, seed=spec.seed, name=spec.model) as model:
        _refuse_disk(model, ctx.path)
        begins = lowest(model.first_block, condition.sites)
        starts = starts_at(lm, begins, {"train": data.train, **data.others})
        begins = begins if starts else None
        setting = Setting(lm, data, starts, _directions(selection, saes, begins), spec.checks.items, group)
        before = time.monotonic()
        base = setting.all()
        _say_cost(ctx, setting, plan, time.monotonic() - before)
        history = finetune(
            model, data.train, condition, plan, starts=starts.get("train"), measure=setting.watched,
            checkpoints=Checkpoints(ctx.path, spec.checkpoint_seconds, group),
        )  # fmt: skip
        tuned, edited = setting.all(), {}
        if condition.full and spec.condition.kind != "prevent":
            edited = setting.all([replace(edit, share=spec.condition.strength) for edit in condition.full])
        result = Finetuned(
            subject=subject,
            data=data.words,
            skipped=data.skipped,
            condition=_in_words(spec),
            selection=None if selection is None else _named(selection),
            weights=Weights(spec.weights.train, sum(w.numel() for w in model.named.values()), _size(lm), begins),
            seed=spec.seed,
            steps=plan.steps,
            batch=spec.learning.batch,
            splits=tuple(
                Split(name, len(rows.lengths), base[name], tuned[name], edited.get(name))
                for name, rows in data.others.items()
            ),
            history=history,
            folder=Path("adapter" if spec.weights.train == "lora" else "model"),
        )
        if group.rank == 0:
            shutil.rmtree(ctx.path / result.folder, ignore_errors=True)
            model.save(ctx.path / result.folder)
            write_file(ctx.path / result.folder / "README.md", card(result, spec.to_dict(result_only=True)))
    return result


def _saes(spec: FinetuneSpec, selection: Selection | None, lm: LM) -> tuple[Mapping[Site, SAE], Subject]:
    """The SAEs of the selection, checked against it."""
    named = spec.saes or (selection.saes if selection is not None else ())
    if not named:
        return {}, Subject(lm.name, lm.note, (), {})
    asked = OfSAEsSpec(saes=named, model=spec.model, device=spec.device, accept_mismatch=spec.accept_mismatch)
    opened = open_saes(asked, lm)
    if selection is not None:
        selection.check(opened.saes)
    return opened.saes, opened.subject


def _directions(selection: Selection | None, saes: Mapping[Site, SAE], begins: Site | None) -> dict[Site, Tensor]:
    """Unit rows of what was selected, at sites that passes reach."""
    if selection is None:
        return {}
    rows = dict(selection.directions)
    for site, numbers in selection.latents.items():
        rows[site] = saes[site].W_dec[list(numbers)]
    return {site: F.normalize(own.float(), dim=1) for site, own in rows.items() if begins is None or site >= begins}


def _in_words(spec: FinetuneSpec) -> str:
    condition = spec.condition
    fields = condition.to_dict()
    default = type(condition)(kind="none").to_dict()
    changed = [f"{name} {value}" for name, value in fields.items() if name != "kind" and value != default[name]]
    kl = [f"KL to the base model {spec.learning.kl:g}"] if spec.learning.kl else []
    return ", ".join([condition.kind, *changed, *kl])


def _named(selection: Selection) -> str:
    sites = ", ".join(f"{len(one.chosen)} at {one.site}" for one in selection.sites)
    return f"{selection.name}: {selection.kind} by {selection.by}, {sites}"


def _size(lm: LM) -> int:
    return sum(weight.numel() for name, weight in lm.model.named_parameters() if "lora_" not in name)


def _refuse_quantised(spec: FinetuneSpec, lm: LM) -> None:
    packed = getattr(lm.model.config, "quantization_config", None) is not None
    if spec.weights.train != "lora" and (packed or not all(w.is_floating_point() for w in lm.model.parameters())):
        raise UnweaveError(
            "the model's weights are quantised: they cannot be trained", where=lm.name,
            remedy="train LoRA adapters (weights.train lora), or give the model in float32 or bfloat16",
        )  # fmt: skip


def _refuse_disk(model: Trainable, path: Path) -> None:
    """For the checkpoint, the one that replaces it, and the result."""
    trained = sum(weight.numel() * weight.element_size() for weight in model.named.values())
    saved = trained if model.adapter is not None else _size(model.lm) * model.lm.dtype.itemsize
    needed, free = 2 * _STATES * trained + saved, disk_free(path)
    if needed > free:
        raise UnweaveError(
            f"checkpoints and the result need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free", where=str(path),
            remedy="free some space, choose another --runs folder, or train fewer weights",
        )  # fmt: skip


def _say_cost(ctx: Context, setting: Setting, plan: Plan, seconds: float) -> None:
    """What the training will take, from the time that the base model took to answer."""
    tokens = int(setting.data.train.lengths.sum()) * plan.options.epochs
    read = sum(int(rows.lengths.sum()) for rows in setting.data.others.values())
    passes = _PASSES + plan.options.recompute + (plan.options.kl > 0)
    estimate = passes * tokens * seconds / max(read, 1)
    ctx.log("cost", {"steps": plan.steps, "tokens": int(tokens), "seconds": round(estimate, 1)})
    if ctx.group.rank == 0:
        minutes = counted(max(1, round(estimate / 60)), "minute")
        say(f"{plan.steps:,} steps, {int(tokens):,} tokens: about {minutes}")
