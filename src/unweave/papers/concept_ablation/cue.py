"""Which candidates act on the unintended part of the training prompts: a rule that stands in for a reader.

A candidate's effect on the metric is a sum over the prompt's tokens. Whoever wrote the task knows the unintended part
of a prompt: the profession in the gender task, one of the two questions in double multiple choice. A candidate is
chosen where at least ``share`` of its effect comes from the tokens of that part, or where its share is one of the
``least`` largest. Nothing is read but training prompts: neither out-of-distribution prompts nor their answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from unweave.attribute.runner import Batch, Runner
from unweave.attribute.states import counted
from unweave.core.site import Site
from unweave.core.stage import Context, stage
from unweave.inputs.saes import Opened, open_saes
from unweave.latents import annotations
from unweave.latents.annotations import Annotation, name_of
from unweave.lm.model import LM
from unweave.methods.finetune.attribute.attribute import ahead
from unweave.methods.finetune.attribute.result import attribution_at
from unweave.methods.finetune.attribute.spec import FinetuneAttributeSpec
from unweave.papers.concept_ablation.result import CueResult
from unweave.papers.concept_ablation.spec import CueSpec
from unweave.sae.module import SAE
from unweave.tasks.choices.choices import open_choices
from unweave.tasks.choices.encode import Encoded, encode_choices
from unweave.tasks.choices.spec import ChoiceSpec

FILE = "cue.jsonl"
_DOUBLE = re.compile(
    r"(?s)(?:Options: [^\n]*\n(?P<second>.*)\n(?P<first>.*)|Question: (?P<first_>.*) \| (?P<second_>.*)\nA\. .*)"
)
_BATCH_TOKENS = 1024


def spans(task: ChoiceSpec, prompt: str) -> list[tuple[int, int]]:
    """The characters (from, to) of a prompt's unintended part; none where it has none."""
    if task.task == "gender":
        words = "|".join(map(re.escape, (*task.male, *task.female)))
        return [match.span() for match in re.finditer(rf"\b(?:{words})\b", prompt)]
    match = _DOUBLE.fullmatch(prompt)
    other = "second" if task.intended == "first" else "first"
    return [] if match is None else [match.span(name) for name in (other, f"{other}_") if match[name] is not None]


def cue_tokens(lm: LM, task: ChoiceSpec, encoded: Encoded) -> Tensor:
    """Which tokens belong to the unintended part, bool [B, P]."""
    inside = torch.zeros_like(encoded.tokens.mask)
    for row, (item, ids, mask) in enumerate(zip(encoded.items, encoded.tokens.ids, encoded.tokens.mask, strict=True)):
        pieces = lm.pieces(ids[mask])
        end = -max(0, "".join(pieces).find(item.prompt))  # a template's own words stand before the prompt
        for place, piece in zip(mask.nonzero()[:, 0].tolist(), pieces, strict=True):
            start, end = end + len(piece) - len(piece.lstrip()), end + len(piece)
            inside[row, place] = any(start < last and first < end for first, last in spans(task, item.prompt))
    return inside


def marked_batches(lm: LM, task: ChoiceSpec, encoded: Encoded) -> Iterator[tuple[Batch, Tensor]]:
    """Items with the metric logit(correct) - logit(incorrect), and the tokens of their unintended part."""
    for part in encoded.groups(_BATCH_TOKENS):
        yield (part.tokens, None, ahead(part)), cue_tokens(lm, task, part)


def effect_shares(
    lm: LM, saes: Mapping[Site, SAE], batches: Sequence[tuple[Batch, Tensor]], chosen: Mapping[Site, Sequence[int]]
) -> dict[Site, Tensor]:
    """Which share of each latent's summed effect comes from marked tokens, float [n] by site; below 0 and above 1 where
    signs differ. ``batches``: (tokens, None, metric) with the marked tokens, bool [B, P]."""
    subsets = {site: saes[site].subset(numbers) for site, numbers in chosen.items()}
    sums = {site: torch.zeros(2, len(numbers), dtype=torch.float64) for site, numbers in chosen.items()}
    for (tokens, _, metric), marked in batches:
        gradients, values = Runner(lm, tokens.to(lm.device), metric, _BATCH_TOKENS).gradients(list(chosen), ())
        for site, subset in subsets.items():
            x = values[site]
            keep = counted(lm, saes[site], x, tokens.to(x.device)).unsqueeze(-1)
            effects = subset.encode(x) * (gradients[site] @ subset.directions.T) * keep
            whole = torch.stack([effects[marked.to(x.device)].sum(0), effects.sum((0, 1))])
            sums[site] += whole.double().cpu()
    return {site: one[0] / one[1].where(one[1] != 0, torch.inf) for site, one in sums.items()}


@stage("concept-ablation-cue", version=1)
def run(spec: CueSpec, ctx: Context) -> CueResult:
    """Writes ``cue.jsonl``: candidates, and whether they act on the unintended part. The handle is the open SAEs."""
    done = attribution_at(spec.attribution)
    found, asked = done.result, FinetuneAttributeSpec.from_dict(done.asked["spec"])
    opened: Opened = ctx.handle or open_saes(asked)
    items = open_choices(asked.task).splits["train"][: spec.prompts]
    encoded = encode_choices(opened.lm, items, chat=asked.chat, skip=True)
    chosen: dict[Site, list[int]] = {}
    for one in found.candidates:
        chosen.setdefault(one.site, []).append(one.number)
    batches = list(marked_batches(opened.lm, asked.task, encoded))
    shares = effect_shares(opened.lm, opened.saes, batches, chosen)
    digests = {one.site: one.digest for one in found.sites}
    shares = {site: part.nan_to_num(0.0) for site, part in shares.items()}
    best = sorted((float(part) for one in shares.values() for part in one), reverse=True)[: spec.least]
    limit = min(spec.share, best[-1])
    lines = [
        Annotation(name_of(site, number), f"{100 * part:.0f} % of its effect is on the unintended part",
                   relevant=part >= limit, sae=digests[site])
        for site, numbers in chosen.items() for number, part in zip(numbers, shares[site].tolist(), strict=True)
    ]  # fmt: skip
    annotations.write(ctx.path / FILE, lines)
    return CueResult(len(lines), sum(bool(one.relevant) for one in lines), len(encoded))
