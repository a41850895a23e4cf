"""
The claim of Abdolmaleki et al. 2018 (arXiv:1812.02256) on the scale of rewards: RERPI with both of its kinds of weights, and
SB3's SAC with a learned and with a fixed entropy coefficient, on Pendulum-v1 with rewards times 0.0001, 0.01, 1 and 100.

All have networks of one size, batches of one size and one learning rate, and RERPI averaged targets, as its settings for
Pendulum. Every run is a row of ``results/reward_scale.jsonl``; runs that are there are not repeated. A run takes one or two
minutes.

    python benchmarks/reward_scale.py run --seeds 2
    python benchmarks/reward_scale.py report    # writes docs/_static/reward_scale.png and docs/_shared/reward_scale.md
"""

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from rows import append_row, read_rows
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_softq import RERPI

RESULTS = Path(__file__).parent / "results" / "reward_scale.jsonl"
DOCS = Path(__file__).parent.parent / "docs"
SCALES = [0.0001, 0.01, 1.0, 100.0]
SMALL: dict[str, Any] = dict(batch_size=128, policy_kwargs=dict(net_arch=[64, 64]))
AVERAGED: dict[str, Any] = dict(SMALL, tau=0.01, target_update_interval=1)
ALGORITHMS: dict[str, tuple[type, dict[str, Any]]] = {
    "rerpi": (RERPI, AVERAGED),
    "rerpi exponential": (RERPI, {**AVERAGED, "weighting": "exponential"}),
    "sac": (SAC, SMALL),
    "sac ent_coef=0.2": (SAC, {**SMALL, "ent_coef": 0.2}),
}
N_STEPS, N_POINTS, N_EPISODES = 10_000, 10, 20


class Curve(BaseCallback):
    """Returns in the environment's own rewards, at evenly spaced points."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[float] = []

    def _on_step(self) -> bool:
        if self.num_timesteps % (N_STEPS // N_POINTS) == 0:
            env = gym.make("Pendulum-v1")
            env.reset(seed=10_000)
            mean, _ = evaluate_policy(self.model, env, N_EPISODES, warn=False)
            self.points.append(float(mean))  # type: ignore[arg-type]
        return True


def run_one(name: str, scale: float, seed: int) -> dict[str, Any]:
    cls, settings = ALGORITHMS[name]
    env = gym.wrappers.TransformReward(gym.make("Pendulum-v1"), lambda reward: scale * float(reward))
    curve = Curve()
    model = cls("MlpPolicy", env, learning_rate=1e-3, seed=seed, device="cpu", **settings)
    model.learn(N_STEPS, curve, log_interval=None)
    return {"algo": name, "scale": scale, "seed": seed, "curve": curve.points}


def run(algos: list[str], seeds: int) -> None:
    th.set_num_threads(1)
    done = {(row["algo"], row["scale"], row["seed"]) for row in read_rows(RESULTS)}
    for seed in range(seeds):
        for name in algos:
            for scale in SCALES:
                if (name, scale, seed) not in done:
                    row = run_one(name, scale, seed)
                    append_row(RESULTS, row)
                    print(f"{name}, rewards x {scale:g}, seed {seed}: {row['curve'][-1]:.0f}", flush=True)


def report() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_rows(RESULTS)
    names = [name for name in ALGORITHMS if any(row["algo"] == name for row in rows)]
    table = ["| algorithm | rewards | seeds | return after the last step, unscaled: mean (of each) |", "|---|---|---|---|"]
    figure, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.2), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for i, scale in enumerate(SCALES):
            curves = np.array([row["curve"] for row in rows if (row["algo"], row["scale"]) == (name, scale)])
            if len(curves):
                steps = np.arange(1, N_POINTS + 1) * N_STEPS // N_POINTS
                axis.plot(steps, curves.mean(axis=0), color=f"C{i}", label=f"rewards x {scale:g}")
                axis.fill_between(steps, curves.min(axis=0), curves.max(axis=0), color=f"C{i}", alpha=0.15)
                last = curves[:, -1]
                each = ", ".join(f"{value:.0f}" for value in last)
                table.append(f"| {name} | x {scale:g} | {len(curves)} | {last.mean():.0f} ({each}) |")
        axis.set(title=name, xlabel="environment steps")
    axes[0, 0].set_ylabel("return, unscaled")
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=len(SCALES), frameon=False)
    figure.savefig(DOCS / "_static" / "reward_scale.png", dpi=110)
    (DOCS / "_shared" / "reward_scale.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))
    print(f"\nWritten: {DOCS}/_shared/reward_scale.md, {DOCS}/_static/reward_scale.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run")
    run_parser.add_argument("--algos", nargs="*", default=list(ALGORITHMS), choices=list(ALGORITHMS))
    run_parser.add_argument("--seeds", type=int, default=2)
    commands.add_parser("report")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.algos, arguments.seeds)
    else:
        report()
