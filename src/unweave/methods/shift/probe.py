"""A linear classifier on mean-pooled activations, and how right it is about two labels at once.

    logit(x) = w . pooled(x) + b,   pooled(x) = mean over a text's tokens of the activation at one site

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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unweave.core.errors import UnweaveError
from unweave.core.shares import Share
from unweave.core.site import Site
from unweave.lm.model import LM
from unweave.methods.shift.result import Accuracies


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
    with lm.taps(read=[site], stop=site) as seen:
        lm(tokens)
    last = tokens.mask.sum(1) - 1
    x = seen[site][torch.arange(len(keywords)), last].float().cpu()
    vectors = x - x.mean(0)
    return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)


def describe(pooled: Tensor, vectors: Tensor) -> Tensor:
    """What the bottleneck lets through of pooled activations [N, D]: [N, K]."""
    return pooled @ vectors.to(pooled.dtype).T
