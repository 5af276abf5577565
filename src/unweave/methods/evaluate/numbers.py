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
    """One number: its name in the evaluation, on the page, and the sentence for a value.

    A sentence is text in which ``{percent}`` stands for the value, or a function of the value, all values and the SAE.
    """

    key: str
    name: str
    group: str
    sentence: str | Callable[[float, Values, SAEInfo], str]
    shown: Callable[[float], str] = number


def value_of(values: Values, key: str) -> float | None:
    """Return the number under ``key``, or None when it is absent or not a finite number."""
    value = values.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _unexplained(value: float, values: Values, sae: SAEInfo) -> str:
    ranked = sae.k is not None and sae.kind.lower() == "topk"
    average = f"{value_of(values, 'l0') or 0:.0f} latents active on an average token"
    return (
        f"The {f'{sae.k} active latents' if ranked else average} leave out {percent(value)} of how activations vary; 0 "
        "is perfect, 1 is no better than always guessing the mean."
    )


def _cosine(value: float, _values: Values, _sae: SAEInfo) -> str:
    angle = math.degrees(math.acos(max(-1.0, min(1.0, value))))
    return f"On average the rebuilt activation points {angle:.0f}° away from the original; 1 is the same direction."


def _norm_ratio(value: float, _values: Values, _sae: SAEInfo) -> str:
    off = abs(1 - value)
    side = "as long as" if off < 0.005 else f"{percent(off)} {'shorter' if value < 1 else 'longer'} than"
    return f"Rebuilt activations are {side} the originals; 1 is the same length, and below 1 means shrinkage."


def _l0(value: float, _values: Values, sae: SAEInfo) -> str:
    share = f"{percent(value / sae.latents)} of all {sae.latents:,}"
    return f"An average token is described by {number(value)} active latents, {share}; fewer are easier to read."


def _alive(value: float, values: Values, _sae: SAEInfo) -> str:
    tokens = value_of(values, "tokens") or 0
    return f"{percent(value)} of the latents fired somewhere in {tokens:,.0f} tokens; 1 means that none is wasted."


def _ce_clean(value: float, _values: Values, _sae: SAEInfo) -> str:
    certain = percent(math.exp(-value))
    return f"The model's own loss, in nats per token: it gives the right next token {certain} on (geometric) average."


def _ce_sae(value: float, values: Values, _sae: SAEInfo) -> str:
    change = value - (value_of(values, "ce_clean") or 0.0)
    than = f"{number(abs(change))} nats {'worse' if change >= 0 else 'better'} than untouched"
    return f"The loss when the SAE's output stands in for the activation: {than}."


REBUILD = "Does it rebuild the activation?"
SPARSE = "Is it sparse and fully used?"
BEHAVE = "Does the model still work?"
_RECOVERED = (
    "Of the loss that {} ablation costs, the SAE's output avoids {{percent}}; 1 loses nothing, 0 is as bad as the "
    "ablation."
)
MEASURES = (
    Measure("unexplained_variance", "Unexplained variance", REBUILD, _unexplained),
    Measure("explained_variance", "Explained variance", REBUILD,
            "The same the other way round: {percent} of the variation is rebuilt; 1 is perfect, 0 is the mean."),
    Measure("mse", "Mean squared error", REBUILD,
            "Squared error per element of the activation, in the model's own units; 0 is perfect."),
    Measure("cosine", "Cosine similarity", REBUILD, _cosine),
    Measure("norm_ratio", "Norm ratio", REBUILD, _norm_ratio),
    Measure("unexplained_variance_all_tokens", "Unexplained variance, all tokens", REBUILD,
            "With the special tokens and outliers counted that are left out above; a large difference means that it "
            "was not trained for them."),
    Measure("l0", "L0", SPARSE, _l0),
    Measure("l0_all_tokens", "L0, all tokens", SPARSE, "Likewise with every token counted."),
    Measure("l1", "L1", SPARSE,
            "Sum of the activations on an average token; useful for comparing runs, without a scale of its own."),
    Measure("alive_fraction", "Latents alive", SPARSE, _alive, percent),
    Measure("recovered_vs_mean", "Loss recovered, against mean ablation", BEHAVE, _RECOVERED.format("mean")),
    Measure("recovered_vs_zero", "Loss recovered, against zero ablation", BEHAVE, _RECOVERED.format("zero")),
    Measure("ce_clean", "Cross-entropy, model untouched", BEHAVE, _ce_clean),
    Measure("ce_sae", "Cross-entropy, SAE in place", BEHAVE, _ce_sae),
    Measure("ce_mean", "Cross-entropy, mean ablation", BEHAVE,
            "The loss when every activation is replaced with the average one: what the model can do without this "
            "site."),
    Measure("ce_zero", "Cross-entropy, zero ablation", BEHAVE,
            "The loss when every activation is replaced with zeros, a harsher cut that flatters any SAE."),
    Measure("kl_sae", "KL divergence, SAE in place", BEHAVE,
            "How far the next-token predictions move with the SAE in place, in nats; 0 means not at all."),
    Measure("kl_mean", "KL divergence, mean ablation", BEHAVE,
            "The same for the average activation, as a yardstick."),
    Measure("kl_zero", "KL divergence, zero ablation", BEHAVE, "The same for zeros."),
)  # fmt: skip
"""In the order of the page."""
_BY_KEY = {measure.key: measure for measure in MEASURES}


def sentence(key: str, values: Values, sae: SAEInfo) -> str | None:
    """Return the plain sentence for the number ``key`` of the evaluation, or None when it was not measured."""
    value, text = value_of(values, key), _BY_KEY[key].sentence
    if value is None:
        return None
    return text.format(percent=percent(value)) if isinstance(text, str) else text(value, values, sae)


def shown(key: str, values: Values) -> str:
    """Return the number ``key`` as the page prints it, "n/a" when it was not measured."""
    value = value_of(values, key)
    return "n/a" if value is None else _BY_KEY[key].shown(value)
