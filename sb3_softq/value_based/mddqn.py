"""Mirror-descent DQN: explicit KL regularisation."""

from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, Schedule
from torch.nn import functional as F

from sb3_softq import operators
from sb3_softq.checks import check_bool, check_choice, check_number
from sb3_softq.value_based.base import ValueBasedAlgorithm
from sb3_softq.value_based.policies import ActorCnnQPolicy, ActorMultiInputQPolicy, ActorQPolicy, QNetworks

GREEDY_STEPS = ("direct", "indirect", "dual_averaging")


class MirrorDescentDQN(ValueBasedAlgorithm):
    """
    Mirror-descent DQN: the policy is a network, kept close to the previous one by an explicit KL divergence.

    Each iteration improves ``<pi, q> - kl_coef * KL(pi || previous pi) + ent_coef * H(pi)`` and evaluates Q under the new
    policy. Vieillard et al. 2020, *Leverage the Average* (arXiv:2003.14089).

    Parameters not described here are those of :class:`~sb3_softq.value_based.base.ValueBasedAlgorithm`.

    :param kl_coef: weight of the KL divergence from the previous policy (the target network's), in the unit of the rewards
    :param ent_coef: weight of the entropy, in the unit of the rewards; not both may be 0
    :param greedy_step: how the policy is improved: ``"direct"``, by the gradient of the objective; ``"indirect"``, by
        regression on its maximiser (KL divergence from it); ``"dual_averaging"``, as the softmax of an average of the action
        values, which is learned instead of the policy and needs a positive ``ent_coef``
    :param regularised_evaluation: whether the KL divergence and the entropy are part of the values ("w/" in the paper), or of
        the greedy step only ("w/o")
    :param exploration: ``"boltzmann_eps"`` by default: a sample of the policy, with probability epsilon a random action
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
        kl_coef: float = 0.03,
        ent_coef: float = 0.003,
        greedy_step: str = "indirect",
        regularised_evaluation: bool = True,
        target_update_interval: int = 10_000,
        exploration: str = "boltzmann_eps",
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
        self.kl_coef = kl_coef
        self.ent_coef = ent_coef
        self.greedy_step = greedy_step
        self.regularised_evaluation = regularised_evaluation
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        check_number("kl_coef", self.kl_coef, 0)
        check_number("ent_coef", self.ent_coef, 0)
        if self.kl_coef == self.ent_coef == 0:
            raise ValueError("kl_coef and ent_coef must not both be 0: pass a positive kl_coef or ent_coef, or use DQN")
        check_choice("greedy_step", self.greedy_step, GREEDY_STEPS)
        if self.greedy_step == "dual_averaging" and self.ent_coef == 0:
            raise ValueError(
                "ent_coef must be positive, not 0, with greedy_step='dual_averaging', whose policy is softmax(average / "
                "ent_coef): pass a positive ent_coef, or use MomentumDQN, which is its limit"
            )
        check_bool("regularised_evaluation", self.regularised_evaluation)
        # The temperature that the maximiser of the greedy step has
        self.temperature = self.kl_coef + self.ent_coef
        super()._check_arguments()

    @property
    def _momentum(self) -> float:
        """Weight of the previous policy in the greedy step."""
        return self.kl_coef / (self.kl_coef + self.ent_coef)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "temperature"]

    @property
    def _acting_temperature(self) -> operators.Temperature:
        return self.ent_coef if self.greedy_step == "dual_averaging" else 1.0

    def _targets_frozen(self) -> bool:
        return False  # the policy in the targets is the online one

    def _log_policy(self, logits: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
        """Log-probabilities of a policy network's output, -inf where an action is not valid."""
        log_policy = operators.scaled_log_policy(logits, self._acting_temperature, mask)
        return log_policy / self._acting_temperature

    def _estimates(self, observations: PyTorchObs) -> tuple[th.Tensor, ...]:
        # The new policy (the online network's), the previous one and the action values (the target networks')
        q_values, previous = self.layout.rows(self.q_net_target(observations))
        return self.layout.rows(self.q_net.networks[-1](observations)), previous, q_values

    def _online_estimates(self, observations: PyTorchObs) -> tuple[th.Tensor, ...]:
        _, previous = self.layout.rows(self.q_net_target(observations))
        q_values, logits = self.layout.rows(self.q_net(observations))
        return logits, previous, q_values

    def _policy_and_q_values(self, estimates: tuple[th.Tensor, ...], mask: th.Tensor | None) -> tuple[th.Tensor, th.Tensor]:
        return self._log_policy(estimates[0], mask).exp(), estimates[-1]

    def _value(self, estimates: tuple[th.Tensor, ...], mask: th.Tensor | None) -> th.Tensor:
        # V(s) = <pi, q> - kl_coef * KL(pi || previous pi) + ent_coef * H(pi) (arXiv:2003.14089, section 4)
        logits, previous, q_values = estimates
        log_policy = self._log_policy(logits, mask)
        value = operators.expectation(log_policy.exp(), q_values, mask)
        return value + self._penalties(log_policy, previous, mask) if self.regularised_evaluation else value

    def _penalties(self, log_policy: th.Tensor, previous: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
        """``ent_coef * H(pi) - kl_coef * KL(pi || previous pi)``, ``(n_rows, 1)``."""
        kl = operators.kl_divergence(log_policy, self._log_policy(previous, mask), mask)
        return -self.ent_coef * operators.expectation(log_policy.exp(), log_policy, mask) - self.kl_coef * kl

    def _compute_loss(self, replay_data: Any, targets: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        actions, mask = self.layout.action_rows(replay_data.actions), self._mask_rows(replay_data)
        q_values, logits = self.layout.rows(self.q_net(replay_data.observations))
        with th.no_grad():
            old_q_values, previous = self.layout.rows(self.q_net_target(replay_data.observations))
        current_q_values = self._taken(q_values, replay_data.actions)
        losses = F.smooth_l1_loss(current_q_values, targets, reduction="none")
        return losses + self._greedy_loss(logits, previous, old_q_values, q_values.detach(), actions, mask), logits.detach()

    def _greedy_loss(
        self,
        logits: th.Tensor,
        previous: th.Tensor,
        old_q_values: th.Tensor,
        q_values: th.Tensor,
        actions: th.Tensor,
        mask: th.Tensor | None,
    ) -> th.Tensor:
        """Loss of the policy's network, of the targets' shape."""
        if self.greedy_step == "dual_averaging":
            # h <- momentum * h + (1 - momentum) * q at the taken action, where h is the target network's
            average = self._momentum * previous + (1 - self._momentum) * q_values
            current, target = (self._joint(values.gather(1, actions)) for values in (logits, average))
            return F.smooth_l1_loss(current, target, reduction="none")
        log_policy = self._log_policy(logits, mask)
        if self.greedy_step == "direct":
            objective = operators.expectation(log_policy.exp(), old_q_values, mask)
            return -self._joint(objective + self._penalties(log_policy, previous, mask))
        # The maximiser is proportional to previous pi ** momentum * exp(q / (kl_coef + ent_coef))
        maximiser = self._maximiser(previous, old_q_values, mask)
        return -self._joint(operators.expectation(maximiser.exp(), log_policy, mask))

    def _maximiser(self, previous: th.Tensor, q_values: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
        """Log-probabilities of the policy that the greedy step is about."""
        log_previous = self._log_policy(previous, mask)
        if mask is not None:
            log_previous = log_previous.masked_fill(~mask, 0.0)  # before the product: 0 * -inf is no number
        return operators.scaled_log_policy(self._momentum * log_previous + q_values / self.current_temperature, 1.0, mask)
