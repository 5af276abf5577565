"""One fine-tuning on an open model: trained under its condition, measured without and with the edit.

What is done at every step below the first trained block is done once: activations are computed up to there, under the
edits that stay the same through the training, and passes begin with them (``starts.py``).
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from unweave.core.dist import SOLO, Group
from unweave.core.errors import UnweaveError, UnweaveWarning
from unweave.core.progress import say
from unweave.core.run import Run
from unweave.core.site import Site
from unweave.core.writing import disk_free, write_file
from unweave.inputs.saes import open_saes
from unweave.inputs.spec import OfSAEsSpec
from unweave.inputs.subject import Subject
from unweave.latents import selection as selections
from unweave.latents.selection import Selection
from unweave.lm.model import LM
from unweave.methods.finetune.card import card
from unweave.methods.finetune.checkpoint import Checkpoints
from unweave.methods.finetune.conditions import Condition, open_condition
from unweave.methods.finetune.diagnose import diagnose
from unweave.methods.finetune.diagnosis import Diagnosis
from unweave.methods.finetune.loop import Plan, finetune
from unweave.methods.finetune.result import Finetuned, Score, Split, Weights
from unweave.methods.finetune.spec import FinetuneSpec
from unweave.methods.finetune.splits import Data, Setting, open_data
from unweave.methods.finetune.starts import Passes, passes
from unweave.methods.finetune.weights import Trainable, trainable
from unweave.sae.module import SAE
from unweave.show.pieces import counted
from unweave.tasks.choices.items import Choices

_STATES = 3
"""a checkpoint holds each trained weight and two moments"""
_TRIED = 100
"""training items on which the selection is tried on the untrained model"""
_PASSES = 3
"""forward passes that a training step costs"""


def tune(
    spec: FinetuneSpec,
    lm: LM,
    runs: Path,
    *,
    choices: Choices | None,
    base: Mapping[str, Score] | None = None,
    kept: Run[Finetuned] | None = None,
    group: Group = SOLO,
) -> Finetuned:
    """Trains ``lm``, and puts it back as it was. With ``kept``, checkpoints, the weights and their model card are
    written to that run; without, only figures remain. ``base``: the untrained model's scores where they are known.

    Raises UnweaveError for a selection that does not suit the model, and where the loss explodes.
    """
    selection = None if spec.selection is None else selections.read(spec.selection)
    _refuse_quantised(spec, lm)
    saes, subject = _saes(spec, selection, lm)
    for _ in group.in_turn():
        data = open_data(spec, choices, lm, runs)
    condition = open_condition(spec.condition, selection, lm, saes, data.texts())
    diagnosis = None if kept is None or selection is None else _diagnosis(lm, saes, selection, condition, data, group)
    plan = Plan(len(data.train.lengths), spec.learning, spec.seed, spec.checks.per_epoch)
    with trainable(lm, spec.weights, seed=spec.seed, name=spec.model) as model:
        _refuse_disk(model, kept)
        plain = passes(lm, model.first_block, data.others)
        training = training_passes(spec, model, condition, data)
        followed = _directions(selection, saes, plain.begins)
        setting = Setting(lm, data, plain.starts, followed, spec.checks.items, group)
        before = time.monotonic()
        base = base or setting.all()
        _say_cost(kept, setting, plan, time.monotonic() - before, group)
        history = finetune(
            model, data.train, replace(condition, full=training.edits), plan, starts=training.starts.get("train"),
            measure=setting.watched,
            checkpoints=Checkpoints(None if kept is None else kept.path, spec.checkpoint_seconds, group),
        )  # fmt: skip
        tuned, edited = setting.all(), _edited(setting, model.first_block, condition)
        result = Finetuned(
            subject=subject,
            data=data.words,
            skipped=data.skipped,
            condition=_in_words(spec),
            selection=None if selection is None else _named(selection),
            weights=_weights(spec, model, training.begins),
            seed=spec.seed,
            steps=plan.steps,
            batch=min(spec.learning.batch, plan.items),
            splits=tuple(
                Split(name, len(rows.lengths), base[name], tuned[name], edited.get(name))
                for name, rows in data.others.items()
            ),
            history=history,
            folder=Path("adapter" if spec.weights.train == "lora" else "model"),
            diagnosis=diagnosis,
        )
        if kept is not None and group.rank == 0:
            _save(model, result, spec, kept.path / result.folder)
    return result


def _save(model: Trainable, result: Finetuned, spec: FinetuneSpec, folder: Path) -> None:
    """Writes the weights, without any hook, and their model card."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save(folder)
    write_file(folder / "README.md", card(result, spec.to_dict(result_only=True)))


def training_passes(spec: FinetuneSpec, model: Trainable, condition: Condition, data: Data) -> Passes:
    """Passes of the training items under a condition."""
    # What fades is another edit at every step, and KL compares with the base model, which begins where training does.
    constant = spec.condition.fade == "none" and not spec.learning.kl
    rows = {"train": data.train}
    return passes(model.lm, model.first_block, rows, condition.edits(0.5), condition.reads, constant=constant)


def _edited(setting: Setting, first_block: int, condition: Condition) -> dict[str, Score]:
    """The scores under the condition's edits; nothing where it takes nothing away."""
    if not condition.ablates:
        return {}
    under = passes(setting.lm, first_block, setting.data.others, condition.full)
    return replace(setting, starts=under.starts).all(under.edits)


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


def _diagnosis(
    lm: LM, saes: Mapping[Site, SAE], selection: Selection, condition: Condition, data: Data, group: Group
) -> Diagnosis:
    """What the selection, and the condition's edit, do to the base model on the first training items; warns of it."""
    answers = data.train.answers
    items = list(data.texts(_TRIED)) if answers is None else answers.at(range(min(_TRIED, len(answers))))
    diagnosis = diagnose(lm, saes, selection, items, conditions=[condition] if condition.ablates else [])
    for words in diagnosis.warnings if group.rank == 0 else ():
        warnings.warn(words, UnweaveWarning, stacklevel=2)
    return diagnosis


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


def _weights(spec: FinetuneSpec, model: Trainable, begins: Site | None) -> Weights:
    return Weights(spec.weights.train, sum(w.numel() for w in model.named.values()), _size(model.lm), begins)


def _size(lm: LM) -> int:
    return sum(weight.numel() for name, weight in lm.model.named_parameters() if "lora_" not in name)


def _refuse_quantised(spec: FinetuneSpec, lm: LM) -> None:
    packed = getattr(lm.model.config, "quantization_config", None) is not None
    if spec.weights.train != "lora" and (packed or not all(w.is_floating_point() for w in lm.model.parameters())):
        raise UnweaveError(
            "the model's weights are quantised: they cannot be trained", where=lm.name,
            remedy="train LoRA adapters (weights.train lora), or give the model in float32 or bfloat16",
        )  # fmt: skip


def _refuse_disk(model: Trainable, kept: Run[Finetuned] | None) -> None:
    """For the checkpoint, the one that replaces it, and the result."""
    if kept is None:
        return
    trained = sum(weight.numel() * weight.element_size() for weight in model.named.values())
    saved = trained if model.adapter is not None else _size(model.lm) * model.lm.dtype.itemsize
    needed, free = 2 * _STATES * trained + saved, disk_free(kept.path)
    if needed > free:
        raise UnweaveError(
            f"checkpoints and the result need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            where=str(kept.path), remedy="free some space, choose another --runs folder, or train fewer weights",
        )  # fmt: skip


def _say_cost(kept: Run[Finetuned] | None, setting: Setting, plan: Plan, seconds: float, group: Group) -> None:
    """What the training will take, from the time that the base model took to answer."""
    if kept is None or group.rank > 0:
        return
    tokens = int(setting.data.train.lengths.sum()) * plan.options.epochs
    read = sum(int(rows.lengths.sum()) for rows in setting.data.others.values())
    passes = _PASSES + plan.options.recompute + (plan.options.kl > 0)
    estimate = passes * tokens * seconds / max(read, 1)
    kept.log("cost", {"steps": plan.steps, "tokens": int(tokens), "seconds": round(estimate, 1)})
    minutes = counted(max(1, round(estimate / 60)), "minute")
    say(f"{counted(plan.steps, 'step')}, {int(tokens):,} tokens: about {minutes}")
