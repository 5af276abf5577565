"""Tables over SAEs: who is ahead of whom, where that can be said at all.

1. Numbers of one task, site, form and data belong together; others are in tables of their own.
2. Where all SAEs are about equally sparse, each pair is compared seed by seed (``spread.gap``).
3. Elsewhere SAEs are not ranked. Kinds of SAE that have at least two L0 each are compared on their curves, linear in
   log L0 between the SAEs, in the middle of the range that both cover.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from unweave.core.contents import content_of
from unweave.core.errors import UnweaveError
from unweave.core.run import Run
from unweave.core.spec import digest
from unweave.core.stage import Context, stage
from unweave.methods.saebench.compare.result import ComparedSAEs, Entry, Pair, Table
from unweave.methods.saebench.compare.spec import CompareSpec
from unweave.methods.saebench.result import Measure, SaebenchResult, Scores
from unweave.methods.saebench.spread import Scored, gap


def content(folders: Sequence[Path]) -> str:
    """Twelve digits over the results of runs. UnweaveError for one that is no finished run."""
    for folder in folders:
        if not (folder / "DONE").is_file():
            raise UnweaveError("this is not a finished run", where=str(folder), remedy="give what saebench printed")
    return digest([content_of(folder / "result.json") for folder in folders])


@stage("compare", version=1)
def run(spec: CompareSpec, ctx: Context) -> ComparedSAEs:
    """Reads the runs and makes a table of each headline number."""
    del ctx
    results = [Run.at(folder, SaebenchResult).result for folder in spec.of]
    models = {result.subject.named_model for result in results}
    if len(models) > 1:
        raise UnweaveError(f"the SAEs are of several models: {', '.join(sorted(models))}", where="of",
                           remedy="compare SAEs of one model")  # fmt: skip
    groups: dict[tuple[object, ...], list[tuple[Scores, Measure, str]]] = {}
    for result in results:
        kinds = {one.digest: one.kind for one in result.subject.saes}
        for one in result.scores:
            for measure in one.measures:
                if measure.better:
                    key = (one.task, one.version, one.site, result.form, one.data, len(measure.draws), measure.key)
                    groups.setdefault(key, []).append((one, measure, kinds[one.digest[:12]]))
    tables = [table(rows, str(key[3]), spec.l0_ratio) for key, rows in groups.items()]
    if all(len(one.entries) < 2 for one in tables):
        raise UnweaveError("no two SAEs were measured alike", where="of",
                           remedy="measure them at one site with the same tasks, form, seeds and data")  # fmt: skip
    return ComparedSAEs(models.pop(), tuple(one for one in tables if len(one.entries) > 1))


def table(rows: Sequence[tuple[Scores, Measure, str]], form: str, l0_ratio: float) -> Table:
    """One headline number of SAEs measured alike, each with its kind."""
    rows = sorted({one.digest: (one, measure, kind) for one, measure, kind in rows}.values(), key=lambda row: row[0].l0)
    entries = tuple(Entry(one.sae, kind, one.l0, m.value, m.low, m.high, m.untold) for one, m, kind in rows)
    scores, measure, _ = rows[0]
    why_not, better = "", measure.better
    if entries[-1].l0 <= l0_ratio * entries[0].l0:
        pairs = [_pair(one, other, better) for one, other in combinations(rows, 2)]
    else:
        pairs = _on_curves(entries, better)
        why_not = f"L0 goes from {entries[0].l0:.3g} to {entries[-1].l0:.3g}, so SAEs are not ranked"
        if not pairs:
            why_not += "; that needs a curve: SAEs of each kind at two L0 or more, which overlap"
    return Table(scores.task, measure.key, scores.site, form, better, entries, tuple(pairs), why_not)


def _pair(one: tuple[Scores, Measure, str], other: tuple[Scores, Measure, str], better: int) -> Pair:
    if better * (one[1].value - other[1].value) < 0:
        one, other = other, one
    first, second = (Scored({"": m.value}, {"": m.draws}, scores.overlap) for scores, m, _ in (one, other))
    between = gap(first, second, "", "")
    return Pair(one[0].sae, other[0].sae, better * between.difference, between.low if better > 0 else -between.high)


def _on_curves(entries: Sequence[Entry], better: int) -> list[Pair]:
    curves = {}
    for kind in dict.fromkeys(entry.kind for entry in entries):
        points = {entry.l0: entry.value for entry in entries if entry.kind == kind}
        if len(points) > 1:
            curves[kind] = np.log(list(points)), np.array(list(points.values()))
    pairs = []
    for one, other in combinations(curves, 2):
        low = max(curves[one][0].min(), curves[other][0].min())
        high = min(curves[one][0].max(), curves[other][0].max())
        if low <= high:
            middle = (low + high) / 2
            difference = better * float(np.interp(middle, *curves[one]) - np.interp(middle, *curves[other]))
            ahead, behind = (one, other) if difference >= 0 else (other, one)
            pairs.append(Pair(ahead, behind, abs(difference), None, float(np.exp(middle))))
    return pairs
