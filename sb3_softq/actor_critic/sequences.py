"""Replay of sequences, with what the behaviour's log-probability was."""

from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecNormalize

from sb3_softq.replay import GrowingReplayBuffer


class SequenceSamples(NamedTuple):
    """
    A minibatch of sequences, each from one episode; steps after its end are there, but not ``valid``.

    Observations have sequence and step in their first dimension, the rest is ``(batch_size, n_steps, ...)``.
    """

    observations: th.Tensor
    actions: th.Tensor
    next_observations: th.Tensor
    dones: th.Tensor
    rewards: th.Tensor
    valid: th.Tensor
    #: Actions as they were drawn, before they were clipped to the range, and their log-probabilities
    drawn_actions: th.Tensor
    log_probs: th.Tensor


class SequenceReplayBuffer(GrowingReplayBuffer):
    """
    Replay buffer that samples sequences, and keeps actions as they were drawn with their log-probabilities.

    These come to :meth:`add` as ``info["drawn_action"]`` and ``info["log_prob"]``.

    :param n_steps: length of the sequences
    """

    def __init__(self, *args: Any, n_steps: int = 5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.n_steps = n_steps
        self.drawn_actions = np.zeros(self.actions.shape, np.float32)
        self.log_probs = np.zeros(self.rewards.shape, np.float32)

    def _arrays(self) -> list[tuple[Any, str, np.ndarray]]:
        own = [(self.__dict__, name, getattr(self, name)) for name in ("drawn_actions", "log_probs")]
        return [*super()._arrays(), *own]

    def add(
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        pos = self.pos
        super().add(obs, next_obs, action, reward, done, infos)
        self.drawn_actions[pos] = np.stack([info["drawn_action"] for info in infos]).reshape(self.actions.shape[1:])
        self.log_probs[pos] = [info["log_prob"] for info in infos]

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> SequenceSamples:  # type: ignore[override]
        env_inds = np.random.randint(0, self.n_envs, size=(len(batch_inds), 1))
        rows = (batch_inds[:, None] + np.arange(self.n_steps)) % self.buffer_size  # (batch_size, n_steps)
        dones = self.dones[rows, env_inds]
        # An episode ends where it is done, and the newest one at the newest row: behind it come the oldest, or none
        newest = (self.pos - 1) % self.buffer_size
        goes_on = ~((dones > 0) | (rows == newest))
        valid = np.concatenate([np.ones_like(goes_on[:, :1]), goes_on[:, :-1]], axis=1).cumprod(axis=1)
        # Rows that were never written are none of the sequence's: any other will do in their place
        rows = np.where(valid > 0, rows, rows[:, :1])

        def observations(array: np.ndarray) -> th.Tensor:
            flat = array[rows, env_inds].reshape(-1, *array.shape[2:])
            return self.to_torch(self._normalize_obs(flat, env))  # type: ignore[arg-type]

        return SequenceSamples(
            observations=observations(self.observations),
            actions=self.to_torch(self.actions[rows, env_inds]),
            next_observations=observations(self.next_observations),
            dones=self.to_torch(self.dones[rows, env_inds] * (1 - self.timeouts[rows, env_inds])),
            rewards=self.to_torch(self._normalize_reward(self.rewards[rows, env_inds], env).astype(np.float32)),
            valid=self.to_torch(valid.astype(np.float32)),
            drawn_actions=self.to_torch(self.drawn_actions[rows, env_inds]),
            log_probs=self.to_torch(self.log_probs[rows, env_inds]),
        )
