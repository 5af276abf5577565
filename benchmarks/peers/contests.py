"""What the training benchmark's contests are, and the files that all contestants of one read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

SPARSE_L0, DENSE_L0 = 64, 553
"""active latents per token of the given checkpoints: below 100, and more than 5 % of 9,216"""
CALIBRATION = 4096
"""rows on which a given checkpoint's biases or thresholds are set"""
Data = tuple[np.ndarray, np.ndarray]
"""activations to train on, and held-out ones, [N, D] each"""


@dataclass(frozen=True)
class Contest:
    """One row of trainers: a kind, a batch size, and for ReLU and JumpReLU the density of the weights to start from."""

    name: str
    kind: str
    batch: int
    peers: tuple[str, ...]
    l0: int = 0
    """0: everyone starts from its own initial weights, with k latents per token"""


def contests(batch: int) -> dict[str, Contest]:
    """All of them by name; ``batch`` is that of the contests from a given checkpoint."""
    both, one = ("sparsify", "saelens"), ("saelens",)
    found = [Contest(f"topk-{n}", "topk", n, both) for n in (2048, 4096)]
    found += [Contest(f"batchtopk-{n}", "batchtopk", n, one) for n in (2048, 4096)]
    for kind in ("relu", "jumprelu"):
        found += [Contest(f"{kind}-{name}", kind, batch, one, l0) for name, l0 in _DENSITIES.items()]
    return {contest.name: contest for contest in found}


_DENSITIES = {"sparse": SPARSE_L0, "dense": DENSE_L0}


def harvest(count: int) -> Data:
    """Activations of resid_post.9 of the demo's model on the demo's text: to train on, and held out by document."""
    from unweave import LM
    from unweave.data.corpus import Source, documents
    from unweave.data.pack import PackSpec, pack

    lm = LM.load("smollm2-135m-instruct")
    rows = pack(documents([Source(path="chitchat"), Source(path="wiki")], 0), lm.tokenizer, PackSpec())
    found: list[torch.Tensor] = []
    with torch.no_grad():
        while sum(map(len, found)) < count:
            part = [next(rows) for _ in range(16)]
            tokens = type(lm.tokenize(["a"])).pad([(row.ids, row.roles) for row in part], lm.pad_id)
            with lm.taps(read=["resid_post.9"], stop="resid_post.9") as seen:
                lm(tokens)
            special = torch.isin(tokens.ids, torch.tensor(lm.special_ids)) | ~tokens.mask
            found.append(seen["resid_post.9"][~special])
    x = torch.cat(found)
    x = x[x.norm(dim=1) < 10 * x.norm(dim=1).median()].numpy()
    held = len(x) // 10
    return x[held:], x[:held]


def read(path: Path) -> Data:
    """Activations to train on and held-out ones from a file."""
    if path.suffix == ".npy":
        x = np.load(path).astype(np.float32)
        return x[len(x) // 10 :], x[: len(x) // 10]
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        saved = load_file(path)
    else:
        saved = torch.load(path, weights_only=True, mmap=True)
    return saved["train"].float().numpy(), saved["held"].float().numpy()


def checkpoint(contest: Contest, x: torch.Tensor, latents: int) -> dict[str, np.ndarray]:
    """Weights with a stated number of active latents per token on x [N, D], every latent firing equally often.

    Decoder rows are random directions of norm 1, the encoder is their transpose; what keeps a latent silent is its bias
    (ReLU) or its threshold (JumpReLU), set at the quantile of its pre-activations.
    """
    generator = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(latents, x.shape[1], generator=generator), dim=1)
    sample = x[torch.randperm(len(x), generator=generator)[:CALIBRATION]]
    count = round(contest.l0 / latents * len(sample))
    bound = (W @ sample.T).topk(count + 1, dim=1).values[:, -1]
    found = {"W_enc": W, "W_dec": W, "b_enc": -bound, "b_dec": torch.zeros(x.shape[1])}
    if contest.kind == "jumprelu":
        found |= {"b_enc": torch.zeros(latents), "threshold": bound.clamp_min(1e-3)}
    return {name: t.numpy() for name, t in found.items()}


def write(
    folder: Path,
    contest: Contest,
    data: tuple[np.ndarray, np.ndarray],
    *,
    steps: int,
    latents: int,
    k: int,
    device: str,
) -> None:
    """Everything a contest's trainers read, into ``folder``.

    A given checkpoint belongs to activations with mean 0 and a mean squared norm of 1, so that no trainer rescales
    them; its rate is low, so that its density lasts, and the window of JumpReLU is sae-lens's default in these units.
    """
    needed = steps * contest.batch
    train, held = (torch.from_numpy(np.array(part)) for part in (data[0][:needed], data[1][:8192]))
    if contest.l0:
        mean = train.mean(0)
        scale = (train - mean).square().sum(1).mean().sqrt()
        train, held = (train - mean) / scale, (held - mean) / scale
        np.savez(folder / "start.npz", **checkpoint(contest, train, latents))
    np.save(folder / "train.npy", train.numpy())
    np.save(folder / "held.npy", held.numpy())
    draw = np.random.default_rng(0)
    epochs = -(-needed // len(train))
    np.save(folder / "order.npy", np.concatenate([draw.permutation(len(train)) for _ in range(epochs)])[:needed])
    setting = {"kind": contest.kind, "batch": contest.batch, "latents": latents, "k": k, "steps": steps}
    fixed = {"device": device, "lr": 1e-6, "sparsity": 1e-4, "bandwidth": 0.05 / train.shape[1] ** 0.5}
    (folder / "setting.json").write_text(json.dumps(setting | fixed))


def described(contest: Contest) -> dict[str, object]:
    """For the JSON file."""
    return asdict(contest)
