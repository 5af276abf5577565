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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unweave.core.errors import UnweaveError
from unweave.core.pieces import Pieces
from unweave.core.progress import task
from unweave.methods.saebench.labelled import LEAST, OVERLAP, SHARES, Split, Texts, about, problems_of, read_most_used
from unweave.methods.saebench.probes import Adam, best_of, by_test, columns, dense, deviations, fitted, scaled
from unweave.methods.saebench.spec import SaebenchSpec
from unweave.methods.saebench.spread import Scored
from unweave.methods.saebench.task import About, Bench, Task
from unweave.sae.module import SAE

_ON_ALL = Adam(lr=1e-2, batch=250, epochs=100, patience=10)
"""SAEBench's probe on everything"""


@dataclass(frozen=True)
class _Prepared:
    bench: Bench
    about: About
    texts: tuple[Texts, ...]

    def score(self, sae: SAE, pieces: Pieces) -> Scored:
        pooled, own_x = [one.pooled(sae, self.bench) for one in self.texts], [one.own for one in self.texts]
        draws: list[dict[str, float]] = []
        tables: list[dict[str, dict[str, float]]] = []
        with task("sparse probes", total=len(self.bench.seeds), unit="seeds") as shown:
            for seed in self.bench.seeds:
                llm = self.bench.pieces.value(f"llm-{seed}", dict[str, dict[str, float]],
                                              lambda seed=seed: self._probed("llm", own_x, seed))  # fmt: skip
                own = pieces.value(f"probes-{seed}", dict[str, dict[str, float]],
                                   lambda seed=seed: self._probed("sae", pooled, seed))  # fmt: skip
                tables.append({name: llm[name] | own[name] for name in own})
                draws.append(_mean(list(tables[-1].values())))
                shown.advance()
        rows = [{"dataset_name": name} | _mean([one[name] for one in tables]) for name in tables[0]]
        return Scored.of(draws, OVERLAP, rows)

    def _probed(self, whose: str, each: Sequence[Any], seed: int) -> dict[str, dict[str, float]]:
        options, form = self.bench.spec.sparse_probing, self.bench.spec.form
        scores = {}
        for texts, x in zip(self.texts, each, strict=True):
            one, problems = texts.labelled, problems_of(texts.labelled, seed)
            if not problems:
                raise UnweaveError(f"no label of {one.name!r} is on {LEAST} texts of each side", where="sparse_probing")
            of = [probed(x, split, options.ks, options.strengths, form, seed) for split in problems.values()]
            scores[one.name] = {f"{whose}_{key}": value for key, value in _mean(of).items()}
        return scores


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def _prepare(bench: Bench) -> _Prepared:
    texts = read_most_used(bench, bench.spec.sparse_probing)
    return _Prepared(bench, about(bench, texts), texts)


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
            scores[f"top_{k}_test_accuracy"] = fitted(x[rows], targets, best, 1.0).score(dense(x[test], best), wanted)
        return scores | {"test_accuracy": by_test(x[rows], targets, x[test], wanted, _ON_ALL, seed)[1]}
    (train, y), (validation, y_validation), (test, y_test) = split.train, split.validation, split.test
    x_train = x[train]
    scale = deviations(x_train)
    parts = [scaled(x[rows], scale) for rows in (train, validation, test)]
    scores, right = {}, {}
    for k in (*ks, None):
        best = None if k is None else columns(parts[0], y, k)
        name = "test_accuracy" if k is None else f"top_{k}_test_accuracy"
        probe, right[name] = best_of(parts[0], y, parts[1], y_validation, best, strengths)
        scores[name] = float(probe.score(dense(parts[2], best), y_test))
    few = [f"top_{k}_test_accuracy" for k in ks]
    return scores | {"chosen_k_test_accuracy": scores[max(few, key=lambda name: right[name])]}


def _config(spec: SaebenchSpec) -> dict[str, Any]:
    options = spec.sparse_probing
    n = options.per_label
    return {
        "random_seed": spec.seed,
        "dataset_names": list(options.sources),
        "probe_train_set_size": round(2 * n * (1 - SHARES[1])),
        "probe_test_set_size": round(2 * n * (1 - sum(SHARES))),
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
