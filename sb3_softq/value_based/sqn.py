"""Soft Q Network: twin critics and a learned temperature."""

from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, Schedule
from torch.nn import functional as F

from sb3_softq import operators
from sb3_softq.value_based.base import ValueBasedAlgorithm
from sb3_softq.value_based.policies import QNetworks, TwinCnnQPolicy, TwinMultiInputQPolicy, TwinQPolicy


class SQN(ValueBasedAlgorithm):
    """
    Soft Q Network: soft Q-learning with twin critics and a learned temperature, as SAC without an actor.

    The policy is the Boltzmann one of the smaller action values of both critics: of the target critics in the target, of
    the online critics for acting. The temperature is learned from the entropy of the acting policy at the sampled states.
    Liu, Liu and Gu 2019 (arXiv:1912.10891).

    Parameters not described here are those of :class:`~sb3_softq.value_based.base.ValueBasedAlgorithm`.

    :param tau: Polyak coefficient of the target networks' update, not a temperature
    :param temperature: ``"auto"`` (learned, from 1), ``"auto_0.2"`` (learned, from 0.2), or a number, schedule or callable
    :param target_update_interval: 1 by default, for the Polyak average
    :param target_entropy: entropy that a learned temperature aims at: nats, or ``"auto"`` / ``"auto_0.3"`` for a fraction of
        the log of the number of actions (``"auto"`` is 0.5)
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": TwinQPolicy,
        "CnnPolicy": TwinCnnQPolicy,
        "MultiInputPolicy": TwinMultiInputQPolicy,
    }
    learns_temperature = True
    policy: TwinQPolicy
    q_net: QNetworks  # type: ignore[assignment]
    q_net_target: QNetworks  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[TwinQPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 32,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 4,
        gradient_steps: int = 1,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        n_step_bonus: bool = True,
        tree_backup: bool = False,
        temperature: float | str | Schedule = "auto_0.2",
        target_entropy: float | str = "auto",
        target_update_interval: int = 1,
        exploration: str = "boltzmann",
        exploration_fraction: float = 0.1,
        exploration_initial_eps: float = 1.0,
        exploration_final_eps: float = 0.05,
        max_grad_norm: float = 10,
        factorisation: str = "sum",
        torch_compile: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            tau=tau,
            gamma=gamma,
            train_freq=train_freq,
            gradient_steps=gradient_steps,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            temperature=temperature,
            target_update_interval=target_update_interval,
            exploration=exploration,
            exploration_fraction=exploration_fraction,
            exploration_initial_eps=exploration_initial_eps,
            exploration_final_eps=exploration_final_eps,
            max_grad_norm=max_grad_norm,
            torch_compile=torch_compile,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
            n_step_bonus=n_step_bonus,
            tree_backup=tree_backup,
            factorisation=factorisation,
            target_entropy=target_entropy,
        )
        if _init_setup_model:
            self._setup_model()

    def _estimates(self, observations: PyTorchObs) -> tuple[th.Tensor, ...]:
        # The smaller of the target critics' action values
        return (self.layout.rows(self.q_net_target(observations).amin(dim=0)),)

    def _value(self, estimates: tuple[th.Tensor, ...], mask: th.Tensor | None) -> th.Tensor:
        return operators.soft_value(estimates[0], self.current_temperature, mask)

    def _compute_loss(self, replay_data: Any, targets: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        # Sum over the critics of their squared errors
        q_values = self.layout.rows(self.q_net(replay_data.observations))  # (2, n_rows, n_actions)
        current_q_values = self._taken(q_values, replay_data.actions)  # (2, n_targets, 1)
        losses = F.mse_loss(current_q_values, targets.expand(2, -1, -1), reduction="none").sum(dim=0)
        return losses, q_values.detach().amin(dim=0)
