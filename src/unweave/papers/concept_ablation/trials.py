"""Fine-tunings one after the other on one open model: every condition, every seed. Weights are not kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from unweave.core.progress import task
from unweave.core.stage import Context, stage
from unweave.inputs.inputs import load_lm
from unweave.lm.model import LM
from unweave.methods.finetune.result import Finetuned, Score
from unweave.methods.finetune.splits import choices_of
from unweave.methods.finetune.tune import tune
from unweave.papers.concept_ablation.result import TrialsResult
from unweave.papers.concept_ablation.spec import TrialsSpec
from unweave.tasks.choices.items import Choices
from unweave.tasks.choices.spec import ChoiceSpec


@stage("concept-ablation-trials", version=2)
def run(spec: TrialsSpec, ctx: Context) -> TrialsResult:
    """The figures of every trial; those that are finished survive an interruption. The handle has the open model."""
    first = spec.trials[0]
    lm: LM = load_lm(first.model, first.dtype, first.device) if ctx.handle is None else ctx.handle.lm
    done: list[Finetuned] = []
    base: dict[ChoiceSpec | None, Mapping[str, Score]] = {}
    opened: dict[tuple[ChoiceSpec | None, str], Choices | None] = {}
    with task("trials", total=len(spec.trials), unit="trials") as shown:
        for number, one in enumerate(spec.trials):

            def trained(one=one) -> Finetuned:
                if (one.task, one.split) not in opened:
                    opened[one.task, one.split] = choices_of(one)
                choices = opened[one.task, one.split]
                if choices is not None and spec.splits:
                    kept = {name: items for name, items in choices.splits.items() if name in (*spec.splits, one.split)}
                    choices = replace(choices, splits=kept)
                return tune(one, lm, ctx.runs, choices=choices, base=base.get(one.task))

            done.append(ctx.pieces.value(f"{number:03d}", Finetuned, trained))
            base[one.task] = {split.name: split.base for split in done[-1].splits}
            shown.advance()
    return TrialsResult(tuple(done))
