"""The kinds of SAE, a file each. Another one is a file here and its class in ``KINDS``."""

from unweave.core.spec import unite
from unweave.methods.train.kinds.base import Part, Penalised, SAESpec, changed, default_of
from unweave.methods.train.kinds.batchtopk import BatchTopKSpec
from unweave.methods.train.kinds.gated import GatedSpec
from unweave.methods.train.kinds.jumprelu import JumpReLUSpec
from unweave.methods.train.kinds.matryoshka import MatryoshkaSpec
from unweave.methods.train.kinds.p_anneal import PAnnealSpec
from unweave.methods.train.kinds.relu import ReLUSpec
from unweave.methods.train.kinds.topk import TopKSpec

KINDS = (TopKSpec, BatchTopKSpec, MatryoshkaSpec, ReLUSpec, PAnnealSpec, GatedSpec, JumpReLUSpec)
unite(SAESpec, KINDS)

__all__ = [
    "KINDS", "BatchTopKSpec", "GatedSpec", "JumpReLUSpec", "MatryoshkaSpec", "PAnnealSpec", "Part", "Penalised",
    "ReLUSpec", "SAESpec", "TopKSpec", "changed", "default_of",
]  # fmt: skip
