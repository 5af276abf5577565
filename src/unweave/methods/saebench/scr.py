"""SCR: spurious correlation removal. Does ablating a few latents take a spurious cue out of a biased probe?

1. Texts of two classes (film, restaurant) that have either of two cues (positive, negative). A biased probe is trained
   where class and cue agree, an unbiased one for each where all four groups are equally many.
2. Direction 1: the latents with the largest effect on the cue's own probe are ablated (``ablation``), and the biased
   probe is tested for the class on all four groups. Direction 2 is the same with class and cue exchanged.
3. SCR = (accuracy ablated - accuracy biased) / (accuracy of the unbiased probe - accuracy biased). ``scr_metric`` takes
   the direction that the biased probe does worse in.

Correct form: SCR is a ratio of sums over pairs, and left out where the bias costs nearly nothing; ``scr_metric``'s
direction is chosen on validation texts; latents become their mean. Compatible form: SAEBench 0.6's, a mean of ratios,
0 where the bias costs less than 0.001; its probes and directions are chosen on the test texts; latents become 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unweave.core.errors import UnweaveError
from unweave.core.pieces import Pieces
from unweave.core.progress import task
from unweave.methods.saebench import ablation
from unweave.methods.saebench.ablation import Pooled, accuracy, trained
from unweave.methods.saebench.labelled import LEAST, OVERLAP, Array, Draw, Labelled, Split, Texts, about, read, sides
from unweave.methods.saebench.probes import Probe
from unweave.methods.saebench.spec import Pair, SaebenchSpec, ScrSpec, pair_of
from unweave.methods.saebench.spread import Scored
from unweave.methods.saebench.task import About, Bench, Task
from unweave.sae.module import SAE
from unweave.tasks.tagged.texts import TaggedTexts

_LEAST_GAP = {"correct": 0.02, "compatible": 0.001}
"""accuracy that the bias costs; below it there is nothing to remove"""
Accuracies = dict[str, float]


@dataclass(frozen=True)
class Trial:
    """A pair's texts, divided by one seed, as problems: which class, and which cue, on four equal groups; and the class
    where it agrees with the cue."""

    classes: Split
    cues: Split
    biased: Split


@dataclass(frozen=True)
class _Prepared:
    bench: Bench
    about: About
    texts: tuple[Texts, ...]

    def score(self, sae: SAE, pieces: Pieces) -> Scored:
        options, form = self.bench.spec.scr, self.bench.spec.form
        data = [Pooled.of(one.pooled(sae, self.bench), one.own, sae) for one in self.texts]
        seeds: list[dict[str, Accuracies]] = []
        with task("scr", total=len(self.bench.seeds), unit="seeds") as shown:
            for seed in self.bench.seeds:
                make = lambda seed=seed: self._shifted(data, seed)  # noqa: E731
                seeds.append(pieces.value(f"accuracies-{seed}", dict[str, Accuracies], make))
                shown.advance()
        rows = []
        for pair in seeds[0]:
            each = [scores([one[pair]], options.ns, form) for one in seeds]
            rows.append({"dataset_name": pair} | Scored.of(each, OVERLAP).value)
        return Scored.of([scores(list(one.values()), options.ns, form) for one in seeds], OVERLAP, rows)

    def _shifted(self, data: Sequence[Pooled], seed: int) -> dict[str, Accuracies]:
        options, form = self.bench.spec.scr, self.bench.spec.form
        found = {}
        for number, (texts, pooled) in enumerate(zip(self.texts, data, strict=True)):
            for index, pair in enumerate(map(pair_of, options.pairs)):
                if set(pair) <= set(texts.labelled.names):
                    trial = trial_of(texts.labelled, pair, seed)
                    splits, place = (trial.classes, trial.cues, trial.biased), f"probes-{seed}-{number}-{index}"
                    probes = trained(self.bench, place, pooled.own, splits, options.strengths, seed)
                    name = f"{texts.labelled.name}: {_words(pair)}"
                    found[name] = shifted(pooled, trial, probes, options.ns, form, seed)
        return found


def _prepare(bench: Bench) -> _Prepared:
    options, texts, unread = bench.spec.scr, [], {pair_of(pair) for pair in bench.spec.scr.pairs}
    for name in options.sources:
        one = read(bench, name, _crossed(options, bench.spec.seed), options.context)
        texts.append(one)
        unread -= {pair for pair in unread if set(pair) <= set(one.labelled.names)}
    if unread:
        raise UnweaveError(f"no source has all labels of {_words(sorted(unread)[0])!r}", where="scr.pairs",
                           remedy="name labels of scr.sources")  # fmt: skip
    return _Prepared(bench, about(bench, texts, ablation.NOTE), tuple(texts))


def _words(pair: Pair) -> str:
    return f"{pair[0]}/{pair[1]} by {pair[2]}/{pair[3]}"


def groups_of(names: Sequence[str], has: Array, pair: Pair) -> Array:
    """The group of each text, 2 class + cue (1 for the first of either), or -1 where class or cue is not one of two."""
    one, other, cue, counter = (has[:, list(names).index(name)] for name in pair)
    return np.where((one != other) & (cue != counter), 2 * one + cue, -1)


def _crossed(options: ScrSpec, seed: int) -> Draw:
    """The pairs' labels that a source has, and some texts of each group."""

    def draw(texts: TaggedTexts) -> tuple[list[int], Array]:
        pairs = [pair for pair in map(pair_of, options.pairs) if set(pair) <= set(texts.names)]
        names = list(dict.fromkeys(name for pair in pairs for name in pair))
        if not names:
            raise UnweaveError("this source has not all labels of any pair", where="scr.pairs",
                               remedy=f"name some of {', '.join(texts.names[:20])}")  # fmt: skip
        labels = [texts.names.index(name) for name in names]
        offsets, of = texts.label_rows(np.arange(len(texts)))
        has = np.zeros((len(texts), len(texts.names)), bool)
        has[np.repeat(np.arange(len(texts)), np.diff(offsets)), of] = True
        has, drawn = has[:, labels], {}
        for pair in pairs:
            group = groups_of(names, has, pair)
            for number in range(4):
                labelled = (pair[0 if number > 1 else 1], pair[2 if number % 2 else 3])
                rng = np.random.default_rng([seed, 37, *map(names.index, labelled)])  # the same in every pair
                drawn[labelled] = rng.permutation(np.flatnonzero(group == number))[: options.per_group]
        return labels, np.unique(np.concatenate(list(drawn.values())))

    return draw


def trial_of(texts: Labelled, pair: Pair, seed: int) -> Trial:
    """A pair's problems. UnweaveError where a group has too few texts on a side."""
    rng = np.random.default_rng([seed, 41])
    side, group = sides(texts.groups, rng), groups_of(texts.names, texts.has, pair)
    four, two = [], []
    for here in range(3):
        rows = [rng.permutation(np.flatnonzero((side == here) & (group == number))) for number in range(4)]
        # the biased probe has as many training texts as the others, from two groups alone
        n = min(*map(len, rows[1:3]), *(len(rows[i]) // (2 if here == 0 else 1) for i in (0, 3)))
        if n < LEAST:
            raise UnweaveError(f"a group of {_words(pair)!r} has fewer than {LEAST} texts on a side", where=texts.name,
                               remedy="give more texts, or leave the pair out of scr.pairs")  # fmt: skip
        four.append((np.concatenate([one[:n] for one in rows]), np.repeat(np.arange(4), n)))
        two.append(np.concatenate([rows[0][: 2 * n], rows[3][: 2 * n]]))
    classes, cues = (Split(*((rows, number >> bit & 1) for rows, number in four)) for bit in (1, 0))
    return Trial(classes, cues, Split(*((rows, group[rows] >> 1) for rows in two)))


def shifted(data: Pooled, trial: Trial, probes: Sequence[Probe], ns: Sequence[int], form: str, seed: int) -> Accuracies:
    """Test accuracies of one pair, by direction: of the biased probe ("d1_"), with n latents ablated ("d1_20"), with as
    many at random, with the classes' difference erased; of the unbiased one ("d1_clean"), and on validation texts."""
    of_class, of_cue, biased = probes
    found = {}
    for number, (removed, wanted, own, unbiased) in enumerate(
        [(trial.cues, trial.classes, of_cue, of_class), (trial.classes, trial.cues, of_class, of_cue)], 1
    ):
        away = ablation.removal(data, removed.train, own, max(ns), form, seed, both_signs=True)
        rows, targets = wanted.test
        logits = away.logits(data, rows, biased, ns)
        found |= {f"d{number}_{kind}": accuracy(of, targets) for kind, of in logits.items()}
        found[f"d{number}_clean"] = accuracy(unbiased.logits(data.own[rows]), targets)
        rows, targets = wanted.validation if form == "correct" else wanted.test
        found[f"d{number}_chosen"] = accuracy(biased.logits(data.own[rows]), targets)
    return found


def scores(pairs: Sequence[Mapping[str, float]], ns: Sequence[int], form: str) -> dict[str, float]:
    """SCR over pairs by SAEBench's keys, with what stands beside it; undefined ones are left out."""
    least, numbers = _LEAST_GAP[form], {}
    worse = [[d for d in (1, 2) if one[f"d{d}_chosen"] < one[f"d{3 - d}_chosen"]] for one in pairs]
    if form == "correct":
        worse = [d or [1] for d in worse]
    for key, directions in (("metric", worse), ("dir1", [[1]] * len(pairs)), ("dir2", [[2]] * len(pairs))):
        taken = [(one, d) for one, of in zip(pairs, directions, strict=True) for d in of]
        gaps = [one[f"d{d}_clean"] - one[f"d{d}_"] for one, d in taken]
        for n in ns:
            for kind in ("", "random_", "llm_") if key == "metric" else ("",):
                after = f"{kind}{'' if kind == 'llm_' else n}"
                gains = [one[f"d{d}_{after}"] - one[f"d{d}_"] for one, d in taken]
                name = f"{kind}scr_{key}_threshold_{n}"
                if form == "correct" and gaps and np.mean(gaps) >= least:
                    numbers[name] = float(np.sum(gains) / np.sum(gaps))
                elif form == "compatible" and gaps:
                    ratios = [gain / gap if gap >= least else 0.0 for gain, gap in zip(gains, gaps, strict=True)]
                    numbers[name] = float(np.mean(ratios))
    return numbers


TASK = Task(
    name="scr",
    eval_type="scr",
    version=1,
    headlines={"scr_metric_threshold_10": 1, "scr_metric_threshold_20": 1},
    baselines=("random directions", "neurons"),
    prepare=_prepare,
    config=lambda spec: (
        ablation.config(spec.scr, spec.seed, scr=True, texts=4 * spec.scr.per_group)
        | {"column1_vals_lookup": _lookup(spec)}
    ),
    categories=lambda spec: {
        "scr_metrics": [f"scr_{key}_threshold_{n}" for n in spec.scr.ns for key in ("dir1", "metric", "dir2")]
    },
)


def _lookup(spec: SaebenchSpec) -> dict[str, Any]:
    return {name: [list(pair_of(pair)[:2]) for pair in spec.scr.pairs] for name in spec.scr.sources}
