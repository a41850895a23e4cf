"""Conservative value iteration, and advantage learning."""

from typing import Any

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_softq import operators
from sb3_softq.value_based.gap_increasing import GapIncreasingAlgorithm, Operator, check_munchausen
from sb3_softq.value_based.policies import QPolicy


class CVI(GapIncreasingAlgorithm):
    """
    Conservative value iteration: the mellowmax as the value, and action gaps widened by ``1 / (1 - munchausen_alpha)``.

    Regularises the policy by ``munchausen_alpha * temperature`` towards the previous one (KL divergence) and by
    ``(1 - munchausen_alpha) * temperature`` towards the uniform one. At temperature 0 it is advantage learning (Bellemare et
    al. 2016, arXiv:1512.04860). Kozuno, Uchibe and Doya 2019 (arXiv:1710.10866).

    Parameters not described here are those of :class:`~sb3_softq.value_based.base.ValueBasedAlgorithm`.

    :param temperature: weight of entropy and KL divergence together, in the unit of the rewards; 0 for advantage learning
    :param exploration: ``"eps_greedy"`` by default, the off-policy choice, which temperature 0 needs
    :param munchausen_alpha: weight of the gap term, at least 0 (mellowmax value iteration) and below 1
    :param munchausen_clip: lower bound of the gap term before it is weighted, at most 0; ``-inf`` for none
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
        munchausen_clip: float = float("-inf"),
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
        self.munchausen_alpha = munchausen_alpha
        self.munchausen_clip = munchausen_clip
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_munchausen(self.munchausen_alpha, self.munchausen_clip)
        if self.munchausen_alpha == 1:
            raise ValueError("munchausen_alpha must be below 1, not 1, where gaps grow without bound: use DPP")

    @property
    def _operator(self) -> Operator:
        # V(s) = temperature * log mean_a exp(q(s, a) / temperature) (arXiv:1710.10866)
        return operators.mellowmax
