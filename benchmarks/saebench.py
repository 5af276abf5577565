"""What SAEBench's measures cost: each task on an SAE and on a second one of its site, and core beside sae-bench's own.

    python benchmarks/saebench.py SAE [SECOND] [--tasks core ...] [--judge NAME] [--latents 20] [--sae_bench PYTHON]

Every task is a process of its own, with its wall time, processor time and peak memory; all share one folder of runs, so
that the second SAE finds the activations of the first. ``--sae_bench`` is the Python of an environment with sae-bench
0.6: its core evaluation then runs on the same model, tokens and SAE as ours in compatible form.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from unweave import SAE
from unweave.inputs.inputs import data_of, token_store
from unweave.inputs.saes import open_saes
from unweave.inputs.spec import OfSAEsSpec
from unweave.methods.saebench.spec import ASKING, TASKS

PEER = Path(__file__).with_name("peers") / "run_saebench.py"
ROWS, CONTEXT = 16, 128


def timed(command: list[str]) -> tuple[str, float, float, float]:
    """What a process prints, its wall and processor seconds, and its peak memory in MB."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command[:5])} ... failed")
        return out.read(), time.perf_counter() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def suite(saes: list[str], tasks: list[str], options: list[str], runs: str) -> None:
    """Each task on each SAE."""
    for which, sae in zip(("first", "second"), saes, strict=False):
        total = 0.0
        for task in tasks:
            own = options if task in ASKING else []
            command = [sys.executable, "-m", "unweave", "saebench", sae, "--tasks", task, "--runs", runs, "--json"]
            try:
                printed, wall, cpu, memory = timed([*command, *own])
            except SystemExit as error:  # the only task of a run could not be run: it said why
                print(f"{which:7} {task:15} {error}", flush=True)
                continue
            total += wall
            result = json.loads(printed)
            numbers = [
                f"{m['key']} {m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}]"
                + "".join(f"; {gap['baseline']} {gap['value']:.3f}" for gap in m["gaps"])
                for one in result["scores"] for m in one["measures"] if m["better"]
            ]  # fmt: skip
            print(f"{which:7} {task:15} {wall:6.0f} s, processor {cpu:6.0f} s, {memory:6.0f} MB", flush=True)
            for line in numbers:
                print(f"        {line}", flush=True)
        print(f"{which:7} all             {total:6.0f} s", flush=True)


def core_beside(python: str, sae: str, tokens: int, runs: str) -> None:
    """Core in compatible form, and sae-bench's on the same work."""
    opened = open_saes(OfSAEsSpec(saes=(sae,)))
    lm, data = opened.lm, data_of(opened.sae, None)
    data = replace(data, pack=replace(data.pack, packing="blocks", context=CONTEXT))
    store, _ = token_store(lm, opened.model, data, "heldout", tokens, Path(runs))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        np.save(place / "tokens.npy", np.asarray(store.ids).astype(np.int64).reshape(store.n_rows, -1))
        weights = {name: p.detach().clone().contiguous() for name, p in lm.model.state_dict().items()}
        save_file(weights, place / "model.safetensors")
        config = {k: v for k, v in lm.model.config.to_dict().items() if k != "quantization_config"}
        ids = [getattr(lm.tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
        site = opened.sae.read
        assert site is not None
        about = {"config": config, "ignore": [i for i in ids if i is not None], "rows": ROWS, "layer": site.layer}
        (place / "about.json").write_text(json.dumps(about, default=str))
        SAE.load(sae).save(place / "sae")
        printed, _, cpu, memory = timed([python, str(PEER), folder])
        theirs = json.loads(printed.splitlines()[-1])
    command = [sys.executable, "-m", "unweave", "saebench", sae, "--tasks", "core", "--form", "compatible", "--json",
               "--core.tokens", str(tokens), "--core.context", str(CONTEXT), "--core.batch_rows", str(ROWS),
               "--baselines", "neurons", "--seeds", "2", "--runs", f"{runs}/core"]  # fmt: skip
    printed, wall, ours, peak = timed(command)
    measured = {m["key"]: m["value"] for m in json.loads(printed)["scores"][0]["measures"]}
    apart = {
        key: abs(measured[key] - value) / max(abs(value), 1e-12)
        for key, value in theirs["metrics"].items() if key in measured and "tokens" not in key
    }  # fmt: skip
    worst = max(apart, key=lambda key: apart[key])
    print(f"core of {store.n_tokens:,} tokens: ours processor {ours:.0f} s (all of the command, {wall:.0f} s, "
          f"{peak:.0f} MB); sae-bench {theirs['seconds']:.0f} s of its evaluation alone ({cpu:.0f} s, {memory:.0f} MB "
          f"with loading): {theirs['seconds'] / ours:.1f} times; {len(apart)} numbers agree to "
          f"{apart[worst]:.1e} ({worst})", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("saes", nargs="+")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[one for one in TASKS if one not in ASKING])
    parser.add_argument("--judge", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--runs", help="a folder that keeps what is computed; by default none is kept")
    parser.add_argument("--sae_bench", help="the Python of an environment with sae-bench")
    for name, default in (("latents", 20), ("tokens", 16384)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    judge = ["--autointerp.judge.model", asked.judge, "--autointerp.latents", str(asked.latents)]
    with tempfile.TemporaryDirectory() as folder:
        runs = asked.runs or folder
        if asked.sae_bench:
            core_beside(asked.sae_bench, asked.saes[0], asked.tokens, runs)
        suite(asked.saes[:2], asked.tasks, judge, runs)


if __name__ == "__main__":
    main()
