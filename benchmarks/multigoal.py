"""
The multi-goal environment of Haarnoja et al. 2017 (arXiv:1702.08165): four equally good goals around a point.

Trains soft Q-learning and SB3's SAC at the same temperature, and draws what both make of it: the values of actions in three
states with sampled actions, and paths from the middle.

    python benchmarks/multigoal.py                    # three minutes; writes docs/_static/multigoal.png
    python benchmarks/multigoal.py --steps 5000 --output /tmp/multigoal.png
"""

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC

from sb3_softq import SoftQLearning

PICTURE = Path(__file__).parent.parent / "docs" / "_static" / "multigoal.png"
GOALS = 5.0 * np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])
# In the middle, towards the goal on the right, and between two goals
STATES = np.array([[0.0, 0.0], [-2.5, 0.0], [2.5, 2.5]], dtype=np.float32)


class MultiGoalEnv(gym.Env):
    """
    A point in the plane whose actions are its steps. Far from a goal costs, and so do long steps; an episode ends at a goal.

    Distances and rewards are those of the paper's code, the latter divided by 10; the noise of the steps is added.

    :param horizon: steps until an episode is cut
    """

    def __init__(self, horizon: int = 30) -> None:
        self.observation_space = spaces.Box(-7.0, 7.0, (2,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.horizon = horizon

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.n_steps = 0
        self.position = self.np_random.normal(scale=0.1, size=2)
        return self.position.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.n_steps += 1
        self.position = np.clip(self.position + action + self.np_random.normal(scale=0.05, size=2), -7.0, 7.0)
        distance = np.linalg.norm(GOALS - self.position, axis=1).min()
        arrived = bool(distance < 1.0)
        reward = -0.1 * float(distance) ** 2 - 3.0 * float(np.square(action).sum()) + 1.0 * arrived
        return self.position.astype(np.float32), reward, arrived, self.n_steps == self.horizon, {}


def paths(model: Any, n_paths: int) -> list[np.ndarray]:
    """Positions of episodes with sampled actions."""
    env = MultiGoalEnv()
    found = []
    for i in range(n_paths):
        observation, _ = env.reset(seed=i)
        positions, ended = [observation], False
        while not ended:
            action, _ = model.predict(observation)
            observation, _, terminated, truncated, _ = env.step(action)
            ended = terminated or truncated
            positions.append(observation)
        found.append(np.array(positions))
    return found


def arrivals(all_paths: list[np.ndarray]) -> list[int]:
    """How many paths end nearest to each goal."""
    nearest = [int(np.linalg.norm(GOALS - path[-1], axis=1).argmin()) for path in all_paths]
    return [nearest.count(i) for i in range(len(GOALS))]


def draw(models: dict[str, Any], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(models), 1 + len(STATES), figsize=(3.2 * (1 + len(STATES)), 3.2 * len(models)))
    grid = np.linspace(-1, 1, 61)
    actions = th.tensor(np.stack(np.meshgrid(grid, grid), axis=2).reshape(-1, 2), dtype=th.float32)
    for row, (name, model) in zip(axes, models.items(), strict=True):
        all_paths = paths(model, 40)
        for path in all_paths:
            row[0].plot(*path.T, color="C0", alpha=0.4, linewidth=1)
        row[0].scatter(*GOALS.T, color="C3", zorder=3)
        row[0].set(title=f"{name}: paths", xlim=(-7, 7), ylim=(-7, 7), aspect="equal")
        print(f"{name}: paths to each goal {arrivals(all_paths)}")
        for axis, state in zip(row[1:], STATES, strict=True):
            with th.no_grad():
                observations = th.as_tensor(state).expand(len(actions), -1)
                q_values = th.stack(model.policy.critic(observations, actions)).amin(dim=0).reshape(61, 61)
            samples, _ = model.predict(np.repeat(state[None], 200, axis=0))
            axis.contourf(grid, grid, q_values, levels=25, cmap="Greys")
            axis.scatter(*samples.T, s=5, color="C0")
            axis.set(title=f"actions at ({state[0]:g}, {state[1]:g})", xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    print(f"Written: {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    th.set_num_threads(1)
    shared: dict[str, Any] = dict(
        learning_rate=1e-3,
        batch_size=64,
        gamma=0.95,
        learning_starts=1000,
        policy_kwargs=dict(net_arch=[64, 64]),
        seed=arguments.seed,
        device="cpu",
    )
    models: dict[str, Any] = {
        "soft Q-learning": SoftQLearning("MlpPolicy", MultiGoalEnv(), temperature=arguments.temperature, **shared),
        "SAC": SAC("MlpPolicy", MultiGoalEnv(), ent_coef=arguments.temperature, **shared),
    }
    for model in models.values():
        model.learn(arguments.steps, log_interval=None)
    draw(models, arguments.output)


if __name__ == "__main__":
    main()
