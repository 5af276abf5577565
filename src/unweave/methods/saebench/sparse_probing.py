"""Sparse probing: how well a few latents tell what a text is about.

1. Texts of labelled sets go through the model once; of each text the mean latents over the tokens that count, [R, F].
2. For each label: as many texts with it as without, the latter spread over the set's other labels. Near duplicates are
   on one side of a split; each seed divides them anew.
3. The k latents whose means differ most between the two, and a logistic regression on them; on all latents; on k
   coordinates of the model, and on all. Accuracy on the test texts, averaged over labels and then over sets.

Correct form: latents are measured in their standard deviations on the training texts (else a probe's penalty and the
choice of latents depend on their scale), and the penalty, and k, are chosen on validation texts. Compatible form:
SAEBench 0.6's, raw units, C = 1, and probes on everything trained by AdamW and stopped where *test* accuracy is best.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from unweave.core.errors import UnweaveError
from unweave.core.pieces import Held, Pieces
from unweave.core.progress import task
from unweave.core.spec import digest
from unweave.data.pack import Row
from unweave.data.stream import ActivationSource
from unweave.lm.chat import encode_text
from unweave.methods.saebench.spec import SaebenchSpec
from unweave.methods.saebench.spread import Scored
from unweave.methods.saebench.task import About, Bench, Task
from unweave.sae.module import SAE
from unweave.tasks.tagged.spec import TaggedSpec
from unweave.tasks.tagged.texts import TaggedTexts, open_tagged

Array = np.ndarray[Any, Any]
_SHARES = (0.6, 0.2)
"""of the texts that a probe is trained on and chosen on; the rest tests it"""
_OVERLAP = 0.2 / 0.6
_CHARACTERS = 20
"""of a text that are read, for each token that is"""
_LEAST = 8
"""texts of a label on each side"""


@dataclass(frozen=True)
class Labelled:
    """A set of texts: which row of the pooled activations each is, its group of near duplicates, and its labels."""

    name: str
    names: tuple[str, ...]
    rows: Array
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
class _Prepared:
    bench: Bench
    about: About
    sets: tuple[Labelled, ...]
    chunks: ActivationSource
    own: Array
    """the model's pooled activations [R, D]"""

    def score(self, sae: SAE, pieces: Pieces) -> Scored:
        pooled = sparse(pieces.tensors("pooled", lambda: pooled_latents(sae, self.bench, self.chunks)), sae.d_sae)
        draws: list[dict[str, float]] = []
        tables: list[dict[str, dict[str, float]]] = []
        with task("sparse probes", total=len(self.bench.seeds), unit="seeds") as shown:
            for seed in self.bench.seeds:
                llm = self.bench.pieces.value(f"llm-{seed}", dict[str, dict[str, float]],
                                              lambda seed=seed: self._probed("llm", self.own, seed))  # fmt: skip
                own = pieces.value(f"probes-{seed}", dict[str, dict[str, float]],
                                   lambda seed=seed: self._probed("sae", pooled, seed))  # fmt: skip
                tables.append({name: llm[name] | own[name] for name in own})
                draws.append(_mean(list(tables[-1].values())))
                shown.advance()
        rows = [{"dataset_name": name} | _mean([one[name] for one in tables]) for name in tables[0]]
        return Scored.of(draws, _OVERLAP, rows)

    def _probed(self, whose: str, x: Any, seed: int) -> dict[str, dict[str, float]]:
        options, form = self.bench.spec.sparse_probing, self.bench.spec.form
        scores = {}
        for one in self.sets:
            problems = problems_of(one, seed)
            if not problems:
                raise UnweaveError(
                    f"no label of {one.name!r} is on {_LEAST} texts of each side", where="sparse_probing"
                )
            each = [probed(x, split, options.ks, options.strengths, form, seed) for split in problems.values()]
            scores[one.name] = {f"{whose}_{key}": value for key, value in _mean(each).items()}
        return scores


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def _prepare(bench: Bench) -> _Prepared:
    options = bench.spec.sparse_probing
    rows: list[Row] = []
    sets, notes, sources = [], [], []
    for name in options.sources:
        texts = open_tagged(TaggedSpec(source=name))
        notes += [f"{name}: {note}" for note in texts.notes]
        sources.append(texts.source)
        labels, drawn = _drawn(texts, options.labels, options.per_label, bench.spec.seed)
        has = np.array([[label in of for label in labels] for of in map(texts.labels, drawn.tolist())])
        places = len(rows) + np.arange(len(drawn))
        sets.append(Labelled(name, tuple(texts.names[i] for i in labels), places, texts.groups[drawn], has))
        for text in drawn.tolist():
            ids, roles = encode_text(bench.lm.tokenizer, texts.text(text)[: _CHARACTERS * options.context])
            rows.append(Row(ids[: options.context], roles[: options.context], len(rows)))
    source = bench.source(bench.stored(rows), 16_384)
    own = torch.zeros(len(rows), bench.lm.width(bench.site), dtype=torch.float64)
    counts = torch.zeros(len(rows))
    for x, row in bench.chunks(source):
        own.index_add_(0, row.cpu(), x.double().cpu())
        counts += torch.bincount(row.cpu(), minlength=len(rows))
    own /= counts.clamp(min=1)[:, None]
    data = digest([source.store.digest, [[one.name, list(one.names), one.has.tolist()] for one in sets]])
    about = About(data, "; ".join(sources), bench.counted(source, 0)[0], tuple(notes))
    return _Prepared(bench, about, tuple(sets), source, own.float().numpy())


def _drawn(texts: TaggedTexts, labels: int, per_label: int, seed: int) -> tuple[list[int], Array]:
    """The labels with the most texts, and some texts of each, drawn at random."""
    rng, everything = np.random.default_rng([seed, 31]), np.arange(len(texts))
    offsets, of = texts.label_rows(everything)
    text = np.repeat(everything, np.diff(offsets))
    most = np.argsort(-texts.support(everything), kind="stable")[:labels].tolist()
    if len(most) < 2:
        raise UnweaveError("sparse probing tells labels apart, and there is one", where=texts.source,
                           remedy="give texts with at least two labels")  # fmt: skip
    return most, np.unique(np.concatenate([rng.permutation(text[of == label])[:per_label] for label in most]))


def problems_of(texts: Labelled, seed: int) -> dict[str, Split]:
    """Each label against the others, balanced, divided by groups of near duplicates; no label of too few texts."""
    rng = np.random.default_rng([seed, 17])
    names, place = np.unique(texts.groups, return_inverse=True)
    order = rng.permutation(len(names))
    reached = np.bincount(place, minlength=len(names))[order].cumsum() / len(place)
    side = np.empty(len(names), np.int64)
    side[order] = np.searchsorted(np.cumsum(_SHARES), reached - 1e-9, side="right")
    side = side[place]
    labels = range(1) if len(texts.names) == 2 else range(len(texts.names))  # of two, one says all
    problems = {}
    for label in labels:
        parts = [_balanced(texts, label, np.flatnonzero(side == one), rng) for one in range(3)]
        if all(len(targets) >= 2 * _LEAST for _, targets in parts):
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
    return texts.rows[chosen][mixed], (np.arange(2 * n) < n).astype(np.int64)[mixed]


# -- pooled latents ---------------------------------------------------------------------------------------------------


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


def sparse(held: Held, n_latents: int) -> Any:
    """The CSR matrix [R, F] in scipy's form."""
    from scipy.sparse import csr_array

    offsets, indices, values = (held[name].numpy() for name in ("offsets", "indices", "values"))
    return csr_array((values, indices, offsets), shape=(len(offsets) - 1, n_latents))


# -- probes -----------------------------------------------------------------------------------------------------------


def probed(
    x: Any, split: Split, ks: Sequence[int], strengths: Sequence[float], form: str, seed: int
) -> dict[str, float]:
    """Test accuracies of probes on the k best columns of x [R, F] (dense or CSR), and on all of them."""
    if form == "compatible":
        rows, targets = (np.concatenate([one, other]) for one, other in zip(split.train, split.validation, strict=True))
        test, wanted = split.test
        scores = {}
        for k in ks:
            best = columns(x[rows], targets, k)
            scores[f"top_{k}_test_accuracy"] = fitted(x[rows], targets, best, 1.0).score(_dense(x[test], best), wanted)
        return scores | {"test_accuracy": _by_test(x[rows], targets, x[test], wanted, seed)}
    (train, y), (validation, y_validation), (test, y_test) = split.train, split.validation, split.test
    x_train = x[train]
    scale = _deviations(x_train)
    parts = [_scaled(x[rows], scale) for rows in (train, validation, test)]
    scores, right = {}, {}
    for k in (*ks, None):
        best = None if k is None else columns(parts[0], y, k)
        probes = [fitted(parts[0], y, best, c) for c in strengths]
        on_validation = [probe.score(_dense(parts[1], best), y_validation) for probe in probes]
        chosen = int(np.argmax(on_validation))
        name = "test_accuracy" if k is None else f"top_{k}_test_accuracy"
        scores[name] = float(probes[chosen].score(_dense(parts[2], best), y_test))
        right[name] = on_validation[chosen]
    few = [f"top_{k}_test_accuracy" for k in ks]
    return scores | {"chosen_k_test_accuracy": scores[max(few, key=lambda name: right[name])]}


def columns(x: Any, y: Array, k: int) -> Array:
    """The k columns whose means over the two classes differ most, the largest difference first."""
    difference = np.asarray(x[y == 1].mean(0)).ravel() - np.asarray(x[y == 0].mean(0)).ravel()
    return np.argsort(-np.abs(difference), kind="stable")[:k]


def fitted(x: Any, y: Array, chosen: Array | None, strength: float) -> Any:
    """A logistic regression on some columns, or on all."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=1000).fit(_dense(x, chosen), y)


def _dense(x: Any, chosen: Array | None) -> Any:
    """Some columns as a dense matrix; all of them as they are."""
    if chosen is None:
        return x
    part = x[:, chosen]
    return part if isinstance(part, np.ndarray) else part.toarray()


def _deviations(x: Any) -> Array:
    """The standard deviation of each column, 1 where it does not vary."""
    square = np.asarray((x * x).mean(0)).ravel()
    variance = square - np.asarray(x.mean(0)).ravel() ** 2
    return np.sqrt(np.where(variance > 1e-9 * np.maximum(square, 1e-30), variance, 1.0))


def _scaled(x: Any, scale: Array) -> Any:
    from scipy.sparse import csr_array, diags_array

    return x / scale if isinstance(x, np.ndarray) else csr_array(x @ diags_array(1 / scale))


def _by_test(x: Any, y: Array, x_test: Any, y_test: Array, seed: int) -> float:
    """SAEBench's probe on all columns: AdamW (0.01), batches of 250, at most 100 epochs, stopped ten after the epoch of
    the best accuracy on the *test* texts, which it returns."""
    dense, dense_test = (torch.as_tensor(part if isinstance(part, np.ndarray) else part.toarray()).float()
                         for part in (x, x_test))  # fmt: skip
    wanted, best, since = torch.as_tensor(y).float(), 0.0, 0
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        probe = torch.nn.Linear(dense.shape[1], 1)
        optimiser = torch.optim.AdamW(probe.parameters(), lr=1e-2)
        for _ in range(100):
            order = torch.randperm(len(dense))
            for rows in order.split(250):
                optimiser.zero_grad()
                F.binary_cross_entropy_with_logits(probe(dense[rows]).squeeze(-1), wanted[rows]).backward()
                optimiser.step()
            right = float(((probe(dense_test).squeeze(-1) > 0).long().numpy() == y_test).mean())
            best, since = (right, 0) if right > best else (best, since + 1)
            if since >= 10:
                break
    return best


def _config(spec: SaebenchSpec) -> dict[str, Any]:
    options = spec.sparse_probing
    n = options.per_label
    return {
        "random_seed": spec.seed,
        "dataset_names": list(options.sources),
        "probe_train_set_size": round(2 * n * (1 - _SHARES[1])),
        "probe_test_set_size": round(2 * n * (1 - sum(_SHARES))),
        "context_length": options.context,
        "k_values": list(options.ks),
    }


TASK = Task(
    name="sparse_probing",
    eval_type="sparse_probing",
    version=1,
    headlines={"sae_top_1_test_accuracy": 1, "sae_chosen_k_test_accuracy": 1, "sae_test_accuracy": 1},
    baselines=("random directions",),
    prepare=_prepare,
    config=_config,
    categories=lambda spec: {
        whose: [f"{whose}_test_accuracy", *(f"{whose}_top_{k}_test_accuracy" for k in spec.sparse_probing.ks)]
        for whose in ("llm", "sae")
    },
)
