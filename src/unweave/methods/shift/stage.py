"""SHIFT with its baselines, over several seeds: the paper's Table 2 (Marks et al. 2024, sec. 4).

1. Biographies are read once by the model; all seeds and baselines share their averaged activations.
2. Seed by seed: training examples, the classifier, its circuit; the same with labels of gender, and with neurons.
3. One judgement of all circuits' latents together.
4. Seed by seed: every row of the table.

Every seed's circuits and measurements are files of their own, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unweave.attribute.completeness import Completeness
from unweave.circuits import support
from unweave.circuits.about import About
from unweave.circuits.graph import Circuit
from unweave.circuits.support import Strong
from unweave.core.contents import tree_of as stamp
from unweave.core.errors import UnweaveError, UnweaveWarning
from unweave.core.files import read_json
from unweave.core.result import to_plain
from unweave.core.run import Run, atomic_write, write_json
from unweave.core.site import Site
from unweave.inputs.saes import Opened, digest_of, open_saes
from unweave.judge.base import check_judge
from unweave.latents.collect_many import text_stamps
from unweave.methods.shift import biographies, shift
from unweave.methods.shift import judge as shift_judge
from unweave.methods.shift import view as shift_table
from unweave.methods.shift.biographies import Biography
from unweave.methods.shift.concepts import concept_vectors, describe
from unweave.methods.shift.pooled import Edit, Pooled
from unweave.methods.shift.probe import Probe, Recipe, accuracies, fit
from unweave.methods.shift.relevance import Verdict
from unweave.methods.shift.spec import CircuitShiftSpec
from unweave.sae.module import SAE
from unweave.sae.neurons import neurons

VERSION = 4
_PROFESSION, _GENDER = "profession", "gender"


def run(spec: CircuitShiftSpec, runs: Path) -> Run:
    """Every method of Table 2 on every seed; ``table.md``, a figure, and the latents ablated with the reasons why.

    Raises UnweaveError for sites, biographies or judgements that do not do. Warns where the task is too easy.
    """
    with Run.open(runs, "circuit-shift", spec, version=VERSION, inputs=_inputs(spec)) as run:
        if run.done:
            return run
        if spec.judge == "chat":
            check_judge(spec.chat)
        opened = open_saes(spec)
        study = _Study(spec, opened, run.path)
        circuits = [study.circuit(seed) for seed in range(spec.seeds)]
        verdicts, judged = shift_judge.judged(spec, opened, study.used, circuits, runs, run.path)
        rows = [study.measured(seed, circuits[seed], verdicts) for seed in range(spec.seeds)]
        found = _found(spec, study, circuits, verdicts, rows, judged)
        found["files"] = shift_table.save(run.path, found)
        run.finish(opened.record | found)
        for warning in found["warnings"]:
            warnings.warn(warning, UnweaveWarning, stacklevel=2)
    return run


def _inputs(spec: CircuitShiftSpec) -> dict[str, str]:
    """Digests of everything local that is read."""
    found = digest_of(spec)
    local = {"biographies": stamp(spec.biographies) if spec.biographies != biographies.TEMPLATED else ""}
    if spec.annotations is not None:
        local["annotations"] = stamp(spec.annotations)
    if spec.judge != "file":
        local |= text_stamps(spec, spec.data)
    if spec.judge == "chat" and spec.chat.base_url is None:
        local["chat"] = stamp(spec.chat.model)
    return found | {name: value for name, value in local.items() if value}


@dataclass(frozen=True)
class _Seed:
    """One seed's training examples, as rows of the texts, and its classifier."""

    seed: int
    ambiguous: list[int]
    balanced: list[int]
    probe: Probe


class _Study:
    """What all seeds share, made when it is first needed."""

    def __init__(self, spec: CircuitShiftSpec, opened: Opened, folder: Path) -> None:
        self.spec, self.lm, self.folder = spec, opened.lm, folder
        self.site = _probe_site(spec, opened)
        self.used: dict[Site, SAE] = {site: sae for site, sae in opened.saes.items() if site <= self.site}
        if not self.used:
            raise UnweaveError(
                f"no autoencoder lies at or before {self.site}", where="probe", remedy="name a later site"
            )
        self.recipe = Recipe(lr=spec.lr, epochs=spec.epochs, standardise=spec.standardise)

    # -- texts ----------------------------------------------------------------------------------------------------

    @cached_property
    def sets(self) -> biographies.Sets:
        spec = self.spec
        found = biographies.sets(spec.biographies, pool=spec.pool, test=spec.test, seed=spec.seed)
        everything = [*((b, "train") for b in self._pool(found)), *((b, "test") for b in found.test)]
        with atomic_write(self.folder / "biographies.jsonl") as temporary:
            lines = [json.dumps(asdict(b) | {"split": split}, ensure_ascii=False) for b, split in everything]
            temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return found

    @staticmethod
    def _pool(sets: biographies.Sets) -> list[Biography]:
        return [biography for group in biographies.GROUPS for biography in sets.train[group]]

    @cached_property
    def people(self) -> list[Biography]:
        """All biographies: the pool, then the test set."""
        return [*self._pool(self.sets), *self.sets.test]

    @cached_property
    def test(self) -> list[int]:
        return list(range(len(self.people) - len(self.sets.test), len(self.people)))

    @cached_property
    def texts(self) -> Pooled:
        layers = [s.layer for site, sae in self.used.items() for s in (site, sae.read) if s is not None]
        inner = [layer for layer in layers if layer is not None]
        return Pooled(
            self.lm,
            [biography.text for biography in self.people],
            self.site,
            begin=min(inner) if inner else None,
            skip_first=self.spec.skip_first,
            max_length=self.spec.max_length,
            batch_tokens=self.spec.batch_tokens,
        )

    def labels(self, rows: Sequence[int], which: str = _PROFESSION) -> list[int]:
        return [getattr(self.people[row], which) for row in rows]

    def fitted(self, x: Tensor, rows: Sequence[int], seed: int) -> Probe:
        return fit(x, torch.tensor(self.labels(rows)), self.recipe, seed=seed)

    def seed(self, seed: int) -> _Seed:
        """Training examples and classifier of one seed."""
        place = {biography.text: row for row, biography in enumerate(self._pool(self.sets))}
        drawn = (
            [place[b.text] for b in draw(self.sets.train, self.spec.train, seed)]
            for draw in (biographies.ambiguous, biographies.balanced)
        )
        ambiguous, balanced = drawn
        return _Seed(seed, ambiguous, balanced, self.fitted(self.texts.clean[ambiguous], ambiguous, seed))

    # -- circuits -------------------------------------------------------------------------------------------------

    def circuit(self, seed: int) -> dict[str, Circuit]:
        """Support by latents for the ambiguous labels ("circuit"), for gender in balanced examples ("gender"), and the
        latter by neurons ("neurons"); kept in files."""
        names = ("circuit", "gender", "neurons")
        paths = {name: self.folder / f"{name}-{seed}.safetensors" for name in names}
        if not all(path.exists() for path in paths.values()):
            for name, circuit in self._circuits(self.seed(seed)).items():
                circuit.save(paths[name])
        return {name: Circuit.load(path) for name, path in paths.items()}

    def _circuits(self, seed: _Seed) -> dict[str, Circuit]:
        half, quarter = self.spec.examples // 2, self.spec.examples // 4
        group = {g: [row for row in seed.ambiguous if self.people[row].group == g] for g in biographies.AMBIGUOUS}
        others = {
            g: [row for row in seed.balanced if self.people[row].group == g][:quarter]
            for g in biographies.GROUPS
            if g not in group
        }
        ambiguous = [row for rows in group.values() for row in rows[:half]]
        balanced = [row for rows in (*group.values(), *others.values()) for row in rows[:quarter]]
        rows = list(dict.fromkeys([*ambiguous, *balanced]))
        of = f"seed {seed.seed + 1} of {self.spec.seeds}"
        complete, of_neurons = Completeness(), Completeness()
        effects = self._effects(self.used, rows, seed.probe, f"effects of latents, {of}", complete)
        at = {row: i for i, row in enumerate(rows)}

        def support(examples: Sequence[int], label: str) -> Circuit:
            here = {site: values[[at[row] for row in examples]] for site, values in effects.items()}
            return self._kept(shift.support(here, self.labels(examples, label)), len(examples), label, complete)

        coordinates = {site: neurons(self.lm, site) for site in self.used}
        skyline = self._effects(coordinates, balanced, seed.probe, f"effects of neurons, {of}", of_neurons)
        return {
            "circuit": support(ambiguous, _PROFESSION),
            "gender": support(balanced, _GENDER),
            "neurons": self._kept(
                shift.support(skyline, self.labels(balanced, _GENDER)),
                len(balanced),
                f"{_GENDER}, by neurons",
                of_neurons,
                neurons=True,
            ),
        }

    def _effects(
        self, saes: Mapping[Site, SAE], rows: Sequence[int], probe: Probe, name: str, complete: Completeness
    ) -> dict[Site, Tensor]:
        spec = self.spec
        return shift.logit_effects(
            self.lm,
            saes,
            self.texts,
            rows,
            probe,
            method=spec.method,
            steps=spec.steps,
            rule=spec.rule,
            max_tokens=spec.batch_tokens,
            name=name,
            complete=complete,
        )

    def _kept(
        self, mean: Mapping[Site, Tensor], n: int, label: str, complete: Completeness, neurons: bool = False
    ) -> Circuit:
        about = About(f"support for the label: {label}", of="classifier", neurons=neurons, sums=complete.rows())
        return Circuit({site: values.unsqueeze(0) for site, values in mean.items()}, {}, False, n, about)

    # -- the table ------------------------------------------------------------------------------------------------

    def measured(self, seed: int, circuits: Mapping[str, Circuit], verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
        """One seed's accuracies by method, and its draws of random latents; kept in a file.

        The file's name says which verdicts it belongs to: asked again, a chat model may answer where it failed before.
        """
        judged = shift_judge.digest_of([verdicts[s.name] for s in self.strong(circuits)])
        path = self.folder / f"seed-{seed}-{judged}.json"
        if not path.exists():
            write_json(path, self._measured(self.seed(seed), circuits, verdicts))
        return read_json(path)

    def _measured(
        self, seed: _Seed, circuits: Mapping[str, Circuit], verdicts: Mapping[str, Verdict]
    ) -> dict[str, Any]:
        clean, test, number = self.texts.clean, self.test, seed.seed
        of = f"seed {number + 1} of {self.spec.seeds}"
        out: dict[str, Any] = {shift_table.ORIGINAL: self._accuracies(seed.probe, clean[test])}

        concepts = describe(clean, concept_vectors(self.lm, self.site))
        bottleneck = self.fitted(concepts[seed.ambiguous], seed.ambiguous, number)
        out[shift_table.CONCEPTS] = self._accuracies(bottleneck, concepts[test])

        ablated = [v for s in self.strong(circuits) if (v := verdicts[s.name]).irrelevant]
        x = self.texts.edited(self._ablation([(v.site, v.latent) for v in ablated]), [*seed.ambiguous, *test], of)
        n = len(seed.ambiguous)
        out[shift_table.SHIFT] = self._accuracies(seed.probe, x[n:])
        out[shift_table.RETRAIN] = self._accuracies(self.fitted(x[:n], seed.ambiguous, number), x[n:])

        draws = []
        for draw in range(self.spec.random):
            others = shift.random_latents(support.means(circuits["circuit"]), ablated, number * self.spec.random + draw)
            draws.append(self._tested(seed.probe, self._ablation(others), f"random latents, {of}"))
        out[shift_table.RANDOM] = {name: sum(d[name] for d in draws) / len(draws) for name in shift_table.MEASURES}

        sky = support.strongest(support.means(circuits["gender"]), top=len(ablated))
        edits = self._ablation([(s.site, s.latent) for s in sky])
        out[shift_table.FEATURES] = self._tested(seed.probe, edits, f"feature skyline, {of}")
        sky = support.strongest(support.means(circuits["neurons"]), top=len(ablated))
        edits = shift.mean_ablation(
            self.lm, self.texts, seed.balanced[: self.spec.examples], [(s.site, s.latent) for s in sky]
        )
        out[shift_table.NEURONS] = self._tested(seed.probe, edits, f"neuron skyline, {of}")

        oracle = self.fitted(clean[seed.balanced], seed.balanced, number)
        out[shift_table.ORACLE] = self._accuracies(oracle, clean[test])
        return {"methods": out, "random": draws, "ablated": len(ablated)}

    def strong(self, circuits: Mapping[str, Circuit]) -> list[Strong]:
        """The circuit's latents, strongest first."""
        return support.strongest(support.means(circuits["circuit"]), threshold=self.spec.threshold, top=self.spec.top)

    def _ablation(self, latents: Sequence[tuple[Site, int]]) -> list[Edit]:
        return shift.ablation(self.used, latents, self.spec.where)

    def _tested(self, probe: Probe, edits: Sequence[Edit], name: str) -> dict[str, float]:
        return self._accuracies(probe, self.texts.edited(edits, self.test, name))

    def _accuracies(self, probe: Probe, x: Tensor) -> dict[str, float]:
        found = accuracies(probe(x), self.labels(self.test), self.labels(self.test, _GENDER))
        return dict(zip(shift_table.MEASURES, (found.wanted, found.unwanted, found.worst), strict=True))


def _probe_site(spec: CircuitShiftSpec, opened: Opened) -> Site:
    if spec.probe is not None:
        return opened.lm.site(spec.probe)
    streams = [site for site in opened.saes if site.point == "resid_post"]
    if not streams:
        raise UnweaveError(
            "no autoencoder is at a residual site", where="probe", remedy="name the classifier's site with --probe"
        )
    return max(streams)


def _found(
    spec: CircuitShiftSpec,
    study: _Study,
    circuits: Sequence[Mapping[str, Circuit]],
    verdicts: Mapping[str, Verdict],
    rows: Sequence[Mapping[str, Any]],
    judged: dict[str, Any],
) -> dict[str, Any]:
    table = shift_table.of_seeds([row["methods"] for row in rows])
    worst = {name: table[name]["worst"]["mean"] for name in table}
    gap = worst[shift_table.ORACLE] - worst[shift_table.ORIGINAL]
    back = {
        name: shift.recovered(worst[shift_table.ORIGINAL], worst[name], worst[shift_table.ORACLE])
        for name in (shift_table.SHIFT, shift_table.RETRAIN, shift_table.RANDOM)
    }
    latents = [
        [{"effect": round(s.effect, 4)} | shift_judge.line(verdicts[s.name]) for s in study.strong(found)]
        for found in circuits
    ]
    said = [unknown] if (unknown := shift_judge.warning(judged)) else []
    if gap < shift.LEAST_GAP:
        said.append(
            f"the oracle's worst group is only {100 * gap:.0f} points above the original's: the task is too easy to "
            "say anything about SHIFT"
        )
    for name, of in (("circuit", "latents"), ("neurons", "neurons of the skyline")):
        off = [(seed, problem) for seed, found in enumerate(circuits) if (problem := found[name].about.incomplete)]
        if off:
            said.append(f"{of}: {off[0][1]} (seed {', '.join(str(seed) for seed, _ in off)})")
    if bare := [i for i, row in enumerate(rows) if not row["ablated"]]:
        said.append(f"no latent was judged irrelevant for seed {', '.join(map(str, bare))}: nothing was ablated")
    told = {"judgement": (spec.judge, shift_judge.in_words(judged)), "biographies": (spec.biographies, _note(spec))}
    return shift_table.summarised(spec, table, gap, back, told, said) | {
        "probe": str(study.site),
        "biographies": spec.biographies,
        "note": _note(spec),
        "judge": judged,
        "judged": shift_judge.in_words(judged),
        "table": table,
        "gap": gap,
        "completeness": [to_plain(found["circuit"].about.sums) for found in circuits],
        "recovered": back,
        "ablated": [row["ablated"] for row in rows],
        "circuits": latents,
        "seeds": [dict(row) for row in rows],
        "warnings": said,
    }


def _note(spec: CircuitShiftSpec) -> str:
    return biographies.TEMPLATED_NOTE if spec.biographies == biographies.TEMPLATED else ""
