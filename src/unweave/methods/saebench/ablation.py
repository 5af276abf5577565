"""What linear probes on pooled activations say once latents are ablated; for SCR and TPP.

1. A latent's effect on a probe w is (mean over the first class - mean over the other) (d_j . w): its part of the
   difference of the classes' mean logits. The strongest n latents are ablated at every token, and the error stays.
2. Pooling and probe are linear, so a text with pooled latents F loses sum_j (F_j - c_j) (d_j . w) of its logit, and no
   token is read again. c_j is the latent's mean over the training texts in the correct form (a latent that fires in
   half of the texts carries part of the probe's threshold, which zeros would shift for all of them); 0 in the
   compatible form.
3. Beside it: as many latents drawn at random among those that fire; and the classes' difference of means erased from
   the model's own activation, x - delta (x - mu) . u / (delta . u) with u = Sigma^-1 delta (Belrose et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.methods.saebench.labelled import Array, Split
from unweave.methods.saebench.probes import Adam, Probe, by_test, dense, difference, validated
from unweave.methods.saebench.task import Bench
from unweave.sae.module import SAE

TRAINED = Adam(lr=1e-3, batch=16, epochs=20, patience=20, l1=1e-3)
"""SAEBench's probe; how far it takes up a spurious cue depends on these numbers"""
NOTE = (
    "SCR and TPP have been found to fall while SAEs are trained longer, so a higher value does not show a better SAE; "
    "they ask what a linear probe reads off mean activations, not what the model does."
)


@dataclass(frozen=True)
class Pooled:
    """Texts as an SAE and the model see them: latents CSR [R, F], activations [R, D], and the decoder [F, D]."""

    latents: Any
    own: Array
    W_dec: Array

    @classmethod
    def of(cls, latents: Any, own: Array, sae: SAE) -> Pooled:
        if sae.input_norm is not None:
            raise UnweaveError(f"this SAE normalises every token's input ({sae.input_norm}), so its latents write "
                               "with another scale at each token", where=str(sae.read),
                               remedy="leave scr and tpp out of tasks")  # fmt: skip
        return cls(latents, own, sae.W_dec.float().cpu().numpy())


@dataclass(frozen=True)
class Removal:
    """What is taken away: latents in order, by kind ("" the strongest, "random_" any), what each becomes [F], and of
    the model's own activation the part along ``delta`` [D] that ``dual`` [D] reads around ``centre`` [D]."""

    latents: Mapping[str, Array]
    becomes: Array
    delta: Array
    dual: Array
    centre: Array

    def logits(self, data: Pooled, rows: Array, probe: Probe, ns: Sequence[int]) -> dict[str, Array]:
        """A probe's logits of some texts: as they are (""), by kind and number ablated, and erased ("llm_")."""
        own, along = data.own[rows], data.W_dec @ probe.weight
        as_they_are = probe.logits(own)
        logits = {"": as_they_are, "llm_": as_they_are - (own - self.centre) @ self.dual * (probe.weight @ self.delta)}
        for kind, latents in self.latents.items():
            parts = (dense(data.latents[rows], latents) - self.becomes[latents]) * along[latents]
            lost = np.concatenate([np.zeros((len(rows), 1)), np.cumsum(parts, 1)], 1)
            logits |= {f"{kind}{n}": as_they_are - lost[:, min(n, len(latents))] for n in ns}
        return logits


def removal(
    data: Pooled, train: tuple[Array, Array], probe: Probe, most: int, form: str, seed: int, *, both_signs: bool
) -> Removal:
    """What tells the two classes of the training texts (rows, targets) apart for a probe, up to ``most`` latents.

    ``both_signs``: latents count by the size of their effect; otherwise those that fire more on the first class do.
    """
    rows, y = train
    latents, own = data.latents[rows], data.own[rows].astype(np.float64)
    apart = difference(latents, y)
    effects = (apart if both_signs else apart.clip(min=0)) * (data.W_dec @ probe.weight)
    effects = np.abs(effects) if both_signs else effects
    some = effects > 0 if form == "correct" else effects != 0
    strongest = np.argsort(-effects, kind="stable")[: min(most, int(some.sum()))]
    mean = np.asarray(latents.mean(0)).ravel()
    fires = np.flatnonzero(mean)
    drawn = np.random.default_rng([seed, 53]).permutation(fires)[:most]
    becomes = mean if form == "correct" else np.zeros_like(mean)
    centre, delta = own.mean(0), difference(own, y)
    within = np.cov(own.T)
    dual = np.linalg.solve(within + 0.01 * np.trace(within) / len(within) * np.eye(len(within)), delta)
    return Removal({"": strongest, "random_": drawn}, becomes, delta, dual / (dual @ delta), centre)


def trained(
    bench: Bench, name: str, own: Array, problems: Sequence[Split], strengths: Sequence[float], seed: int
) -> list[Probe]:
    """Probes on the model's pooled activations own [R, D], which all SAEs of the site share as a piece."""
    form = bench.spec.form

    def make() -> dict[str, Tensor]:
        probes = [probe_of(own, split, strengths, form, seed) for split in problems]
        return {"weight": torch.from_numpy(np.stack([one.weight for one in probes])),
                "bias": torch.tensor([one.bias for one in probes], dtype=torch.float64)}  # fmt: skip

    tensors = bench.pieces.tensors(name, make)
    return [Probe(weight, float(bias)) for weight, bias in zip(tensors["weight"].numpy(), tensors["bias"], strict=True)]


def probe_of(x: Array, split: Split, strengths: Sequence[float], form: str, seed: int) -> Probe:
    """A probe on x [R, D]; in the compatible form SAEBench's, chosen on test texts."""
    if form == "correct":
        return validated(x, split, strengths)
    rows, targets = (np.concatenate([one, other]) for one, other in zip(split.train, split.validation, strict=True))
    test, wanted = split.test
    return by_test(x[rows], targets, x[test], wanted, TRAINED, seed)[0]


def accuracy(logits: Array, targets: Array) -> float:
    return float(((logits > 0) == (targets == 1)).mean())


def config(options: Any, seed: int, *, scr: bool, texts: int) -> dict[str, Any]:
    """SAEBench's eval_config of both."""
    return {
        "random_seed": seed,
        "dataset_names": list(options.sources),
        "perform_scr": scr,
        "early_stopping_patience": TRAINED.patience,
        "train_set_size": round(texts * 0.8),
        "test_set_size": round(texts * 0.2),
        "context_length": options.context,
        "probe_train_batch_size": TRAINED.batch,
        "probe_test_batch_size": 500,
        "probe_epochs": TRAINED.epochs,
        "probe_lr": TRAINED.lr,
        "probe_l1_penalty": TRAINED.l1,
        "sae_batch_size": 125,
        "n_values": list(options.ns),
    }
