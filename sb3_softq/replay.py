"""
Replay buffers of Stable-Baselines3 whose storage grows as it fills.

A buffer of the usual million image transitions asks for tens of gigabytes before the first step. Here storage is
allocated at the first transition and doubled when it is full, up to ``buffer_size``: a short training, or a model that
was loaded to be looked at, holds what it uses.
"""

import warnings
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

try:
    import psutil
except ImportError:  # an extra of SB3's
    psutil = None  # type: ignore[assignment]

MINIMUM_CAPACITY = 1024


class GrowingStorage(ReplayBuffer):
    """
    Mixin before one of SB3's buffers: its arrays have :attr:`capacity` rows, at most ``buffer_size``.

    If the memory runs out, the buffer stays at the size it has, with a warning, and overwrites its oldest transitions:
    the training goes on.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        **kwargs: Any,
    ) -> None:
        # SB3 allocates in its constructor: a single row, whose dtypes and shapes all later ones have
        super().__init__(n_envs, observation_space, action_space, device, n_envs=n_envs, **kwargs)
        self.buffer_size = max(buffer_size // n_envs, 1)

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
        for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
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
        if not self.full:
            # n-step sampling and optimize_memory_usage look (and write) past the current row
            self._reserve(self.pos + 1 + getattr(self, "n_steps", 1))
        super().add(*args, **kwargs)

    def _gather(self, batch_inds: np.ndarray) -> dict[str, Any]:
        """The samples at rows of the buffer, each of a random environment, gathered by tensors: no copy but the gathering."""
        if self.n_envs > 1:  # drawn as SB3 draws them; from one environment no random number is taken
            batch_inds = batch_inds * self.n_envs + np.random.randint(0, high=self.n_envs, size=(len(batch_inds),))
        rows = th.from_numpy(batch_inds)

        def gather(array: Any) -> Any:
            if isinstance(array, dict):
                return {key: gather(value) for key, value in array.items()}
            return self._view(array).index_select(0, rows).to(self.device)

        terminated = gather(self.dones)
        if self.handle_timeout_termination:
            terminated = terminated * (1 - gather(self.timeouts))
        return {
            "observations": gather(self.observations),
            "actions": gather(self.actions),
            "next_observations": gather(self.next_observations),
            "dones": terminated.unsqueeze(1),
            "rewards": gather(self.rewards).unsqueeze(1),
        }

    def _view(self, array: np.ndarray) -> th.Tensor:
        """An array as a tensor of the same memory, with rows and environments in one dimension."""
        return th.from_numpy(array).view(-1, *array.shape[2:])


class GrowingReplayBuffer(GrowingStorage, ReplayBuffer):
    """SB3's ``ReplayBuffer``, allocated as it fills."""

    def add(
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        if self.optimize_memory_usage:
            super().add(obs, next_obs, action, reward, done, infos)
            return
        if not self.full:
            self._reserve(self.pos + 2)
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

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> ReplayBufferSamples:
        if env is not None or self.optimize_memory_usage:
            return super()._get_samples(batch_inds, env)
        return ReplayBufferSamples(**self._gather(batch_inds))


class GrowingDictReplayBuffer(GrowingStorage, DictReplayBuffer):  # type: ignore[misc]
    """SB3's ``DictReplayBuffer``, allocated as it fills."""

    def _get_samples(  # type: ignore[override]
        self, batch_inds: np.ndarray, env: VecNormalize | None = None
    ) -> DictReplayBufferSamples:
        if env is not None:
            return super()._get_samples(batch_inds, env)
        return DictReplayBufferSamples(**self._gather(batch_inds))


class GrowingNStepReplayBuffer(GrowingStorage, NStepReplayBuffer):
    """SB3's ``NStepReplayBuffer``, allocated as it fills."""


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
            pieces = {key: value.chunk(n_batches) for key, value in field.items()}
            return [{key: piece[i] for key, piece in pieces.items()} for i in range(n_batches)]
        return [None] * n_batches if field is None else field.chunk(n_batches)

    return [type(samples)(*fields) for fields in zip(*map(split, samples), strict=True)]
