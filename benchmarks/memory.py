"""
Memory benchmark: the most memory that a training needs, ours beside SB3's DQN with equal settings.

    python benchmarks/memory.py run
    python benchmarks/memory.py report           # writes docs/_shared/memory.md

Every training is a process of its own, which imports nothing but the library that it trains with. What counts is its peak
resident memory (``ru_maxrss``), with Python, torch and everything else; what was there before the model is recorded beside it.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rows import read_rows, update_rows

# This module imports no library by itself: the memory of a process that starts another one counts as that one's
RESULTS = Path(__file__).parent / "results" / "memory.jsonl"
TABLE = Path(__file__).parent.parent / "docs" / "_shared" / "memory.md"
CASES: dict[str, dict[str, Any]] = {
    "CartPole-v1, MlpPolicy": {
        "environment": "cartpole",
        "policy": "MlpPolicy",
        "n_steps": 20_000,
        "settings": {"buffer_size": 100_000, "train_freq": 1, "batch_size": 64},
    },
    "84x84x4 images, CnnPolicy": {
        "environment": "images",
        "policy": "CnnPolicy",
        "n_steps": 6_000,
        "settings": {"buffer_size": 5_000, "train_freq": 4, "batch_size": 32},
    },
}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "SB3 DQN": {},
    "mdqn": {},
    "mdqn compiled": {"torch_compile": True},
}


def peak() -> float:
    """Peak resident memory of this process, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def train(case_name: str, name: str, quick: bool) -> dict[str, float]:
    """What a process of its own does."""
    import environments
    import torch as th

    if name == "SB3 DQN":
        from stable_baselines3 import DQN as Algorithm
    else:
        from sb3_softq import MunchausenDQN as Algorithm  # type: ignore[assignment]
    from stable_baselines3.common.vec_env import DummyVecEnv

    th.set_num_threads(1)
    case = CASES[case_name]
    env = DummyVecEnv([getattr(environments, case["environment"])])
    before = peak()
    settings = {**case["settings"], **ALGORITHMS[name]}
    model: Any = Algorithm(case["policy"], env, learning_starts=1_000, seed=0, device="cpu", **settings)
    model.learn(1_500 if quick else case["n_steps"], log_interval=None)
    if settings.get("torch_compile") and model._compiled.given_up:
        raise SystemExit("the updates were not compiled")
    return {"peak_mib": round(peak(), 1), "imports_mib": round(before, 1)}


def run(algos: list[str], repeats: int, quick: bool) -> None:
    for case_name in CASES:
        for name in algos:
            command = [sys.executable, __file__, "one", case_name, name, *(["--quick"] if quick else [])]
            found = []
            for _ in range(repeats):
                output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                found.append(json.loads(output.splitlines()[-1]))
            row = {"case": case_name, "algo": name, **{key: [one[key] for one in found] for key in found[0]}}
            print(row, flush=True)
            if not quick:
                update_rows(RESULTS, [row], ("case", "algo"))


def report() -> None:
    """Print and write a table in Markdown."""
    table = [
        "| training | algorithm | peak, MiB | of SB3's DQN | without the imports, MiB | of SB3's DQN |",
        "|---|---|---|---|---|---|",
    ]
    rows = {
        (row["case"], row["algo"]): (statistics.median(row["peak_mib"]), statistics.median(row["imports_mib"]))
        for row in read_rows(RESULTS)
    }
    for (case_name, name), (most, imports) in rows.items():
        reference, reference_imports = rows[case_name, "SB3 DQN"]
        own, reference_own = most - imports, reference - reference_imports
        cells = [case_name, name, f"{most:.0f}", f"{most / reference:.2f}", f"{own:.0f}", f"{own / reference_own:.2f}"]
        table.append("| " + " | ".join(cells) + " |")
    TABLE.write_text("\n".join(table) + "\n")
    print("\n".join(table))
    print(f"\nWritten: {TABLE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report")
    run_parser = commands.add_parser("run")
    run_parser.add_argument("--algos", nargs="*", default=list(ALGORITHMS), choices=list(ALGORITHMS))
    run_parser.add_argument("--repeats", type=int, default=3)
    one_parser = commands.add_parser("one", help="a training, in this process")
    one_parser.add_argument("case", choices=list(CASES))
    one_parser.add_argument("algo", choices=list(ALGORITHMS))
    for one in (run_parser, one_parser):
        one.add_argument("--quick", action="store_true", help="short trainings, of which nothing is written")
    arguments = parser.parse_args()
    if arguments.command == "report":
        report()
    elif arguments.command == "run":
        run(arguments.algos, arguments.repeats, arguments.quick)
    else:
        print(json.dumps(train(arguments.case, arguments.algo, arguments.quick)))


if __name__ == "__main__":
    main()
