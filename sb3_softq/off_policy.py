"""What every algorithm of this package has in common, whatever it learns: replay storage, checks and the guard."""

from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import MaybeCallback

from sb3_softq.checks import check_integer, check_number
from sb3_softq.diagnostics import check_finite
from sb3_softq.replay import GrowingDictReplayBuffer, GrowingReplayBuffer, GrowingStorage

SelfRegularisedAlgorithm = TypeVar("SelfRegularisedAlgorithm", bound="RegularisedAlgorithm")


class RegularisedAlgorithm(OffPolicyAlgorithm):
    """
    SB3's off-policy algorithm with replay storage that grows as it fills, checked arguments, and a guard that stops a
    training whose rewards or observations are not finite.

    As a first base beside one of SB3's algorithms it gives these to that algorithm.
    """

    # ------------------------------------------------------------------ setting up

    def _check_arguments(self) -> None:
        """Raise for what the algorithm cannot use. Called whenever the model is set up, also after loading."""
        if isinstance(self.observation_space, (spaces.Tuple, spaces.Text, spaces.Sequence, spaces.Graph)):
            raise ValueError(
                f"No policy of {type(self).__name__} reads observation_space={self.observation_space}: "
                "wrap the environment so that it has Box, Discrete or Dict observations"
            )
        check_integer("buffer_size", self.buffer_size, 1)
        check_integer("batch_size", self.batch_size, 1)
        check_integer("gradient_steps", self.gradient_steps, -1)
        check_integer("n_steps", self.n_steps, 1)
        check_number("learning_starts", self.learning_starts, 0)
        check_number("tau", self.tau, 0, 1)
        check_number("gamma", self.gamma, 0, 1)

    def _setup_model(self) -> None:
        self._check_arguments()
        if self.replay_buffer is None and self.replay_buffer_class is None:
            self.replay_buffer = self._make_replay_buffer()
        # SB3 writes the class and arguments it chose into the user's: keep those as they came
        replay_buffer_class, replay_buffer_kwargs = self.replay_buffer_class, self.replay_buffer_kwargs
        self.replay_buffer_kwargs = replay_buffer_kwargs.copy()
        n_steps = self.n_steps
        if isinstance(self.replay_buffer, GrowingStorage):
            self.n_steps = 1  # our buffers have n-step returns of Dict observations, which SB3 refuses
        super()._setup_model()
        self.n_steps = n_steps
        self.replay_buffer_class, self.replay_buffer_kwargs = replay_buffer_class, replay_buffer_kwargs

    def _make_replay_buffer(self) -> ReplayBuffer:
        is_dict = isinstance(self.observation_space, spaces.Dict)
        return (GrowingDictReplayBuffer if is_dict else GrowingReplayBuffer)(
            self.buffer_size,
            self.observation_space,
            self.action_space,
            device=self.device,
            n_envs=self.n_envs,
            optimize_memory_usage=self.optimize_memory_usage,
            **{**self._storage_options(), **self.replay_buffer_kwargs},
        )

    def _storage_options(self) -> dict[str, Any]:
        """What our replay buffers are told beyond SB3's arguments, see :class:`~sb3_softq.replay.GrowingStorage`."""
        return dict(n_steps=self.n_steps, gamma=self.gamma, extra_fields=self._extra_fields())

    def _extra_fields(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """What is stored beside each transition: name -> (shape, dtype). :meth:`_pending` gives it."""
        return {}

    def load_replay_buffer(self, *args: Any, **kwargs: Any) -> None:
        """Load a replay buffer from a file; where our own is stored and how it samples segments is up to the model."""
        super().load_replay_buffer(*args, **kwargs)
        if isinstance(self.replay_buffer, GrowingStorage) and self.replay_buffer_class is None:
            options = {**self._storage_options(), **self.replay_buffer_kwargs}
            for name in ("n_steps", "gamma", "keep_steps"):
                setattr(self.replay_buffer, name, options.get(name, getattr(self.replay_buffer, name)))
            self.replay_buffer.store_on(options.get("storage_device"))

    # ------------------------------------------------------------------ collecting

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        last_obs = self._last_obs
        result = super()._setup_learn(*args, **kwargs)
        if isinstance(self.replay_buffer, GrowingStorage):
            self.replay_buffer.check_normalisation(self._vec_normalize_env)
            if self._last_obs is not last_obs:
                self.replay_buffer.end_segments()  # the environments were reset in the middle of their episodes
        check_finite("observations", self._last_obs, self.num_timesteps)
        return result

    def _pending(self) -> dict[str, np.ndarray]:
        """The :meth:`_extra_fields` of the transition that is about to be stored, ``(n_envs, ...)`` each."""
        return {}

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        check_finite("rewards", reward, self.num_timesteps)
        check_finite("observations", new_obs, self.num_timesteps)
        if isinstance(replay_buffer, GrowingStorage) and replay_buffer.extras:
            replay_buffer.pending = self._pending()
        if self._vec_normalize_env is not None:
            # What is stored; normalisation clips infinities
            check_finite("rewards", self._vec_normalize_env.get_original_reward(), self.num_timesteps)
            check_finite("observations", self._vec_normalize_env.get_original_obs(), self.num_timesteps)
        elif not dones.any():
            # Nothing to replace in new_obs, so no copy is needed: the buffer makes its own (but reshapes entries of a dict)
            next_obs = dict(new_obs) if isinstance(new_obs, dict) else new_obs
            replay_buffer.add(self._last_obs, next_obs, buffer_action, reward, dones, infos)  # type: ignore[arg-type]
            self._last_original_obs = self._last_obs = new_obs  # type: ignore[assignment]
            return
        for info in infos:
            check_finite("observations", info.get("terminal_observation"), self.num_timesteps)
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # The last rollout may end after total_timesteps, where a linear schedule of the learning rate would be negative
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    # ------------------------------------------------------------------ learning

    def _record(self, metrics: dict[str, th.Tensor]) -> None:
        """Log tensors without dimensions under ``train/``, with one read from the device."""
        for name, value in zip(metrics, th.stack(list(metrics.values())).tolist(), strict=True):
            self.logger.record(f"train/{name}", value)

    def learn(
        self: SelfRegularisedAlgorithm,
        total_timesteps: int = 1_000_000,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfRegularisedAlgorithm:
        """
        Train; see :meth:`stable_baselines3.DQN.learn`.

        :param total_timesteps: number of environment steps
        :param callback: callbacks, called at every step
        :param log_interval: episodes between two logs
        :param tb_log_name: name of the TensorBoard run, by default the class's
        :param reset_num_timesteps: whether the count of steps, and with it every schedule, starts again
        :param progress_bar: whether to show a progress bar
        :return: the model
        :raises DivergenceError: if a reward, an observation or a loss is not finite; the weights are those before it
        """
        return super().learn(
            total_timesteps,
            callback,
            log_interval,
            type(self).__name__ if tb_log_name is None else tb_log_name,
            reset_num_timesteps,
            progress_bar,
        )
