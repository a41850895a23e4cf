"""Relative entropy regularised policy iteration."""

from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_softq import losses
from sb3_softq.actor_critic.mpo import MPO, PolicyEvaluation
from sb3_softq.actor_critic.policies import MPOPolicy
from sb3_softq.checks import check_choice

WEIGHTINGS = ("rank", "exponential", "identity")


class RERPI(MPO):
    """
    Relative entropy regularised policy iteration: MPO for Gaussian policies with a choice of weights.

    Weights by rank, as in CMA-ES, need no temperature and do not change with the scale of the rewards: the same settings
    serve returns of 1 and of 10,000. Abdolmaleki et al. 2018 (arXiv:1812.02256).

    Parameters not described here are those of :class:`~sb3_softq.MPO`.

    :param env: the environment, with a Box action space (a registered name works too)
    :param weighting: ``"rank"``; ``"exponential"``, MPO's; or ``"identity"``, the values less their mean, which makes it a
        policy gradient within the bounds of the KL divergences
    :param epsilon: bound on the KL divergence of the weights from uniform ones, for ``"exponential"``
    """

    action_spaces: ClassVar[tuple[type[spaces.Space], ...]] = (spaces.Box,)
    other_actions: ClassVar[str] = "for Discrete actions use MPO, whose expectations are exact there"

    def __init__(
        self,
        policy: str | type[MPOPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 1.0,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        weighting: str = "rank",
        n_action_samples: int = 20,
        epsilon: float = 0.1,
        epsilon_mean: float = 0.01,
        epsilon_covariance: float = 1e-3,
        epsilon_penalty: float = 1e-3,
        per_dimension_kl: bool = False,
        action_penalty: bool = True,
        init_temperature: float = 1.0,
        init_alpha: float = 1.0,
        dual_learning_rate: float = 1e-2,
        target_update_interval: int = 100,
        max_grad_norm: float = 40.0,
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
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class,
            replay_buffer_kwargs,
            optimize_memory_usage,
            n_steps,
            n_action_samples,
            epsilon,
            epsilon_mean,
            epsilon_covariance,
            epsilon_penalty=epsilon_penalty,
            per_dimension_kl=per_dimension_kl,
            action_penalty=action_penalty,
            init_temperature=init_temperature,
            init_alpha=init_alpha,
            dual_learning_rate=dual_learning_rate,
            target_update_interval=target_update_interval,
            max_grad_norm=max_grad_norm,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        self.weighting = weighting
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        check_choice("weighting", self.weighting, WEIGHTINGS)
        super()._check_arguments()

    def _initial_multipliers(self) -> dict[str, tuple[float, int]]:
        initial = super()._initial_multipliers()
        if self.weighting != "exponential":
            del initial["temperature"]
        return initial

    def _weights(self, evaluation: PolicyEvaluation) -> tuple[th.Tensor, th.Tensor, dict[str, th.Tensor]]:
        if self.weighting == "exponential":
            return super()._weights(evaluation)
        weigh = losses.rank_weights if self.weighting == "rank" else losses.identity_weights
        return weigh(evaluation.q_values), evaluation.q_values.new_zeros(()), {}
