"""Every algorithm learns small problems in seconds, and CartPole in a minute or two."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from helpers import make_model
from stable_baselines3.common.callbacks import EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnv
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_softq import CVI, DPP, MunchausenIQN


class Corridor(gym.Env):
    """
    Six cells in a row, the agent starts in the first; the last ends the episode with a reward of 1, each step costs 0.05.

    A random policy rarely arrives within the twenty steps that an episode lasts.
    """

    observation_space = spaces.Discrete(6)
    action_space = spaces.Discrete(2)
    best_return = 1 - 5 * 0.05

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell = self.n_steps = 0
        return self.cell, {}

    def step(self, action):
        self.n_steps += 1
        self.cell = max(0, self.cell + (1 if action == 1 else -1))
        arrived = self.cell == 5
        return self.cell, float(arrived) - 0.05, arrived, self.n_steps == 20, {}


QUICK_LEARNING = dict(
    learning_rate=5e-3,
    learning_starts=100,
    batch_size=32,
    gamma=0.9,
    train_freq=4,
    gradient_steps=4,
    temperature=0.05,
    exploration="boltzmann_eps",
    exploration_fraction=0.7,
    policy_kwargs=dict(net_arch=[32]),
)


def target_updates(algorithm):
    """Each class with the kind of target update that its default is."""
    return {} if algorithm.learns_temperature else dict(target_update_interval=50)


@pytest.mark.parametrize("n_actions", [2, 4])
def test_identity(algorithm, n_actions):
    # The right action is the observation: 100 for the best policy, 100 / n_actions for a random one
    env = IdentityEnv(n_actions)
    env.action_space.seed(0)
    model = make_model(algorithm, env, buffer_size=2000, **QUICK_LEARNING | dict(gamma=0.0), **target_updates(algorithm))
    model.learn(1000)
    mean_return, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=3)
    assert mean_return > 95
    # Its own policy is good too, not only the best action of it
    mean_return, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=3, deterministic=False)
    assert mean_return > 80


def test_corridor(algorithm):
    model = make_model(algorithm, Corridor(), buffer_size=5000, **QUICK_LEARNING, **target_updates(algorithm))
    model.learn(2000)
    mean_return, deviation = evaluate_policy(model, model.get_env(), n_eval_episodes=2)
    assert mean_return == pytest.approx(Corridor.best_return) and deviation == pytest.approx(0.0, abs=1e-6)
    # The values rise towards the end
    assert (np.diff(model.soft_value(np.arange(5))) > 0).all()


def test_corridor_with_n_step_returns(algorithm):
    settings = dict(QUICK_LEARNING, n_steps=3, buffer_size=5000)
    if algorithm.learns_temperature:
        settings.update(temperature="auto_0.2", target_entropy="auto_0.2")
    if algorithm in (CVI, DPP):
        settings.update(tree_backup=True)  # wide gaps are slow to forget what random actions led to
    elif algorithm is MunchausenIQN:
        settings.update(munchausen_alpha=0.5)  # the same without a tree backup: narrower gaps
    model = make_model(algorithm, Corridor(), **settings, **target_updates(algorithm))
    model.learn(2000)
    assert evaluate_policy(model, model.get_env(), n_eval_episodes=1)[0] == pytest.approx(Corridor.best_return)


@pytest.mark.expensive
def test_cartpole(algorithm):
    # Stops at the first evaluation of 400 and more: what comes after is the instability of all DQNs
    evaluation = EvalCallback(
        make_vec_env("CartPole-v1", seed=1),
        eval_freq=1000,
        n_eval_episodes=10,
        callback_on_new_best=StopTrainingOnRewardThreshold(400, verbose=0),
        verbose=0,
    )
    model = make_model(
        algorithm,
        make_vec_env("CartPole-v1", seed=0),
        learning_rate=1e-3,
        buffer_size=50_000,
        learning_starts=500,
        batch_size=64,
        train_freq=4,
        gradient_steps=4,
        temperature="auto_0.1" if algorithm.learns_temperature else 0.05,
        exploration="boltzmann_eps",
        exploration_fraction=0.2,
        policy_kwargs=dict(net_arch=[128, 128]),
        **target_updates(algorithm),
    )
    model.learn(30_000, evaluation)
    assert evaluation.best_mean_reward >= 400
