"""What to run at each scale: which SAEs, which texts with tags, how latents are labelled and steered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unweave.core.errors import UnweaveError
from unweave.data.corpus import Source
from unweave.data.pack import PackSpec
from unweave.data.spec import DEFAULT_MODEL, DEFAULT_SOURCES, DataSpec
from unweave.methods.train.kinds import BatchTopKSpec
from unweave.methods.train.spec import TrainSpec
from unweave.papers.gemma_scope import listed, nearest_l0
from unweave.papers.labelled_steering.result import F1
from unweave.papers.labelled_steering.spec import FORA, LabelledSteeringSpec, MixSpec
from unweave.tasks.tagged.spec import TaggedSpec

LOW, HIGH, SEED = "low L0", "high L0", "low L0, other seed"
_LAYERS = (9, 20)
_K = {LOW: (24, 0), HIGH: (96, 0), SEED: (24, 1)}
# What a package is about or works with; not how it is built, or of what sort it is.
_FACETS = ("culture::", "devel::lang:", "field::", "game::", "security::", "sound::", "works-with::")
_GEMMA, _GEMMA_LAYERS = "google/gemma-2-9b-it", (17, 32)
_GEMMA_SCOPE = "google/gemma-scope-9b-pt-res"
_GEMMA_L0 = {LOW: 25, HIGH: 130}


@dataclass(frozen=True)
class Plan:
    """Everything that a scale asks for. Labels and comparisons are of every corpus."""

    shared: Mapping[str, Any]
    """what labels and comparisons are both asked with"""
    mix: MixSpec | None
    """texts to put together first, the only corpus; also trained on"""
    training: TrainSpec | None
    """SAEs to train, without those texts among their data"""
    variants: Mapping[str, str]
    """of the training, by set of SAEs"""
    saes: Mapping[str, tuple[str, ...]]
    """published SAEs, by set"""
    corpora: Mapping[str, TaggedSpec]
    drawn: int | None
    """how many of a corpus's texts labels are chosen and tested on; comparisons learn on all, divided alike"""
    labels: Mapping[str, Any]
    """what labels are asked with beside that; likewise below"""
    compare: Mapping[str, Any]
    comparisons: Mapping[tuple[str, F1], tuple[str, ...]]
    """the methods that are compared, by set of SAEs and way of labelling"""
    labelled: tuple[tuple[str, F1], ...] = ()
    """what is labelled though not steered"""


def plan_of(spec: LabelledSteeringSpec) -> Plan:
    """The settings of a scale. UnweaveError where a dump is missing."""
    return _smoke(spec) if spec.scale == "smoke" else _paper(spec)


def _protocol(spec: LabelledSteeringSpec, per_pair: int) -> dict[str, Any]:
    given = {} if spec.instructions is None else {"instructions": str(spec.instructions)}
    return {"per_pair": per_pair, "suppression": False, **given}


def _raters(spec: LabelledSteeringSpec) -> dict[str, Any]:
    if spec.judge is None:
        return {"raters": ["truth"]}
    return {"raters": ["truth", "chat"] if spec.scale == "smoke" else ["chat"], "judge": spec.judge.to_dict()}


def _smoke(spec: LabelledSteeringSpec) -> Plan:
    training = TrainSpec(
        sites=(f"resid_post.{{{','.join(map(str, _LAYERS))}}}",),
        data=DataSpec(sources=DEFAULT_SOURCES, pack=PackSpec(context=256), tokens=250_000, heldout_tokens=10_000),
        sae=BatchTopKSpec(expansion=8, tokens=600_064, batch=512),
        variants=tuple({"k": [k], "seed": [seed]} for k, seed in _K.values()),
        device=spec.device,
        checkpoint_seconds=240.0,
    )
    return Plan(
        shared={"model": DEFAULT_MODEL, "device": spec.device},
        # Scripted truth needs some 150 texts to learn a concept's words: from 30 it missed it in prompted answers.
        mix=MixSpec(
            sources=tuple(
                TaggedSpec(source=name) for name in ("debtags", "topics", "code", "occupations", "sentiment")
            ),
            facets=_FACETS,
            per_label=240,
            support=160,
        ),
        training=training,
        variants={name: f"k{k}-seed{seed}" for name, (k, seed) in _K.items()},
        saes={},
        corpora={},
        drawn=3600,
        # At the paper's prior of 0.001 one false positive outweighs all true ones of a label on 60 of 2,200 texts.
        labels={"match": {"prior": 0.01, "top": 24, "per_label": 1}, "context": 48},
        compare={
            "most_pairs": 24,
            "protocol": _protocol(spec, 5),
            "steering": {"factors": [0.7, 1.0, 1.4, 1.8]},
            "generation": {"max_new_tokens": 32},
            "learning": {"examples": 48, "heldout": 24, "tokens": 48},
            **_raters(spec),
        },
        comparisons={
            (LOW, "calibrated"): ("unedited", "sae", "random", "diffmean", "prompt"),
            (HIGH, "calibrated"): ("sae", "random"),
            (LOW, "ordinary"): ("sae", "random"),
        },
        labelled=((SEED, "calibrated"),),
    )


def _paper(spec: LabelledSteeringSpec) -> Plan:
    """Support 50, prior 0.001, output score 0.001, 20 instructions, 10 repeats of 4 folds; what the paper leaves open
    (thresholds, how many pairs, strengths, width and L0 of the SAEs) is AxBench's or our own."""
    assert spec.stackexchange is not None
    corpora = {forum: TaggedSpec(source=str(_dump(spec.stackexchange, forum))) for forum in FORA}
    files = listed(_GEMMA_SCOPE)
    folders = {name: nearest_l0(files, "16k", l0) for name, l0 in _GEMMA_L0.items()}
    return Plan(
        shared={
            "model": _GEMMA,
            "device": spec.device,
            "accept_mismatch": "the paper steers the instruct model with SAEs of the base model",
        },
        mix=None,
        training=None,
        variants={},
        saes={
            name: tuple(f"hub:{_GEMMA_SCOPE}/{of[layer]}" for layer in _GEMMA_LAYERS) for name, of in folders.items()
        },
        corpora=corpora,
        drawn=None,
        labels={"match": {"prior": 1e-3, "top": 100}, "context": 256},
        compare={
            "most_pairs": None,
            "protocol": _protocol(spec, 20),
            "steering": {"preset": "max-act"},
            "writer": "chat",
            "most_texts": 10_000_000,
            **_raters(spec),
        },
        comparisons={
            (LOW, "calibrated"): ("unedited", "sae", "random", "diffmean", "lora", "prompt"),
            (HIGH, "calibrated"): ("sae", "random", "prompt"),
            (LOW, "ordinary"): ("sae", "random"),
        },
    )


def _dump(folder: Path, forum: str) -> Path:
    """A forum's dump, as an archive or a folder."""
    name = f"{forum}.stackexchange.com"
    for path in (folder / f"{name}.7z", folder / name, folder / forum):
        if path.is_file() or (path / "Posts.xml").is_file():
            return path
    raise UnweaveError(
        f"the dump of {forum} is missing",
        where=str(folder),
        remedy=f"put {name}.7z there, or a folder {name} with Posts.xml and Comments.xml",
    )


def with_texts(training: TrainSpec, path: str) -> TrainSpec:
    """A training whose data are also the rows of a file, a third of its documents."""
    weight = sum(source.weight for source in training.data.sources) / 2
    own = Source(path=path, messages_field="", weight=weight)
    return replace(training, data=replace(training.data, sources=(*training.data.sources, own)))
