"""Files of SAEs are read as their own tools do: each format against its formula, written out here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.sae_files import OUT, D, F, K, N, Numbers, X, agrees, base, jump, linear, saelens, sparsify, topk, v6
from unweave.core.errors import UnweaveError, UnweaveWarning
from unweave.core.site import Site
from unweave.lm.model import LM
from unweave.sae.module import SAE

# -- SAELens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken_off", [True, False])
def test_saelens_6(taken_off: bool, tmp_path: Path) -> None:
    x = X - N["bd"] if taken_off else X
    z = x @ N["We"] + N["be"]
    option = {"apply_b_dec_to_input": taken_off}
    sae = SAE.load(saelens(tmp_path / "a", v6("standard", **option), base()))
    agrees(sae, z.relu(), z.relu() @ N["Wd"] + N["bd"])
    assert (sae.read, sae.write) == (Site("resid_post", 3), Site("resid_post", 3))
    assert sae.provenance["source"]["format"] == "saelens" and sae.provenance["model"]["name"] == "gpt2"
    f = jump(z, N["t"])
    agrees(
        SAE.load(saelens(tmp_path / "b", v6("jumprelu", **option), base() | {"threshold": N["t"]})),
        f,
        f @ N["Wd"] + N["bd"],
    )
    log = base() | {"log_threshold": N["t"].log()}
    agrees(SAE.load(saelens(tmp_path / "b2", v6("jumprelu", **option), log)), f, None)
    agrees(SAE.load(saelens(tmp_path / "c", v6("topk", k=K, **option), base())), topk(z), topk(z) @ N["Wd"] + N["bd"])
    norms = N["Wd"].norm(dim=1)
    rescaled = v6("topk", k=K, rescale_acts_by_decoder_norm=True, **option)
    f = topk(z * norms)
    assert not torch.equal(f > 0, topk(z) > 0)  # ranking by the rescaled values is another choice
    agrees(SAE.load(saelens(tmp_path / "d", rescaled, base())), f, (f / norms) @ N["Wd"] + N["bd"])
    gate = x @ N["We"] + N["gate"]
    f = (gate > 0) * (x @ (N["We"] * N["r"].exp()) + N["mag"]).relu()
    tensors = {k: v for k, v in base().items() if k != "b_enc"} | {
        "b_gate": N["gate"],
        "b_mag": N["mag"],
        "r_mag": N["r"],
    }
    agrees(SAE.load(saelens(tmp_path / "e", v6("gated", **option), tensors)), f, f @ N["Wd"] + N["bd"])


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("rescaled", [True, False])
def test_trap_19_batchtopk_checkpoints_keep_their_threshold(architecture: str, rescaled: bool, tmp_path: Path) -> None:
    config = v6(architecture, k=K, rescale_acts_by_decoder_norm=rescaled)
    tensors = base() | {"topk_threshold": torch.tensor(0.9, dtype=torch.float64)}
    norms = N["Wd"].norm(dim=1) if rescaled else torch.ones(F)
    f = jump((X @ N["We"] + N["be"]) * norms, torch.full((F,), 0.9))
    agrees(SAE.load(saelens(tmp_path / "a", config, tensors)), f, (f / norms) @ N["Wd"] + N["bd"])
    with pytest.raises(UnweaveError, match="no threshold yet"):
        SAE.load(saelens(tmp_path / "b", config, tensors | {"topk_threshold": torch.tensor(0.0)}))


def test_older_saelens_configurations(tmp_path: Path) -> None:
    z = (X - N["bd"]) @ N["We"] + N["be"]  # b_dec is taken off unless told otherwise
    old = {"hook_point": "blocks.2.hook_resid_pre", "d_in": D, "d_sae": F, "dtype": "torch.float32"}
    folder = saelens(tmp_path / "a", old | {"activation_fn_str": "relu", "model_name": "gpt2-small"}, base())
    save_file({"sparsity": torch.rand(F)}, folder / "sparsity.safetensors")  # known, and no part of the SAE
    sae = SAE.load(folder)
    agrees(sae, z.relu(), z.relu() @ N["Wd"] + N["bd"])
    assert sae.read == Site("resid_pre", 2) and sae.provenance["model"]["name"] == "gpt2-small"
    config = old | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "apply_b_dec_to_input": False}
    raw = X @ N["We"] + N["be"]
    agrees(SAE.load(saelens(tmp_path / "b", config, base())), topk(raw), topk(raw) @ N["Wd"] + N["bd"])
    scaled = old | {"normalize_activations": True, "norm_scaling_factor": 0.3}
    f = ((X * 0.3 - N["bd"]) @ N["We"] + N["be"]).relu()
    agrees(SAE.load(saelens(tmp_path / "c", scaled, base())), f, (f @ N["Wd"] + N["bd"]) / 0.3)
    with pytest.raises(UnweaveError, match="does not hold it"):  # trap 20
        SAE.load(saelens(tmp_path / "d", old | {"normalize_activations": True}, base()))
    tuned = base() | {"scaling_factor": N["scale"]}
    sae = SAE.load(saelens(tmp_path / "e", old | {"finetuning_scaling_factor": True}, tuned))
    agrees(sae, z.relu(), (z.relu() * N["scale"]) @ N["Wd"] + N["bd"])
    with pytest.raises(UnweaveError, match="not in use"):
        SAE.load(saelens(tmp_path / "f", old, tuned))
    agrees(SAE.load(saelens(tmp_path / "g", old, base() | {"scaling_factor": torch.ones(F)})), z.relu(), None)
    hook_z = old | {"hook_point": "blocks.1.attn.hook_z", "hook_point_head_index": None}
    assert SAE.load(saelens(tmp_path / "h", hook_z, base())).read == Site("attn_heads", 1)  # trap 17
    one_head = SAE.load(saelens(tmp_path / "i", hook_z | {"hook_point_head_index": 3}, base()))
    assert one_head.read is None and one_head.provenance["source"]["hook_head_index"] == 3
    processed = old | {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    with pytest.warns(UnweaveWarning, match="center_writing_weights"):  # trap 12
        SAE.load(saelens(tmp_path / "j", processed, base()))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("jumps", [False, True])
def test_saelens_transcoders(skip: bool, jumps: bool, tmp_path: Path) -> None:
    n = Numbers(d_out=OUT)
    z = X @ n["We"] + n["be"]
    f = jump(z, n["t"]) if jumps else z.relu()
    y = f @ n["Wd"] + n["bd"] + (X @ n["skip"] if skip else 0)
    name = f"{'jumprelu_' if jumps else ''}{'skip_' if skip else ''}transcoder"
    config = v6(name, d_out=OUT)
    config["metadata"] |= {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}
    tensors = base(n) | ({"threshold": n["t"]} if jumps else {}) | ({"W_skip": n["skip"].T} if skip else {})
    sae = SAE.load(saelens(tmp_path / "a", config, tensors))
    agrees(sae, f, y)
    assert (sae.read, sae.write, sae.d_out) == (Site("mlp_in", 3), Site("mlp_add", 3), OUT)
    saved = sae.save(tmp_path / "b", "saelens")
    again = json.loads((saved / "cfg.json").read_text())
    assert (again["architecture"], again["d_out"]) == (name, OUT)
    assert again["metadata"]["hook_name_out"] == "blocks.3.hook_mlp_out"
    for key, tensor in load_file(saved / "sae_weights.safetensors").items():
        assert torch.equal(tensor, tensors[key]), key
    loaded = SAE.load(saved)
    agrees(loaded, f, y)
    assert (loaded.read, loaded.write) == (sae.read, sae.write)
    with pytest.raises(UnweaveError, match="apply_b_dec_to_input"):
        SAE.load(saelens(tmp_path / "c", config | {"apply_b_dec_to_input": True}, tensors))


# -- the other formats -------------------------------------------------------------------------------------------------


def test_gemma_scope(tmp_path: Path) -> None:
    arrays = {k: v.numpy() for k, v in base().items()} | {"threshold": N["t"].numpy()}
    f = jump(X @ N["We"] + N["be"], N["t"])
    y = f @ N["Wd"] + N["bd"]
    places = {
        "gemma-scope-2b-pt-res/layer_7/width_16k/average_l0_50": Site("resid_post", 7),
        "gemma-scope-2b-pt-mlp/layer_7/width_16k/average_l0_50": Site("mlp_add", 7),
        "gemma-scope-9b-it-att/layer_7/width_16k/average_l0_50": Site("attn_heads", 7),
        "elsewhere/layer_7": None,
        "gemma-scope-2b-pt-transcoders/layer_7/width_16k/average_l0_50": None,  # before the norm's weight: no site
    }
    for place, site in places.items():
        folder = tmp_path / place
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", **arrays)
        sae = SAE.load(folder)
        agrees(sae, f, y)
        assert sae.read == sae.write == site, place
    assert sae.provenance["source"]["hook_name"] == "blocks.7.ln2.hook_normalized"
    named = SAE.load(folder / "params.npz").at("mlp_in.7", "mlp_add.7")
    assert named.write == Site("mlp_add", 7)
    small = tmp_path / "lower.npz"
    np.savez(small, w_enc=arrays.pop("W_enc"), w_dec=arrays.pop("W_dec"), **arrays)
    agrees(SAE.load(small), f, y)


def test_gemma_scope_embeddings_read_what_the_model_goes_on_with(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{k: v.numpy() for k, v in base().items()}, threshold=N["t"].numpy())
    sae = SAE.load(folder)
    embeddings = X / D**0.5  # the file's own input; Gemma multiplies by sqrt(d)
    f = jump(embeddings @ N["We"] + N["be"], N["t"])
    agrees(sae, f, (f @ N["Wd"] + N["bd"]) * D**0.5)
    assert sae.read == Site("resid_pre", 0)


def test_gemma_scope_2(tmp_path: Path) -> None:
    n = Numbers(d_out=OUT)
    tensors = {"w_enc": n["We"], "b_enc": n["be"], "w_dec": n["Wd"], "b_dec": n["bd"], "threshold": n["t"]}
    f = jump(X @ n["We"] + n["be"], n["t"])
    layers = "model.layers.4"
    config = {
        "architecture": "jump_relu",
        "hf_hook_point_in": f"{layers}.pre_feedforward_layernorm.output",
        "hf_hook_point_out": f"{layers}.post_feedforward_layernorm.output",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors | {"affine_skip_connection": n["skip"]}, tmp_path / "params.safetensors")
    sae = SAE.load(tmp_path)
    agrees(sae, f, f @ n["Wd"] + n["bd"] + X @ n["skip"])
    assert (sae.read, sae.write) == (Site("mlp_in", 4), Site("mlp_add", 4))
    many = tensors | {"w_dec": torch.randn(F, 3, OUT), "b_dec": torch.randn(3, OUT)}
    save_file(many, tmp_path / "layer_4.safetensors")
    encoder = SAE.load(tmp_path / "layer_4.safetensors")
    agrees(encoder, f, None)
    with pytest.raises(UnweaveError, match="no decoder"):
        encoder(X)


@pytest.mark.parametrize("by_norm", [True, False])
def test_llama_scope(by_norm: bool, tmp_path: Path) -> None:
    """Scaled inputs, a threshold for raw activations, and decoder norms in the activation where the file says so."""
    norm, threshold = 2.5, 0.35
    s = D**0.5 / norm
    config = {
        "d_model": D, "d_sae": F, "jump_relu_threshold": threshold, "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "hook_point_in": "blocks.19.hook_resid_post", "hook_point_out": "blocks.19.hook_resid_post", "top_k": 50,
        "dataset_average_activation_norm": {"in": norm, "out": norm}, "sparsity_include_decoder_norm": by_norm,
    }  # fmt: skip
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "hyperparams.json").write_text(json.dumps(config))
    tensors = {
        "encoder.weight": N["We"].T,
        "encoder.bias": N["be"],
        "decoder.weight": N["Wd"].T,
        "decoder.bias": N["bd"],
    }
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "checkpoints/final.safetensors")
    z = (X * s) @ N["We"] + N["be"]
    raw = z / s * (N["Wd"].norm(dim=1) if by_norm else 1)  # the unit that the one threshold is in
    f = torch.where((raw > threshold) & (z > 0), z, torch.zeros_like(z))
    for place in (tmp_path, tmp_path / "checkpoints/final.safetensors"):
        sae = SAE.load(place)
        agrees(sae, f, (f @ N["Wd"] + N["bd"]) / s)
        assert sae.read == Site("resid_post", 19)
    earlier = {k: v.clone() for k, v in tensors.items()} | {"encoder.bias": N["be"] - 0.5}
    step = tmp_path / "checkpoints/step_5000.safetensors"
    save_file({k: v.contiguous() for k, v in earlier.items()}, step)
    torch.testing.assert_close(SAE.load(step).b_enc, N["be"] - 0.5)  # the file that was named, not the final one
    torch.testing.assert_close(SAE.load(tmp_path / "checkpoints").b_enc, N["be"])
    with pytest.raises(UnweaveError, match="not an SAE in a known format"):
        SAE.load(tmp_path / "hyperparams.json")
    (tmp_path / "hyperparams.json").write_text(json.dumps(config | {"act_fn": "topk", "top_k": None}))
    with pytest.raises(UnweaveError, match="must say top_k"):
        SAE.load(tmp_path)
    (tmp_path / "hyperparams.json").write_text(json.dumps(config | {"dataset_average_activation_norm": {}}))
    with pytest.raises(UnweaveError, match="does not hold it"):
        SAE.load(tmp_path)


def openmoss(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    hooks = {"hook_point_in": "blocks.2.hook_resid_post", "hook_point_out": "blocks.2.hook_resid_post"}
    (folder / "config.json").write_text(json.dumps(hooks | {"d_model": D, "expansion_factor": F / D} | config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "sae_weights.safetensors")
    return folder


def test_openmoss(tmp_path: Path) -> None:
    direct = {"W_E": N["We"], "b_E": N["be"], "W_D": N["Wd"], "b_D": N["bd"]}
    average = {"dataset_average_activation_norm.blocks.2.hook_resid_post": torch.tensor(2.0)}
    s, norms = D**0.5 / 2.0, N["Wd"].norm(dim=1)
    z = (X * s) @ N["We"] + N["be"]
    linear = {
        "encoder.weight": N["We"].T,
        "encoder.bias": N["be"],
        "decoder.weight": N["Wd"].T,
        "decoder.bias": N["bd"],
    }
    for name, tensors in (
        ("log_jumprelu_threshold", linear),
        ("activation_function.log_jumprelu_threshold", direct),
    ):
        config = {"act_fn": "jumprelu", "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True}
        sae = SAE.load(openmoss(tmp_path / name, config, tensors | average | {name: N["t"].log()}))
        f = torch.where(z * norms > N["t"], z, torch.zeros_like(z))
        agrees(sae, f, (f @ N["Wd"] + N["bd"]) / s)
        assert sae.read == Site("resid_post", 2)
    config = {"act_fn": "topk", "top_k": K, "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True}
    sae = SAE.load(openmoss(tmp_path / "topk", config, direct | average))
    f = topk(z * norms)
    agrees(sae, f, ((f / norms) @ N["Wd"] + N["bd"]) / s)
    out = {"hook_point_out": "blocks.2.hook_mlp_out", "act_fn": "relu", "norm_activation": "dataset-wise"}
    norm_out = {"dataset_average_activation_norm.blocks.2.hook_mlp_out": torch.tensor(5.0)}
    sae = SAE.load(openmoss(tmp_path / "transcoder", out, direct | average | norm_out))
    agrees(sae, z.relu(), (z.relu() @ N["Wd"] + N["bd"]) / (D**0.5 / 5.0))
    assert (sae.read, sae.write) == (Site("resid_post", 2), Site("mlp_add", 2))
    token_wise = SAE.load(openmoss(tmp_path / "token", {"act_fn": "relu", "norm_activation": "token-wise"}, direct))
    c = D**0.5 / X.norm(dim=1, keepdim=True)
    f = ((X * c) @ N["We"] + N["be"]).relu()
    agrees(token_wise, f, (f @ N["Wd"] + N["bd"]) / c)
    folded = SAE.load(openmoss(tmp_path / "folded", {"act_fn": "relu", "norm_activation": "inference"}, direct))
    agrees(folded, (X @ N["We"] + N["be"]).relu(), None)
    for n, (bad, says) in enumerate([
        ({"sae_type": "crosscoder"}, "crosscoder"), ({"use_glu_encoder": True}, "gated linear unit"),
        ({"norm_activation": "batch-wise"}, "batch-wise"), ({"act_fn": "batchtopk"}, "batchtopk"),
        ({"act_fn": "relu", "norm_activation": "dataset-wise"}, "average norm"), ({"act_fn": "topk"}, "must say top_k"),
    ]):  # fmt: skip
        with pytest.raises(UnweaveError, match=says):
            SAE.load(openmoss(tmp_path / f"bad{n}", {"norm_activation": "inference"} | bad, direct))


def dictionary(folder: Path, kind: str, tensors: dict[str, Tensor], **trainer: Any) -> Path:
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "ae.pt")
    about = {"dict_class": kind, "activation_dim": D, "dict_size": F, "lm_name": "EleutherAI/pythia-70m-deduped"}
    about |= {"submodule_name": "resid_post_layer_3", "layer": 3} | trainer
    (folder / "config.json").write_text(json.dumps({"trainer": about, "buffer": {"ctx_len": 128}}))
    return folder


def test_dictionary_learning(tmp_path: Path) -> None:
    raw, z = X @ N["We"] + N["be"], (X - N["bd"]) @ N["We"] + N["be"]
    k, below = torch.tensor(K, dtype=torch.int), torch.tensor(0.7)
    cut = torch.where(z.relu() > 0.7, z.relu(), torch.zeros_like(z))
    gate = (X - N["bd"]) @ N["We"]
    gated = (gate + N["gate"] > 0) * (N["r"].exp() * gate + N["mag"]).relu()
    direct = base() | {"threshold": N["t"]}
    cases: dict[str, tuple[dict[str, Tensor], Tensor, dict[str, Any]]] = {
        "AutoEncoder": (linear(encoder__bias=N["be"], bias=N["bd"]), z.relu(), {}),
        "AutoEncoderNew": (linear(encoder__bias=N["be"], decoder__bias=N["bd"]), raw.relu(), {}),
        "GatedAutoEncoder": (
            linear(decoder_bias=N["bd"], r_mag=N["r"], gate_bias=N["gate"], mag_bias=N["mag"]), gated, {},
        ),
        "AutoEncoderTopK": (
            linear(encoder__bias=N["be"], b_dec=N["bd"], k=k, threshold=torch.tensor(-1.0)), topk(z), {"k": K},
        ),
        "BatchTopKSAE": (linear(encoder__bias=N["be"], b_dec=N["bd"], k=k, threshold=below), cut, {"k": K}),
        "MatryoshkaBatchTopKSAE": (
            base() | {"k": k, "threshold": below, "group_sizes": torch.tensor([8, 12])}, cut, {"k": K},
        ),
        "JumpReluAutoEncoder": (direct, jump(raw, N["t"]), {}),
    }  # fmt: skip
    for kind, (tensors, f, trainer) in cases.items():
        sae = SAE.load(dictionary(tmp_path / kind, kind, tensors, **trainer))
        agrees(sae, f, f @ N["Wd"] + N["bd"])
        assert sae.read == Site("resid_post", 3), kind
        assert "taken_for" not in sae.provenance["source"]
    config, step = (tmp_path / "AutoEncoder/config.json"), tmp_path / "AutoEncoder/checkpoints/ae_500.pt"
    step.parent.mkdir()
    torch.save(cases["AutoEncoder"][0], step)
    assert SAE.load(step).provenance["model"]["name"] == "EleutherAI/pythia-70m-deduped"
    config.unlink()
    alone = tmp_path / "AutoEncoder/ae.pt"
    with pytest.warns(UnweaveWarning, match="taken for AutoEncoder: ReLU, b_dec is taken off"):  # trap 19
        agrees(SAE.load(alone), z.relu(), None)
    torch.save(cases["AutoEncoderNew"][0], alone)
    with pytest.warns(UnweaveWarning, match="taken for AutoEncoderNew: ReLU, nothing is taken off"):
        sae = SAE.load(alone)
    agrees(sae, raw.relu(), None)
    assert sae.provenance["source"]["taken_for"].startswith("AutoEncoderNew: ReLU")
    old = linear(encoder__bias=N["be"], b_dec=N["bd"])  # without k, which the configuration says
    agrees(SAE.load(dictionary(tmp_path / "old", "AutoEncoderTopK", old, k=K)), topk(z), None)
    for name, site in (("mlp_out_layer2", "mlp_out.2"), ("attn_out_layer_4", "attn_out.4"), ("odd", None)):
        folder = dictionary(tmp_path / f"s/{name}", "AutoEncoder", cases["AutoEncoder"][0], submodule_name=name)
        assert SAE.load(folder).read == (Site.parse(site) if site else None)


def test_trap_19_dictionaries_that_contradict_themselves(tmp_path: Path) -> None:
    pair = linear(encoder__bias=N["be"], b_dec=N["bd"], threshold=torch.tensor(0.5))
    k = {"k": torch.tensor(K)}
    cases: list[tuple[str, dict[str, Tensor], dict[str, Any], str]] = [
        ("AutoEncoder", pair, {}, "says AutoEncoder, but"),
        ("BatchTopKSAE", pair | {"threshold": torch.tensor(-1.0)} | k, {"k": K}, "no threshold"),
        ("AutoEncoderTopK", pair | k, {"k": K + 1}, "says k 6"),
        ("AutoEncoderTopK", pair, {}, "says k"),
        ("AutoEncoderTopK", pair | k, {"dict_size": F + 1}, "dict_size 21"),
        ("AutoEncoder", linear(encoder__bias=N["be"], bias=N["bd"], extra=N["be"]), {}, "unused extra"),
        (
            "MatryoshkaBatchTopKSAE",
            base() | {"threshold": torch.tensor(0.5), "group_sizes": torch.tensor([3])} | k,
            {},
            "sum",
        ),
    ]
    for n, (kind, tensors, trainer, says) in enumerate(cases):
        with pytest.raises(UnweaveError, match=says):
            SAE.load(dictionary(tmp_path / str(n), kind, tensors, **trainer))
    torch.save(pair | k, tmp_path / "alone.pt")
    with pytest.raises(UnweaveError, match="TopK and BatchTopK"):
        SAE.load(tmp_path / "alone.pt")


def test_bare_weights_of_other_publishers(tmp_path: Path) -> None:
    raw = X @ N["We"] + N["be"]
    wide = {f"{name}_linear.{kind}": t for name, kind, t in (
        ("encoder", "weight", N["We"].T.contiguous()), ("encoder", "bias", N["be"]),
        ("decoder", "weight", N["Wd"].T.contiguous()), ("decoder", "bias", N["bd"]),
    )}  # fmt: skip
    torch.save(wide, tmp_path / "Llama-3.1-8B-Instruct-SAE-l19.pth")
    with pytest.warns(UnweaveWarning, match="taken for AutoEncoderNew"):
        sae = SAE.load(tmp_path / "Llama-3.1-8B-Instruct-SAE-l19.pth")
    agrees(sae, raw.relu(), raw.relu() @ N["Wd"] + N["bd"])
    assert sae.read == Site("resid_post", 19)
    turned = base() | {"W_enc": N["We"].T.contiguous(), "W_dec": N["Wd"].T.contiguous()}
    folder = tmp_path / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}"
    folder.mkdir()
    torch.save(turned, folder / "layer7.sae.pt")
    sae = SAE.load(folder / "layer7.sae.pt")
    agrees(sae, topk(raw), topk(raw) @ N["Wd"] + N["bd"])
    assert sae.read == Site("resid_post", 7)
    torch.save(base(), tmp_path / "heads.pt")
    with pytest.raises(UnweaveError, match="bare weights"):
        SAE.load(tmp_path / "heads.pt")
    (tmp_path / "heads_cfg.json").write_text(
        json.dumps({"act_size": D, "dict_size": F, "act_name": "blocks.5.attn.hook_z"})
    )
    sae = SAE.load(tmp_path / "heads.pt")
    z = (X - N["bd"]) @ N["We"] + N["be"]
    agrees(sae, z.relu(), z.relu() @ N["Wd"] + N["bd"])
    assert sae.read == Site("attn_heads", 5)


@pytest.mark.parametrize("skip", [False, True])
def test_sparsify(skip: bool, tmp_path: Path) -> None:
    extra = X @ N["skip"] if skip else 0
    sae = SAE.load(sparsify(tmp_path / "a/layers.10", skip=skip))
    f = topk((X - N["bd"]) @ N["We"] + N["be"])
    agrees(sae, f, f @ N["Wd"] + N["bd"] + extra)
    assert (sae.read, sae.write) == (Site("resid_post", 10), Site("resid_post", 10))
    sae = SAE.load(sparsify(tmp_path / "b/layers.10.mlp", skip=skip, transcode=True))
    f = topk(X @ N["We"] + N["be"])
    agrees(sae, f, f @ N["Wd"] + N["bd"] + extra)
    assert (sae.read, sae.write) == (Site("mlp_in", 10), Site("mlp_out", 10))
    for name, site in (("h.3.attn", "attn_out.3"), ("embed_tokens", "embed"), ("layers.1.odd", None)):
        assert SAE.load(sparsify(tmp_path / "c" / name)).read == (Site.parse(site) if site else None)
    for n, (bad, says) in enumerate([
        ({"activation": "groupmax"}, "groupmax"), ({"signed": True}, "signed"), ({"k": None}, "say k"),
        ({"num_latents": F + 1}, "num_latents 21"), ({"skip_connection": not skip}, "W_skip"),
    ]):  # fmt: skip
        with pytest.raises(UnweaveError, match=says):
            SAE.load(sparsify(tmp_path / f"bad{n}", skip=skip, **bad))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("activation", ["relu", "jump", "topk"])
def test_circuit_tracer(turned: bool, activation: str, tmp_path: Path) -> None:
    """Published files disagree on W_dec's orientation: shapes decide."""
    z = X @ N["We"] + N["be"]
    f = {"relu": z.relu(), "jump": jump(z, N["t"]), "topk": topk(z)}[activation]
    tensors = base() | {"W_enc": N["We"].T, "W_dec": N["Wd"].T if turned else N["Wd"], "W_skip": N["skip"].T}
    tensors |= {"relu": {}, "jump": {"activation_function.threshold": N["t"]}, "topk": {"k": torch.tensor(K)}}[
        activation
    ]
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "layer_6.safetensors")
    (tmp_path / "config.yaml").write_text(
        "model_name: Qwen/Qwen3-4B\nfeature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
    )
    sae = SAE.load(tmp_path / "layer_6.safetensors")
    agrees(sae, f, f @ N["Wd"] + N["bd"] + X @ N["skip"])
    assert (sae.read, sae.write) == (Site("mlp_in", 6), Site("mlp_add", 6))
    assert sae.provenance["model"]["name"] == "Qwen/Qwen3-4B"
    for name, layer in (("qwen3-4b_layer_12", 12), ("27", 27), ("transcoder3", 3)):
        shutil.copy(tmp_path / "layer_6.safetensors", tmp_path / f"{name}.safetensors")
        assert SAE.load(tmp_path / f"{name}.safetensors").read == Site("mlp_in", layer)
    (tmp_path / "config.yaml").write_text(
        "feature_input_hook: ln2.hook_normalized\nfeature_output_hook: hook_mlp_out\n"
    )
    assert SAE.load(tmp_path / "layer_6.safetensors").read is None
    (tmp_path / "config.yaml").write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(UnweaveError, match="YAML"):
        SAE.load(tmp_path / "layer_6.safetensors")


def test_traps_19_and_21_bare_tensors_are_no_relu_until_something_says_so(tmp_path: Path) -> None:
    """SAELens's tensors have the same names, whatever the activation; cfg.json says which, and may be lost."""
    for architecture, more in (("standard", {}), ("topk", {"k": K})):
        folder = saelens(tmp_path / architecture, v6(architecture, **more), base())
        assert SAE.load(folder / "sae_weights.safetensors").kind == {"standard": "relu"}.get(architecture, architecture)
        (folder / "cfg.json").unlink()
        with pytest.raises(UnweaveError, match="nothing says which activation"):
            SAE.load(folder / "sae_weights.safetensors")
    ours = SAE.load(sparsify(tmp_path / "layers.1.mlp", skip=True, transcode=True)).save(tmp_path / "ours")
    (ours / "cfg.json").unlink()  # a TopK transcoder with a skip
    with pytest.raises(UnweaveError, match="nothing says which activation"):
        SAE.load(ours / "sae_weights.safetensors")
    alone = tmp_path / "alone/layer_2.safetensors"
    alone.parent.mkdir()
    save_file(base(), alone)
    with pytest.raises(UnweaveError, match="nothing says which activation"):
        SAE.load(alone)
    z = X @ N["We"] + N["be"]
    for extra, f in (
        ({"k": torch.tensor(K)}, topk(z)), ({"activation_function.threshold": N["t"]}, jump(z, N["t"])),
        ({"W_skip": N["skip"].T.contiguous()}, z.relu()),
    ):  # fmt: skip
        save_file(base() | extra, alone)
        agrees(SAE.load(alone), f, None)


def test_trap_24_a_cross_layer_transcoder_s_layer_only_encodes(tmp_path: Path, tiny) -> None:  # type: ignore[no-untyped-def]
    n = Numbers(d_in=32, d_sae=F)
    tensors = {"W_enc_1": n["We"].T.contiguous(), "b_enc_1": n["be"], "b_dec_1": n["bd"], "threshold_1": n["t"]}
    save_file(tensors, tmp_path / "W_enc_1.safetensors")
    save_file({"W_dec_1": torch.randn(F, 3, 32)}, tmp_path / "W_dec_1.safetensors")
    (tmp_path / "config.yaml").write_text("feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n")
    sae, x = SAE.load(tmp_path / "W_enc_1.safetensors"), torch.randn(30, 32)
    agrees(sae, jump(x @ n["We"] + n["be"], n["t"]), None, x)
    assert (sae.read, sae.write) == (Site("resid_mid", 1), None) and "encodes only" in repr(sae)
    lm = LM(tiny("llama"), None)
    sae.verify(lm)
    refused: list[Callable[[], object]] = [
        lambda: sae(x), lambda: sae.decode(sae.codes(x)), lambda: sae.reconstruct_sparsely(x),
        lambda: sae.reconstruct(), lambda: sae.clamp({1: 1.0}), lambda: sae.add({1: 1.0}), lambda: sae.ablate([1]),
        lambda: sae.ablate([1], mode="span"), lambda: sae.subset([1]).directions,
        lambda: sae.save(tmp_path / "s"), lambda: sae.save(tmp_path / "s", "sparsify"),
    ]  # fmt: skip
    for use in refused:
        with pytest.raises(UnweaveError, match="no decoder: it is layer 1 of a cross-layer transcoder"):
            use()
    with pytest.raises(UnweaveError, match="name one of its files: W_dec_1"):
        SAE.load(tmp_path)


def test_square_matrices_lie_as_their_format_says(tmp_path: Path) -> None:
    n = Numbers(d_in=D, d_sae=D)
    z, off = X @ n["We"] + n["be"], (X - n["bd"]) @ n["We"] + n["be"]
    agrees(SAE.load(saelens(tmp_path / "a", v6("standard", d_sae=D), base(n))), z.relu(), z.relu() @ n["Wd"] + n["bd"])
    f = topk(off)
    agrees(SAE.load(sparsify(tmp_path / "layers.1", n, num_latents=D)), f, f @ n["Wd"] + n["bd"])
    tensors = {"encoder.weight": n["We"].T, "encoder.bias": n["be"], "decoder.weight": n["Wd"].T, "bias": n["bd"]}
    torch.save({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "square.pt")
    with pytest.warns(UnweaveWarning, match="taken for AutoEncoder"):
        square = SAE.load(tmp_path / "square.pt")
    agrees(square, off.relu(), off.relu() @ n["Wd"] + n["bd"])
    save_file(base(n) | {"W_enc": n["We"].T.contiguous()}, tmp_path / "layer_0.safetensors")
    (tmp_path / "config.yaml").write_text("model_name: gpt2\n")
    agrees(SAE.load(tmp_path / "layer_0.safetensors"), z.relu(), z.relu() @ n["Wd"] + n["bd"])
    np.savez(tmp_path / "square.npz", **{k: v.numpy() for k, v in base(n).items()}, threshold=n["t"].numpy())
    f = jump(z, n["t"])
    agrees(SAE.load(tmp_path / "square.npz"), f, f @ n["Wd"] + n["bd"])
