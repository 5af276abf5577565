"""How long `import unweave` and `unweave --help` take, as medians of fresh processes, beside a bare interpreter's.

    python benchmarks/startup.py [REPEATS]

Leaves with status 1 when a median is over its budget: 0.3 s for the import, 0.6 s for the help.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

CASES = {
    "bare interpreter": (["-c", "pass"], None),
    "import unweave": (["-c", "import unweave"], 0.3),
    "unweave --help": (["-m", "unweave", "--help"], 0.6),
    "unweave train --help": (["-m", "unweave", "train", "--help"], None),
    "import torch": (["-c", "import torch"], None),
}


def seconds(arguments: list[str]) -> float:
    """The time of one fresh process, from its start to its end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> int:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    seconds(CASES["unweave train --help"][0])  # compile and cache the bytecode first
    # Round-robin, so that a busy moment of the machine falls on every case.
    rounds = [{name: seconds(arguments) for name, (arguments, _) in CASES.items()} for _ in range(repeats)]
    medians = {name: statistics.median(one[name] for one in rounds) for name in CASES}
    over = False
    for name, (_, budget) in CASES.items():
        verdict = "" if budget is None else f"   budget {budget} s: {medians[name] / budget:.2f} of it"
        over |= budget is not None and medians[name] > budget
        print(f"{name:22s} {medians[name]:6.3f} s   {medians[name] / medians['bare interpreter']:5.1f} x bare{verdict}")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
