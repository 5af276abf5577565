"""Texts of labelled sets at a site: drawn, read once for all tasks and SAEs, pooled, and divided anew by each seed.

Every source has rows and activations of its own, so that tasks which draw the same texts share them; pooled latents of
an SAE are shared in the same way. A text's pooled activation is its mean over the tokens that count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from unweave.core.errors import UnweaveError
from unweave.core.pieces import Held
from unweave.core.progress import task
from unweave.core.spec import digest
from unweave.data.pack import Row
from unweave.data.stream import ActivationSource
from unweave.lm.chat import encode_text
from unweave.methods.saebench.spec import ProbingSpec, TppSpec
from unweave.methods.saebench.task import About, Bench
from unweave.sae.module import SAE
from unweave.tasks.tagged.spec import TaggedSpec
from unweave.tasks.tagged.texts import TaggedTexts, open_tagged

Array = np.ndarray[Any, Any]
SHARES = (0.6, 0.2)
"""of the texts that a probe is trained on and chosen on; the rest tests it"""
OVERLAP = 0.2 / 0.6
LEAST = 8
"""texts of a label on each side"""
_CHARACTERS = 20
"""of a text that are read, for each token that is"""


@dataclass(frozen=True)
class Labelled:
    """A set of texts: the group of near duplicates of each, and its labels."""

    name: str
    names: tuple[str, ...]
    groups: Array
    has: Array
    """bool [texts, labels]"""


@dataclass(frozen=True)
class Split:
    """Rows and targets of a problem: to train on, to choose on, to test on."""

    train: tuple[Array, Array]
    validation: tuple[Array, Array]
    test: tuple[Array, Array]


@dataclass(frozen=True)
class Texts:
    """A set as it is read at a site: a row of the store, and of ``own`` [R, D], is a text's."""

    labelled: Labelled
    source: ActivationSource
    own: Array
    """the model's pooled activations"""
    about: str
    notes: tuple[str, ...]

    def pooled(self, sae: SAE, bench: Bench) -> Any:
        """An SAE's pooled latents, CSR [R, F]."""
        name = f"pooled-{sae.digest()}-{self.source.store.digest[:12]}"
        return sparse(bench.common.tensors(name, lambda: pooled_latents(sae, bench, self.source)), sae.d_sae)


Draw = Callable[[TaggedTexts], tuple[Sequence[int], Array]]
"""which labels of a source are used, and which of its texts"""


def read(bench: Bench, name: str, draw: Draw, context: int) -> Texts:
    """The texts of a source that ``draw`` chooses, cut off at ``context`` tokens."""
    texts = open_tagged(TaggedSpec(source=name))
    labels, drawn = draw(texts)
    has = np.array([[label in of for label in labels] for of in map(texts.labels, drawn.tolist())])
    rows = []
    for text in drawn.tolist():
        ids, roles = encode_text(bench.lm.tokenizer, texts.text(text)[: _CHARACTERS * context])
        rows.append(Row(ids[:context], roles[:context], len(rows)))
    source = bench.source(bench.stored(rows), 16_384)
    own = bench.common.tensors(f"own-{source.store.digest[:12]}", lambda: {"x": _pooled(bench, source)})["x"].numpy()
    labelled = Labelled(name, tuple(texts.names[i] for i in labels), texts.groups[drawn], has)
    return Texts(labelled, source, own, texts.source, tuple(f"{name}: {note}" for note in texts.notes))


def about(bench: Bench, texts: Sequence[Texts], *notes: str) -> About:
    """What a task on these sets measures on."""
    what = [[one.source.store.digest, one.labelled.name, list(one.labelled.names), one.labelled.has.tolist()]
            for one in texts]  # fmt: skip
    known = dict.fromkeys(note for one in texts for note in one.notes)
    sample = bench.counted(texts[0].source, 0)[0]
    return About(digest(what), "; ".join(one.about for one in texts), sample, (*known, *notes))


def read_most_used(bench: Bench, options: ProbingSpec | TppSpec) -> tuple[Texts, ...]:
    """Of each source the labels with the most texts, and some texts of each."""
    draw = most_used(options.labels, options.per_label, bench.spec.seed)
    return tuple(read(bench, name, draw, options.context) for name in options.sources)


def most_used(labels: int, per_label: int, seed: int) -> Draw:
    """The labels with the most texts, and some texts of each, drawn at random."""

    def draw(texts: TaggedTexts) -> tuple[list[int], Array]:
        rng, everything = np.random.default_rng([seed, 31]), np.arange(len(texts))
        offsets, of = texts.label_rows(everything)
        text = np.repeat(everything, np.diff(offsets))
        most = np.argsort(-texts.support(everything), kind="stable")[:labels].tolist()
        if len(most) < 2:
            raise UnweaveError("probes tell labels apart, and there is one", where=texts.source,
                               remedy="give texts with at least two labels")  # fmt: skip
        return most, np.unique(np.concatenate([rng.permutation(text[of == label])[:per_label] for label in most]))

    return draw


# -- divided by a seed ------------------------------------------------------------------------------------------------


def sides(groups: Array, rng: np.random.Generator) -> Array:
    """Where each text lies: 0 to train on, 1 to choose on, 2 to test on; near duplicates lie on one side."""
    names, place = np.unique(groups, return_inverse=True)
    order = rng.permutation(len(names))
    reached = np.bincount(place, minlength=len(names))[order].cumsum() / len(place)
    side = np.empty(len(names), np.int64)
    side[order] = np.searchsorted(np.cumsum(SHARES), reached - 1e-9, side="right")
    return side[place]


def problems_of(texts: Labelled, seed: int) -> dict[str, Split]:
    """Each label against the others, balanced, divided by groups of near duplicates; no label of too few texts."""
    rng = np.random.default_rng([seed, 17])
    side = sides(texts.groups, rng)
    labels = range(1) if len(texts.names) == 2 else range(len(texts.names))  # of two, one says all
    problems = {}
    for label in labels:
        parts = [_balanced(texts, label, np.flatnonzero(side == one), rng) for one in range(3)]
        if all(len(targets) >= 2 * LEAST for _, targets in parts):
            problems[texts.names[label]] = Split(*parts)
    return problems


def _balanced(texts: Labelled, label: int, here: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """As many texts without the label as with it, from each of the other labels alike; (rows, targets)."""
    positive = here[texts.has[here, label]]
    others = [other for other in range(len(texts.names)) if other != label]
    each = -(-len(positive) // len(others))
    drawn = [rng.permutation(here[texts.has[here, other] & ~texts.has[here, label]])[:each] for other in others]
    negative = rng.permutation(np.unique(np.concatenate(drawn)))
    n = min(len(positive), len(negative))
    chosen = np.concatenate([rng.permutation(positive)[:n], negative[:n]])
    mixed = rng.permutation(2 * n)
    return chosen[mixed], (np.arange(2 * n) < n).astype(np.int64)[mixed]


# -- pooled -----------------------------------------------------------------------------------------------------------


def _pooled(bench: Bench, source: ActivationSource) -> torch.Tensor:
    own = torch.zeros(source.store.n_rows, bench.lm.width(bench.site), dtype=torch.float64)
    counts = torch.zeros(source.store.n_rows)
    for x, row in bench.chunks(source):
        own.index_add_(0, row.cpu(), x.double().cpu())
        counts += torch.bincount(row.cpu(), minlength=len(own))
    return (own / counts.clamp(min=1)[:, None]).float()


def pooled_latents(sae: SAE, bench: Bench, source: ActivationSource) -> Held:
    """Mean latents of each row of a store over its tokens that count, as CSR [R, F]; no dense matrix is made."""
    from scipy.sparse import coo_array, csr_array

    size = (source.store.n_rows, sae.d_sae)
    total, counts = csr_array(size, dtype=np.float64), np.zeros(size[0])
    with task("latents of texts", total=source.n_chunks, unit="chunks") as shown:
        for x, row in bench.chunks(source):
            codes = sae.codes(x.to(sae.W_enc.dtype))
            values, of, latent = (
                part.cpu().numpy() for part in (codes.values.double(), row[codes.row_of_each()], codes.indices)
            )
            total = csr_array(total + coo_array((values, (of, latent)), size))
            counts += np.bincount(row.cpu().numpy(), minlength=size[0])
            shown.advance()
    offsets, indices, values = (torch.from_numpy(part) for part in (total.indptr, total.indices, total.data))
    values /= torch.from_numpy(counts).repeat_interleave(offsets.diff())
    return {"offsets": offsets, "indices": indices, "values": values.float()}


def sparse(held: Mapping[str, torch.Tensor], n_latents: int) -> Any:
    """The CSR matrix [R, F] in scipy's form."""
    from scipy.sparse import csr_array

    offsets, indices, values = (held[name].numpy() for name in ("offsets", "indices", "values"))
    return csr_array((values, indices, offsets), shape=(len(offsets) - 1, n_latents))
