"""Models, environments and comparisons that several test files use."""

import inspect
import shutil
from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.logger import configure
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_softq import ALGOS, MomentumDQN, MunchausenIQN
from sb3_softq.value_based.base import ValueBasedAlgorithm

# zoo key -> class; an algorithm joins the tests of the family when it joins ALGOS
VALUE_BASED = {key: cls for key, cls in ALGOS.items() if issubclass(cls, ValueBasedAlgorithm)}

QUICK = dict(learning_starts=20, buffer_size=500, batch_size=16, policy_kwargs=dict(net_arch=[16]), device="cpu", seed=0)


# Those whose policy is the softmax of their action values
SOFTMAX = {key: VALUE_BASED[key] for key in ("softdqn", "sqn", "mdqn", "miqn", "dpp", "cvi")}


def make_model(algorithm, env="CartPole-v1", policy="MlpPolicy", **kwargs):
    """
    A small model that learns early, and can be told to ``train()`` without ``learn()``.

    Where the weight of the entropy is called ``ent_coef``, that is what a ``temperature`` stands for.
    """
    if "temperature" in kwargs and not has_parameter(algorithm, "temperature"):
        value = kwargs.pop("temperature")
        if callable(value) or str(value).startswith("lin_"):
            pytest.skip(f"{algorithm.__name__} has no schedules of ent_coef")
        kwargs["ent_coef"] = value
    if algorithm is MomentumDQN and kwargs.get("exploration") == "boltzmann":
        kwargs.setdefault("temperature", 0.1)  # it has none by default
    kwargs = {**QUICK, **kwargs}
    kwargs["policy_kwargs"] = dict(kwargs["policy_kwargs"] or {})  # SB3's SAC writes into what it is given
    model = algorithm(policy, env, **kwargs)
    model.set_logger(configure(format_strings=[]))
    return model


def make_learner(algorithm, env=None, **kwargs):
    """A model with a filled replay buffer, in which every update shows, also in the target network; 3 actions by default."""
    kwargs = dict(tau=0.3, target_update_interval=1, learning_rate=0.01) | kwargs
    model = make_model(algorithm, env or RandomEnv(VECTOR), **kwargs)
    fill_buffer(model, 100)
    return model


needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++")), reason="needs a C++ compiler"
)


def has_parameter(algorithm, name):
    """Whether the constructor has a parameter."""
    return name in inspect.signature(algorithm.__init__).parameters


def snapshot(model):
    """All learned numbers of a model: networks, optimisers, a learned temperature."""
    return deepcopy(model.get_parameters())


def assert_same(first, second, **tolerances):
    """Nested dicts and lists of tensors are equal, bit for bit if no tolerances are given."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key], **tolerances)
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other, **tolerances)
    elif isinstance(first, th.Tensor):
        th.testing.assert_close(first, second, **(tolerances or dict(rtol=0, atol=0)))
    else:
        assert first == second


def is_same(first, second):
    """Whether nested dicts and lists of tensors are equal bit for bit."""
    try:
        assert_same(first, second)
    except AssertionError:
        return False
    return True


def sample_batch(space, n):
    """``n`` samples of a space, stacked as a VecEnv stacks them."""
    samples = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {key: np.stack([sample[key] for sample in samples]) for key in space}
    return np.stack(samples)


def random_transitions(observation_space, action_space, n_envs, n_rows):
    """Arguments of the replay buffer's ``add()``, the same at each call: episodes end by terminations and time limits."""
    rng = np.random.default_rng(0)
    observation_space.seed(0)
    action_space.seed(0)
    for _ in range(n_rows):
        dones = rng.random(n_envs) < 0.2
        infos = [{"TimeLimit.truncated": bool(done and rng.random() < 0.5)} for done in dones]
        yield (
            sample_batch(observation_space, n_envs),
            sample_batch(observation_space, n_envs),
            sample_batch(action_space, n_envs),
            rng.normal(size=n_envs),
            dones,
            infos,
        )


def fill_buffer(model, n_rows):
    """Add random transitions to a model's replay buffer, all actions valid; ``n_rows`` for each environment."""
    extras = getattr(model.replay_buffer, "extras", {})
    model.replay_buffer.pending = {name: np.ones_like(array[0]) for name, array in extras.items()}
    for transition in random_transitions(model.observation_space, model.action_space, model.n_envs, n_rows):
        model.replay_buffer.add(*transition)


class Float64Extractor(FlattenExtractor):
    """Float64 from the observation on, which SB3 hands over in float32."""

    def forward(self, observations):
        return super().forward(observations).double()


class RandomEnv(gym.Env):
    """
    Random observations and rewards, episodes of ten steps.

    :param observation_space: the space to sample
    :param n_actions: number of actions
    :param truncate: whether an episode is cut by a time limit instead of terminating
    """

    def __init__(self, observation_space, n_actions=3, truncate=False):
        self.observation_space = observation_space
        self.action_space = spaces.Discrete(n_actions)
        self.truncate = truncate

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.n_steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.n_steps += 1
        end = self.n_steps == 10
        reward = float(self.np_random.normal())
        return self.observation_space.sample(), reward, end and not self.truncate, end and self.truncate, {}


class RecordedEnv(gym.Env):
    """
    Random observations and rewards on any actions; :attr:`history` keeps what happened. Episodes end by chance.

    :param action_space: the action space
    :param observation_space: the space to sample
    :param end: probability that a step terminates the episode, and that it is cut
    """

    def __init__(self, action_space, observation_space=None, end=0.12):
        self.observation_space = deepcopy(VECTOR if observation_space is None else observation_space)
        self.action_space = action_space
        self.end = end
        self.history = []

    def _draw(self):
        """The next state."""
        self.obs, self.mask = self.observation_space.sample(), None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self._draw()
        return self.obs, {}

    def step(self, action):
        obs, mask = self.obs, self.mask
        reward = float(self.np_random.integers(-16, 17)) / 16  # exact in float32
        terminated, truncated = (bool(self.np_random.random() < self.end) for _ in range(2))
        self._draw()
        step = dict(obs=obs, mask=mask, action=np.array(action).reshape(-1), reward=reward, next_obs=self.obs)
        self.history.append(dict(step, next_mask=self.mask, terminated=terminated, truncated=truncated))
        return self.obs, reward, terminated, truncated, {}


class MaskedEnv(RecordedEnv):
    """:class:`RecordedEnv` with random masks, which raises for an action that its mask excludes."""

    def _draw(self):
        super()._draw()
        mask = []
        for size in head_sizes(self.action_space):
            head = self.np_random.random(size) < 0.5
            head[self.np_random.integers(size)] = True
            mask += head.tolist()
        self.mask = np.array(mask)

    def action_masks(self):
        return self.mask

    def step(self, action):
        start = 0
        for value, size in zip(np.array(action).reshape(-1), head_sizes(self.action_space), strict=True):
            assert self.mask[start : start + size][value], f"{action} is not valid: {self.mask}"
            start += size
        return super().step(action)


def head_sizes(action_space):
    """The number of actions of each head."""
    if isinstance(action_space, spaces.Discrete):
        return [int(action_space.n)]
    return action_space.nvec.tolist() if isinstance(action_space, spaces.MultiDiscrete) else [2] * action_space.n


VECTOR = spaces.Box(-1.0, 1.0, (4,), np.float32)
# MinAtar's observations
PLANES = spaces.Box(0.0, 1.0, (10, 10, 4), np.bool_)


def variants():
    """Name -> (class, arguments): every algorithm with its defaults, and with the switches that change its target."""
    found = {}
    for key, algorithm in VALUE_BASED.items():
        found[key] = (algorithm, {})
        if has_parameter(algorithm, "double_q"):
            found[f"{key}-double"] = (algorithm, dict(double_q=True))
        if algorithm.learns_temperature:
            found[f"{key}-fixed"] = (algorithm, dict(temperature=0.1))
    return found


VARIANTS = variants()
# Those whose targets are one number for each sample, not quantiles
SCALAR_VARIANTS = {name: variant for name, variant in VARIANTS.items() if variant[0] is not MunchausenIQN}
