"""Momentum DQN."""

from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, Schedule
from torch.nn import functional as F

from sb3_softq import operators
from sb3_softq.checks import check_choice, check_number
from sb3_softq.value_based.base import ValueBasedAlgorithm
from sb3_softq.value_based.policies import ActorCnnQPolicy, ActorMultiInputQPolicy, ActorQPolicy, QNetworks

AVERAGED = ("q_values", "targets")


class MomentumDQN(ValueBasedAlgorithm):
    """
    Momentum DQN: acts on an average H of the successive action values, which is learned beside them.

    The policy is greedy on H, and Q is evaluated under it, so that errors of single iterations average out: what a KL
    divergence from the previous policy does, without one. Vieillard, Scherrer, Pietquin and Geist 2020 (arXiv:1910.09322).

    Parameters not described here are those of :class:`~sb3_softq.value_based.base.ValueBasedAlgorithm`.

    :param temperature: of the policy ``softmax(H / temperature)``; 0 by default, the greedy policy of the paper
    :param exploration: ``"eps_greedy"`` by default, on H, as in the paper
    :param momentum: weight of the previous average, between 0 and 1; or ``"inverse_time_20"``: the new action values have
        the weight ``1 / (1 + k / 20)`` after k iterations (updates of the target network after gradient steps), and for
        ``"inverse_time"`` ``1 / (1 + k)``, so that all count alike
    :param averaged: what H averages: ``"q_values"``, the online network's action values, or ``"targets"``, their targets
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": ActorQPolicy,
        "CnnPolicy": ActorCnnQPolicy,
        "MultiInputPolicy": ActorMultiInputQPolicy,
    }
    acts_on_q_values = False
    policy: ActorQPolicy
    q_net: QNetworks  # type: ignore[assignment]
    q_net_target: QNetworks  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[ActorQPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 32,
        tau: float = 1.0,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 4,
        gradient_steps: int = 1,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        n_step_bonus: bool = True,
        tree_backup: bool = False,
        temperature: float | str | Schedule = 0.0,
        momentum: float | str = 0.9,
        averaged: str = "q_values",
        target_update_interval: int = 10_000,
        exploration: str = "eps_greedy",
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
            n_step_bonus=n_step_bonus,
            tree_backup=tree_backup,
            temperature=temperature,
            target_update_interval=target_update_interval,
            exploration=exploration,
            exploration_fraction=exploration_fraction,
            exploration_initial_eps=exploration_initial_eps,
            exploration_final_eps=exploration_final_eps,
            max_grad_norm=max_grad_norm,
            factorisation=factorisation,
            torch_compile=torch_compile,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        self.momentum = momentum
        self.averaged = averaged
        # Updates of the target network that had something to copy, and the gradient steps at the last of them
        self._n_iterations = 0
        self._n_updates_copied = 0
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_choice("averaged", self.averaged, AVERAGED)
        self._current_momentum()

    def _current_momentum(self) -> float:
        """Weight of the previous average now."""
        if not isinstance(self.momentum, str):
            check_number("momentum", self.momentum, 0, 1)
            return float(self.momentum)
        name, _, number = self.momentum.partition("inverse_time")
        try:
            horizon = float(number.removeprefix("_")) if number else 1.0
        except ValueError:
            horizon = -1.0
        if name or horizon <= 0:
            raise ValueError(
                f"momentum must be a number, 'inverse_time' or like 'inverse_time_20' with a positive number, not "
                f"{self.momentum!r}"
            )
        return 1 - 1 / (1 + self._n_iterations / horizon)

    def _update_target(self) -> None:
        super()._update_target()
        if self._n_updates > self._n_updates_copied:
            self._n_iterations += 1
            self._n_updates_copied = self._n_updates

    def _inputs(self, n_samples: int) -> dict[str, th.Tensor]:
        return {"momentum": th.full((n_samples, 1), self._current_momentum(), device=self.device)}

    def _estimates(self, observations: PyTorchObs) -> tuple[th.Tensor, ...]:
        q_values, averages = self.layout.rows(self.q_net_target(observations))
        return averages, q_values

    def _online_estimates(self, observations: PyTorchObs) -> tuple[th.Tensor, ...]:
        q_values, averages = self.layout.rows(self.q_net(observations))
        return averages, q_values

    def _value(self, estimates: tuple[th.Tensor, ...], mask: th.Tensor | None) -> th.Tensor:
        # V(s) = q(s, argmax h(s, .)), both of the target networks (arXiv:1910.09322)
        return operators.expectation(*self._policy_and_q_values(estimates, mask), mask)

    def _compute_loss(self, replay_data: Any, targets: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        q_values, averages = self.layout.rows(self.q_net(replay_data.observations))
        current_q_values = self._taken(q_values, replay_data.actions)
        current_averages = self._taken(averages, replay_data.actions)
        with th.no_grad():
            # h <- momentum * h + (1 - momentum) * q, where h is the target network's
            old_averages = self.layout.rows(self.q_net_target.networks[-1](replay_data.observations))
            old_averages = self._taken(old_averages, replay_data.actions)
            momentum = self._per_target(replay_data.extras["momentum"])
            new = current_q_values if self.averaged == "q_values" else targets
            target_averages = momentum * old_averages + (1 - momentum) * new
        losses = F.smooth_l1_loss(current_q_values, targets, reduction="none")
        return losses + F.smooth_l1_loss(current_averages, target_averages, reduction="none"), averages.detach()
