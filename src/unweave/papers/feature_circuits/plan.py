"""What to run at each scale: which SAEs, which layers count for faithfulness, which thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unweave.data.corpus import Source
from unweave.data.pack import PackSpec
from unweave.data.spec import DEFAULT_MODEL, DataSpec, StreamSpec
from unweave.methods.shift.biographies import TEMPLATED
from unweave.methods.train.kinds import BatchTopKSpec
from unweave.methods.train.spec import TrainSpec
from unweave.papers.feature_circuits.spec import MODELS, FeatureCircuitsSpec
from unweave.papers.gemma_scope import listed, nearest_l0
from unweave.tasks.agreement import STRUCTURES

_SMOKE_LAYERS = (24, 25, 26, 27)
_GEMMA_L0 = 100
"""the paper takes, at each site, the Gemma Scope SAE whose average L0 is nearest to this"""


@dataclass(frozen=True)
class Plan:
    """Everything that a scale asks for."""

    model: str
    training: TrainSpec | None
    """SAEs to train first; None where published ones are taken"""
    saes: tuple[str, ...]
    """published SAEs"""
    sites: tuple[str, ...]
    """the sites, by pattern; neurons stand there in the baseline"""
    start_layer: int
    """faithfulness ablates from here on: early layers deal with particular words, which differ in the test split"""
    thresholds: Mapping[str, tuple[float, float]]
    """of nodes and edges, by structure"""
    find: Mapping[str, Any] = field(default_factory=dict)
    """what circuits are found with beside that; likewise below"""
    shift: Mapping[str, Any] = field(default_factory=dict)
    behaviours: Mapping[str, Any] = field(default_factory=dict)


def plan_of(spec: FeatureCircuitsSpec) -> Plan:
    """The settings of a scale."""
    if spec.scale == "smoke":
        return _smoke(spec)
    return _pythia() if (spec.model or MODELS[0]) == MODELS[0] else _gemma()


def _smoke(spec: FeatureCircuitsSpec) -> Plan:
    """Four layers of SmolLM2: across 24 to 27 the subject's number moves to the sentence's last token."""
    layers = ",".join(map(str, _SMOKE_LAYERS))
    sites = ("embed", *(f"{point}.{{{layers}}}" for point in ("attn_add", "mlp_add", "resid_post")))
    sources = (Source(path="wiki", weight=2.0), Source(path="c4", weight=2.0), Source(path="sotu"))
    pack = PackSpec(packing="blocks", context=128)
    training = TrainSpec(
        sites=sites,
        data=DataSpec(sources=sources, pack=pack, tokens=250_000, heldout_tokens=10_000),
        # layer 27's MLP undoes the first token's attention sink with vectors of 7 medians, which would swamp its SAE
        stream=StreamSpec(max_norm_ratio=5.0),
        # The page's figures are of these settings, not of what the defaults have become since.
        sae=BatchTopKSpec(
            expansion=8,
            k=64,
            tokens=999_424,
            batch=1024,
            init="random",
            aux_weight=1 / 32,
            k_aux=64,
            dead_after=100_000,
        ),
        device=spec.device,
        checkpoint_seconds=240.0,
    )
    return Plan(
        model=DEFAULT_MODEL,
        training=training,
        saes=(),
        sites=sites,
        start_layer=_SMOKE_LAYERS[0],
        thresholds=dict.fromkeys(STRUCTURES, (0.1, 0.01)),
        shift={"classifier": {"site": f"resid_post.{_SMOKE_LAYERS[-1]}"}, "biographies": TEMPLATED},
        behaviours={"behaviours": 20},
    )


# The published SAEs do not say which text they were trained on. The paper's code takes gradients at the left of a step.
_PILE = DataSpec(
    sources=(Source(path="hub:monology/pile-uncopyrighted"),),
    pack=PackSpec(context=130),
    tokens=2_000_000,
    heldout=0.01,
    heldout_tokens=200_000,
)
_PAPER_BEHAVIOURS: dict[str, Any] = {
    "data": _PILE.to_dict(),
    "tokens": 2_000_000,
    "contexts": {"limit": 8192},
    "clusters": {"number": 750},
    "behaviours": 750,
    "circuit": {"examples": 100, "steps": 10, "rule": "left", "node_threshold": 0.4, "edge_threshold": 0.04},
}


def _paper_shift(site: str, *, threshold: float, skip_first: int) -> dict[str, Any]:
    """Its classifier reads activations as they are, and everything above the threshold is judged."""
    return {
        "biographies": "hub:LabHC/bias_in_bios",
        "data": _PILE.to_dict(),
        "pool": 1000,
        "test": 400,
        "classifier": {"site": site, "train": 2000, "standardise": False, "skip_first": skip_first},
        "circuit": {"examples": 100, "steps": 10, "rule": "left", "threshold": threshold, "top": None},
    }


def _pythia() -> Plan:
    parts = {"attn_add": "att-sm/blocks.{}.hook_attn_out", "mlp_add": "mlp-sm/blocks.{}.hook_mlp_out"}
    parts["resid_post"] = "res-sm/blocks.{}.hook_resid_post"
    release = "saelens:pythia-70m-deduped-"
    saes = [f"embed={release}res-sm/blocks.0.hook_resid_pre"]
    saes += [f"{point}.{layer}={release}{name.format(layer)}" for layer in range(6) for point, name in parts.items()]
    return Plan(
        model=MODELS[0],
        training=None,
        saes=tuple(saes),
        sites=("embed", "attn_add.*", "mlp_add.*", "resid_post.*"),
        start_layer=2,
        thresholds={name: (0.1, 0.01) if name.startswith("across") else (0.2, 0.02) for name in STRUCTURES},
        find={"rule": "left"},
        shift=_paper_shift("resid_post.4", threshold=0.1, skip_first=0),
        behaviours=_PAPER_BEHAVIOURS,
    )


def _gemma() -> Plan:
    kinds = {"attn_heads": "att", "mlp_add": "mlp", "resid_post": "res"}
    saes = []
    for point, kind in kinds.items():
        repository = f"google/gemma-scope-2b-pt-{kind}"
        folders = nearest_l0(listed(repository), "16k", _GEMMA_L0)
        saes += [f"{point}.{layer}=hub:{repository}/{folder}" for layer, folder in folders.items()]
    return Plan(
        model=MODELS[1],
        training=None,
        saes=tuple(saes),
        sites=("attn_heads.*", "mlp_add.*", "resid_post.*"),
        start_layer=8,
        thresholds={name: (0.073, 0.007) if name == "across_rc" else (0.5, 0.05) for name in STRUCTURES},
        find={"rule": "left"},
        shift=_paper_shift("resid_post.22", threshold=6.0, skip_first=1),
        behaviours=_PAPER_BEHAVIOURS,
    )
