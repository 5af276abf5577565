"""A linear classifier on averaged activations, and how right it is about two labels at once.

    logit(x) = w . pooled(x) + b,   pooled(x) = mean over a text's tokens of the activation at one site

1. Texts are tokenised once and put into batches of similar length.
2. One pass up to the site gives the pooled activations of the model as it is, and keeps the residual stream where the
   lowest SAE's block begins. Everything that does not change the model shares them.
3. With edits the pass begins at that stream, unless something below it (the embedding) is edited, and ends at the
   site. The cost of an ablation is that of the blocks it can change.

Trained as in Marks et al. 2024, app. E.1: logistic regression by AdamW, learning rate 0.01, one epoch, batches of 32,
in the order in which the examples come. One thing differs, unless told otherwise: activations are centred and scaled
by the training set's mean and standard deviation first, which is folded into w and b afterwards. In some models (the
default one too) a few dimensions are hundreds of times larger than the rest, and one epoch then learns nothing else.

Concept bottleneck probing is a baseline that knows the task's words (app. E.2). Each keyword's vector is the model's
activation at its last token, at the classifier's site, minus the mean over all keywords, at unit length. A text is
described by its pooled activation's product with each vector, and a probe is trained on these descriptions. The
keywords stand behind a neutral word, since the first token of a text is an attention sink in many models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unweave.attribute.states import beyond_first, values_of
from unweave.core.errors import UnweaveError
from unweave.core.progress import Task, task
from unweave.core.shares import Share
from unweave.core.site import Site
from unweave.data.batches import by_length
from unweave.lm.chat import encode_text
from unweave.lm.model import LM, Tokens
from unweave.lm.taps import SiteEdit
from unweave.methods.shift.result import Accuracies

Edit = SiteEdit


def pool(x: Tensor, tokens: Tokens, skip_first: int) -> Tensor:
    """Means [B, D] of activations x [B, P, D] over each row's tokens, without its first ``skip_first``.

    The first token of a text is an attention sink in many models: its activation is huge, and says nothing of the text.
    Sums are taken in float32 at least.
    """
    counted = beyond_first(tokens.mask, skip_first)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    weights = counted.to(wide.dtype).unsqueeze(-1)
    return (wide * weights).sum(1) / weights.sum(1)


class Pooled:
    """Texts and their pooled activations. ``clean`` [N, D] is computed once; ``edited`` once per call.

    ``begin`` is the block below which no edit but the embedding's lies. Raises UnweaveError for a text of no more than
    ``skip_first`` tokens.
    """

    def __init__(
        self,
        lm: LM,
        texts: Sequence[str],
        site: Site,
        *,
        begin: int | None = None,
        skip_first: int = 1,
        max_length: int = 128,
        batch_tokens: int = 2048,
    ) -> None:
        self.lm, self.site, self.skip_first, self.batch_tokens = lm, lm.site(site), skip_first, batch_tokens
        if lm.tokenizer is None:
            raise UnweaveError("texts need a tokenizer", where=lm.name, remedy="use a model that comes with one")
        encoded = [encode_text(lm.tokenizer, text) for text in texts]
        self.rows = [(ids[:max_length], roles[:max_length]) for ids, roles in encoded]
        for row, text in zip(self.rows, texts, strict=True):
            if len(row[0]) <= skip_first:
                what = f"no token is left to average over without the first {skip_first}"
                raise UnweaveError(what, where=repr(text[:60]), remedy="leave the text out, or skip fewer")
        self.begin = None if begin is None else Site("resid_pre", begin)
        self._streams: dict[int, Tensor] = {}
        self._clean: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, rows: Sequence[int], copies: int = 1) -> Iterator[list[int]]:
        """``rows`` sorted by length, in groups whose padded size times ``copies`` keeps to ``batch_tokens``."""
        order = sorted(rows)
        for group in by_length([len(self.rows[row][0]) for row in order], self.batch_tokens // copies):
            yield [order[i] for i in group]

    def tokens(self, rows: Sequence[int]) -> Tokens:
        """The tokens of some texts, padded on the right."""
        return Tokens.pad([self.rows[i] for i in rows], self.lm.pad_id)

    @property
    def clean(self) -> Tensor:
        """Pooled activations [N, D] of the model as it is, on the CPU."""
        if self._clean is None:
            with task("read texts", total=len(self), unit="texts") as shown:
                self._clean = self._read(range(len(self)), (), shown)
        return self._clean

    def edited(self, edits: Sequence[Edit], rows: Sequence[int] | None = None, name: str = "ablate") -> Tensor:
        """Pooled activations [n, D] of ``rows`` (all by default) with edits in place, on the CPU."""
        rows = range(len(self)) if rows is None else rows
        if not edits:
            return self.clean[list(rows)]
        with task(name, total=len(rows), unit="texts") as shown:
            return self._read(rows, edits, shown)

    def _read(self, rows: Sequence[int], edits: Sequence[Edit], shown: Task) -> Tensor:
        lm, place = self.lm, {row: i for i, row in enumerate(rows)}
        pooled = torch.zeros(0)
        above = bool(edits) and self._above(edits)
        for group in self.batches(rows):
            tokens = self.tokens(group).to(lm.device)
            start = (self.begin, self._stream(group, tokens)) if above and self.begin is not None else None
            keep = [self.begin] if self.begin is not None and not edits else []
            with lm.taps(read=[*keep, self.site], edit=list(edits), stop=self.site, start=start) as seen:
                lm(tokens)
            for site in keep:
                for i, row in enumerate(group):
                    self._streams[row] = seen[site][i, : len(self.rows[row][0])].clone()
            values = pool(seen[self.site], tokens, self.skip_first).cpu()
            pooled = pooled if len(pooled) else values.new_zeros(len(rows), values.shape[1])
            pooled[[place[row] for row in group]] = values
            shown.advance(len(group))
        return pooled

    def _above(self, edits: Sequence[Edit]) -> bool:
        """Whether no edit changes, or reads, anything below the block where a pass can begin."""
        if self.begin is None:
            return False
        touched = [site for edit in edits for site in (edit.site, *edit.needs)]
        return all(site.layer is not None and site >= self.begin for site in touched)

    def _stream(self, group: Sequence[int], tokens: Tokens) -> Tensor:
        """The kept residual stream [B, P, D] of some texts, zero at padding."""
        self.clean  # noqa: B018 (fills what is kept)
        first = self._streams[group[0]]
        stream = first.new_zeros(*tokens.ids.shape, first.shape[-1])
        for i, row in enumerate(group):
            stream[i, : len(self._streams[row])] = self._streams[row]
        return stream


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a probe is trained; the defaults are the paper's, ``standardise`` aside."""

    lr: float = 1e-2
    epochs: int = 1
    batch: int = 32
    weight_decay: float = 0.01
    standardise: bool = True

    def __post_init__(self) -> None:
        if not (self.lr > 0 and self.epochs > 0 and self.batch > 0 and self.weight_decay >= 0):
            raise UnweaveError(f"a probe cannot be trained so: {self}", remedy="give positive numbers")


@dataclass(frozen=True)
class Probe:
    """``weight`` [D] and ``bias`` []: the logit of label 1 is ``x @ weight + bias``."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [...] of pooled activations x [..., D]; above 0 means label 1."""
        return x @ self.weight.to(x.dtype) + self.bias.to(x.dtype)


def fit(x: Tensor, labels: Tensor, recipe: Recipe | None = None, *, seed: int = 0) -> Probe:
    """The probe of examples x [N, D] with labels [N] of 0 and 1. ``seed`` decides the first weights.

    Raises UnweaveError for one label only, and for NaN.
    """
    recipe = recipe or Recipe()
    if x.ndim != 2 or labels.shape != x.shape[:1]:
        raise UnweaveError(f"{list(x.shape)} activations and {list(labels.shape)} labels do not go together")
    if set(labels.tolist()) != {0, 1}:
        raise UnweaveError("a probe needs examples of both labels, 0 and 1", remedy="give some of each")
    if not bool(torch.isfinite(x).all()):
        raise UnweaveError("the activations hold NaN or infinity", remedy="use another dtype or site")
    shift, scale = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    if recipe.standardise:
        shift, scale = x.mean(0), x.std(0, correction=0)
        scale = torch.where(scale > 1e-6 * scale.max(), scale, torch.ones_like(scale))
    weight, bias = _trained((x - shift) / scale, labels.to(x.dtype), recipe, seed)
    weight = weight / scale
    return Probe(weight, bias - shift @ weight)


def _trained(x: Tensor, labels: Tensor, recipe: Recipe, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    bound = x.shape[1] ** -0.5  # as torch.nn.Linear begins
    first = (torch.rand(x.shape[1] + 1, generator=generator, dtype=torch.float64) * 2 - 1) * bound
    weight, bias = (nn.Parameter(part.to(x)) for part in (first[:-1], first[-1]))
    optimiser = torch.optim.AdamW([weight, bias], lr=recipe.lr, weight_decay=recipe.weight_decay)
    with torch.enable_grad():
        for _ in range(recipe.epochs):
            for rows, wanted in zip(x.split(recipe.batch), labels.split(recipe.batch), strict=True):
                optimiser.zero_grad()
                F.binary_cross_entropy_with_logits(rows @ weight + bias, wanted).backward()
                optimiser.step()
    return weight.detach(), bias.detach()


def accuracies(logits: Tensor, professions: Sequence[int], genders: Sequence[int]) -> Accuracies:
    """How right logits [N] are, with the profession and the gender (0 or 1) of each example.

    Raises UnweaveError unless all four combinations of labels occur.
    """
    predicted = (logits > 0).long().cpu()
    labels = torch.tensor([list(professions), list(genders)])
    right = predicted == labels
    groups = []
    for group in ((0, 0), (0, 1), (1, 0), (1, 1)):
        here = (labels == torch.tensor(group).unsqueeze(1)).all(0)
        if not bool(here.any()):
            raise UnweaveError(f"no test example has the labels {group}", remedy="test on all four groups")
        groups.append(_share(right[0, here]))
    return Accuracies(_share(right[0]), _share(right[1]), tuple(groups))


def _share(right: Tensor) -> Share:
    return Share(int(right.sum()), len(right))


# -- concept bottleneck probing ----------------------------------------------------------------------------------------

KEYWORDS = (
    "nurse", "healthcare", "hospital", "patient", "medical", "clinic", "triage", "medication", "emergency", "surgery",
    "professor", "academia", "research", "university", "tenure", "faculty", "dissertation", "sabbatical", "publication",
    "grant",
)  # fmt: skip
"""The paper's words for the two professions."""
_BEFORE = "The"


def concept_vectors(lm: LM, site: Site, keywords: Sequence[str] = KEYWORDS) -> Tensor:
    """Unit vectors [K, D], on the CPU."""
    tokens = lm.tokenize([f"{_BEFORE} {word}" for word in keywords])
    last = tokens.mask.sum(1) - 1
    x = values_of(lm, [site], tokens)[site][torch.arange(len(keywords)), last].float().cpu()
    vectors = x - x.mean(0)
    return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)


def describe(pooled: Tensor, vectors: Tensor) -> Tensor:
    """What the bottleneck lets through of pooled activations [N, D]: [N, K]."""
    return pooled @ vectors.to(pooled.dtype).T
