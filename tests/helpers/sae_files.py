"""Files of SAEs as other tools write them, made of random numbers that are nowhere zero."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from unweave.sae.module import SAE

D, F, OUT, K = 12, 20, 9, 5  # d_in, latents, d_out of transcoders, k


class Numbers(dict[str, Tensor]):
    """Random parameters, none of them zero: a forgotten one must show (trap 21)."""

    def __init__(self, d_in: int = D, d_sae: int = F, d_out: int | None = None, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        d_out = d_in if d_out is None else d_out

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g) * 0.5

        super().__init__(
            We=draw(d_in, d_sae),
            be=draw(d_sae),
            Wd=draw(d_sae, d_out) * (0.5 + torch.rand(d_sae, 1, generator=g) * 2),
            bd=draw(d_out),
            t=draw(d_sae).abs() + 0.1,
            gate=draw(d_sae),
            mag=draw(d_sae),
            r=draw(d_sae) * 0.5,
            skip=draw(d_in, d_out),
            scale=torch.rand(d_sae, generator=g) + 0.5,
        )


N = Numbers()
X = torch.randn(40, D, generator=torch.Generator().manual_seed(9)) * 2 + 0.4


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def agrees(sae: SAE, f: Tensor, y: Tensor | None, x: Tensor = X) -> None:
    """Latents and reconstruction are the format's own, and some but not all latents fire."""
    assert 0.02 < float((f > 0).float().mean()) < 0.98
    assert torch.equal(sae.encode(x) > 0, f > 0)
    close(sae.encode(x), f)
    close(sae.codes(x).dense(), f)
    if y is not None:
        close(sae(x), y)
        close(sae.reconstruct_sparsely(x), y)


def topk(z: Tensor, k: int = K) -> Tensor:
    """One row at a time, by sorting."""
    out = torch.zeros_like(z)
    for i, row in enumerate(z):
        for j in sorted(range(len(row)), key=lambda j: -float(row[j]))[:k]:
            out[i, j] = max(float(row[j]), 0.0)
    return out


def jump(z: Tensor, threshold: Tensor) -> Tensor:
    return torch.where((z > threshold) & (z > 0), z, torch.zeros_like(z))


def saelens(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "sae_weights.safetensors")
    return folder


def v6(architecture: str, **more: Any) -> dict[str, Any]:
    metadata = {"sae_lens_version": "6.5.0", "hook_name": "blocks.3.hook_resid_post", "model_name": "gpt2"}
    base = {"architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "apply_b_dec_to_input": False}
    return base | {"normalize_activations": "none", "metadata": metadata} | more


def base(n: Numbers = N) -> dict[str, Tensor]:
    return {"W_enc": n["We"], "b_enc": n["be"], "W_dec": n["Wd"], "b_dec": n["bd"]}


def linear(**more: Tensor) -> dict[str, Tensor]:
    weights = {"encoder.weight": N["We"].T.contiguous(), "decoder.weight": N["Wd"].T.contiguous()}
    return weights | {name.replace("__", "."): tensor for name, tensor in more.items()}


def sparsify(folder: Path, n: Numbers = N, skip: bool = False, **config: Any) -> Path:
    folder.mkdir(parents=True)
    said = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": F,
        "k": K,
        "d_in": D,
    }
    (folder / "cfg.json").write_text(json.dumps(said | {"skip_connection": skip} | config))
    tensors = {"encoder.weight": n["We"].T, "encoder.bias": n["be"], "W_dec": n["Wd"], "b_dec": n["bd"]}
    tensors |= {"W_skip": n["skip"].T} if skip else {}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "sae.safetensors")
    return folder
