"""What can be said of an ablation before anything is trained: where the base model lies on the directions that would
be ablated, and whether the ablation breaks the task.

1. Projections p = x . d / |d| of the base model over the task's tokens that count: mean, deviation and share of the
   site's variance. Taking the direction out sets p to 0. Where p is well below 0 that is an addition of the concept.
2. How zeroing a latent shifts x on average: by -f_j |d_j|, which is much where it fires everywhere.
3. logit(correct) - logit(incorrect) on the task's items with each edit and without, in pairs.
4. What the edit costs, in multiply-adds: for a TopK SAE every latent must be computed to know which win.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from unweave.attribute.means import Z
from unweave.attribute.states import counted, values_of
from unweave.core.errors import UnweaveError
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.latents.selection import Selection
from unweave.lm.model import LM, Tokens
from unweave.lm.taps import Edits
from unweave.methods.finetune.attribute.attribute import ahead
from unweave.methods.finetune.conditions import Condition, open_condition
from unweave.methods.finetune.diagnosis import Diagnosis, DirectionCheck, EditCheck
from unweave.methods.finetune.spec import ConditionSpec
from unweave.sae.activations import TopK
from unweave.sae.module import SAE
from unweave.sae.subset import Subset, orthonormal_basis
from unweave.tasks.choices.encode import Encoded


def diagnose(
    lm: LM,
    saes: Mapping[Site, SAE],
    selection: Selection,
    items: Encoded | Sequence[Tokens],
    *,
    conditions: Sequence[Condition] | None = None,
    max_tokens: int = 2048,
) -> Diagnosis:
    """What ``selection`` would do to the base model ``lm``, on the items of a task; of batches of text, which have no
    answers, where the model lies on the directions. ``conditions``: the ablations to try, by default one of each kind.

    Raises UnweaveError where an SAE is missing, or no token counts.
    """
    groups = list(items.groups(max_tokens)) if isinstance(items, Encoded) else []
    texts = [group.tokens for group in groups] if isinstance(items, Encoded) else items
    kinds = ("zero", "span", "mean") if selection.kind == "latents" else ("span", "mean")
    ablations = conditions
    if ablations is None:
        specs = [ConditionSpec(kind=kind) for kind in kinds]  # type: ignore[arg-type]
        ablations = [open_condition(one, selection, lm, saes, texts) for one in specs]
    chosen = open_condition(ConditionSpec(kind="span"), selection, lm, saes).chosen
    passes = (None, *(one.full for one in ablations)) if groups and ablations else ()
    n, answers = sum(map(len, texts)), []
    with task("diagnose", total=n * (1 + len(passes)), unit="items") as shown:
        numbers = {one.site: one.numbers for one in selection.sites}
        directions, shares, n_tokens = _projections(lm, chosen, numbers, texts, shown.advance)
        for edit in passes:
            answers.append(_ahead(lm, groups, edit))
            shown.advance(n)
    edits = [
        _check(one.spec.kind, answers[0], after, _cost(lm, chosen, one.spec.kind))
        for one, after in zip(ablations, answers[1:], strict=False)
    ]
    return Diagnosis(n, n_tokens, directions, shares, tuple(edits))


def _projections(
    lm: LM,
    chosen: Mapping[Site, Subset],
    numbers: Mapping[Site, Sequence[int]],
    texts: Sequence[Tokens],
    advance: Callable[[int], None],
) -> tuple[tuple[DirectionCheck, ...], dict[str, float], int]:
    """Every direction's check, the share of variance of each site's span, and how many tokens counted at most."""
    reads = {site: subset.sae.read or site for site, subset in chosen.items()}
    sums = {site: _Sums(subset) for site, subset in chosen.items()}
    sites = {*chosen, *reads.values()}
    for tokens in texts:
        batch = tokens.to(lm.device)
        values = values_of(lm, sites, batch, max_tokens=batch.ids.numel())
        for site, one in sums.items():
            source = values[reads[site]]
            keep = counted(lm, one.subset.sae, source, batch)
            one.add(values[site][keep], source[keep])
        advance(len(tokens))
    checks = tuple(check for site, one in sums.items() for check in one.checks(site, numbers[site]))
    return checks, {str(site): one.span_share for site, one in sums.items()}, max(one.n for one in sums.values())


class _Sums:
    """Sums over one site's tokens: x, its squared length, squared projections on directions and span, and latents."""

    def __init__(self, subset: Subset) -> None:
        self.subset, self.n = subset, 0
        rows = subset.sae.W_dec[subset.latents].double()
        self.norms = rows.norm(dim=1)
        self.unit, self.span = F.normalize(rows, dim=1), orthonormal_basis(rows)
        width, count = rows.shape[1], len(rows)
        zeros = [torch.zeros(n, dtype=torch.float64, device=rows.device) for n in (width, 1, count, len(self.span))]
        self.x, self.size, self.squares, self.span_squares = zeros
        self.f = torch.zeros(2, count, dtype=torch.float64, device=rows.device)

    def add(self, x: Tensor, source: Tensor) -> None:
        """Counts tokens in: what is written to, x [n, D], and what the latents read."""
        x, f = x.double(), self.subset.encode(source).double()
        self.n += len(x)
        self.x += x.sum(0)
        self.size += x.square().sum()
        self.squares += (x @ self.unit.T).square().sum(0)
        self.span_squares += (x @ self.span.T).square().sum(0)
        self.f += torch.stack([f.sum(0), (f != 0).double().sum(0)])

    def _variance(self, squares: Tensor, rows: Tensor) -> Tensor:
        return (squares / self.n - (self.x @ rows.T / self.n).square()).clamp(min=0)

    @property
    def _total(self) -> float:
        return max(float(self.size / self.n - (self.x / self.n).square().sum()), 1e-30)

    @property
    def span_share(self) -> float:
        return float(self._variance(self.span_squares, self.span).sum()) / self._total

    def checks(self, site: Site, numbers: Sequence[int]) -> Iterator[DirectionCheck]:
        """A check for each direction, which are numbered so. UnweaveError where no token counts."""
        if self.n == 0:
            raise UnweaveError("no token of the task counts for this SAE", where=str(site), remedy="check the task")
        variance = self._variance(self.squares, self.unit)
        mean, deviation = self.x @ self.unit.T / self.n, variance.sqrt()
        strong, often = self.f / self.n
        columns = torch.stack([strong, often, mean, deviation, variance / self._total, -strong * self.norms])
        for number, (f, share, p, spread, part, shift) in zip(numbers, columns.T.tolist(), strict=True):
            in_deviations = shift / spread if spread else 0.0
            yield DirectionCheck(site, number, f, share, p, spread, part, p < -spread, in_deviations)


def _ahead(lm: LM, groups: Sequence[Encoded], edit: Edits | None) -> Tensor:
    """logit(correct) - logit(incorrect) of every item, float64 [N]."""
    values = []
    for group in groups:
        width = group.tokens.ids.shape[1]
        keep = width - int(group.last.min())
        with lm.taps(edit=edit):
            logits = lm(group.tokens, keep_logits=keep)
        assert logits is not None
        rows = torch.arange(len(group))
        last = logits[rows, (group.last - (width - keep)).to(logits.device)].double()
        values.append(ahead(group)(last, rows).cpu())
    return torch.cat(values)


def _cost(lm: LM, chosen: Mapping[Site, Subset], kind: str) -> float:
    """Multiply-adds that the edits add at a token, as a share of those of the model's blocks."""
    added = 0
    for subset in chosen.values():
        (inputs, latents), (count, width) = subset.W_enc.shape, subset.sae.W_dec[subset.latents].shape
        rows = subset.sae.d_sae if isinstance(subset.sae.activation, TopK) else latents
        added += 2 * count * width if kind == "span" else inputs * rows + count * width
    return added / sum(weight.numel() for block in lm.layout.blocks for weight in block.parameters())


def _check(edit: str, before: Tensor, after: Tensor, cost: float) -> EditCheck:
    change = after - before
    margin = Z * float(change.std()) / len(change) ** 0.5 if len(change) > 1 else 0.0
    first, then = (float((values > 0).double().mean()) for values in (before, after))
    return EditCheck(edit, float(before.mean()), float(change.mean()), margin, first, then, cost)
