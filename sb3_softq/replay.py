"""
Replay buffers of Stable-Baselines3 whose storage grows as it fills.

A buffer of the usual million image transitions asks for tens of gigabytes before the first step. Here storage is
allocated at the first transition and doubled when it is full, up to ``buffer_size``: a short training, or a model that
was loaded to be looked at, holds what it uses.
"""

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import PyTorchObs, ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from torch.utils._pytree import tree_map

try:
    import psutil
except ImportError:  # an extra of SB3's
    psutil = None  # type: ignore[assignment]

MINIMUM_CAPACITY = 1024


def n_states(observations: PyTorchObs) -> int:
    """
    Number of states in a batch of observations.

    :param observations: a tensor, or a dict of them
    """
    return len(next(iter(observations.values())) if isinstance(observations, dict) else observations)


class Samples(NamedTuple):
    """
    A minibatch: the fields of SB3's samples, and two that only the buffers here have.

    With n-step returns, the first five describe a segment of up to n steps that ends early with its episode: observations
    and actions of its first step, next observations and dones of its last, the discounted sum of its rewards.
    """

    observations: PyTorchObs
    actions: th.Tensor
    next_observations: PyTorchObs
    #: 1 where the episode terminated, not where it was cut by a time limit
    dones: th.Tensor
    rewards: th.Tensor
    #: ``gamma ** length`` of segments, ``(batch_size, 1)``; None for single steps
    discounts: th.Tensor | None = None
    #: what else was stored with the transition: of a segment, with its first step, but ``next_...`` with its last
    extras: dict[str, th.Tensor] | None = None
    #: the steps of segments: ``rewards`` and ``valid`` of all n (``(batch_size, n)``), ``observations``, ``actions`` and the
    #: extras of all but the first (``(batch_size, n - 1, ...)``)
    steps: dict[str, Any] | None = None


class GrowingStorage(ReplayBuffer):
    """
    Mixin before one of SB3's buffers: its arrays have :attr:`capacity` rows, at most ``buffer_size``.

    If the memory runs out, the buffer stays at the size it has, with a warning, and overwrites its oldest transitions:
    the training goes on.

    :param buffer_size: number of transitions to keep
    :param observation_space: observation space of the environment
    :param action_space: action space of the environment
    :param device: where minibatches go
    :param n_envs: number of environments
    :param n_steps: length of the segments that are sampled
    :param gamma: discount within a segment
    :param keep_steps: whether segments come with their single steps (:attr:`Samples.steps`)
    :param extra_fields: name -> (shape, dtype) of what is stored beside each transition; :attr:`pending` is where
        :meth:`add` takes it from
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        n_steps: int = 1,
        gamma: float = 0.99,
        keep_steps: bool = False,
        extra_fields: dict[str, tuple[tuple[int, ...], Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        # SB3 allocates in its constructor: a single row, whose dtypes and shapes all later ones have
        super().__init__(n_envs, observation_space, action_space, device, n_envs=n_envs, **kwargs)
        self.buffer_size = max(buffer_size // n_envs, 1)
        self.n_steps, self.gamma, self.keep_steps = n_steps, gamma, keep_steps
        self.extras = {
            name: np.zeros((1, n_envs, *shape), dtype=dtype) for name, (shape, dtype) in (extra_fields or {}).items()
        }
        #: What the next :meth:`add` stores besides its arguments, ``(n_envs, ...)`` each
        self.pending: dict[str, np.ndarray] = {}

    @property
    def capacity(self) -> int:
        """Number of rows (of ``n_envs`` transitions) that the storage has."""
        return len(self.rewards)

    @property
    def transition_bytes(self) -> int:
        """Memory that one transition takes."""
        return sum(array[0].nbytes for _, _, array in self._arrays()) // self.n_envs

    def _arrays(self) -> list[tuple[Any, str, np.ndarray]]:
        """All storage as (owner, name, array), where the owner is the buffer's ``__dict__`` or a dict of observations."""
        arrays: list[tuple[Any, str, np.ndarray]] = []
        for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts", "extras"):
            array = getattr(self, name, None)
            if isinstance(array, dict):
                arrays += [(array, key, array[key]) for key in array]
            elif array is not None:
                arrays.append((self.__dict__, name, array))
        return arrays

    def _reserve(self, n_rows: int) -> None:
        """Make room for at least ``n_rows`` rows, if ``buffer_size`` and the memory allow it."""
        n_rows = min(n_rows, self.buffer_size)
        if n_rows <= self.capacity:
            return
        capacity = min(max(n_rows, 2 * self.capacity, MINIMUM_CAPACITY), self.buffer_size)
        if psutil is not None:
            available_rows = 0.9 * psutil.virtual_memory().available / (self.transition_bytes * self.n_envs)
            capacity = min(capacity, self.capacity + int(available_rows))
        try:
            if capacity < n_rows:
                raise MemoryError
            # Fresh pages of np.zeros take no memory until they are written, so growing never holds the data twice
            for owner, name, array in self._arrays():
                grown = np.zeros((capacity, *array.shape[1:]), dtype=array.dtype)
                grown[: len(array)] = array
                owner[name] = grown
        except MemoryError:
            self._stop_growing()

    def _stop_growing(self) -> None:
        # An allocation may have failed half way: all arrays go back to the shortest
        capacity = min(len(array) for _, _, array in self._arrays())
        for owner, name, array in self._arrays():
            owner[name] = array[:capacity]
        warnings.warn(
            f"Not enough memory for the replay buffer to grow to buffer_size={self.buffer_size * self.n_envs}: it stays at "
            f"{capacity * self.n_envs} transitions and overwrites the oldest. Pass a smaller buffer_size to avoid this."
        )
        self.buffer_size = capacity

    def add(self, *args: Any, **kwargs: Any) -> None:
        pos = self.pos
        if not self.full:
            self._reserve(pos + 2)  # optimize_memory_usage writes past the current row
        self._write(*args, **kwargs)
        for name, array in self.extras.items():
            array[pos] = self.pending[name]

    def _write(self, *args: Any, **kwargs: Any) -> None:
        super().add(*args, **kwargs)

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> Samples:  # type: ignore[override]
        """The samples at rows of the buffer, each of a random environment, gathered by tensors: no copy but the gathering."""
        # Drawn as SB3 draws them; from one environment no random number is taken
        envs = np.random.randint(0, self.n_envs, size=len(batch_inds))
        if self.n_steps == 1:
            first = last = self._flat(batch_inds, envs)
            rewards, discounts, steps = self._gather_rewards(first, env).unsqueeze(1), None, None
        else:
            rows, valid = self._segments(batch_inds, envs)
            segments = self._flat(rows, envs[:, None])
            first, last = segments[:, 0], segments[np.arange(len(rows)), valid.sum(axis=1) - 1]
            powers = self.gamma ** np.arange(self.n_steps, dtype=np.float32)
            all_rewards = self._gather_rewards(segments, env)
            rewards = (all_rewards * th.from_numpy(powers * valid)).sum(dim=1, keepdim=True)
            discounts = th.from_numpy(self.gamma ** valid.sum(axis=1, keepdims=True).astype(np.float32))
            steps = self._gather_steps(segments[:, 1:], env) if self.keep_steps else None
            if steps is not None:
                steps |= {"rewards": all_rewards, "valid": th.from_numpy(valid)}
        dones = self._gather(self.dones, last)
        if self.handle_timeout_termination:
            dones = dones * (1 - self._gather(self.timeouts, last))
        samples = Samples(
            observations=self._gather_observations(self.observations, first, env),
            actions=self._gather(self.actions, first),
            next_observations=self._gather_next_observations(last, env),
            dones=dones.unsqueeze(1),
            rewards=rewards,
            discounts=discounts,
            extras=self._gather_extras(first, last),
            steps=steps,
        )
        if self.device.type == "cpu":
            return samples
        return tree_map(lambda tensor: tensor.to(self.device), samples)

    def end_segments(self) -> None:
        """No segment leads from the newest transition to the next one, which belongs to another episode."""
        if self.n_steps == 1 or self.size() == 0:
            return
        newest = (self.pos - 1) % self.buffer_size
        if self.handle_timeout_termination:
            self.timeouts[newest] = np.maximum(self.timeouts[newest], 1 - self.dones[newest])
        else:
            self.dones[newest] = 1  # as SB3 does, where nothing tells a time limit from an end

    def _flat(self, rows: np.ndarray, envs: np.ndarray) -> np.ndarray:
        """Index of transitions where rows and environments are one dimension."""
        return rows if self.n_envs == 1 else rows * self.n_envs + envs

    def _segments(self, batch_inds: np.ndarray, envs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        The rows of segments, and which of their steps count: those up to the end of the episode, or to the newest
        transition; ``(batch_size, n_steps)`` both.
        """
        rows = (batch_inds[:, None] + np.arange(self.n_steps)) % self.buffer_size
        newest = rows == (self.pos - 1) % self.buffer_size
        rows = np.minimum(rows, self.capacity - 1)  # what lies beyond never counts
        ends = newest | (self.dones[rows, envs[:, None]] > 0)
        if self.handle_timeout_termination:
            ends |= self.timeouts[rows, envs[:, None]] > 0
        ends_before = np.cumsum(ends, axis=1) - ends
        return rows, ends_before == 0

    def _gather(self, array: Any, index: np.ndarray) -> Any:
        """The rows of an array, or of each of a dict, as tensors of the same memory sees them."""
        if isinstance(array, dict):
            return {key: self._gather(value, index) for key, value in array.items()}
        tensor = th.from_numpy(array).view(-1, *array.shape[2:]).index_select(0, th.from_numpy(index.reshape(-1)))
        return tensor if index.ndim == 1 else tensor.unflatten(0, index.shape)

    def _gather_extras(self, first: np.ndarray, last: np.ndarray) -> dict[str, th.Tensor] | None:
        # What is stored of a next state belongs, as the next observation, to the last step of a segment
        extras = {
            name: self._gather(array, last if name.startswith("next_") else first) for name, array in self.extras.items()
        }
        return extras or None

    def _gather_observations(self, array: Any, index: np.ndarray, env: VecNormalize | None) -> Any:
        observations = self._gather(array, index)
        if env is None:
            return observations
        return tree_map(th.from_numpy, env.normalize_obs(tree_map(th.Tensor.numpy, observations)))

    def _gather_next_observations(self, index: np.ndarray, env: VecNormalize | None) -> Any:
        if not self.optimize_memory_usage:
            return self._gather_observations(self.next_observations, index, env)
        rows, envs = np.divmod(index, self.n_envs)
        return self._gather_observations(self.observations, self._flat((rows + 1) % self.buffer_size, envs), env)

    def _gather_rewards(self, index: np.ndarray, env: VecNormalize | None) -> th.Tensor:
        rewards: th.Tensor = self._gather(self.rewards, index)
        return rewards if env is None else th.from_numpy(env.normalize_reward(rewards.numpy()).astype(np.float32))

    def _gather_steps(self, index: np.ndarray, env: VecNormalize | None) -> dict[str, Any]:
        # Normalised with their steps in one dimension, as an environment's observations are
        observations = self._gather_observations(self.observations, index.reshape(-1), env)
        return {
            "observations": tree_map(lambda tensor: tensor.unflatten(0, index.shape), observations),
            "actions": self._gather(self.actions, index),
            **self._gather(self.extras, index),
        }


class GrowingReplayBuffer(GrowingStorage, ReplayBuffer):
    """SB3's ``ReplayBuffer``, or its n-step buffer, allocated as it fills."""

    def _write(
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        if self.optimize_memory_usage:
            super()._write(obs, next_obs, action, reward, done, infos)
            return
        # As SB3's buffer does, less its intermediate copies: assigning copies already
        pos = self.pos
        self.observations[pos] = obs.reshape(self.observations.shape[1:])
        self.next_observations[pos] = next_obs.reshape(self.observations.shape[1:])
        self.actions[pos] = action.reshape(self.actions.shape[1:])
        self.rewards[pos] = reward
        self.dones[pos] = done
        if self.handle_timeout_termination:
            self.timeouts[pos] = [info.get("TimeLimit.truncated", False) for info in infos]
        self.pos += 1
        if self.pos == self.buffer_size:
            self.full = True
            self.pos = 0


class GrowingDictReplayBuffer(GrowingStorage, DictReplayBuffer):  # type: ignore[misc]
    """SB3's ``DictReplayBuffer``, allocated as it fills, with n-step returns as well."""


def split_samples(samples: ReplayBufferSamples, n_batches: int) -> list[ReplayBufferSamples]:
    """
    Cut samples into minibatches of one size.

    :param samples: ``n_batches * batch_size`` samples
    :param n_batches: number of minibatches
    :return: views of the samples
    """
    if n_batches == 1:
        return [samples]

    def split(field: Any) -> Any:
        if isinstance(field, dict):
            pieces = {key: split(value) for key, value in field.items()}
            return [{key: piece[i] for key, piece in pieces.items()} for i in range(n_batches)]
        return [None] * n_batches if field is None else field.chunk(n_batches)

    return [type(samples)(*fields) for fields in zip(*map(split, samples), strict=True)]
