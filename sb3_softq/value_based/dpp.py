"""Dynamic policy programming."""

from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, Schedule
from torch.nn import functional as F

from sb3_softq import operators
from sb3_softq.checks import check_choice, check_number
from sb3_softq.value_based.gap_increasing import GapIncreasingAlgorithm, Operator
from sb3_softq.value_based.policies import (
    CnnQPolicy,
    MultiInputQPolicy,
    QPolicy,
    SumCnnQPolicy,
    SumMultiInputQPolicy,
    SumQPolicy,
)

OPERATORS: dict[str, Operator] = {"boltzmann": operators.boltzmann_value, "logsumexp": operators.soft_value}
PARAMETRISATIONS = ("preference", "q")
# Policies of one network, and those of two
PAIRS: dict[type[BasePolicy], type[BasePolicy]] = {
    QPolicy: SumQPolicy,
    CnnQPolicy: SumCnnQPolicy,
    MultiInputQPolicy: SumMultiInputQPolicy,
}


class DPP(GapIncreasingAlgorithm):
    """
    Dynamic policy programming: learns preferences P, whose Boltzmann policy is regularised towards the previous one.

    By its nature P drifts: with the right policy, the preferences of all but the best actions fall without bound, by their
    distance from the best value at each iteration. Three cures are at hand: ``gap_clip`` and ``preference_clip`` bound what
    grows, and ``parametrisation="q"`` learns Q and the gap apart, of which only the gap grows.
    Azar, Gomez and Kappen 2012 (JMLR 13).

    Parameters not described here are those of :class:`~sb3_softq.value_based.base.ValueBasedAlgorithm`.

    :param temperature: weight of the KL divergence from the previous policy, in the unit of the rewards
    :param exploration: ``"eps_greedy"`` by default, the off-policy choice
    :param operator: the value of a state: ``"boltzmann"``, the average of P under its policy, or ``"logsumexp"``, the form
        that the recursion is derived with (DPP-L)
    :param gap_clip: lower bound of the gap term ``P(s, a) - V(s)``, at most 0; ``-inf`` for none. With
        ``parametrisation="q"`` and several heads of actions it bounds the gap of each head
    :param preference_clip: bound of the absolute value of targets for P, or with ``parametrisation="q"`` for Q; ``inf`` for
        none
    :param parametrisation: ``"preference"``, one network for P, or ``"q"``, two networks, ``P = Q + gap``
    :raises ValueError: with ``parametrisation="q"``, for a policy class of one network
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
        operator: str = "boltzmann",
        gap_clip: float = float("-inf"),
        preference_clip: float = float("inf"),
        parametrisation: str = "preference",
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
        self.operator = operator
        self.gap_clip = gap_clip
        self.preference_clip = preference_clip
        self.parametrisation = parametrisation
        if _init_setup_model:
            self._setup_model()

    # The gap term has its full weight
    munchausen_alpha: ClassVar[float] = 1.0  # type: ignore[misc]

    @property
    def munchausen_clip(self) -> float:  # type: ignore[override]
        return self.gap_clip

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_choice("operator", self.operator, tuple(OPERATORS))
        check_number("gap_clip", self.gap_clip, maximum=0, finite=False)
        check_number("preference_clip", self.preference_clip, positive=True, finite=False)
        check_choice("parametrisation", self.parametrisation, PARAMETRISATIONS)
        # Which networks there are depends on the parametrisation
        right = PAIRS if self.parametrisation == "q" else {pair: single for single, pair in PAIRS.items()}
        self.policy_class = right.get(self.policy_class, self.policy_class)  # type: ignore[assignment]
        if self.parametrisation == "q" and not issubclass(self.policy_class, SumQPolicy):
            raise ValueError(
                f"parametrisation='q' needs a policy with a network for Q and one for the gap, not policy="
                f"{self.policy_class.__name__}: derive it from SumQPolicy"
            )

    @property
    def _operator(self) -> Operator:
        return OPERATORS[self.operator]

    @property
    def _has_bonus(self) -> bool:
        # In the other parametrisation the gap has a network of its own
        return self.parametrisation == "preference"

    def _estimates(self, observations: PyTorchObs) -> tuple[th.Tensor, ...]:
        if self.parametrisation == "preference":
            return super()._estimates(observations)
        q_values, gaps = self.layout.rows(self.q_net_target(observations))
        return q_values + gaps, q_values

    def _compute_targets(self, replay_data: Any) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        # r + P(s, a) - V(s) + gamma * V(s'), or without the gap for Q (Azar et al. 2012, algorithm 1)
        targets, metrics = super()._compute_targets(replay_data)
        return targets.clamp(-self.preference_clip, self.preference_clip), metrics

    def _compute_loss(self, replay_data: Any, targets: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        if self.parametrisation == "preference":
            return super()._compute_loss(replay_data, targets)
        q_values, gaps = self.layout.rows(self.q_net(replay_data.observations))
        current_q_values = self._taken(q_values, replay_data.actions)
        losses = F.smooth_l1_loss(current_q_values, targets, reduction="none")
        # The gaps of all actions to come: P(s, .) - V(s) of the target network
        mask = self._mask_rows(replay_data)
        with th.no_grad():
            estimates = self._estimates(replay_data.observations)
            target_gaps = (estimates[0] - self._value(estimates, mask)).clamp(min=self.gap_clip)
        errors = F.smooth_l1_loss(gaps, target_gaps, reduction="none")
        if mask is not None:
            errors = errors.masked_fill(~mask, 0.0)
        return losses + self._joint(errors.sum(dim=1, keepdim=True)), (q_values + gaps).detach()
