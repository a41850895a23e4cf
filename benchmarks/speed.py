"""
Speed benchmark: our updates and trainings beside SB3's DQN (and sb3-contrib's QR-DQN loss), in alternating blocks.

    python benchmarks/speed.py run                        # all cases, 1 and 2 threads
    python benchmarks/speed.py run --cases mlp64 --threads 1 --quick
    python benchmarks/speed.py run --sbx .venv-sbx/bin/python  # sbx's DQN too, from an environment that has sbx-rl
    python benchmarks/speed.py report                     # table and picture of what was measured

Before a case is timed, its fast paths must end with the plain path's parameters, and MunchausenDQN at temperature 0 and
alpha 0 with those of SB3's DQN, on the same minibatches; otherwise there is no ratio. Times are of the process's CPUs or
the wall clock, as ``--clock`` says; the results are ratios of neighbouring blocks in one process, their median and
quartiles.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib import QRDQN
from stable_baselines3 import DQN
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_softq import (
    CVI,
    SQN,
    MirrorDescentDQN,
    MomentumDQN,
    MunchausenDQN,
    MunchausenIQN,
    SACDiscrete,
    SoftDQN,
)
from sb3_softq.losses import quantile_huber_loss
from sb3_softq.value_based.policies import SmallImageCNN

RESULTS = Path(__file__).parent / "results" / "speed.jsonl"
DOCS = Path(__file__).parent.parent / "docs"
BLOCKS = 7


class RandomImages(gym.Env):
    """Observations without meaning at no cost, so that the update is what is measured."""

    def __init__(self, space: spaces.Box):
        self.observation_space, self.action_space = space, spaces.Discrete(6)
        self.frames = [space.sample() for _ in range(64)]
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        return self.frames[0], {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        return self.frames[self.steps % 64], float(action == 0), self.steps % 100 == 0, False, {}


def cartpole() -> gym.Env:
    return gym.make("CartPole-v1")


def planes() -> gym.Env:
    return RandomImages(spaces.Box(0, 1, (10, 10, 4), bool))  # type: ignore[arg-type]


def images() -> gym.Env:
    return RandomImages(spaces.Box(0, 255, (4, 84, 84), np.uint8))


CASES: dict[str, dict[str, Any]] = {
    "mlp64": {"env": cartpole, "policy": "MlpPolicy", "batch_size": 64, "net_arch": [64, 64]},
    "mlp256": {"env": cartpole, "policy": "MlpPolicy", "batch_size": 64, "net_arch": [256, 256]},
    "minatar": {"env": planes, "policy": "CnnPolicy", "batch_size": 32, "net_arch": []},
    "nature": {"env": images, "policy": "CnnPolicy", "batch_size": 32, "net_arch": []},
}
# Whole learn(): environment steps between two calls of train(), updates in a call, environments
SCHEDULES = {"1 per step": (1, 1, 1), "256/128": (256, 128, 1), "8 environments": (1, 8, 8)}
OURS: dict[str, tuple[type, dict[str, Any]]] = {
    "mdqn": (MunchausenDQN, {}),
    "mdqn compiled": (MunchausenDQN, {"torch_compile": True}),
    "softdqn": (SoftDQN, {}),
    "sqn": (SQN, {}),
    "sqn compiled": (SQN, {"torch_compile": True}),
}
# The rest of the family, whose updates do other work: no floor is set for them, the numbers are for orientation
FAMILY: dict[str, tuple[type, dict[str, Any]]] = {
    "miqn, 64 quantiles": (MunchausenIQN, {}),
    "miqn, 8 quantiles": (MunchausenIQN, {"n_quantiles": 8, "n_target_quantiles": 8, "n_policy_quantiles": 16}),
    "sacd": (SACDiscrete, {}),
    "cvi": (CVI, {}),
    "modqn": (MomentumDQN, {}),
    "mddqn": (MirrorDescentDQN, {}),
}
REFERENCES = {"SB3 DQN": DQN, "contrib QR-DQN, 50 quantiles": QRDQN}


def build(
    cls: type, case: dict[str, Any], train_freq: int = 1, gradient_steps: int = 1, n_envs: int = 1, **kwargs: Any
) -> Any:
    """A model with a filled buffer, which trains from the next step on."""
    policy_kwargs: dict[str, Any] = {"net_arch": case["net_arch"]}
    if cls is QRDQN:
        policy_kwargs["n_quantiles"] = 50
    if cls in (DQN, QRDQN) and case["env"] is planes:  # SB3's policies cannot read small planes by themselves
        policy_kwargs["features_extractor_class"] = SmallImageCNN
    model = cls(
        case["policy"],
        DummyVecEnv([case["env"]] * n_envs),
        batch_size=case["batch_size"],
        buffer_size=20_000 if case["env"] is not images else 1_000,
        learning_starts=500,
        train_freq=train_freq,
        gradient_steps=gradient_steps,
        target_update_interval=1_000,
        policy_kwargs=policy_kwargs,
        device="cpu",
        seed=0,
        **kwargs,
    )
    model.learn(500, log_interval=None)  # the warm-up trains nothing
    model.learning_starts = 0
    return model


def parameters(model: Any) -> th.Tensor:
    return th.cat([parameter.detach().reshape(-1) for parameter in model.q_net.parameters()])


def trained(cls: type, case: dict[str, Any], flat: bool = True, **kwargs: Any) -> th.Tensor:
    """Parameters after a few updates; few, because rounding grows from update to update."""
    model = build(cls, case, **kwargs)
    model.flat_parameters = flat
    np.random.seed(1)
    model.train(gradient_steps=8, batch_size=case["batch_size"])
    return parameters(model)


def check_equality(case: dict[str, Any], names: list[str]) -> dict[str, float]:
    """Largest differences of parameters between paths that must agree; raises if they do not."""
    differences = {
        "mdqn at temperature 0 and alpha 0 / DQN": (
            trained(MunchausenDQN, case, temperature=0, munchausen_alpha=0) - trained(DQN, case)
        )
    }
    for name in names:
        cls, kwargs = OURS[name]
        differences[f"{name} / plain path"] = trained(cls, case, **kwargs) - trained(cls, case, flat=False)
    largest = {name: difference.abs().max().item() for name, difference in differences.items()}
    for name, difference in largest.items():
        if not difference < 1e-5:
            raise SystemExit(f"{name}: parameters differ by {difference:.1e} after 8 updates, so there is no ratio to report")
    return largest


def ratios(
    reference: Callable[[], Any], ours: dict[str, Callable[[], Any]], clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Times of the reference over times of ours, of neighbouring blocks."""
    for function in (reference, *ours.values()):
        function()
    result: dict[str, list[float]] = {name: [] for name in ours}
    for _ in range(BLOCKS):
        for name, function in ours.items():
            times = []
            for run in (reference, function):
                start = clock()
                run()
                times.append(clock() - start)
            result[name].append(times[0] / times[1])
    return result


def check_compiled(names: list[str], models: list[Any]) -> None:
    """Raise if a model that should train by compiled updates did not."""
    for name, model in zip(names, models, strict=True):
        if "compiled" in name and model._compiled.given_up:
            raise SystemExit(f"{name}: the updates were not compiled, so there is no ratio to report")


def quantile_ratios(clock: Callable[[], float]) -> dict[str, list[float]]:
    """Loss and gradient of quantile regression, ours over contrib's."""
    from sb3_contrib.common.utils import quantile_huber_loss as contrib_loss

    result = {}
    for n in (8, 50, 200):
        current, targets = th.randn(64, n, requires_grad=True), th.randn(64, n)
        repeat = range(2_000 // n)

        def contrib(current: th.Tensor = current, targets: th.Tensor = targets, repeat: range = repeat) -> None:
            for _ in repeat:
                contrib_loss(current, targets, sum_over_quantiles=True).backward()

        def ours(current: th.Tensor = current, targets: th.Tensor = targets, repeat: range = repeat) -> None:
            for _ in repeat:
                quantile_huber_loss(current, targets).mean().backward()

        result[f"N = {n}"] = ratios(contrib, {"ours": ours}, clock)["ours"]
    return result


def sbx_ratio(python: str, case: dict[str, Any], n_steps: int) -> list[float]:
    """Whole ``learn()`` against sbx's DQN, in alternating processes."""
    script = (
        "import sys, time; from sbx import DQN; "
        f"m = DQN('MlpPolicy', 'CartPole-v1', batch_size={case['batch_size']}, learning_starts=500, train_freq=1, "
        f"gradient_steps=1, target_update_interval=1000, policy_kwargs=dict(net_arch={case['net_arch']}), seed=0); "
        "m.learn(1500); t = time.perf_counter(); "
        f"m.learn({n_steps}, reset_num_timesteps=False); print(time.perf_counter() - t)"
    )
    result = []
    for _ in range(3):
        theirs = float(subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.split()[-1])
        model = build(MunchausenDQN, case)
        model.learn(1_000, log_interval=None)
        start = time.perf_counter()
        model.learn(n_steps, reset_num_timesteps=False, log_interval=None)
        result.append(theirs / (time.perf_counter() - start))
    return result


def write(rows: list[dict[str, Any]]) -> None:
    """Replace the rows of the same measurement."""
    keys = ("case", "what", "ours", "reference", "threads")
    old = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    new = {tuple(row[key] for key in keys): row for row in [*old, *rows]}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in new.values()))


def run(cases: list[str], threads: int, names: list[str], quick: bool, clock: str, sbx: str | None) -> None:
    th.set_num_threads(threads)
    timer = {"cpu": time.process_time, "wall": time.perf_counter}[clock]
    scale = 5 if quick else 1
    machine = {"torch": th.__version__, "processor": platform.processor() or platform.machine(), "clock": clock}

    def rows(case: str, what: str, reference: str, measured: dict[str, list[float]]) -> list[dict[str, Any]]:
        for name, values in measured.items():
            low, middle, high = statistics.quantiles(values, n=4)
            print(f"{case:8} {what:30} {name:15} / {reference}: {middle:.2f} [{low:.2f}, {high:.2f}]", flush=True)
        common = {"case": case, "what": what, "reference": reference, "threads": threads, **machine}
        return [{**common, "ours": name, "ratios": [round(value, 3) for value in values]} for name, values in measured.items()]

    for case_name in cases:
        case = CASES[case_name]
        print(f"{case_name}: largest differences {check_equality(case, names)}", flush=True)
        models = {name: build(OURS[name][0], case, **OURS[name][1]) for name in names}
        n_updates = (100 if case_name == "nature" else 1_000) // scale

        def update(model: Any, n: int = n_updates, batch_size: int = case["batch_size"]) -> Callable[[], None]:
            def block() -> None:
                for _ in range(n):
                    model.train(gradient_steps=1, batch_size=batch_size)

            return block

        measured = ratios(update(build(DQN, case)), {name: update(model) for name, model in models.items()}, timer)
        check_compiled(names, list(models.values()))
        write(rows(case_name, "update", "SB3 DQN", measured))
        if case_name in ("mlp64", "minatar"):
            for reference, cls in REFERENCES.items():
                others = {name: update(build(FAMILY[name][0], case, **FAMILY[name][1]), n_updates // 5) for name in FAMILY}
                measured = ratios(update(build(cls, case), n_updates // 5), others, timer)
                write(rows(case_name, "update", reference, measured))
        if not case_name.startswith("mlp"):
            continue
        for schedule, (train_freq, gradient_steps, n_envs) in SCHEDULES.items():
            kwargs = {"train_freq": train_freq, "gradient_steps": gradient_steps, "n_envs": n_envs}
            n_steps = 4_096 // scale

            def learn(model: Any, n_steps: int = n_steps) -> Callable[[], None]:
                # Exploring until the end of the first tenth as all do: the block is a training of its own
                return lambda: model.learn(n_steps, log_interval=None)

            models = {name: build(OURS[name][0], case, **OURS[name][1], **kwargs) for name in names}
            ours = {name: learn(model) for name, model in models.items()}
            measured = ratios(learn(build(DQN, case, **kwargs)), ours, timer)
            check_compiled(names, list(models.values()))
            write(rows(case_name, f"learn(), {schedule}", "SB3 DQN", measured))
        if sbx:
            write(rows(case_name, "learn(), 1 per step", "sbx DQN", {"mdqn": sbx_ratio(sbx, case, 4_096 // scale)}))
    measured = quantile_ratios(timer)
    for name, values in measured.items():
        write(rows("loss", f"quantile Huber, {name}", "sb3-contrib", {"ours": values}))


def report() -> None:
    """Print a table in Markdown and draw the ratios."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    measured = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    table = ["| case | what | ratio | threads | median | quartiles |", "|---|---|---|---|---|---|"]
    bars = []
    for row in sorted(measured, key=lambda row: (row["case"], row["what"], row["threads"], row["ours"])):
        low, middle, high = statistics.quantiles(row["ratios"], n=4)
        name = f"{row['ours']} / {row['reference']}"
        table.append(f"| {row['case']} | {row['what']} | {name} | {row['threads']} | {middle:.2f} | {low:.2f} to {high:.2f} |")
        if row["threads"] == 1 and row["reference"] == "SB3 DQN":
            bars.append((f"{row['case']}, {row['what']}: {row['ours']}", middle))
    figure, axes = plt.subplots(figsize=(8, 0.28 * len(bars) + 1))
    axes.barh([label for label, _ in reversed(bars)], [value for _, value in reversed(bars)])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("times as fast as SB3's DQN (1 thread)")
    figure.tight_layout()
    figure.savefig(DOCS / "_static" / "speed.png", dpi=110)
    (DOCS / "_shared" / "speed.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))
    print(f"\nWritten: {DOCS}/_shared/speed.md, {DOCS}/_static/speed.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report")
    run_parser = commands.add_parser("run")
    run_parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    run_parser.add_argument("--algos", nargs="*", default=list(OURS), choices=list(OURS))
    run_parser.add_argument("--threads", type=int, default=0, help="1, 2, ...; both 1 and 2 by default")
    run_parser.add_argument("--clock", choices=["cpu", "wall"], default="wall")
    run_parser.add_argument("--quick", action="store_true", help="short blocks: a rough idea")
    run_parser.add_argument("--sbx", help="Python of an environment with sbx-rl")
    arguments = parser.parse_args()
    if arguments.command == "report":
        report()
    elif arguments.threads:
        run(arguments.cases, arguments.threads, arguments.algos, arguments.quick, arguments.clock, arguments.sbx)
    else:  # a process each: threads of another setting would linger
        for n in (1, 2):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--threads", str(n)], check=True)
