"""RAVEL: do some latents hold one attribute of an entity, and no other?

1. Sentences about entities (``facts``); those that the model completes rightly count. f is what the SAE makes of the
   activation x at the entity's last token.
2. A pair has a base and a source sentence about other entities, on one attribute of which their values differ. Of
   *cause* pairs that is the attribute in question, and the base's completion should become the source's; of *isolation*
   pairs it is another one, and it should stay.
3. A mask m over latents: at the entity's last token x' = x + sum_j m_j (f_j(source) - f_j(base)) d_j. In training
   m = sigmoid(theta / T), theta from 0, T from 1 to 1e-4, against the cross-entropy of the token that should come next;
   in testing m = 1 where theta > 0.
4. Cause and isolation are the shares of test pairs whose greedy completion begins with what it should; their mean is
   the disentanglement. Changing nothing reaches 0.5.

Correct form: entities of test pairs are in no training pair; a pair counts as what it was drawn for; a value must be
complete; what the SAE does not explain stays. Compatible form: SAEBench 0.6's, pairs divided and not entities, batches
in one order and the last, partial one dropped, cause pairs whose completions begin with the same token counted as
isolation, x' = decode(...) without the error. Beside it: the subspace of the values' means in the model's own
activation swapped as a whole (``llm_``), and as many latents as the mask has, drawn at random (``random_``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unweave.core.codes import Codes
from unweave.core.errors import UnweaveError
from unweave.core.pieces import Pieces
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.core.spec import digest
from unweave.data.pack import Row
from unweave.lm.at import At
from unweave.lm.chat import encode_texts
from unweave.lm.model import LM, Tokens
from unweave.methods.saebench.facts import TRAIN, Fact, Known, Pairs, facts, says
from unweave.methods.saebench.spec import RavelSpec, SaebenchSpec
from unweave.methods.saebench.spread import Scored
from unweave.methods.saebench.task import About, Bench, Task
from unweave.sae.module import SAE
from unweave.tasks.suitable import tokenizer_of

_OVERLAP = (1 - TRAIN) / TRAIN


class Answering(Protocol):
    """What answers prompts (by number [n]) when ``added`` [n, D] is added at the entity's last token."""

    def logits(self, prompts: Tensor, added: Tensor) -> Tensor:
        """Of the next token, [n, V], with gradients to ``added``."""
        ...

    def completions(self, prompts: Tensor, added: Tensor) -> list[str]: ...


@dataclass(frozen=True)
class Prompted:
    """A model that answers: rows of tokens, and the entity's last token in each."""

    lm: LM
    site: Site
    rows: Sequence[Row]
    places: Sequence[int]
    new_tokens: int
    batch_tokens: int

    def _edited(self, prompts: Tensor, added: Tensor | None) -> tuple[Tokens, dict[Site, Any]]:
        tokens = Tokens.pad([(self.rows[i].ids, self.rows[i].roles) for i in prompts.tolist()], self.lm.pad_id, "left")
        width, every = tokens.ids.shape[1], torch.arange(len(prompts), device=self.lm.device)
        place = torch.tensor([width - len(self.rows[i].ids) + self.places[i] for i in prompts.tolist()])

        def edit(x: Tensor, at: At) -> Tensor | None:
            if added is None or x.shape[1] < width:
                return None  # a new token alone: the entity's keys and values are kept as edited
            at_entity = (every, place.to(x.device))
            return x.index_put(at_entity, (x[at_entity] + added.to(x.device)).to(x.dtype))

        return tokens, {self.site: edit}

    def logits(self, prompts: Tensor, added: Tensor) -> Tensor:
        tokens, edit = self._edited(prompts, added)
        with self.lm.taps(edit=edit, grad=True):
            logits = self.lm(tokens, keep_logits=1)
        assert logits is not None
        return logits[:, -1]

    def new_ids(self, prompts: Tensor, added: Tensor | None) -> Tensor:
        """What is said next, greedily, int64 [n, new tokens]."""
        longest = max(len(self.rows[i].ids) for i in prompts.tolist())
        parts = []
        with task("completions", total=len(prompts), unit="sentences") as shown:
            for some in torch.arange(len(prompts)).split(max(1, self.batch_tokens // longest)):
                tokens, edit = self._edited(prompts[some], None if added is None else added[some])
                new = self.lm.generate_ids(tokens, edit, max_new_tokens=self.new_tokens).cpu()
                parts.append(F.pad(new, (0, self.new_tokens - new.shape[1]), value=self.lm.pad_id))
                shown.advance(len(some))
        return torch.cat(parts)

    def completions(self, prompts: Tensor, added: Tensor | None) -> list[str]:
        return [self.lm.decode(row) for row in self.new_ids(prompts, added)]


@dataclass(frozen=True)
class Swap:
    """What swapping latents adds to the bases' activations at their entities' last tokens."""

    codes: Codes
    """of every prompt [N, F]"""
    W_dec: Tensor
    rest: Tensor | None
    """what is taken off where the error goes: decode(f) - x [N, D]"""
    scale: Tensor | None
    """of each prompt [N, 1], where the SAE normalises its inputs"""

    @classmethod
    def of(cls, sae: SAE, x: Tensor, *, keep_error: bool) -> Swap:
        x = x.to(sae.W_enc)
        codes, normal = sae.codes(x), sae.normalised(x)
        rest = None if keep_error else (sae.explained(codes, x) - x).float().cpu()
        scale = None if normal is None else normal.scale.float().cpu()
        return cls(codes.cpu(), sae.W_dec.float().cpu(), rest, scale)

    def added(self, pairs: Pairs, masks: Tensor, number: Tensor) -> Tensor:
        """[n, D] for masks [M, F], of which each pair has one (number int64 [n])."""
        parts = []
        for prompts in (pairs.source, pairs.base):
            codes = self.codes.take(prompts)
            weight = codes.values * masks[number[codes.row_of_each()], codes.indices]
            parts.append(F.embedding_bag(codes.indices, self.W_dec, codes.offsets, mode="sum",
                                         per_sample_weights=weight, include_last_offset=True))  # fmt: skip
        added = parts[0] - parts[1]
        added = added if self.scale is None else added * self.scale[pairs.base]
        return added if self.rest is None else added + self.rest[pairs.base]


def trained(
    world: Answering, swap: Swap, problems: Sequence[Pairs], first: Tensor, options: RavelSpec, form: str, seed: int,
    rows_at_once: int = 64,
) -> Tensor:  # fmt: skip
    """A mask for each problem, bool [M, F], all trained together; ``first`` [N] is each prompt's first right token."""
    theta = torch.zeros(len(problems), swap.codes.n_latents, requires_grad=True)
    optimiser, orders = torch.optim.Adam([theta], lr=options.rate), []
    most = max(map(len, problems))
    each = max(1, most // options.batch if form == "compatible" else -(-most // options.batch))
    temperatures = torch.logspace(0, -4, options.epochs * each).tolist()
    generator = torch.Generator().manual_seed(seed)
    with task("ravel's masks", total=len(temperatures), unit="steps") as shown:
        for step, temperature in enumerate(temperatures):
            if step % each == 0 and (form != "compatible" or step == 0):
                orders = [torch.randperm(len(one), generator=generator) for one in problems]
            taken = [order[(step % each) * options.batch :][: options.batch] for order in orders]
            pairs = [one.take(rows) for one, rows in zip(problems, taken, strict=True)]
            together = Pairs.cat(pairs)
            number = torch.repeat_interleave(torch.arange(len(pairs)), torch.tensor([len(one) for one in pairs]))
            share = 1 / torch.tensor([max(1, len(one)) for one in pairs])[number]  # a mean over each problem's own
            optimiser.zero_grad()
            for some in torch.arange(len(together)).split(rows_at_once):
                with torch.enable_grad():
                    masks = torch.sigmoid(theta / temperature)
                    part = together.take(some)
                    logits = world.logits(part.base, swap.added(part, masks, number[some]))
                    target = first[part.wanted].to(logits.device)
                    lost = F.cross_entropy(logits.float(), target, reduction="none")
                    (lost * share[some].to(lost.device)).sum().backward()
            optimiser.step()
            shown.advance()
    return theta.detach() > 0


def shares(
    world: Answering, pairs: Pairs, added: Tensor, names: Sequence[tuple[str, ...]], form: str
) -> tuple[float, float]:
    """Cause and isolation: of either kind of pair, the share whose completion is what it should be."""
    said = world.completions(pairs.base, added)
    if not 0 < int(pairs.cause.sum()) < len(pairs):
        raise UnweaveError("all test pairs are of one kind: the values begin with the same token", where="ravel",
                           remedy="give facts whose values begin with different tokens")  # fmt: skip
    right = torch.tensor([says(text, names[i], form) for text, i in zip(said, pairs.wanted.tolist(), strict=True)])
    return float(right[pairs.cause].double().mean()), float(right[~pairs.cause].double().mean())


def subspace(x: Tensor, values: Sequence[str]) -> Tensor:
    """The projection [D, D] on the values' means within x [n, D], oblique so that it takes all that a linear
    probe could read of them (Belrose et al. 2023): x' = x + (x_source - x) P."""
    _, place = np.unique(list(values), return_inverse=True)
    hot = F.one_hot(torch.from_numpy(place)).double()
    centred = x.double() - x.double().mean(0)
    means = (hot.T @ centred) / hot.sum(0)[:, None]
    covariance = centred.T @ centred / len(x)
    covariance += 0.01 * covariance.diagonal().mean() * torch.eye(x.shape[1], dtype=torch.float64)
    dual = torch.linalg.solve(covariance, means.T)
    return (dual @ torch.linalg.pinv(means @ dual, rtol=1e-6, hermitian=True) @ means).float()


# -- the task ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Prepared:
    bench: Bench
    about: About
    """whose sample is the activation at every entity [N, D]"""
    world: Prompted
    known: Known
    first: Tensor

    def score(self, sae: SAE, pieces: Pieces) -> Scored:
        options, form = self.bench.spec.ravel, self.bench.spec.form
        keep = form == "correct" if options.keep_error is None else options.keep_error
        swap, seeds = Swap.of(sae, self.about.sample, keep_error=keep), []
        for seed in self.bench.seeds:
            problems = self.known.problems(options.pairs, seed, form, self.first)
            own = self.bench.pieces.value(f"own-{seed}", dict[str, float], lambda p=problems: self._own(p))
            make = lambda problems=problems, seed=seed: self._swapped(swap, problems, seed)  # noqa: E731
            seeds.append(own | pieces.value(f"swapped-{seed}", dict[str, float], make))
        means = {key: float(np.mean([one[key] for one in seeds])) for key in seeds[0]}
        rows = [{"entity_class": kind, "attribute": name}
                | {part: means[f"{kind}/{name}/{part}"] for part in ("cause_score", "isolation_score")}
                for kind, of in self.known.attributes.items() for name in of]  # fmt: skip
        return Scored.of([self._means(one) for one in seeds], _OVERLAP, rows)

    def _means(self, one: dict[str, float]) -> dict[str, float]:
        """Over attributes, then over classes."""
        numbers = {}
        for prefix in ("", "random_", "llm_"):
            for part in ("cause_score", "isolation_score"):
                numbers[prefix + part] = float(np.mean([
                    np.mean([one[f"{kind}/{name}/{prefix}{part}"] for name in of])
                    for kind, of in self.known.attributes.items()]))  # fmt: skip
            both = numbers[f"{prefix}cause_score"] + numbers[f"{prefix}isolation_score"]
            numbers[f"{prefix}disentanglement_score"] = both / 2
        return numbers | {"num_latents": one["num_latents"]}

    def _swapped(self, swap: Swap, problems: dict[tuple[str, str], tuple[Pairs, Pairs]], seed: int) -> dict[str, float]:
        options, form = self.bench.spec.ravel, self.bench.spec.form
        masks = trained(self.world, swap, [train for train, _ in problems.values()], self.first, options, form, seed,
                        max(1, self.bench.spec.batch_tokens // 32))  # fmt: skip
        fires = torch.zeros(swap.codes.n_latents, dtype=torch.bool)
        fires[swap.codes.indices] = True
        generator, numbers = torch.Generator().manual_seed(seed), {}
        for (kind, name), (_, test), mask in zip(problems, problems.values(), masks, strict=True):
            drawn = torch.zeros_like(mask)
            active = fires.nonzero().flatten()
            drawn[active[torch.randperm(len(active), generator=generator)[: int(mask.sum())]]] = True
            for prefix, chosen in (("", mask), ("random_", drawn)):
                added = swap.added(test, chosen[None].float(), torch.zeros(len(test), dtype=torch.int64))
                numbers |= self._told(f"{kind}/{name}/{prefix}", test, added)
        return numbers | {"num_latents": float(masks.double().sum(1).mean())}

    def _own(self, problems: dict[tuple[str, str], tuple[Pairs, Pairs]]) -> dict[str, float]:
        x, numbers = self.about.sample, {}
        for (kind, name), (train, test) in problems.items():
            there = {i for i in (*train.base.tolist(), *train.source.tolist()) if self.known.facts[i].attribute == name}
            those = sorted(there)
            values = [self.known.facts[i].names[0] for i in those]
            added = (x[test.source] - x[test.base]) @ subspace(x[those], values)
            numbers |= self._told(f"{kind}/{name}/llm_", test, added)
        return numbers

    def _told(self, prefix: str, test: Pairs, added: Tensor) -> dict[str, float]:
        names = [one.names for one in self.known.facts]
        cause, isolation = shares(self.world, test, added, names, self.bench.spec.form)
        return {f"{prefix}cause_score": cause, f"{prefix}isolation_score": isolation}


def _prepare(bench: Bench) -> _Prepared:
    options, lm = bench.spec.ravel, bench.lm
    rows, places, there = prompts(lm, [one for one in facts(options.facts) if one.kind in options.classes])
    if not rows:
        raise UnweaveError(f"there are no facts about {' or '.join(options.classes)}", where="ravel.classes",
                           remedy="name classes of the facts")  # fmt: skip
    world = Prompted(lm, bench.site, rows, places, options.new_tokens, bench.spec.batch_tokens)
    kept = bench.kept("saebench-completions", options.new_tokens, [row.ids for row in rows])
    said = kept.tensors("ids", lambda: {"ids": world.new_ids(torch.arange(len(rows)), None)})["ids"]
    right = [i for i, one in enumerate(there) if says(lm.decode(said[i]), one.names, bench.spec.form)]
    place, x = {}, torch.zeros(0, 0)
    if right:
        x = bench.at([rows[i] for i in right], [places[i] for i in right])
        keep = bench.policy.keep(x, torch.tensor([rows[i].ids[places[i]] for i in right]))
        place = {i: number for number, i in enumerate(right) if keep[number]}
    known = Known.of([there[i] for i in place])
    if not known.attributes:
        raise UnweaveError(f"the model completes {len(place)} of {len(there)} sentences rightly, too few",
                           where="ravel", remedy="leave ravel out of tasks, or give facts that it knows")  # fmt: skip
    counted = [i for i in place if there[i].attribute in known.attributes.get(there[i].kind, ())]
    known = Known(tuple(there[i] for i in counted), known.attributes)
    some, x = [rows[i] for i in counted], x[[place[i] for i in counted]]
    counts = "; ".join(f"{kind}: " + ", ".join(
        f"{name} {sum(one.kind == kind and one.attribute == name for one in known.facts)}" for name in of)
        for kind, of in known.attributes.items())  # fmt: skip
    notes = (f"Sentences that the model completes rightly: {counts} (of {len(there)}).",
             "Changing nothing has isolation 1 and cause 0, and reaches a disentanglement of 0.5.")  # fmt: skip
    source = f"{len(known.facts)} sentences about {len({one.entity for one in known.facts})} entities"
    about = About(digest([[one.text, one.names] for one in known.facts]), source, x, notes)
    world = Prompted(lm, bench.site, some, [places[i] for i in counted], options.new_tokens, bench.spec.batch_tokens)
    return _Prepared(bench, about, world, known, said[counted, 0])


def prompts(lm: LM, asked: Sequence[Fact]) -> tuple[list[Row], list[int], list[Fact]]:
    """A row for each fact whose entity ends at a token's end, the place of that token, and the facts."""
    rows, places, there = [], [], []
    starts, texts = (
        encode_texts(tokenizer_of(lm), [getattr(one, name) for one in asked]) for name in ("start", "text")
    )
    for one, (start, _), (ids, roles) in zip(asked, starts, texts, strict=True):
        if len(start) > 1 and ids[: len(start)] == start and len(ids) > len(start):
            rows.append(Row(ids, roles, len(rows)))
            places.append(len(start) - 1)
            there.append(one)
    return rows, places, there


def _config(spec: SaebenchSpec) -> dict[str, Any]:
    options = spec.ravel
    return {
        "random_seed": spec.seed,
        "entity_attribute_selection": {kind: [] for kind in options.classes},
        "num_pairs_per_attribute": options.pairs,
        "train_test_split": TRAIN,
        "learning_rate": options.rate,
        "num_epochs": options.epochs,
        "train_mdas": False,
        "n_generated_tokens": options.new_tokens,
        "llm_batch_size": options.batch,
    }


TASK = Task(
    name="ravel",
    eval_type="ravel",
    version=1,
    headlines={"disentanglement_score": 1},
    baselines=("random directions", "neurons"),
    prepare=_prepare,
    config=_config,
    categories=lambda spec: {"ravel": ["disentanglement_score", "cause_score", "isolation_score"]},
)
