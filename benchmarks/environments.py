"""Environments of the benchmarks: observations without meaning at no cost, so that the update is what is measured."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class RandomImages(gym.Env):
    """
    Random observations out of a few, six actions, episodes of 100 steps.

    :param space: observation space
    """

    def __init__(self, space: spaces.Box) -> None:
        self.observation_space, self.action_space = space, spaces.Discrete(6)
        space.seed(0)  # the same ones for all that are compared
        self.frames = [space.sample() for _ in range(64)]
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        return self.frames[0], {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self.frames[self.steps % 64], float(action == 0), self.steps % 100 == 0, False, {}


def cartpole() -> gym.Env:
    return gym.make("CartPole-v1")


def pendulum() -> gym.Env:
    return gym.make("Pendulum-v1")


def planes() -> gym.Env:
    """Images as MinAtar has them."""
    return RandomImages(spaces.Box(0, 1, (10, 10, 4), bool))  # type: ignore[arg-type]


def images() -> gym.Env:
    """Images as Atari wrappers make them."""
    return RandomImages(spaces.Box(0, 255, (4, 84, 84), np.uint8))
