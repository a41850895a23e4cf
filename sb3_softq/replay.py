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

try:
    import psutil
except ImportError:  # an extra of SB3's
    psutil = None  # type: ignore[assignment]

MINIMUM_CAPACITY = 1024


class _GrowingStorage(ReplayBuffer):
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
            row_bytes = sum(array[0].nbytes for _, _, array in self._arrays())
            capacity = min(capacity, self.capacity + int(0.9 * psutil.virtual_memory().available / row_bytes))
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


class GrowingReplayBuffer(_GrowingStorage, ReplayBuffer):
    """SB3's ``ReplayBuffer``, allocated as it fills."""


class GrowingDictReplayBuffer(_GrowingStorage, DictReplayBuffer):  # type: ignore[misc]
    """SB3's ``DictReplayBuffer``, allocated as it fills."""


class GrowingNStepReplayBuffer(_GrowingStorage, NStepReplayBuffer):
    """SB3's ``NStepReplayBuffer``, allocated as it fills."""
