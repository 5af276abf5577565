"""SAEBench's own form of a result: its JSON with every key, beside what its schema has no place for.

``<eval_type>/<release>_<id>_eval_results.json``; What is undefined is -1, as there. Form, versions, digests,
intervals and baselines are in ``eval_result_unstructured``.
"""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from unweave.core.errors import UnweaveError
from unweave.core.result import to_plain
from unweave.core.writing import write_json
from unweave.lm.model import LM
from unweave.methods.saebench.result import Scores
from unweave.methods.saebench.spec import SaebenchSpec
from unweave.methods.saebench.spread import Scored
from unweave.methods.saebench.task import Task
from unweave.sae.module import SAE

RELEASE = "unweave"


def path_of(task: Task, digest: str, site: str) -> Path:
    """Where a task's file of one SAE lies, below the run."""
    return Path(task.eval_type) / f"{RELEASE}_{site}_{digest[:12]}_eval_results.json"


def write(folder: Path, task: Task, spec: SaebenchSpec, lm: LM, sae: SAE, scored: Scored, scores: Scores) -> None:
    """Writes one file."""
    number = {key: round(value) if key.startswith("total_tokens") else value for key, value in scored.value.items()}
    metrics = {name: {key: number.get(key, -1.0) for key in keys} for name, keys in task.categories(spec).items()}
    name = f"{scores.site}_{scores.digest[:12]}"
    config = {"model_name": lm.name, "llm_dtype": str(lm.dtype).removeprefix("torch.")} | task.config(spec)
    about = {
        "form": spec.form,
        "task_version": task.version,
        "seeds": list(range(spec.seed, spec.seed + spec.seeds)),
        "data": scores.data,
        "source": scores.source,
        "notes": list(scores.notes),
        "model": {"name": lm.name, "note": lm.note, "tokenizer": lm.tokenizer_fingerprint()},
        "sae": {"name": scores.sae, "digest": scores.digest, "site": str(scores.site)},
        "measures": to_plain(scores.measures),
    }
    write_json(folder / scores.file, {
        "eval_type_id": task.eval_type,
        "eval_config": config,
        "eval_id": str(uuid5(NAMESPACE_URL, f"{name}/{task.eval_type}/{scores.data}/{spec.digest()}")),
        "datetime_epoch_millis": int(datetime.now(UTC).timestamp() * 1000),
        "eval_result_metrics": metrics,
        "eval_result_details": list(scored.details),
        "sae_bench_commit_hash": f"{RELEASE} {metadata.version('unweave')}, task version {task.version}",
        "sae_lens_id": name,
        "sae_lens_release_id": RELEASE,
        "sae_lens_version": None,
        "sae_cfg_dict": _config_of(lm, sae),
        "eval_result_unstructured": about,
    })  # fmt: skip


def _config_of(lm: LM, sae: SAE) -> dict[str, Any]:
    """SAEBench's sae_cfg_dict; the hook's name is TransformerLens's, where that has one."""
    assert sae.read is not None
    hook = str(sae.read)
    with contextlib.suppress(UnweaveError):
        hook = sae.read.to_transformer_lens()
    return {
        "architecture": sae.kind,
        "model_name": lm.name,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "hook_name": hook,
        "hook_layer": sae.read.layer,
        "hook_head_index": None,
        "context_size": sae.provenance.get("data", {}).get("context"),
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": str(sae.W_enc.device),
        "prepend_bos": sae.provenance.get("data", {}).get("begins_with_bos"),
        "training_tokens": sae.provenance.get("train", {}).get("sae", {}).get("tokens"),
    }
