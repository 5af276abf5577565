"""What the paper claims, beside what came out here. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping

from unweave.methods.behaviours.result import BehavioursResult
from unweave.methods.circuits.figures import curve_name
from unweave.methods.circuits.result import Errors, Faithfulness, Reached
from unweave.methods.shift import view as shift_view
from unweave.methods.shift.result import LEAST_GAP, Method, ShiftResult
from unweave.papers.claims import Claim, Verdict
from unweave.papers.feature_circuits.result import FeatureCircuits, Overlap

LEVEL = 0.8
_TIMES = 5
"""how many times fewer nodes than neurons, or random ones, count as few; the paper has fifteen times and more"""
_MUCH = 0.8
"""below this share of what is reached otherwise, much is lost"""
_RANDOM_AT_MOST = 0.1
"""the share of SHIFT's gap that random latents may close"""


def claims(result: FeatureCircuits) -> list[Claim]:
    """Every claim with our figure and a verdict."""
    measured = {one.name: one.faithfulness for one in result.structures}
    return [
        *_agreement_claims(measured, result.overlap),
        _shift_claim(result.shift),
        _behaviour_claim(result.behaviours),
    ]


# -- agreement --------------------------------------------------------------------------------------------------------


def reached_heads() -> list[str]:
    features, neurons = curve_name("default", False), curve_name("default", True)
    return [f"{features}: nodes for {LEVEL:g}", "random nodes for it", f"{neurons}: nodes for {LEVEL:g}", "random"]


def _of(result: Faithfulness, errors: Errors = "default", neurons: bool = False) -> Reached:
    """How many nodes one of the curves takes."""
    return next(curve for curve in result.reached if (curve.errors, curve.neurons) == (errors, neurons))


def reached(result: Faithfulness) -> list[str]:
    cells = []
    for curve in (_of(result), _of(result, neurons=True)):
        for value in (curve.nodes, curve.random_nodes):
            cells.append(f"never (of {curve.changing:,})" if value is None else f"{value:,.0f}")
    return cells


def _highest(result: Faithfulness, errors: Errors) -> float:
    """The highest faithfulness with errors treated so, 1 at most."""
    curve = result.curve(errors)
    assert curve is not None
    return min(1.0, max(row.faithfulness for row in curve.rows))


def _agreement_claims(measured: Mapping[str, Faithfulness], shared: Overlap) -> list[Claim]:
    def words(errors: Errors = "default", neurons: bool = False, random: bool = False) -> str:
        curves = {name: _of(result, errors, neurons) for name, result in measured.items()}
        values = {name: one.random_nodes if random else one.nodes for name, one in curves.items()}
        return ", ".join(f"{name} {'never' if v is None else f'{v:,.0f}'}" for name, v in values.items())

    few = []
    for result in measured.values():
        latents, neurons = _of(result), _of(result, neurons=True)
        few.append(_fewer(latents.nodes, neurons.nodes) and _fewer(latents.nodes, latents.random_nodes))
    none = {name: _highest(result, "remove") for name, result in measured.items()}
    inner = {name: _highest(result, "remove-attn-mlp") for name, result in measured.items()}
    lost = [none[name] < _MUCH * inner[name] for name in none]
    share = shared.share
    return [
        Claim(
            "small circuits of latents and errors explain most of the behaviour (about 100 nodes in Pythia-70M, 500 in "
            "Gemma-2-2B), where half of it takes about 1,500 (50,000) neurons",
            f"nodes for a faithfulness of {LEVEL:g} on held-out sentences: {words()}; without errors: "
            f"{words('remove')}; neurons: {words(neurons=True)}; random nodes: {words(random=True)}",
            _verdict(few),
        ),
        Claim(
            "without residual errors circuits lose much of what they can reach, without attention and MLP errors less",
            f"the highest faithfulness without any errors: {_numbers(none)}; without those of attention and MLPs only: "
            f"{_numbers(inner)}",
            _verdict(lost),
        ),
        Claim(
            "the circuits across a relative clause and across a prepositional phrase share over 85 % of their nodes",
            f"{shared.shared} latents are in both, positions apart, of {shared.sizes[0]} and {shared.sizes[1]}; with "
            f"errors {shared.with_errors} nodes are",
            "not measured" if share is None else "as claimed" if share > 0.85 else "not as claimed",
        ),
    ]


def _fewer(features: float | None, others: float | None) -> bool:
    """Whether latents need several times fewer nodes."""
    return features is not None and (others is None or others > _TIMES * features)


def _numbers(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())


def _verdict(holds: list[bool]) -> Verdict:
    return "as claimed" if all(holds) else "partly" if any(holds) else "not as claimed"


# -- SHIFT ------------------------------------------------------------------------------------------------------------


def _shift_claim(result: ShiftResult) -> Claim:
    shown: tuple[Method, ...] = ("original", "random", "shift", "retrain", "features", "neurons", "oracle")
    worst = ", ".join(f"{shift_view.NAMES[name]} {shift_view.accuracy(result, name, 'worst')}" for name in shown)
    back, random = result.recovered("shift"), result.recovered("random") or 0.0
    share = "-" if back is None else f"{100 * back:.0f} %"
    ours = f"worst group, %: {worst}; SHIFT makes good {share} of the gap of {100 * result.gap:.0f} points"
    notes = [note for note in (result.biographies_note, *shift_view.warnings(result)) if note]
    better = result.mean("retrain", "worst") >= result.mean("shift", "worst")
    verdict: Verdict = "partly"
    if result.gap < LEAST_GAP or back is None:
        verdict = "not measured"  # nothing to recover
    elif back <= 2 * random:
        verdict = "not as claimed"
    elif back >= 0.5 and better and random < _RANDOM_AT_MOST:
        verdict = "as claimed"
    claim = (
        "SHIFT lifts the worst group's accuracy from 24.4 % to 76.0 %, with retraining to 89.0 % (Pythia-70M); random "
        "latents do not"
    )
    return Claim(claim, ours + (f" ({'; '.join(notes)})" if notes else ""), verdict)


def _behaviour_claim(result: BehavioursResult) -> Claim:
    means = result.coherence()
    coherence = "" if means is None else f"clusters {means[0]:.3f}, random {means[1]:.3f}"
    return Claim(
        "circuits are found without supervision for thousands of behaviours that clustering discovers",
        f"{len(result.behaviours)} behaviours with a circuit each, of {len(result.clusters)} clusters; coherence: "
        f"{coherence}",
        "not measured",  # in the paper people judged how clear the clusters are; here none did
    )
