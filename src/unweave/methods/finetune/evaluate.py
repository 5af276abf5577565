"""How a model answers, and what it projects on directions: one pass of every batch; counts and sums are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from unweave.core.dist import SOLO, Group
from unweave.core.errors import UnweaveError
from unweave.core.shares import Share
from unweave.core.site import Site
from unweave.lm.model import LM
from unweave.lm.taps import Edits
from unweave.methods.finetune.result import Accuracy, Score
from unweave.methods.finetune.rows import IGNORE, Rows
from unweave.methods.finetune.starts import Starts

_BATCH = 32


@dataclass
class _Sums:
    """Over items: right, between, cued, cues; over labels and tokens: loss, labels, tokens; and x [D] by site."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.int64))
    loss: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    x: dict[Site, Tensor] = field(default_factory=dict)


def evaluate(
    lm: LM,
    rows: Rows,
    edit: Edits | None = None,
    *,
    starts: Starts | None = None,
    directions: Mapping[Site, Tensor] | None = None,
    most: int | None = None,
    group: Group = SOLO,
) -> tuple[Score, dict[Site, float]]:
    """The score on (the first ``most``) rows, and the mean product of activations with unit ``directions`` [C, D] over
    all tokens and directions, by site. In a group each process reads its share, and all get the same numbers."""
    lengths = rows.lengths[:most]
    if len(lengths) == 0:
        raise UnweaveError("there are no items to evaluate on", remedy="give a split that has some")
    own = lengths.argsort(stable=True).tolist()[group.share(len(lengths))]
    directions, sums = directions or {}, _Sums()
    sums.x = {site: torch.zeros(rows_.shape[1], dtype=torch.float64) for site, rows_ in directions.items()}
    for batch in (own[i : i + _BATCH] for i in range(0, len(own), _BATCH)):
        _add(sums, lm, rows, batch, edit, starts)
    for t in (sums.counts, sums.loss, *sums.x.values()):
        group.sum(t)
    right, between, cued, cues = sums.counts.tolist()
    loss, labels, tokens = sums.loss.tolist()
    n = len(lengths)
    answers = None
    if rows.answers is not None:
        answers = Accuracy(Share(right, n), Share(between, n), Share(cued, cues) if cues else None)
    projections = {
        site: float(x @ directions[site].double().cpu().mean(0) / max(tokens, 1.0)) for site, x in sums.x.items()
    }
    return Score(loss / max(labels, 1.0), answers), projections


def _add(sums: _Sums, lm: LM, rows: Rows, batch: Sequence[int], edit: Edits | None, starts: Starts | None) -> None:
    tokens, labels = rows.batch(batch)
    columns = (labels != IGNORE).any(0).nonzero().squeeze(1)
    start = None if starts is None else starts.start(batch, tokens.ids.shape[1])
    with lm.taps(read=sums.x, edit=edit, start=start) as seen:
        logits = lm(tokens, keep_logits=columns.to(lm.device))
    assert logits is not None
    goal = labels[:, columns].to(logits.device)
    picked = logits[goal != IGNORE].float()
    goal = goal[goal != IGNORE]
    loss = float(F.cross_entropy(picked, goal, reduction="sum"))
    sums.loss += torch.tensor([loss, len(goal), tokens.n_tokens], dtype=torch.float64)
    mask = tokens.mask.to(logits.device)
    for site in sums.x:
        sums.x[site] += seen[site][mask].double().sum(0).cpu()
    if rows.answers is None:
        return
    answers = rows.answers.at(batch)
    last = logits[:, -1].float().cpu()
    right = last.argmax(1) == answers.correct
    either = last.gather(1, torch.stack([answers.correct, answers.incorrect], 1))
    between = either[:, 0] > either[:, 1]
    likelier = torch.where(between, answers.correct, answers.incorrect)
    known = answers.cue >= 0
    cued = known & (likelier == answers.cue)
    sums.counts += torch.stack([flag.sum() for flag in (right, between, cued, known)])
