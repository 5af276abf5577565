"""Directions learnt from labelled texts, each as an SAE of one latent, so that all that is done with latents goes for
them: values, largest activation, steering, suppression.

    difference of means   w = mean of x over tokens of texts with the concept - mean over those without
    linear probe          w, b of a logistic regression on tokens, each with its text's label
    ReFT-r1               w of unit length, f = relu(w x + b), trained through the model (Wu et al. 2025)

ReFT-r1 adds to every token of a text the mean of its k largest f times w, and minimises the language model's loss on
texts with the concept, plus the sum of the other f there and of every f on texts without it:

    L = CE(text | x + mean(topk(f)) w) + l1 (sum of f not in topk, texts with + sum of f, texts without) / tokens

Beside them LoRA (Hu et al. 2021), the baseline that changes weights, on texts with the concept. It needs ``peft``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unweave.core.errors import UnweaveError
from unweave.core.progress import Task
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.lm.adapters import require_peft
from unweave.lm.chat import Role
from unweave.lm.model import LM, Tokens
from unweave.lm.taps import At
from unweave.methods.axbench.spec import LoraSpec, ReftSpec, TrainingSpec
from unweave.sae.activations import Activation, Identity, ReLU
from unweave.sae.module import SAE

_FIRST = 16
WRITE = "Write a short text."
"""the user's turn before a training text, for models with a chat template"""


@dataclass(frozen=True)
class Direction:
    """``w`` [D] of unit length and ``b``: the value of a token is w x + b, cut at 0 where ``relu``."""

    w: Tensor
    b: float = 0.0
    relu: bool = False


def sae_of(directions: Sequence[Direction], site: Site, policy: TokenPolicy) -> SAE:
    """Directions at one site as the latents of an SAE that reads and writes along them."""
    w = torch.stack([direction.w for direction in directions])
    b = torch.tensor([direction.b for direction in directions], dtype=w.dtype, device=w.device)
    activation: Activation = ReLU() if all(direction.relu for direction in directions) else Identity()
    return SAE(w.T, b, w, w.new_zeros(w.shape[1]), activation, read=site, policy=policy)


def text_tokens(lm: LM, texts: Sequence[str], most: int) -> Tokens:
    """Texts as the assistant's answers where the model has a chat template, else as they are; cut to ``most``."""
    if getattr(lm.tokenizer, "chat_template", None) is None:
        return lm.tokenize(list(texts)).columns(slice(most))
    talks = [[{"role": "user", "content": WRITE}, {"role": "assistant", "content": text}] for text in texts]
    tokens = lm.chat(talks)
    written = (tokens.roles == Role.ASSISTANT).int().cumsum(1)
    return tokens.columns(slice(int(((written <= most) & tokens.mask).any(0).sum())))


def counted(tokens: Tokens) -> Tensor:
    """The tokens of the texts themselves, without the chat's frame, bool [B, P]."""
    of_text = (tokens.roles == Role.ASSISTANT) | (tokens.roles == Role.TEXT)
    return of_text & tokens.mask


def batches(lm: LM, texts: Sequence[str], most: int, size: int) -> Iterator[tuple[slice, Tokens]]:
    """Texts as tokens, ``size`` at a time."""
    for start in range(0, len(texts), size):
        part = slice(start, min(start + size, len(texts)))
        yield part, text_tokens(lm, texts[part], most).to(lm.device)


def token_activations(
    lm: LM, site: Site, policy: TokenPolicy, texts: Sequence[str], most: int
) -> tuple[Tensor, Tensor]:
    """The activations x [N, D] of the texts' tokens that the policy counts, and the text [N] that each is of."""
    rows, owners = [], []
    for part, tokens in batches(lm, texts, most, 16):
        with lm.taps(read=[site], stop=site) as seen:
            lm(tokens)
        x = seen[site]
        keep = policy.keep(x, tokens.ids, tokens.mask) & counted(tokens)
        rows.append(x[keep])
        owners.append(torch.arange(part.start, part.stop, device=x.device).unsqueeze(1).expand_as(keep)[keep])
    return torch.cat(rows), torch.cat(owners)


def difference_of_means(x: Tensor, with_concept: Tensor) -> Direction:
    """From tokens x [N, D] and whether each is of a text with the concept [N]. The value 0 is where the tokens without
    the concept are on average. Raises UnweaveError where there are none of one kind, or no difference."""
    _both(with_concept)
    without = x[~with_concept].double().mean(0)
    w = x[with_concept].double().mean(0) - without
    return _direction(w, -(without @ w), x, relu=False)


def linear_probe(x: Tensor, with_concept: Tensor, l2: float = 1.0) -> Direction:
    """The logistic regression of tokens x [N, D], in standard units, with classes of equal weight; ``l2`` is the
    penalty on the squared weights over 2. The value of a token is its logit over the length of the raw weights."""
    from sklearn.linear_model import LogisticRegression

    _both(with_concept)
    mean, scale = x.double().mean(0), x.double().std(0, correction=0)
    scale = torch.where(scale > 1e-6 * scale.max(), scale, torch.ones_like(scale))
    model = LogisticRegression(C=1 / l2, class_weight="balanced", max_iter=1000)
    model.fit(((x.double() - mean) / scale).cpu().numpy(), with_concept.cpu().numpy())
    w = torch.from_numpy(np.asarray(model.coef_)[0]).to(scale) / scale
    return _direction(w, float(np.asarray(model.intercept_).item()) - mean @ w, x, relu=False)


def _direction(w: Tensor, b: Tensor | float, like: Tensor, *, relu: bool) -> Direction:
    length = float(w.norm())
    if not length > 0:
        raise UnweaveError("texts with and without the concept do not differ", remedy="use another site or other texts")
    return Direction((w / length).to(like.dtype), float(b) / length, relu)


def _both(with_concept: Tensor) -> None:
    if not bool(with_concept.any()) or bool(with_concept.all()):
        raise UnweaveError("a direction needs texts with the concept and without it", remedy="give some of each")


def trained(
    lm: LM, weights: Sequence[Tensor], texts: Sequence[str], most: int, options: TrainingSpec, seed: int,
    loss: Callable[[Tokens, Tensor], Tensor],
) -> Iterator[float]:  # fmt: skip
    """Takes AdamW's steps on ``loss(tokens, their places among the texts)``; yields it after each."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(weights, lr=options.lr, weight_decay=0.0)
    for _ in range(options.epochs):
        for rows in torch.randperm(len(texts), generator=generator).split(options.batch):
            tokens = text_tokens(lm, [texts[int(i)] for i in rows], most).to(lm.device)
            optimiser.zero_grad()
            with lm.taps(grad=True), torch.enable_grad():
                value = loss(tokens, rows)
                value.backward()
            optimiser.step()
            yield float(value.detach())


def reft_r1(
    lm: LM, site: Site, policy: TokenPolicy, texts: Sequence[str], with_concept: Sequence[bool], *, most: int,
    options: ReftSpec | None = None, seed: int = 0,
) -> Direction:  # fmt: skip
    """Trains a rank-1 edit on texts, each with the concept or without; the model's weights stay as they are.

    w starts at random, with the sign that makes at least half of the first texts' tokens active: many a random w is
    negative on all of them, and what is cut at 0 everywhere has no gradient.
    """
    options, label = options or ReftSpec(), torch.tensor(list(with_concept))
    _both(label)
    start = torch.randn(lm.width(site), generator=torch.Generator().manual_seed(seed))
    start = F.normalize(start, dim=0).to(lm.device)
    x, _ = token_activations(lm, site, policy, texts[:_FIRST], most)
    w = torch.nn.Parameter(-start if bool((x.to(start.dtype) @ start).median() < 0) else start)
    b = torch.nn.Parameter(torch.zeros((), device=lm.device))

    def loss(tokens: Tokens, rows: Tensor) -> Tensor:
        return reft_loss(lm, site, policy, tokens, label[rows].to(lm.device), (w, b), options)

    for _ in trained(lm, [w, b], texts, most, options, seed, loss):
        w.data = F.normalize(w.data, dim=0)
    return Direction(w.detach().to(lm.dtype), float(b.detach()), relu=True)


def reft_loss(
    lm: LM, site: Site, policy: TokenPolicy, tokens: Tokens, label: Tensor, weights: tuple[Tensor, Tensor],
    options: ReftSpec,
) -> Tensor:  # fmt: skip
    """The loss above of one batch, with gradients on ``weights`` w [D] and b []. ``label`` [B]: with the concept."""
    w, b = weights
    outside: list[Tensor] = []

    def edit(x: Tensor, at: At) -> Tensor:
        keep = policy.keep(x, at.ids, at.mask) & counted(tokens)
        f = torch.relu(x.to(w.dtype) @ w + b) * keep
        top = f.topk(min(options.k, f.shape[1]), 1).values
        outside[:] = [torch.where(label, f.sum(1) - top.sum(1), f.sum(1)).sum() / keep.sum().clamp(min=1)]
        return x + (top.mean(1)[:, None, None] * w * keep.unsqueeze(-1)).to(x.dtype)

    with lm.taps(edit={site: edit}, grad=True):
        logits = lm(tokens)
    assert logits is not None
    return text_loss(logits, tokens, label) + options.l1 * outside[0]


def text_loss(logits: Tensor, tokens: Tokens, rows: Tensor | None = None) -> Tensor:
    """Mean cross-entropy, in nats, of the texts' tokens in ``rows`` [B] (None: all); 0 where there are none."""
    predicted = counted(tokens)[:, 1:]
    if rows is not None:
        predicted = predicted & rows.unsqueeze(1)
    if not bool(predicted.any()):
        return logits.sum() * 0.0
    return F.cross_entropy(logits[:, :-1][predicted].float(), tokens.ids[:, 1:][predicted])


def passage_values(
    lm: LM, latents: Sequence[tuple[SAE, int]], texts: Sequence[str], most: int, shown: Task
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Each text's mean and largest value of each latent over the tokens that count, [texts, latents] twice; one pass of
    the model for all. NaN where no token counts. ``shown`` counts texts."""
    by_sae: dict[SAE, list[int]] = {}
    for place, (sae, _) in enumerate(latents):
        by_sae.setdefault(sae, []).append(place)
    order = lm.sites()
    sites = sorted({sae.read for sae in by_sae if sae.read is not None}, key=order.index)
    subsets = {sae: sae.subset(dict.fromkeys(latents[i][1] for i in places)) for sae, places in by_sae.items()}
    mean, largest = (np.full((len(texts), len(latents)), np.nan) for _ in range(2))
    for part, tokens in batches(lm, texts, most, 16):
        with lm.taps(read=sites, stop=sites[-1]) as seen:
            lm(tokens)
        for sae, places in by_sae.items():
            assert sae.read is not None
            x, column = seen[sae.read], subsets[sae].latents.tolist()
            keep = (sae.policy.keep(x, tokens.ids, tokens.mask) & counted(tokens)).unsqueeze(-1)
            f = subsets[sae].encode(x).float()[..., [column.index(latents[i][1]) for i in places]]
            mean[part, places] = (torch.where(keep, f, 0.0).sum(1) / keep.sum(1)).cpu().numpy()
            top = torch.where(keep, f, -torch.inf).amax(1)
            largest[part, places] = torch.where(keep.any(1), top, torch.nan).cpu().numpy()
        shown.advance(len(tokens))
    return mean, largest


def peft_for_lora() -> Any:
    """The package. UnweaveError where it is not installed."""
    return require_peft("the method lora", otherwise="leave lora out")


@contextmanager
def adapted(
    lm: LM, texts: Sequence[str], *, most: int, options: LoraSpec | None = None, seed: int = 0
) -> Iterator[list[float]]:
    """The model with adapters on all linear layers but the unembedding, trained on texts with a concept; as it was
    afterwards. Yields the loss of each step."""
    from transformers.pytorch_utils import Conv1D

    options, peft = options or LoraSpec(), peft_for_lora()
    transposed = any(isinstance(module, Conv1D) for module in lm.model.modules())
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=options.alpha, target_modules="all-linear", fan_in_fan_out=transposed
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = peft.LoraModel(lm.model, config, "default")
    weights = [weight for weight in lm.model.parameters() if weight.requires_grad]

    def loss(tokens: Tokens, _rows: Tensor) -> Tensor:
        logits = lm(tokens)
        assert logits is not None
        return text_loss(logits, tokens)

    try:
        yield list(trained(lm, weights, texts, most, options, seed, loss))
    finally:
        wrapped.unload()
