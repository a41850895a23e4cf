"""Munchausen IQN: implicit quantiles of the return."""

from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, Schedule

from sb3_softq import operators
from sb3_softq.checks import check_integer
from sb3_softq.losses import quantile_huber_loss
from sb3_softq.replay import n_states
from sb3_softq.value_based.gap_increasing import GapIncreasingAlgorithm, check_munchausen
from sb3_softq.value_based.quantile_policies import (
    CnnQuantilePolicy,
    MultiInputQuantilePolicy,
    QuantileNetwork,
    QuantilePolicy,
)


class MunchausenIQN(GapIncreasingAlgorithm):
    """
    Munchausen IQN: :class:`~sb3_softq.value_based.mdqn.MunchausenDQN` on implicit quantiles of the return.

    With ``munchausen_alpha=0`` it is soft IQN, and with ``temperature=0`` besides plain IQN (Dabney et al. 2018,
    arXiv:1806.06923). Vieillard, Pietquin and Geist 2020 (arXiv:2007.14430), whose constants are the defaults.

    Parameters not described here are those of :class:`~sb3_softq.value_based.base.ValueBasedAlgorithm`.

    :param temperature: weight of entropy and KL divergence together, in the unit of the rewards
    :param exploration: ``"eps_greedy"`` by default, as in the paper
    :param munchausen_alpha: weight of the scaled log-policy, between 0 (soft IQN) and 1
    :param munchausen_clip: lower bound of the scaled log-policy before it is weighted, at most 0; ``-inf`` for none
    :param n_quantiles: number of quantiles that are learned for each sample
    :param n_target_quantiles: number of quantiles of a target
    :param n_policy_quantiles: number of quantiles whose mean is the action value of the policy, one of each of as many equal
        intervals
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": QuantilePolicy,
        "CnnPolicy": CnnQuantilePolicy,
        "MultiInputPolicy": MultiInputQuantilePolicy,
    }
    policy: QuantilePolicy
    q_net: QuantileNetwork  # type: ignore[assignment]
    q_net_target: QuantileNetwork  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[QuantilePolicy],
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
        temperature: float | str | Schedule = 0.03,
        munchausen_alpha: float = 0.9,
        munchausen_clip: float = -1.0,
        n_quantiles: int = 64,
        n_target_quantiles: int = 64,
        n_policy_quantiles: int = 32,
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
        self.n_quantiles = n_quantiles
        self.n_target_quantiles = n_target_quantiles
        self.n_policy_quantiles = n_policy_quantiles
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_munchausen(self.munchausen_alpha, self.munchausen_clip)
        for name in ("n_quantiles", "n_target_quantiles", "n_policy_quantiles"):
            check_integer(name, getattr(self, name), 1)

    def _setup_model(self) -> None:
        super()._setup_model()
        self.policy.n_policy_quantiles = self.n_policy_quantiles

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "tree_backup"]

    def _inputs(self, n_samples: int) -> dict[str, th.Tensor]:
        # Fresh fractions for each sample. Those of the policy are one of each of equal intervals: as uniform as any, and their
        # mean has less noise, which the temperature would amplify
        strata = th.arange(self.n_policy_quantiles, device=self.device)
        return {
            "fractions": th.rand(n_samples, self.n_quantiles, device=self.device),
            "target_fractions": th.rand(n_samples, self.n_target_quantiles, device=self.device),
            "policy_fractions": (strata + th.rand(n_samples, len(strata), device=self.device)) / len(strata),
        }

    def _compute_targets(self, replay_data: Any) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        self._fractions = [replay_data.extras[name] for name in ("policy_fractions", "target_fractions")]
        try:
            return super()._compute_targets(replay_data)
        finally:
            del self._fractions

    def _estimates(self, observations: PyTorchObs) -> tuple[th.Tensor, ...]:
        # The states may be several for each sample, which then share its fractions
        n_rows, n_samples = n_states(observations), len(self._fractions[0])
        fractions = [drawn.repeat(-(-n_rows // n_samples), 1)[:n_rows] for drawn in self._fractions]
        n_policy = self.n_policy_quantiles
        quantiles = self._quantile_rows(self.q_net_target(observations, th.cat(fractions, dim=1)))
        # The policy's action values, and other quantiles for the return
        return quantiles[:, :n_policy].mean(dim=1), quantiles[:, n_policy:]

    def _pair_estimates(self, replay_data: Any) -> tuple[tuple[th.Tensor, ...], tuple[th.Tensor, ...]]:
        # The bonus asks for the policy in s alone, which needs no quantiles of the return
        quantiles = self._quantile_rows(self.q_net_target(replay_data.observations, self._fractions[0]))
        return (quantiles.mean(dim=1),), self._estimates(replay_data.next_observations)

    def _online_estimates(self, observations: PyTorchObs) -> tuple[th.Tensor, ...]:
        quantiles = self._quantile_rows(self.q_net(observations, self.policy.acting_fractions(observations)))
        return quantiles.mean(dim=1), quantiles

    def _quantile_rows(self, quantiles: th.Tensor) -> th.Tensor:
        """Quantiles of states, ``(batch_size, k, n_heads * width)``, as rows: ``(n_rows, k, width)``."""
        if self.layout.n_heads == 1:
            return quantiles
        return quantiles.unflatten(2, (self.layout.n_heads, self.layout.width)).transpose(1, 2).flatten(end_dim=1)

    def _value(self, estimates: tuple[th.Tensor, ...], mask: th.Tensor | None) -> th.Tensor:
        # Of each quantile z: sum_a pi(a|s) * (z(s, a) - temperature * log pi(a|s)) (arXiv:2007.14430, appendix B)
        q_values, quantiles = estimates
        policy = operators.policy(q_values, self.current_temperature, mask).unsqueeze(1)
        if mask is not None:
            quantiles = quantiles.masked_fill(~mask.unsqueeze(1), 0.0)
        return (policy * quantiles).sum(dim=2) + self._regularisation(estimates, mask)

    def _regularisation(self, estimates: tuple[th.Tensor, ...], mask: th.Tensor | None) -> th.Tensor:
        return self.current_temperature * operators.entropy(estimates[0], self.current_temperature, mask)

    def _policy_and_q_values(self, estimates: tuple[th.Tensor, ...], mask: th.Tensor | None) -> tuple[th.Tensor, th.Tensor]:
        return operators.policy(estimates[0], self.current_temperature, mask), estimates[0]

    def _compute_loss(self, replay_data: Any, targets: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        fractions = replay_data.extras["fractions"]
        quantiles = self._quantile_rows(self.q_net(replay_data.observations, fractions))  # (n_rows, n_quantiles, n_actions)
        actions = self.layout.action_rows(replay_data.actions).unsqueeze(1).expand(-1, self.n_quantiles, 1)
        current_quantiles = self._joint(quantiles.gather(2, actions).squeeze(2))
        losses = quantile_huber_loss(current_quantiles, targets, self._per_target(fractions))
        return losses, quantiles.detach().mean(dim=1)
