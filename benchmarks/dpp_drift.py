"""
What becomes of DPP's preferences on a long task, and what each of the cures does.

A corridor without an end: the reward is 1 for each step at its right end, so that values go up to 100. Five agents that
differ in nothing but the cure train on it; the table shows how far their preferences have gone, and what they earn.

    python benchmarks/dpp_drift.py
"""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces

from sb3_softq import DPP

LENGTH, N_STEPS, INTERVAL = 12, 30_000, 100
CURES: dict[str, dict[str, Any]] = {
    "none": {},
    "`gap_clip=-1`": dict(gap_clip=-1.0),
    "`preference_clip=150`": dict(preference_clip=150.0),
    '`parametrisation="q"`': dict(parametrisation="q"),
    '`parametrisation="q", gap_clip=-20`': dict(parametrisation="q", gap_clip=-20.0),
}


class Corridor(gym.Env):
    """Left, stay, right; episodes of 100 steps, cut by the time limit, from a random place."""

    observation_space = spaces.Discrete(LENGTH)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.place, self.n_steps = int(self.np_random.integers(LENGTH)), 0
        return self.place, {}

    def step(self, action: Any) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.place = int(np.clip(self.place + int(action) - 1, 0, LENGTH - 1))
        self.n_steps += 1
        return self.place, float(self.place == LENGTH - 1), False, self.n_steps == 100, {}


def preferences(model: DPP) -> np.ndarray:
    return model.q_values(np.arange(LENGTH))


def earned(model: DPP) -> float:
    """Mean return of greedy episodes from every place."""
    policy = preferences(model).argmax(axis=1)
    returns = []
    for start in range(LENGTH):
        place, total = start, 0
        for _ in range(100):
            place = int(np.clip(place + policy[place] - 1, 0, LENGTH - 1))
            total += place == LENGTH - 1
        returns.append(total)
    return float(np.mean(returns))


def main() -> None:
    th.set_num_threads(1)
    best = float(np.mean([100 - max(LENGTH - 2 - start, 0) for start in range(LENGTH)]))
    lines = [
        f"Corridor of {LENGTH} places, discount 0.99, {N_STEPS:,} steps, {N_STEPS // INTERVAL} iterations; the best policy "
        f"earns {best:.1f}.",
        "",
        "| cure | largest abs(P), a third of the way | two thirds | at the end | largest abs(Q) | greedy return |",
        "|---|---|---|---|---|---|",
    ]
    for name, kwargs in CURES.items():
        model = DPP(
            "MlpPolicy",
            Corridor(),
            temperature=0.1,
            learning_rate=3e-3,
            batch_size=64,
            train_freq=4,
            gradient_steps=4,
            learning_starts=1000,
            target_update_interval=INTERVAL,
            exploration_final_eps=0.3,
            seed=0,
            device="cpu",
            **kwargs,
        )
        sizes = []
        for _ in range(3):
            model.learn(N_STEPS // 3, reset_num_timesteps=False)
            sizes.append(float(np.abs(preferences(model)).max()))
        with th.no_grad():  # of two networks the first
            largest_q = f"{model.q_net(th.arange(LENGTH))[0].abs().max():.0f}" if model.parametrisation == "q" else ""
        lines.append(f"| {name} | {' | '.join(f'{size:.0f}' for size in sizes)} | {largest_q} | {earned(model):.1f} |")
        print(lines[-1], flush=True)
    path = Path(__file__).parent.parent / "docs" / "_shared" / "dpp_drift.md"
    path.write_text("\n".join(lines) + "\n")
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
