"""The stage of fine-tuning under a condition."""

from __future__ import annotations

from unweave.core.dist import refuse_shared_device
from unweave.core.stage import Context, stage
from unweave.inputs.inputs import load_lm
from unweave.methods.finetune.result import Finetuned
from unweave.methods.finetune.spec import FinetuneSpec
from unweave.methods.finetune.splits import choices_of
from unweave.methods.finetune.tune import tune


@stage("finetune-run", version=2, together=True)
def run(spec: FinetuneSpec, ctx: Context) -> Finetuned:
    """Trains under the condition; the run holds ``model/`` or ``adapter/`` with its model card."""
    group = ctx.group
    refuse_shared_device(spec.device, group)
    choices = choices_of(spec)  # refused before the model loads
    for _ in group.in_turn():
        lm = load_lm(spec.model, spec.dtype, spec.device)
    return tune(spec, lm, ctx.runs, choices=choices, kept=ctx.run, group=group)
