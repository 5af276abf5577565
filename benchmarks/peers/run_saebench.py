"""sae-bench's core evaluation of one SAE on given tokens and weights; prints its seconds and numbers as JSON.

It knows models through TransformerLens alone, so the calls that it makes of one are answered by the Hugging Face model.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.main import calculate_misc_metrics, run_evals
from sae_bench.sae_bench_utils import general_utils
from sae_lens import SAE
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM


class Model:
    def __init__(self, model: Any, layer: int) -> None:
        self.model, self.block = model, model.model.layers[layer]

    def run(self, tokens: torch.Tensor, change: Any = None, read: list[Any] | None = None) -> Any:
        def at_block(module: Any, args: Any, out: Any) -> Any:
            x = out if isinstance(out, torch.Tensor) else out[0]
            if read is not None:
                read.append(x)
            if change is None:
                return out
            new = change(x, hook=None)
            return new if isinstance(out, torch.Tensor) else (new, *out[1:])

        handle = self.block.register_forward_hook(at_block)
        try:
            with torch.no_grad():
                logits = self.model(input_ids=tokens).logits
        finally:
            handle.remove()
        return logits, -logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]

    def __call__(self, tokens: torch.Tensor, **_: Any) -> Any:
        return self.run(tokens)

    def run_with_hooks(
        self, tokens: Any, return_type: Any = None, fwd_hooks: Any = (), loss_per_token: Any = None
    ) -> Any:
        return self.run(tokens, fwd_hooks[0][1])

    def run_with_cache(
        self, tokens: Any, prepend_bos: Any = None, names_filter: Any = (), stop_at_layer: Any = None
    ) -> Any:
        read: list[Any] = []
        self.run(tokens, None, read)
        return None, {names_filter[0]: read[0]}


class Store:
    def __init__(self, ids: torch.Tensor, rows: int) -> None:
        self.ids, self.place, self.context_size, self.store_batch_size_prompts = ids, 0, ids.shape[1], rows

    def get_batch_tokens(self, n: int) -> torch.Tensor:
        self.place += n
        return self.ids[self.place - n : self.place]

    def reset_input_dataset(self) -> None:
        self.place = 0


def main() -> None:
    folder = Path(sys.argv[1])
    about = json.loads((folder / "about.json").read_text())
    config = AutoConfig.for_model(**about["config"])
    model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    sae = SAE.load_from_disk(str(folder / "sae"), device="cpu")
    general_utils._standardize_sae_cfg(sae.cfg)
    ids = torch.from_numpy(np.load(folder / "tokens.npy"))
    rows = about["rows"]
    n = len(ids) // rows
    options = CoreEvalConfig(
        batch_size_prompts=rows, n_eval_reconstruction_batches=n, n_eval_sparsity_variance_batches=n,
        context_size=ids.shape[1], compute_kl=True, compute_ce_loss=True, compute_l2_norms=True,
        compute_sparsity_metrics=True, compute_variance_metrics=True, compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
    )  # fmt: skip
    begun = time.process_time()
    store: Any = Store(ids, rows)
    target: Any = Model(model.eval(), about["layer"])
    metrics, features = run_evals(sae, store, target, options, ignore_tokens=set(about["ignore"]))
    metrics["misc_metrics"] = calculate_misc_metrics(features)
    seconds = time.process_time() - begun
    flat = {key: value for category in metrics.values() for key, value in category.items()}
    print(json.dumps({"seconds": seconds, "metrics": flat}))


if __name__ == "__main__":
    main()
