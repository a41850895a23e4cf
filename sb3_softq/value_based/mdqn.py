"""Munchausen DQN."""

from typing import Any

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_softq.value_based.gap_increasing import GapIncreasingAlgorithm, check_munchausen
from sb3_softq.value_based.policies import QPolicy


class MunchausenDQN(GapIncreasingAlgorithm):
    """
    Munchausen DQN: soft Q-learning whose reward carries the scaled log-policy of the taken action.

    That term regularises the policy towards the previous one by their KL divergence, without a network for either, and
    widens the gaps between actions. Vieillard, Pietquin and Geist 2020 (arXiv:2007.14430): the target is equation 2,
    everything in it of the target network, and the defaults are the paper's constants.

    Parameters not described here are those of :class:`~sb3_softq.value_based.base.ValueBasedAlgorithm`.

    :param temperature: weight of entropy and KL divergence together, in the unit of the rewards
    :param exploration: ``"eps_greedy"`` by default, as in the paper
    :param munchausen_alpha: weight of the scaled log-policy, between 0 (soft Q-learning) and 1
    :param munchausen_clip: lower bound of the scaled log-policy before it is weighted, at most 0; ``-inf`` for none
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
        munchausen_alpha: float = 0.9,
        munchausen_clip: float = -1.0,
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
        self.munchausen_alpha = munchausen_alpha
        self.munchausen_clip = munchausen_clip
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_munchausen(self.munchausen_alpha, self.munchausen_clip)
