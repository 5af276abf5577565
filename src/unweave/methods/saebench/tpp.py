"""TPP: targeted probe perturbation. Do the latents of one class hurt that class's probe and no other's?

1. One probe for each class of a set, on the model's own pooled activations.
2. For each class the latents with the largest effect on its probe are ablated (``ablation``), among those that fire
   more on its texts, and every class's probe is tested on that class's test texts.
3. TPP = the loss of accuracy of the class's own probe less the mean loss of the others, averaged over classes and sets.

A probe can lose no more than what it has above one half, so TPP lies below ``llm_test_accuracy`` - 0.5. Forms differ as
in ``ablation``, and in the probes: chosen on validation texts, or as SAEBench does on the test texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from unweave.core.errors import UnweaveError
from unweave.core.pieces import Pieces
from unweave.core.progress import task
from unweave.methods.saebench import ablation
from unweave.methods.saebench.ablation import Pooled, accuracy, trained
from unweave.methods.saebench.labelled import LEAST, OVERLAP, Split, Texts, about, problems_of, read_most_used
from unweave.methods.saebench.probes import Probe
from unweave.methods.saebench.spread import Scored
from unweave.methods.saebench.task import About, Bench, Task
from unweave.sae.module import SAE

_PARTS = ("total_metric", "intended_diff_only", "unintended_diff_only")


@dataclass(frozen=True)
class _Prepared:
    bench: Bench
    about: About
    texts: tuple[Texts, ...]

    def score(self, sae: SAE, pieces: Pieces) -> Scored:
        data = [Pooled.of(one.pooled(sae, self.bench), one.own, sae) for one in self.texts]
        seeds: list[dict[str, dict[str, float]]] = []
        with task("tpp", total=len(self.bench.seeds), unit="seeds") as shown:
            for seed in self.bench.seeds:
                make = lambda seed=seed: {  # noqa: E731
                    texts.labelled.name: self._perturbed(number, pooled, seed)
                    for number, (texts, pooled) in enumerate(zip(self.texts, data, strict=True))}  # fmt: skip
                seeds.append(pieces.value(f"losses-{seed}", dict[str, dict[str, float]], make))
                shown.advance()
        rows = [{"dataset_name": name} | Scored.of([one[name] for one in seeds], OVERLAP).value for name in seeds[0]]
        draws = [{key: float(np.mean([of[key] for of in one.values()])) for key in next(iter(one.values()))}
                 for one in seeds]  # fmt: skip
        return Scored.of(draws, OVERLAP, rows)

    def _perturbed(self, number: int, data: Pooled, seed: int) -> dict[str, float]:
        options, form, labelled = self.bench.spec.tpp, self.bench.spec.form, self.texts[number].labelled
        problems = list(problems_of(labelled, seed).values())
        if len(problems) < 2:
            raise UnweaveError(f"TPP needs two classes, each on {LEAST} texts of each side", where=labelled.name,
                               remedy="give a set of three labels or more, or leave it out of tpp.sources")  # fmt: skip
        probes = trained(self.bench, f"probes-{seed}-{number}", data.own, problems, options.strengths, seed)
        return perturbed(data, problems, probes, options.ns, form, seed)


def perturbed(
    data: Pooled, problems: Sequence[Split], probes: Sequence[Probe], ns: Sequence[int], form: str, seed: int
) -> dict[str, float]:
    """TPP of a set by SAEBench's keys, with what stands beside it."""
    own: dict[str, list[float]] = {}
    others: dict[str, list[float]] = {}
    for number, (split, probe) in enumerate(zip(problems, probes, strict=True)):
        away = ablation.removal(data, split.train, probe, max(ns), form, seed, both_signs=False)
        losses = [_losses(away.logits(data, rows, one, ns), targets)
                  for one, (rows, targets) in zip(probes, (other.test for other in problems), strict=True)]  # fmt: skip
        for kind in losses[0]:
            own.setdefault(kind, []).append(losses[number][kind])
            rest = [loss[kind] for other, loss in enumerate(losses) if other != number]
            others.setdefault(kind, []).append(float(np.mean(rest)))
    clean = [accuracy(probe.logits(data.own[split.test[0]]), split.test[1])
             for probe, split in zip(probes, problems, strict=True)]  # fmt: skip
    numbers = {"llm_test_accuracy": float(np.mean(clean))}
    for n in ns:
        intended, unintended = float(np.mean(own[str(n)])), float(np.mean(others[str(n)]))
        for part, value in zip(_PARTS, (intended - unintended, intended, unintended), strict=True):
            numbers[f"tpp_threshold_{n}_{part}"] = value
        for kind, after in (("random_", f"random_{n}"), ("llm_", "llm_")):
            numbers[f"{kind}tpp_threshold_{n}_total_metric"] = float(np.mean(own[after]) - np.mean(others[after]))
    return numbers


def _losses(logits: Mapping[str, np.ndarray], targets: np.ndarray) -> dict[str, float]:
    start = accuracy(logits[""], targets)
    return {kind: start - accuracy(of, targets) for kind, of in logits.items()}


def _prepare(bench: Bench) -> _Prepared:
    texts = read_most_used(bench, bench.spec.tpp)
    return _Prepared(bench, about(bench, texts, ablation.NOTE), texts)


TASK = Task(
    name="tpp",
    eval_type="tpp",
    version=1,
    headlines={"tpp_threshold_10_total_metric": 1, "tpp_threshold_20_total_metric": 1},
    baselines=("random directions", "neurons"),
    prepare=_prepare,
    config=lambda spec: ablation.config(spec.tpp, spec.seed, scr=False, texts=2 * spec.tpp.per_label),
    categories=lambda spec: {"tpp_metrics": [f"tpp_threshold_{n}_{part}" for n in spec.tpp.ns for part in _PARTS]},
)
