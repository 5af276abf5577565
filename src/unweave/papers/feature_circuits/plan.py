"""What to run at each scale: which SAEs, which layers count for faithfulness, which thresholds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from unweave.core.errors import UnweaveError
from unweave.data.corpus import Source
from unweave.data.pack import PackSpec
from unweave.jobs.specs import DEFAULT_MODEL, DataSpec, StreamSpec, TrainSpec
from unweave.papers.feature_circuits.spec import MODELS, FeatureCircuitsSpec
from unweave.sae.spec import SAESpec

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
    probe: str
    """the site that SHIFT's classifier reads"""
    examples: int
    node_threshold: float
    edge_threshold: float
    seeds: int
    behaviours: int


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
        sae=SAESpec(kind="batchtopk", expansion=8, k=64, tokens=999_424, batch=1024),
        device=spec.device,
        checkpoint_seconds=240.0,
    )
    return Plan(
        model=DEFAULT_MODEL,
        training=training,
        saes=(),
        sites=sites,
        start_layer=_SMOKE_LAYERS[0],
        probe=f"resid_post.{_SMOKE_LAYERS[-1]}",
        examples=100,
        node_threshold=0.1,
        edge_threshold=0.01,
        seeds=5,
        behaviours=20,
    )


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
        probe="resid_post.4",
        examples=100,
        node_threshold=0.1,
        edge_threshold=0.01,
        seeds=5,
        behaviours=1000,
    )


def _gemma() -> Plan:
    kinds = {"attn_heads": "att", "mlp_add": "mlp", "resid_post": "res"}
    saes = []
    for point, kind in kinds.items():
        repository = f"google/gemma-scope-2b-pt-{kind}"
        folders = nearest_l0(_listed(repository), "16k", _GEMMA_L0)
        saes += [f"{point}.{layer}=hub:{repository}/{folder}" for layer, folder in folders.items()]
    return Plan(
        model=MODELS[1],
        training=None,
        saes=tuple(saes),
        sites=("attn_heads.*", "mlp_add.*", "resid_post.*"),
        start_layer=8,
        probe="resid_post.22",
        examples=100,
        node_threshold=0.073,
        edge_threshold=0.007,
        seeds=5,
        behaviours=1000,
    )


def nearest_l0(files: Sequence[str], width: str, l0: int) -> dict[int, str]:
    """Each layer's folder with the L0 nearest to ``l0``, of files named layer_3/width_16k/average_l0_59/params.npz."""
    found: dict[int, tuple[int, str]] = {}
    for file in files:
        match = re.fullmatch(rf"(layer_(\d+)/width_{width}/average_l0_(\d+))/params\.npz", file)
        if match is None:
            continue
        layer, distance = int(match[2]), abs(int(match[3]) - l0)
        if layer not in found or (distance, match[1]) < found[layer]:
            found[layer] = (distance, match[1])
    if not found:
        raise UnweaveError(f"the repository lists no SAE of width {width}", remedy="check the name and the network")
    return {layer: folder for layer, (_, folder) in sorted(found.items())}


def _listed(repository: str) -> list[str]:
    import huggingface_hub

    try:
        return huggingface_hub.list_repo_files(repository)
    except Exception as error:  # network, hub and authorisation errors of several libraries meet here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnweaveError(
            f"its files cannot be listed: {reason}", where=f"hub:{repository}", remedy="check the network and try again"
        ) from error
