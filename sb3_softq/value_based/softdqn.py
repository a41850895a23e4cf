"""Soft Q-learning for discrete actions."""

from typing import Any

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, Schedule

from sb3_softq import operators
from sb3_softq.checks import check_bool
from sb3_softq.value_based.base import ValueBasedAlgorithm
from sb3_softq.value_based.policies import QPolicy


class SoftDQN(ValueBasedAlgorithm):
    """
    Soft Q-learning for discrete actions: DQN with the log-sum-exp instead of the maximum.

    Its policy is ``softmax(q / temperature)``, the optimal one where the entropy is part of the return. Haarnoja et al. 2017
    (arXiv:1702.08165); the "Soft-DQN" of Vieillard et al. 2020 (arXiv:2007.14430).

    Parameters not described here are those of :class:`~sb3_softq.value_based.base.ValueBasedAlgorithm`.

    :param temperature: weight of the entropy in the unit of the rewards; at 0 this is DQN
    :param double_q: whether the online network's policy is evaluated by the target network, which at temperature 0 is
        Double DQN
    """

    def __init__(
        self,
        policy: str | type[QPolicy],
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
        temperature: float | str | Schedule = 0.03,
        double_q: bool = False,
        target_update_interval: int = 10_000,
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
        )
        self.double_q = double_q
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_bool("double_q", self.double_q)

    def _targets_frozen(self) -> bool:
        return not self.double_q and super()._targets_frozen()

    def _estimates(self, observations: PyTorchObs) -> tuple[th.Tensor, ...]:
        target_q_values = super()._estimates(observations)
        # In the double form the online network defines the policy that the target network evaluates
        return (self.layout.rows(self.q_net(observations)), *target_q_values) if self.double_q else target_q_values

    def _value(self, estimates: tuple[th.Tensor, ...], mask: th.Tensor | None) -> th.Tensor:
        if len(estimates) == 2:
            # V(s) = E_{a ~ pi}[q_target(s, a)] + temperature * H(pi), with pi of the online network
            return operators.double_soft_value(*estimates, self.current_temperature, mask)
        # V(s) = temperature * log sum_a exp(q(s, a) / temperature) (arXiv:1702.08165)
        return operators.soft_value(estimates[0], self.current_temperature, mask)
