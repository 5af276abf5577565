"""The evaluation's numbers with a plain sentence each: what is measured, what this value says, what the ends mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from unweave.inputs.subject import SAEInfo
from unweave.show.pieces import number, percent

Values = Mapping[str, object]


@dataclass(frozen=True)
class Measure:
    """One number: its name in the evaluation, on the page, and the sentence for a value."""

    key: str
    name: str
    group: str
    say: Callable[[float, Values, SAEInfo | None], str]
    shown: Callable[[float], str] = number


def value_of(values: Values, key: str) -> float | None:
    """Return the number under ``key``, or None when it is absent or not a finite number."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _active(values: Values, sae: SAEInfo | None) -> str:
    if sae is not None and sae.k is not None and sae.kind.lower() == "topk":
        return f"the {sae.k} active latents"
    count = value_of(values, "l0")
    return "the active latents" if count is None else f"the {count:.0f} latents active on an average token"


def _unexplained(value: float, values: Values, sae: SAEInfo | None) -> str:
    active = _active(values, sae)
    return (
        f"{active[0].upper()}{active[1:]} leave out {percent(value)} of how activations vary; 0 is perfect, 1 is "
        "no better than always guessing the mean."
    )


def _explained(value: float, _values: Values, _sae: SAEInfo | None) -> str:
    return f"The same the other way round: {percent(value)} of the variation is rebuilt; 1 is perfect, 0 is the mean."


def _mse(_value: float, _values: Values, _sae: SAEInfo | None) -> str:
    return "Squared error per element of the activation, in the model's own units; 0 is perfect."


def _cosine(value: float, _values: Values, _sae: SAEInfo | None) -> str:
    angle = math.degrees(math.acos(max(-1.0, min(1.0, value))))
    return f"On average the rebuilt activation points {angle:.0f}° away from the original; 1 is the same direction."


def _norm_ratio(value: float, _values: Values, _sae: SAEInfo | None) -> str:
    off = abs(1 - value)
    side = "as long as" if off < 0.005 else f"{percent(off)} {'shorter' if value < 1 else 'longer'} than"
    return f"Rebuilt activations are {side} the originals; 1 is the same length, and below 1 means shrinkage."


def _l0(value: float, _values: Values, sae: SAEInfo | None) -> str:
    share = f", {percent(value / sae.latents)} of all {sae.latents:,}" if sae is not None and sae.latents else ""
    return f"An average token is described by {number(value)} active latents{share}; fewer are easier to read."


def _l1(_value: float, _values: Values, _sae: SAEInfo | None) -> str:
    return "Sum of the activations on an average token; useful for comparing runs, without a scale of its own."


def _alive(value: float, values: Values, _sae: SAEInfo | None) -> str:
    seen = value_of(values, "alive_tokens") or value_of(values, "tokens")
    where = "somewhere in the text that was read" if seen is None else f"somewhere in {seen:,.0f} tokens"
    return f"{percent(value)} of the latents fired {where}; 1 means that none is wasted."


def _ce_clean(value: float, _values: Values, _sae: SAEInfo | None) -> str:
    return (
        f"The model's own loss, in nats per token: it gives the right next token {percent(math.exp(-value))} "
        "on (geometric) average."
    )


def _ce_sae(value: float, values: Values, _sae: SAEInfo | None) -> str:
    clean = value_of(values, "ce_clean")
    change = 0.0 if clean is None else value - clean
    than = (
        "" if clean is None else f": {number(abs(change))} nats {'worse' if change >= 0 else 'better'} than untouched"
    )
    return f"The loss when the SAE's output stands in for the activation{than}."


def _ce_mean(_value: float, _values: Values, _sae: SAEInfo | None) -> str:
    return "The loss when every activation is replaced with the average one: what the model can do without this site."


def _ce_zero(_value: float, _values: Values, _sae: SAEInfo | None) -> str:
    return "The loss when every activation is replaced with zeros, a harsher cut that flatters any SAE."


def _recovered(value: float, baseline: str) -> str:
    return (
        f"Of the loss that {baseline} ablation costs, the SAE's output avoids {percent(value)}; 1 loses nothing, "
        "0 is as bad as the ablation."
    )


def _recovered_mean(value: float, _values: Values, _sae: SAEInfo | None) -> str:
    return _recovered(value, "mean")


def _recovered_zero(value: float, _values: Values, _sae: SAEInfo | None) -> str:
    return _recovered(value, "zero")


def _kl_sae(_value: float, _values: Values, _sae: SAEInfo | None) -> str:
    return "How far the next-token predictions move with the SAE in place, in nats; 0 means not at all."


def _kl_mean(_value: float, _values: Values, _sae: SAEInfo | None) -> str:
    return "The same for the average activation, as a yardstick."


def _kl_zero(_value: float, _values: Values, _sae: SAEInfo | None) -> str:
    return "The same for zeros."


def _unexplained_all(_value: float, _values: Values, _sae: SAEInfo | None) -> str:
    return (
        "With the special tokens and outliers counted that are left out above; a large difference means that it "
        "was not trained for them."
    )


def _l0_all(_value: float, _values: Values, _sae: SAEInfo | None) -> str:
    return "Likewise with every token counted."


REBUILD = "Does it rebuild the activation?"
SPARSE = "Is it sparse and fully used?"
BEHAVE = "Does the model still work?"
MEASURES = (
    Measure("unexplained_variance", "Unexplained variance", REBUILD, _unexplained),
    Measure("explained_variance", "Explained variance", REBUILD, _explained),
    Measure("mse", "Mean squared error", REBUILD, _mse),
    Measure("cosine", "Cosine similarity", REBUILD, _cosine),
    Measure("norm_ratio", "Norm ratio", REBUILD, _norm_ratio),
    Measure("unexplained_variance_all_tokens", "Unexplained variance, all tokens", REBUILD, _unexplained_all),
    Measure("l0", "L0", SPARSE, _l0),
    Measure("l0_all_tokens", "L0, all tokens", SPARSE, _l0_all),
    Measure("l1", "L1", SPARSE, _l1),
    Measure("alive_fraction", "Latents alive", SPARSE, _alive, percent),
    Measure("recovered_vs_mean", "Loss recovered, against mean ablation", BEHAVE, _recovered_mean),
    Measure("recovered_vs_zero", "Loss recovered, against zero ablation", BEHAVE, _recovered_zero),
    Measure("ce_clean", "Cross-entropy, model untouched", BEHAVE, _ce_clean),
    Measure("ce_sae", "Cross-entropy, SAE in place", BEHAVE, _ce_sae),
    Measure("ce_mean", "Cross-entropy, mean ablation", BEHAVE, _ce_mean),
    Measure("ce_zero", "Cross-entropy, zero ablation", BEHAVE, _ce_zero),
    Measure("kl_sae", "KL divergence, SAE in place", BEHAVE, _kl_sae),
    Measure("kl_mean", "KL divergence, mean ablation", BEHAVE, _kl_mean),
    Measure("kl_zero", "KL divergence, zero ablation", BEHAVE, _kl_zero),
)
"""In the order of the page."""
BY_KEY = {measure.key: measure for measure in MEASURES}
KNOWN = {*BY_KEY, "metric_set", "tokens", "excluded", "alive_tokens", "predictions", "notes", "density", "site"}
"""Names that the page shows in their own place; others it lists as they are."""


def sentence(key: str, values: Values, sae: SAEInfo | None) -> str | None:
    """Return the plain sentence for the number ``key`` of the evaluation, or None when it was not measured."""
    value = value_of(values, key)
    return None if value is None else BY_KEY[key].say(value, values, sae)


def shown(key: str, values: Values) -> str:
    """Return the number ``key`` as the page prints it, "n/a" when it was not measured."""
    value = value_of(values, key)
    return "n/a" if value is None else BY_KEY[key].shown(value)
