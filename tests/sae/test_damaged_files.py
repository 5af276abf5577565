"""Thousands of damaged SAE files: each is refused in words, or read as what it says by an independent reading.

An accepted file is parsed again here, by other code (JSON, NumPy, PyTorch's own reader), and put through its format's
formula in float64. Files of our own say what was written, so that any change of their numbers must be refused.
"""

from __future__ import annotations

import io
import json
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from helpers import damage
from helpers.sae_files import Numbers
from unweave.core.errors import UnweaveError
from unweave.sae.module import SAE

D, F, K = 5, 8, 3
N = Numbers(D, F)
X = np.random.default_rng(0).normal(size=(6, D)) * 2
PLAIN = {"W_enc": N["We"], "b_enc": N["be"], "W_dec": N["Wd"], "b_dec": N["bd"]}
LINEAR = {"encoder.weight": N["We"].T, "encoder.bias": N["be"], "decoder.weight": N["Wd"].T, "decoder.bias": N["bd"]}
Arrays = dict[str, np.ndarray[Any, Any]]
Latents = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Case:
    """A whole SAE: its files, which of them is the configuration and which the weights, and what they mean."""

    config_file: str
    config: dict[str, Any]
    weights_file: str
    tensors: dict[str, Tensor]
    formula: Callable[[Arrays, dict[str, Any]], Latents]
    folder: str = "sae"
    """its name counts in some formats"""
    load: str = ""

    @property
    def form(self) -> str:
        return self.weights_file.rsplit(".", 1)[1]

    def weights(self, tensors: dict[str, Tensor]) -> bytes:
        whole = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        if self.form == "safetensors":
            return save(whole)
        out = io.BytesIO()
        if self.form == "npz":
            np.savez(out, **{name: tensor.float().numpy() for name, tensor in whole.items()})
        else:
            torch.save(dict(tensors), out)
        return out.getvalue()

    def arrays(self, data: bytes) -> Arrays:
        """The tensors by another reader than ours."""
        if self.form == "npz":
            return {name: array.astype(float) for name, array in np.load(io.BytesIO(data)).items()}
        if self.form == "pt":
            try:
                found = torch.load(io.BytesIO(data), weights_only=True)
            except (
                RuntimeError,
                ValueError,
                TypeError,
            ):  # of members that hold no numbers: what is read must be what was written
                found = self.tensors
            return {name: tensor.double().numpy() for name, tensor in found.items()}
        length = struct.unpack("<Q", data[:8])[0]
        made: Arrays = {}
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                kind = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8", "I32": "<i4"}.get(entry["dtype"])
                if kind is None:
                    raw = np.frombuffer(data[8 + length + start : 8 + length + stop], "<u2")
                    array = (raw.astype("<u4") << 16).view("<f4")
                else:
                    array = np.frombuffer(data[8 + length + start : 8 + length + stop], kind)
                made[name] = array.reshape([int(n) for n in entry["shape"]]).astype(float)
        return made


def lie(array: np.ndarray[Any, Any], rows: int, columns: int) -> np.ndarray[Any, Any]:
    return array if array.shape == (rows, columns) else array.T


def matrices(t: Arrays, encoder: str, decoder: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return lie(t[encoder], D, F), lie(t[decoder], F, D)


def largest(z: np.ndarray[Any, Any], k: float) -> np.ndarray[Any, Any]:
    kept = np.zeros_like(z)
    for row, out in zip(z, kept, strict=True):
        for j in sorted(range(len(row)), key=lambda j: (-row[j], j))[: int(k)]:
            out[j] = max(row[j], 0.0)
    return kept


def jump(z: np.ndarray[Any, Any], threshold: Any) -> np.ndarray[Any, Any]:
    return np.where((z > threshold) & (z > 0), z, 0.0)


def saelens(t: Arrays, c: dict[str, Any]) -> Latents:
    W, V = matrices(t, "W_enc", "W_dec")
    z = (X - t["b_dec"] if c.get("apply_b_dec_to_input", True) else X) @ W + t["b_enc"]
    if "threshold" in t:
        f = jump(z, t["threshold"])
        return f, f @ V + t["b_dec"]
    k = c["k"] if "k" in c else c.get("activation_fn_kwargs", {}).get("k")
    norms = np.linalg.norm(V, axis=1) if c.get("rescale_acts_by_decoder_norm") else np.ones(F)
    f = largest(z * norms, k)
    return f, (f / np.where(norms > 0, norms, 1)) @ V + t["b_dec"]


def sparsify(t: Arrays, c: dict[str, Any]) -> Latents:
    W, V = matrices(t, "encoder.weight", "W_dec")
    f = largest((X if c.get("transcode", False) else X - t["b_dec"]) @ W + t["encoder.bias"], c["k"])
    return f, f @ V + t["b_dec"] + (X @ t["W_skip"].T if "W_skip" in t else 0)


def dictionary(t: Arrays, c: dict[str, Any]) -> Latents:
    W, V = matrices(t, "encoder.weight", "decoder.weight")
    z = (X - t["b_dec"]) @ W + t["encoder.bias"]
    trainer = c.get("trainer") or {}
    said, k = trainer.get("dict_class"), t["k"].item() if "k" in t else trainer.get("k")
    f = largest(z, k) if said == "AutoEncoderTopK" else np.where(z > t["threshold"], z, 0) * (z > 0)
    return f, f @ V + t["b_dec"]


def gemma(t: Arrays, c: dict[str, Any]) -> Latents:
    del c
    names = ("w_enc", "w_dec") if "w_enc" in t else ("W_enc", "W_dec")
    W, V = matrices(t, *names)
    f = jump(X @ W + t["b_enc"], t["threshold"])
    return f, f @ V + t["b_dec"]


def llama(t: Arrays, c: dict[str, Any]) -> Latents:
    W, V = matrices(t, "encoder.weight", "decoder.weight")
    s = 1.0
    if (c.get("norm_activation") or "dataset-wise") == "dataset-wise":
        said = c["dataset_average_activation_norm"]
        norms = {"in": said} if isinstance(said, (int, float)) else said
        s = D**0.5 / norms.get("in", norms.get(c.get("hook_point_in")))
    z = X * s @ W + t["encoder.bias"]
    if c.get("apply_decoder_bias_to_pre_encoder"):
        z = z - t["decoder.bias"] @ W
    norms = np.linalg.norm(V, axis=1) if c.get("sparsity_include_decoder_norm", False) else np.ones(F)
    function = (c.get("act_fn") or "jumprelu").lower()
    if function == "topk":
        f = largest(z * norms, c["top_k"]) / norms
    else:
        f = np.where((z * norms > c["jump_relu_threshold"] * s) & (z > 0), z, 0)
    y = (f @ V + t["decoder.bias"]) / s
    return (f * norms if function == "topk" else f), y


def tracer(t: Arrays, c: dict[str, Any]) -> Latents:
    W, V = matrices(t, "W_enc", "W_dec")
    z = X @ W + t["b_enc"]
    f = (
        jump(z, t["activation_function.threshold"])
        if "activation_function.threshold" in t
        else largest(z, t["k"].item())
    )
    return f, f @ V + t["b_dec"] + (X @ t["W_skip"].T if "W_skip" in t else 0)


def ours(t: Arrays, c: dict[str, Any]) -> Latents:
    """Whatever happened, the numbers are those that were written."""
    del t, c
    whole = {name: tensor.double().numpy() for name, tensor in PLAIN.items()}
    return saelens(whole, {"k": K, "apply_b_dec_to_input": False})


V6 = {"sae_lens_version": "6.5.0", "hook_name": "blocks.3.hook_resid_post", "model_name": "gpt2", "context_size": 128}
LLAMA = {
    "d_model": D, "d_sae": F, "jump_relu_threshold": 0.4, "act_fn": "jumprelu", "norm_activation": "dataset-wise",
    "hook_point_in": "blocks.19.hook_resid_post", "hook_point_out": "blocks.19.hook_resid_post",
    "dataset_average_activation_norm": {"in": 2.5, "out": 2.5}, "sparsity_include_decoder_norm": True, "top_k": 4,
    "use_glu_encoder": False, "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False, "sae_type": "sae",
    "model_name": "llama",
}  # fmt: skip
TRAINER = {
    "dict_class": "AutoEncoderTopK", "activation_dim": D, "dict_size": F, "k": K, "lm_name": "pythia",
    "submodule_name": "resid_post_layer_3", "layer": 3,
}  # fmt: skip
PAIR = {"encoder.weight": N["We"].T, "encoder.bias": N["be"], "decoder.weight": N["Wd"].T, "b_dec": N["bd"]}
PAIR |= {"k": torch.tensor(K), "threshold": torch.tensor(0.3)}
SPARSIFY = {"activation": "topk", "expansion_factor": 32, "num_latents": F, "k": K, "d_in": D, "signed": False}
SPARSIFY |= {"skip_connection": True, "transcode": False, "normalize_decoder": True}
WRITTEN = {"encoder.weight": N["We"].T, "encoder.bias": N["be"], "W_dec": N["Wd"], "b_dec": N["bd"]}
BASE = {"architecture": "topk", "d_in": D, "d_sae": F, "k": K, "dtype": "float32", "apply_b_dec_to_input": True}

CASES = {
    "saelens": Case(
        "cfg.json", BASE | {"rescale_acts_by_decoder_norm": False, "normalize_activations": "none", "metadata": V6},
        "sae_weights.safetensors", PLAIN, saelens,
    ),
    "saelens jumprelu": Case(
        "cfg.json", {k: v for k, v in BASE.items() if k != "k"} | {"architecture": "jumprelu", "metadata": V6},
        "sae_weights.safetensors", PLAIN | {"threshold": N["t"]}, saelens,
    ),
    "saelens old": Case(
        "cfg.json",
        {"hook_point": "blocks.2.hook_resid_pre", "d_in": D, "d_sae": F, "activation_fn_str": "topk",
         "activation_fn_kwargs": {"k": K}, "model_name": "gpt2", "prepend_bos": True, "hook_point_head_index": None,
         "model_from_pretrained_kwargs": {"center_writing_weights": False}, "normalize_activations": False},
        "sae_weights.safetensors", PLAIN, saelens,
    ),
    "sparsify": Case("cfg.json", SPARSIFY, "sae.safetensors", WRITTEN | {"W_skip": N["skip"].T}, sparsify, "layers.1"),
    "dictionary_learning": Case(
        "config.json", {"trainer": TRAINER, "buffer": {"ctx_len": 128, "io": "out"}}, "ae.pt", PAIR, dictionary
    ),
    "gemma_scope": Case("README.md", {}, "params.npz", PLAIN | {"threshold": N["t"]}, gemma),
    "gemma_scope_2": Case(
        "config.json", {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.4.output", "model_name": "g"},
        "params.safetensors",
        {"w_enc": N["We"], "b_enc": N["be"], "w_dec": N["Wd"], "b_dec": N["bd"], "threshold": N["t"]}, gemma,
    ),
    "llama_scope": Case(
        "hyperparams.json", LLAMA, "final.safetensors", LINEAR, llama, "checkpoints", "final.safetensors"
    ),
    "openmoss": Case(
        "config.json", LLAMA | {"act_fn": "topk", "sparsity_include_decoder_norm": False}, "sae_weights.safetensors",
        LINEAR, llama,
    ),
    "circuit_tracer": Case(
        "config.yaml",
        {"model_name": "gpt2", "feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out",
         "activation": "topk"},
        "layer_6.safetensors", PLAIN | {"k": torch.tensor(K), "W_skip": N["skip"].T}, tracer,
        load="layer_6.safetensors",
    ),
}  # fmt: skip


def tensor_damage(whole: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Tensors missing, extra, renamed, of another shape or type, expanded, empty, or with numbers that are none."""
    for name, tensor in whole.items():
        yield f"{name} missing", {k: v for k, v in whole.items() if k != name}
        yield f"{name} renamed", {(f"{k}_" if k == name else k): v for k, v in whole.items()}
        yield f"{name} copied", whole | {f"{name}_copy": tensor}
        nan = tensor.double().clone(memory_format=torch.contiguous_format)
        nan.view(-1)[0] = float("nan")
        changes = [
            tensor.T if tensor.ndim == 2 else tensor[None], tensor.flatten(), tensor[..., None], tensor.double(),
            tensor.bfloat16(), tensor.to(torch.int32), tensor.bool(), torch.empty(0), torch.empty(0, D),
            torch.empty(F, 0),
            nan, nan.nan_to_num(float("inf")), tensor * 1e30, tensor * 0, torch.zeros(3, 3, 3), torch.tensor(3.0),
            torch.cat([tensor.reshape(-1), tensor.reshape(-1)]),
        ]  # fmt: skip
        for n, new in enumerate(changes):
            yield f"{name} changed, {n}", whole | {name: new}
    yield "none", {}
    yield (
        "no latents",
        {k: v[..., :0] if v.shape[-1:] == (F,) else v[:0] if v.shape[:1] == (F,) else v for k, v in whole.items()},
    )


def weights_damage(case: Case, whole: bytes, rng: Random) -> Iterator[tuple[str, bytes]]:
    for what, tensors in tensor_damage(case.tensors):
        yield what, case.weights(tensors)
    if case.form == "safetensors":
        yield from damage.safetensors(whole, rng)
    else:
        yield from damage.archives(whole, rng)
    if case.form == "pt":
        large = case.tensors | {"encoder.weight": torch.ones(1).expand(60_000, 60_000)}
        out = io.BytesIO()
        torch.save(large, out)
        yield "expanded", out.getvalue()
        torch.save(case.tensors, out := io.BytesIO(), _use_new_zipfile_serialization=False)
        yield "as before PyTorch 1.6", out.getvalue()
        yield from damage.contents(out.getvalue(), rng, 300)


def agrees(case: Case, sae: SAE, config: bytes, weights: bytes, what: str) -> None:
    """What was read says what the files say."""
    if sae.encode_only:
        return
    if case.config_file.endswith(".yaml"):
        import yaml

        told = yaml.safe_load(config) if config.strip() else {}
    else:
        told = json.loads(config.decode("utf-8-sig")) if config.strip() else {}
    with np.errstate(all="ignore"):
        f, y = case.formula(case.arrays(weights) if case.formula is not ours else {}, told)
        if not np.isfinite(y).all() or np.abs(y).max() > 1e12:
            return
    x = torch.tensor(X, dtype=sae.W_enc.dtype)
    size = max(1.0, float(np.abs(f).max()), float(np.abs(y).max()))
    low = sae.W_enc.dtype in (torch.bfloat16, torch.float16)
    for got, wanted in ((sae.encode(x), f), (sae(x), y)):
        assert np.abs(got.double().numpy() - wanted).max() <= (0.2 if low else 1e-3) * size, what


def outcome(case: Case, place: Path, what: str, config: bytes, weights: bytes) -> str:
    """ "refused" in words, or "read" and in agreement; anything else is an AssertionError."""
    (place / case.weights_file).write_bytes(weights)
    (place / case.config_file).write_bytes(config)
    found = damage.attempt(lambda: SAE.load(place / case.load))
    if isinstance(found, UnweaveError):
        assert found.where, found
        return "refused"
    agrees(case, found, config, weights, what)
    return "read"


def run(case: Case, folder: Path, variants: Iterator[tuple[str, bytes, bytes]]) -> dict[str, int]:
    """How many of each outcome; every variant that has another is named in one AssertionError."""
    counts, failures = {"refused": 0, "read": 0}, []
    place = folder / case.folder
    place.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for what, config, weights in variants:
            try:
                counts[outcome(case, place, what, config, weights)] += 1
            except Exception as error:
                failures.append(f"{what}: {type(error).__name__}: {error}"[:300])
    assert not failures, f"{len(failures)} failures\n" + "\n".join(failures[:20])
    return counts


@pytest.mark.parametrize("name", CASES)
def test_damaged_files_are_refused_or_read_as_they_say(name: str, tmp_path: Path) -> None:
    case, rng = CASES[name], Random(name)
    config, weights = json.dumps(case.config).encode(), case.weights(case.tensors)

    def variants() -> Iterator[tuple[str, bytes, bytes]]:
        yield "whole", config, weights
        for what, text in damage.texts(case.config, rng) if case.config else ():
            yield what, text, weights
        for what, data in weights_damage(case, weights, rng):
            yield what, config, data

    counts = run(case, tmp_path, variants())
    assert sum(counts.values()) >= (1000 if case.config else 500) and counts["refused"] > 100 and counts["read"] > 1, (
        counts
    )


@pytest.mark.parametrize("format", ["unweave", "sparsify", "dictionary_learning"])
def test_damage_to_our_own_files_changes_no_number(format: str, tmp_path: Path) -> None:
    start = CASES["saelens"]
    rng = Random(format)
    run_in = tmp_path / "whole"
    run_in.mkdir()
    (run_in / "cfg.json").write_text(json.dumps(start.config | {"apply_b_dec_to_input": False}))
    (run_in / "sae_weights.safetensors").write_bytes(start.weights(start.tensors))
    sae = SAE.load(run_in)
    sae.provenance |= {
        "model": {"name": "gpt2", "tokenizer": "abc", "fingerprint": {"norms": [1.0, 2.0], "products": [0.5, 0.25]}},
        "train": {"model": "gpt2", "dtype": "float32", "data": {"sources": []}, "stream": {}}, "reference": {"l0": 3.0},
    }  # fmt: skip
    folder = sae.save(tmp_path / format, format)
    config_file, weights_file = {
        "unweave": ("cfg.json", "sae_weights.safetensors"), "sparsify": ("cfg.json", "sae.safetensors"),
        "dictionary_learning": ("config.json", "ae.pt"),
    }[format]  # fmt: skip
    config, weights = (folder / config_file).read_bytes(), (folder / weights_file).read_bytes()
    case = Case(config_file, json.loads(config), weights_file, {}, ours, format)

    def variants() -> Iterator[tuple[str, bytes, bytes]]:
        yield "whole", config, weights
        for what, text in damage.texts(case.config, rng, per_place=12):
            if not any(word in what for word in ("'written'", "'unweave')", "'metadata')", "the whole")):
                yield what, text, weights
        for what, data in (damage.archives if case.form == "pt" else damage.safetensors)(weights, rng):
            yield what, config, data

    (folder / config_file).unlink()
    (tmp_path / "damaged").mkdir()
    extra = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != weights_file}
    place = tmp_path / "damaged" / format

    def beside() -> Iterator[tuple[str, bytes, bytes]]:
        for n, (what, told, data) in enumerate(variants()):
            if n == 0:
                for name, content in extra.items():
                    (place / name).write_bytes(content)
            yield what, told, data

    counts = run(case, tmp_path / "damaged", beside())
    assert sum(counts.values()) >= 500 and counts["refused"] > 100 and counts["read"] > 1, counts
