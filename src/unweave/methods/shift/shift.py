"""SHIFT with its baselines, over several seeds: the paper's Table 2 (Marks et al. 2024, sec. 4).

    people = biographies.sets("templated", pool=160, test=75)
    shift(lm, saes, people, judge.by_rule(records))             # in a notebook: shows itself as the table

1. Biographies are read once by the model; all seeds and baselines share their averaged activations.
2. Seed by seed: training examples, the classifier, its circuit; the same with labels of gender, and with neurons.
3. One judgement of all circuits' latents together: which of them are irrelevant to the task.
4. Seed by seed every row: the classifier on the model without those latents (SHIFT), one trained anew there (retrain),
   a concept bottleneck, random latents; with labels of gender the strongest latents and neurons; and an oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from unweave.attribute.completeness import Completeness
from unweave.attribute.result import SiteSum
from unweave.circuits.about import About, Judged, Supporting
from unweave.circuits.graph import Circuit, strongest
from unweave.core.errors import UnweaveError
from unweave.core.pieces import Held, Pieces
from unweave.core.site import Site
from unweave.core.spec import digest
from unweave.inputs.saes import info_of
from unweave.inputs.subject import Subject
from unweave.lm.model import LM
from unweave.methods.shift import biographies
from unweave.methods.shift.biographies import Biography, Sets
from unweave.methods.shift.probe import Edit, Pooled, Probe, Recipe, accuracies, concept_vectors, describe, fit
from unweave.methods.shift.result import Accuracies, Judgement, Method, Seed, ShiftResult, TableRow
from unweave.methods.shift.spec import ShiftOptions
from unweave.methods.shift.supporting import ablation, before, logit_effects, mean_ablation, random_latents, support
from unweave.sae.module import SAE
from unweave.sae.neurons import neurons

Judging = Callable[[Sequence[tuple[Site, int]]], Judgement]
"""Says of latents whether they are relevant to the task; ``judge.py`` has a rule, a file, and a chat model."""


def shift(
    lm: LM,
    saes: Mapping[Site, SAE],
    people: Sets,
    judge: Judging,
    options: ShiftOptions | None = None,
    *,
    pieces: Pieces | None = None,
    folder: Path | None = None,
) -> ShiftResult:
    """Every method of Table 2 on every seed. ``pieces`` holds what is finished; every seed's circuits go to ``folder``
    as ``circuit-0.safetensors`` and so on, where one is given.

    Raises UnweaveError where no SAE lies at or before the classifier's site, and where no latent supports the labels.
    """
    options, pieces = options or ShiftOptions(), pieces or Pieces(None)
    study = _Study(lm, saes, people, options)
    circuits = [study.circuits(seed, pieces) for seed in range(options.seeds)]
    latents = {(latent.site, latent.latent) for of_seed in circuits for latent in of_seed.strong}
    if not latents:
        remedy = f"lower the threshold of {options.circuit.threshold}"
        raise UnweaveError("no latent supports the classifier's labels", where="circuit.threshold", remedy=remedy)
    judgement = judge(sorted(latents))
    seeds = []
    for number, of_seed in enumerate(circuits):
        if folder is not None:
            of_seed.save(folder, number, options)
        rows = study.rows(number, of_seed, judgement, pieces)
        seeds.append(Seed(of_seed.strong, rows, of_seed.sums, of_seed.neuron_sums))
    subject = Subject(lm.name, lm.note, tuple(info_of(sae) for sae in saes.values()), {})
    return ShiftResult(subject, study.site, people.source, people.note, judgement, tuple(seeds))


@dataclass(frozen=True)
class _Circuits:
    """One seed's support by slot {site: [F + 1]}: by latents of the ambiguous examples' professions, by latents of the
    balanced examples' genders, and the latter by neurons; and whether effects add up."""

    profession: dict[Site, Tensor]
    gender: dict[Site, Tensor]
    neurons: dict[Site, Tensor]
    strong: tuple[Supporting, ...]
    sums: tuple[SiteSum, ...]
    neuron_sums: tuple[SiteSum, ...]

    def save(self, folder: Path, seed: int, options: ShiftOptions) -> None:
        """A file for each of the three."""
        search = options.circuit
        files = {
            "circuit": ("profession", self.profession, self.sums),
            "gender": ("gender", self.gender, self.sums),
            "neurons": ("gender, by neurons", self.neurons, self.neuron_sums),
        }
        for name, (label, mean, sums) in files.items():
            about = About(
                f"support for the label: {label}",
                of="classifier",
                judged=Judged(search.threshold, search.top),
                neurons=name == "neurons",
                sums=sums,
            )
            nodes = {place: values.unsqueeze(0) for place, values in mean.items()}
            Circuit(nodes, {}, False, search.examples, about).save(folder / f"{name}-{seed}.safetensors")


@dataclass(frozen=True)
class _Examples:
    """One seed's training examples, as rows of the texts, and its classifier."""

    ambiguous: list[int]
    balanced: list[int]
    probe: Probe


class _Study:
    """What all seeds share."""

    def __init__(self, lm: LM, saes: Mapping[Site, SAE], people: Sets, options: ShiftOptions) -> None:
        self.lm, self.sets, self.options = lm, people, options
        self.site = _site_of(lm, saes, options.classifier.site)
        self.used = before(saes, self.site)
        self.pool = [biography for group in biographies.GROUPS for biography in people.train[group]]
        self.people: list[Biography] = [*self.pool, *people.test]
        self.test = list(range(len(self.pool), len(self.people)))
        told = options.classifier
        self.recipe = Recipe(lr=told.lr, epochs=told.epochs, standardise=told.standardise)

    @cached_property
    def texts(self) -> Pooled:
        layers = [s.layer for site, sae in self.used.items() for s in (site, sae.read) if s is not None]
        inner = [layer for layer in layers if layer is not None]
        return Pooled(
            self.lm,
            [biography.text for biography in self.people],
            self.site,
            begin=min(inner) if inner else None,
            skip_first=self.options.classifier.skip_first,
            max_length=self.options.classifier.max_length,
            batch_tokens=self.options.batch_tokens,
        )

    def professions(self, rows: Sequence[int]) -> list[int]:
        return [self.people[row].profession for row in rows]

    def genders(self, rows: Sequence[int]) -> list[int]:
        return [self.people[row].gender for row in rows]

    def fitted(self, x: Tensor, rows: Sequence[int], seed: int) -> Probe:
        return fit(x, torch.tensor(self.professions(rows)), self.recipe, seed=seed)

    def examples(self, seed: int) -> _Examples:
        place, n = {biography.text: row for row, biography in enumerate(self.pool)}, self.options.classifier.train
        ambiguous = [place[b.text] for b in biographies.ambiguous(self.sets.train, n, seed)]
        balanced = [place[b.text] for b in biographies.balanced(self.sets.train, n, seed)]
        return _Examples(ambiguous, balanced, self.fitted(self.texts.clean[ambiguous], ambiguous, seed))

    def _of(self, seed: int) -> str:
        return f"seed {seed + 1} of {self.options.seeds}"

    # -- circuits -------------------------------------------------------------------------------------------------

    def circuits(self, seed: int, pieces: Pieces) -> _Circuits:
        """One seed's, from the pieces where they are finished."""
        held = pieces.tensors(f"circuits-{seed}", lambda: self._circuits(seed))
        profession, gender, by_neurons, sums, neuron_sums = (
            {Site.parse(name.partition("/")[2]): value for name, value in held.items() if name.startswith(f"{kind}/")}
            for kind in ("profession", "gender", "neurons", "sums", "neuron_sums")
        )
        search = self.options.circuit
        strong = strongest(profession, threshold=search.threshold, top=search.top)
        return _Circuits(profession, gender, by_neurons, tuple(strong), _rows(sums), _rows(neuron_sums))

    def _circuits(self, seed: int) -> Held:
        chosen, n = self.examples(seed), self.options.circuit.examples
        half, quarter = n // 2, n // 4
        group = {g: [row for row in chosen.ambiguous if self.people[row].group == g] for g in biographies.AMBIGUOUS}
        others = {
            g: [row for row in chosen.balanced if self.people[row].group == g][:quarter]
            for g in biographies.GROUPS
            if g not in group
        }
        ambiguous = [row for rows in group.values() for row in rows[:half]]
        balanced = [row for rows in (*group.values(), *others.values()) for row in rows[:quarter]]
        rows = list(dict.fromkeys([*ambiguous, *balanced]))
        complete, of_neurons = Completeness(), Completeness()
        effects = self._effects(self.used, rows, chosen.probe, f"effects of latents, {self._of(seed)}", complete)
        coordinates = {site: neurons(self.lm, site) for site in self.used}
        name = f"effects of neurons, {self._of(seed)}"
        by_neurons = self._effects(coordinates, balanced, chosen.probe, name, of_neurons)
        at = {row: i for i, row in enumerate(rows)}

        def among(examples: Sequence[int]) -> dict[Site, Tensor]:
            return {site: values[[at[row] for row in examples]] for site, values in effects.items()}

        kinds = {
            "profession": support(among(ambiguous), self.professions(ambiguous)),
            "gender": support(among(balanced), self.genders(balanced)),
            "neurons": support(by_neurons, self.genders(balanced)),
            "sums": {site: torch.tensor(sums, dtype=torch.float64) for site, sums in complete.sums.items()},
            "neuron_sums": {site: torch.tensor(sums, dtype=torch.float64) for site, sums in of_neurons.sums.items()},
        }
        return {f"{kind}/{site}": value for kind, values in kinds.items() for site, value in values.items()}

    def _effects(
        self, saes: Mapping[Site, SAE], rows: Sequence[int], probe: Probe, name: str, complete: Completeness
    ) -> dict[Site, Tensor]:
        search = self.options.circuit
        return logit_effects(self.lm, saes, self.texts, rows, probe, options=search, name=name, complete=complete)

    # -- the table ------------------------------------------------------------------------------------------------

    def rows(self, seed: int, circuits: _Circuits, judgement: Judgement, pieces: Pieces) -> tuple[TableRow, ...]:
        """One seed's rows. The piece's name says what was ablated: asked again, a chat model may answer where it failed
        before."""
        ablated = judgement.ablated(circuits.strong)
        name = f"rows-{seed}-{digest([one.name for one in ablated])}"
        return pieces.value(name, tuple[TableRow, ...], lambda: self._rows(seed, circuits, ablated))

    def _rows(self, seed: int, circuits: _Circuits, ablated: Sequence[Supporting]) -> tuple[TableRow, ...]:
        clean, test, chosen, of = self.texts.clean, self.test, self.examples(seed), self._of(seed)
        concepts = describe(clean, concept_vectors(self.lm, self.site))
        bottleneck = self.fitted(concepts[chosen.ambiguous], chosen.ambiguous, seed)
        oracle = self.fitted(clean[chosen.balanced], chosen.balanced, seed)
        x = self.texts.edited(self._ablation(_places(ablated)), [*chosen.ambiguous, *test], of)
        n, by_gender = len(chosen.ambiguous), _places(strongest(circuits.gender, top=len(ablated)))
        retrained = self.fitted(x[:n], chosen.ambiguous, seed)
        by_neurons = _places(strongest(circuits.neurons, top=len(ablated)))
        examples = chosen.balanced[: self.options.circuit.examples]
        without_neurons = mean_ablation(self.lm, self.texts, examples, by_neurons)
        single: dict[Method, Accuracies] = {
            "original": self._accuracies(chosen.probe, clean[test]),
            "concepts": self._accuracies(bottleneck, concepts[test]),
            "shift": self._accuracies(chosen.probe, x[n:]),
            "retrain": self._accuracies(retrained, x[n:]),
            "neurons": self._tested(chosen.probe, without_neurons, f"neurons, {of}"),
            "features": self._tested(chosen.probe, self._ablation(by_gender), f"feature skyline, {of}"),
            "oracle": self._accuracies(oracle, clean[test]),
        }
        rows = [TableRow(method, 0, reached) for method, reached in single.items()]
        for draw in range(self.options.random):
            others = random_latents(circuits.profession, ablated, seed * self.options.random + draw)
            reached = self._tested(chosen.probe, self._ablation(others), f"random latents, {of}")
            rows.append(TableRow("random", draw, reached))
        return tuple(rows)

    def _ablation(self, latents: Sequence[tuple[Site, int]]) -> list[Edit]:
        return ablation(self.used, latents, self.options.where)

    def _tested(self, probe: Probe, edits: Sequence[Edit], name: str) -> Accuracies:
        return self._accuracies(probe, self.texts.edited(edits, self.test, name))

    def _accuracies(self, probe: Probe, x: Tensor) -> Accuracies:
        return accuracies(probe(x), self.professions(self.test), self.genders(self.test))


def _places(latents: Sequence[Supporting]) -> list[tuple[Site, int]]:
    return [(latent.site, latent.latent) for latent in latents]


def _rows(sums: Mapping[Site, Tensor]) -> tuple[SiteSum, ...]:
    return Completeness({site: values.tolist() for site, values in sums.items()}).rows()


def _site_of(lm: LM, saes: Mapping[Site, SAE], name: str | None) -> Site:
    """The classifier's site: the named one, else the last residual one with an SAE."""
    if name is not None:
        return lm.site(name)
    streams = [site for site in saes if site.point == "resid_post"]
    if not streams:
        remedy = "name the classifier's site with --classifier.site"
        raise UnweaveError("no SAE is at a residual site", where="classifier.site", remedy=remedy)
    return max(streams)
