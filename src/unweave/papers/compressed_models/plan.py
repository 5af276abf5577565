"""What to run at each scale: which model and SAEs, how both are compressed, what is trained anew and measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unweave.data.corpus import Source
from unweave.data.pack import PackSpec
from unweave.data.spec import DEFAULT_MODEL, DEFAULT_SOURCES, DataSpec
from unweave.methods.compress.spec import CompressSpec, LowRankSpec, PruneSpec, QuantiseSpec
from unweave.methods.train.kinds import JumpReLUSpec, SAESpec, TopKSpec
from unweave.methods.train.spec import TrainSpec
from unweave.papers.compressed_models.spec import CompressedModelsSpec
from unweave.papers.gemma_scope import listed, nearest_l0

_POINTS = ("attn_heads", "mlp_add", "resid_post")
_LAYERS = (4, 12, 20)
_SEEDS = (0, 1)
_TASKS = ("absorption", "scr", "tpp", "ravel", "sparse_probing")
"""those of SAEBench that the paper reports beside core"""
_FEW = {
    "seeds": 2,
    "absorption": {"words_per_letter": 40},
    "scr": {"pairs": ["film review/product review by positive/negative"], "per_group": 100},
    "tpp": {"sources": ["topics"], "per_label": 80},
    "ravel": {"pairs": 40},
    "sparse_probing": {"sources": ["topics", "sentiment"], "per_label": 80},
}
"""of the smoke scale, where one site's four SAEs are measured within minutes"""
_GPT2, _GPT2_LAYERS = "openai-community/gpt2", 12
_GEMMA, _GEMMA_LAYER = "google/gemma-2-2b", 12
_GEMMA_L0 = {"att": 85, "mlp": 125, "res": 82}
"""of the SAEs whose L0 the paper reports (Tables 6 to 8)"""
_WEB = (Source(path="hub:Skylion007/openwebtext"),)
_PILE = (Source(path="hub:monology/pile-uncopyrighted"),)


@dataclass(frozen=True)
class StudyPlan:
    """Everything that is asked of one model."""

    name: str
    model: str
    training: TrainSpec | None
    """the original SAEs, where they are not published ones"""
    saes: Mapping[str, Mapping[str, str]]
    """published SAEs, by group and site"""
    compressions: tuple[CompressSpec, ...]
    """the first is studied in full; the others are compared with it in the first group"""
    retraining: TrainSpec
    """SAEs on the compressed model; of a seed each where the original ones are"""
    transfer: Mapping[str, Any]
    device: str | None
    groups: tuple[str, ...] = ()
    """of the trainings: their variants"""
    labels: Mapping[str, Any] | None = None
    """what labels of the first group are asked with"""
    bench: Mapping[str, Any] = field(default_factory=dict)
    bench_sites: tuple[str, ...] = ()
    """where SAEBench's tasks are run, on the first group's SAEs in the compressed model"""


def plan_of(spec: CompressedModelsSpec) -> tuple[StudyPlan, ...]:
    """The settings of a scale. UnweaveError where published SAEs cannot be listed."""
    return (_smoke(spec),) if spec.scale == "smoke" else (_gpt2(spec), _gemma(spec))


def _compressions(model: str, data: DataSpec, device: str | None) -> tuple[CompressSpec, ...]:
    """WANDA at half, the paper's; other ways and other sizes of it."""
    given = {"model": model, "data": data, "device": device}
    return (
        PruneSpec(**given),
        PruneSpec(**given, sparsity=0.25),
        PruneSpec(**given, method="magnitude"),
        PruneSpec(**given, method="sparsegpt"),
        *(QuantiseSpec(**given, bits=bits) for bits in (8, 4, 3)),
        LowRankSpec(**given),
    )


def _smoke(spec: CompressedModelsSpec) -> StudyPlan:
    data = DataSpec(sources=DEFAULT_SOURCES, pack=PackSpec(context=256), tokens=80_000, heldout_tokens=8192)
    blocks = DataSpec(sources=DEFAULT_SOURCES, pack=PackSpec(packing="blocks", context=256), tokens=16_384,
                      heldout_tokens=2048)  # fmt: skip
    training = TrainSpec(
        sites=tuple(f"{point}.{{{','.join(map(str, _LAYERS))}}}" for point in _POINTS),
        data=data,
        sae=TopKSpec(expansion=4, k=32, tokens=200_192, batch=512),
        variants=tuple({"seed": [seed]} for seed in _SEEDS),
        device=spec.device,
        checkpoint_seconds=240.0,
    )
    return StudyPlan(
        name="SmolLM2-135M-Instruct",
        model=DEFAULT_MODEL,
        training=training,
        saes={},
        compressions=_compressions(DEFAULT_MODEL, blocks, spec.device),
        retraining=training,
        device=spec.device,
        transfer={
            "pruning": {"sweep": [0.75, 0.9, 0.95, 0.99], "tokens": 16_384},
            "tokens": 8192,
            "loss_tokens": 1536,
            "steer": 16,
        },
        groups=tuple(f"seed{seed}" for seed in _SEEDS),
        labels={
            "texts": {"source": "topics", "texts": 1500},
            "match": {"prior": 0.01, "top": 24, "per_label": 6, "output_score": None},
            "context": 48,
        },
        bench={"tasks": _TASKS, **_FEW},
        bench_sites=("resid_post.12",),
    )


def _gpt2(spec: CompressedModelsSpec) -> StudyPlan:
    """TopK SAEs of MLP and residual stream; 128 sequences of 1,024 tokens to prune on. The paper's SAEs of attention
    heads are published as pickles alone, which are not read."""
    data = DataSpec(sources=_WEB, pack=PackSpec(packing="blocks", context=1024), tokens=131_072, heldout_tokens=131_072)
    saes = {
        f"layer {layer}": {
            f"mlp_add.{layer}": f"saelens:gpt2-small-mlp-out-v5-32k/blocks.{layer}.hook_mlp_out",
            f"resid_post.{layer}": f"saelens:gpt2-small-resid-post-v5-32k/blocks.{layer}.hook_resid_post",
        }
        for layer in range(_GPT2_LAYERS)
    }
    points = tuple(f"{point}.*" for point in _POINTS[1:])
    # these SAEs normalise every token, so their directions have no length to steer with
    return _published(spec, "GPT-2 small", _GPT2, data, saes, points, TopKSpec(expansion=32, tokens=122_880_000),
                      {"steer": 0})  # fmt: skip


def _gemma(spec: CompressedModelsSpec) -> StudyPlan:
    data = DataSpec(
        sources=_PILE, pack=PackSpec(packing="blocks", context=1024), tokens=131_072, heldout_tokens=131_072
    )
    saes = {}
    for point, (kind, l0) in zip(_POINTS, _GEMMA_L0.items(), strict=True):
        repository = f"google/gemma-scope-2b-pt-{kind}"
        saes[f"{point}.{_GEMMA_LAYER}"] = f"hub:{repository}/{nearest_l0(listed(repository), '16k', l0)[_GEMMA_LAYER]}"
    return _published(spec, "Gemma-2-2B", _GEMMA, data, {f"layer {_GEMMA_LAYER}": saes}, tuple(saes),
                      JumpReLUSpec(expansion=7, k=82, tokens=200_000_000), {})  # fmt: skip


def _published(
    spec: CompressedModelsSpec, name: str, model: str, data: DataSpec, saes: Mapping[str, Mapping[str, str]],
    sites: tuple[str, ...], sae: SAESpec, transfer: Mapping[str, Any],
) -> StudyPlan:  # fmt: skip
    """As published, at the sparsity that the original SAEs have: the paper's own are far denser than those."""
    training = TrainSpec(model=model, sites=sites, data=DataSpec.from_dict(data.to_dict() | {"tokens": sae.tokens}),
                         sae=sae, device=spec.device)  # fmt: skip
    benched = tuple(f"{point}.{_GEMMA_LAYER if model == _GEMMA else _GPT2_LAYERS // 2}" for point in _POINTS[1:])
    return StudyPlan(
        name=name,
        model=model,
        training=None,
        saes=saes,
        compressions=_compressions(model, data, spec.device),
        retraining=training,
        device=spec.device,
        transfer={"data": data.to_dict(), "tokens": 131_072, "loss_tokens": 32_768, "pruning": {"tokens": 131_072},
                  **transfer},
        bench={"tasks": _TASKS},
        bench_sites=benched,
    )  # fmt: skip
