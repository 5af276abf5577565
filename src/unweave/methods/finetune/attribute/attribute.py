"""Candidates for ablation: the latents with the largest mean effect on a metric, over all sites or at each.

Metrics are of single examples, and are averaged over them: logit(correct) - logit(incorrect) at a prompt's last token
(Casademunt et al. 2025), or the mean log-probability of the assistant's tokens in a conversation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unweave.attribute.means import Activity, Mean
from unweave.attribute.runner import Batch
from unweave.core.site import Site
from unweave.lm.chat import Role
from unweave.lm.model import Tokens
from unweave.methods.finetune.attribute.result import Candidate
from unweave.tasks.agreement import AnswerDifference
from unweave.tasks.choices.encode import Encoded

Sign = Literal["positive", "negative", "either"]


@dataclass(frozen=True)
class AnswerLogProb:
    """The metric m = mean log-probability, in nats, of the assistant's tokens of each row. It reads all logits."""

    tokens: Tokens
    site: Site = Site("logits")

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        """The metric [R] of logits [R, P, V] of the examples ``rows`` [R]."""
        rows = rows.to(self.tokens.ids.device)
        answers = of_assistant(self.tokens)[rows, 1:].to(logits.device)
        row, place = answers.nonzero(as_tuple=True)
        targets = self.tokens.ids[rows, 1:].to(logits.device)[answers]
        log_p = torch.log_softmax(logits[row, place], -1).gather(1, targets.unsqueeze(1)).squeeze(1)
        return log_p.new_zeros(len(rows)).index_add(0, row, log_p) / answers.sum(1)


def of_assistant(tokens: Tokens) -> Tensor:
    """Which tokens are of the assistant's answers, and have something before them: bool [B, P]."""
    first = tokens.mask.cumsum(1) == 1
    return (tokens.roles == Role.ASSISTANT) & tokens.mask & ~first


def ahead(encoded: Encoded) -> AnswerDifference:
    """The metric logit(correct) - logit(incorrect) of items."""
    return AnswerDifference(clean=encoded.incorrect, patch=encoded.correct)


def choice_batches(encoded: Encoded, max_tokens: int) -> Iterator[Batch]:
    """Items with the metric logit(correct) - logit(incorrect)."""
    return ((part.tokens, None, ahead(part)) for part in encoded.groups(max_tokens))


def candidates(
    means: Mapping[Site, Activity],
    scores: Mapping[Site, Mean],
    *,
    top: int,
    per_site: bool = False,
    sign: Sign = "positive",
    scale: Mapping[Site, Tensor] | None = None,
) -> tuple[Candidate, ...]:
    """The ``top`` latents by score, of all sites together or of each, the strongest first; fewer where fewer fire.

    ``means`` say how strongly and often latents fire. ``scale`` [F] by site multiplies scores.
    """
    sites = list(scores)
    value = {site: scores[site].value * (1 if scale is None else scale[site].to(scores[site].value)) for site in sites}
    ranked = {site: _ranked(value[site], top, sign) for site in sites}
    listed = []
    for site in sites:
        factor = torch.ones_like(value[site]) if scale is None else scale[site].to(value[site])
        columns = (
            value[site], scores[site].margin * factor, means[site].activation.value, means[site].frequency.value,
            scores[site].value / scores[site].deviation.clamp(min=1e-30),
        )  # fmt: skip
        rows = torch.stack(columns, 1)[ranked[site]].tolist()
        for number, (score, margin, activation, frequency, size) in zip(ranked[site].tolist(), rows, strict=True):
            of_models = size if scale is not None else None
            listed.append(Candidate(site, number, score, margin, activation, frequency, of_models))
    listed.sort(key=lambda one: (-abs(one.score), one.site, one.number))
    return tuple(listed if per_site else listed[:top])


def _ranked(value: Tensor, top: int, sign: Sign) -> Tensor:
    """Up to ``top`` latents whose value has the sign, the largest in size first, int64."""
    size = {"positive": value, "negative": -value, "either": value.abs()}[sign]
    order = torch.argsort(size, descending=True, stable=True)[:top]
    return order[size[order] > 0].cpu()
