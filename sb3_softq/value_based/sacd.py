"""Discrete soft actor-critic."""

from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, Schedule

from sb3_softq import operators
from sb3_softq.checks import check_bool, check_number
from sb3_softq.value_based.base import ValueBasedAlgorithm
from sb3_softq.value_based.gap_increasing import check_munchausen, munchausen_bonus
from sb3_softq.value_based.policies import QNetworks, TwinActorCnnQPolicy, TwinActorMultiInputQPolicy, TwinActorQPolicy


class SACDiscrete(ValueBasedAlgorithm):
    """
    Soft actor-critic for discrete actions: a categorical actor, twin critics, exact expectations over the actions.

    Christodoulou 2019 (arXiv:1910.07207), with the options of Zhou et al. 2022, *Revisiting Discrete SAC* (arXiv:2209.10081),
    and the scaled log-policy of Munchausen in the reward (arXiv:2007.14430).

    Parameters not described here are those of :class:`~sb3_softq.value_based.base.ValueBasedAlgorithm`.

    :param tau: Polyak coefficient of the target networks' update, not a temperature
    :param ent_coef: weight of the entropy, as SB3's SAC writes it: ``"auto"`` (learned, from 1), ``"auto_0.1"`` (learned, from
        0.1), or a number
    :param target_entropy: entropy that a learned ``ent_coef`` aims at: nats, or ``"auto"`` / ``"auto_0.3"`` for a fraction of
        the log of the number of (valid) actions (``"auto"`` is 0.5: with the paper's 0.98 it diverges for two actions)
    :param target_update_interval: 1 by default, for the Polyak average
    :param entropy_penalty: weight of the squared difference between the policy's entropy and its entropy when the action was
        taken, stored at collection (0.5 in arXiv:2209.10081; of the uniform policy before ``learning_starts``, and without
        the epsilon of an ``exploration`` that has one); 0 for none
    :param average_q: whether the critics' average counts, in targets and for the actor, instead of their minimum
    :param q_clip: by how much an action value may move away from the target network's before its loss stops falling
        (0.5 in arXiv:2209.10081); ``inf`` for no limit
    :param munchausen_alpha: weight of the scaled log-policy in the reward, between 0 (none) and 1
    :param munchausen_clip: lower bound of the scaled log-policy before it is weighted, at most 0; ``-inf`` for none
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": TwinActorQPolicy,
        "CnnPolicy": TwinActorCnnQPolicy,
        "MultiInputPolicy": TwinActorMultiInputQPolicy,
    }
    learns_temperature = True
    temperature_name = "ent_coef"
    acts_on_q_values = False
    policy: TwinActorQPolicy
    q_net: QNetworks  # type: ignore[assignment]
    q_net_target: QNetworks  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[TwinActorQPolicy],
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
        ent_coef: float | str = "auto",
        target_entropy: float | str = "auto",
        entropy_penalty: float = 0.0,
        average_q: bool = False,
        q_clip: float = float("inf"),
        munchausen_alpha: float = 0.0,
        munchausen_clip: float = -1.0,
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
            target_entropy=target_entropy,
        )
        self.ent_coef = ent_coef
        self.entropy_penalty = entropy_penalty
        self.average_q = average_q
        self.q_clip = q_clip
        self.munchausen_alpha = munchausen_alpha
        self.munchausen_clip = munchausen_clip
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        if not isinstance(self.ent_coef, str):
            check_number("ent_coef", self.ent_coef, 0)
        elif self.ent_coef != "auto" and not self.ent_coef.startswith("auto_"):
            raise ValueError(f"ent_coef must be a number, 'auto' or like 'auto_0.1', not {self.ent_coef!r}")
        # The same thing under the name that SB3's SAC gives it. At 0 the actor still explores
        self.temperature = self.ent_coef or 1.0
        super()._check_arguments()
        self.temperature = self.ent_coef
        check_number("entropy_penalty", self.entropy_penalty, 0)
        check_bool("average_q", self.average_q)
        check_number("q_clip", self.q_clip, 0, finite=False)
        check_munchausen(self.munchausen_alpha, self.munchausen_clip)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "temperature"]

    @property
    def _acting_temperature(self) -> operators.Temperature:
        return 1.0  # the actor gives logits

    def _targets_frozen(self) -> bool:
        return False  # the actor in the targets is the online one

    def _extra_fields(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        if self.entropy_penalty == 0:
            return super()._extra_fields()
        return {**super()._extra_fields(), "entropies": ((self.layout.n_heads,), "float32")}

    def _pending(self) -> dict[str, Any]:
        if self.entropy_penalty == 0:
            return super()._pending()
        assert self._last_obs is not None
        values, _ = self._act_on(self._last_obs, self.policy.acting_values)
        rows, mask = self._acting_rows(values, self._flat_masks())
        # When the actions were drawn the steps of this call had not been counted
        if self.num_timesteps - self.n_envs < self.learning_starts:
            rows = rows * 0.0  # uniformly
        entropies = operators.entropy(rows, 1.0, mask).view(len(values), -1).cpu().numpy()
        return {**super()._pending(), "entropies": entropies}

    def _critics(self, q_values: th.Tensor) -> th.Tensor:
        """What counts of both critics' values, ``(2, n_rows, n_actions)``."""
        return q_values.mean(dim=0) if self.average_q else q_values.amin(dim=0)

    def _estimates(self, observations: PyTorchObs) -> tuple[th.Tensor, ...]:
        critics = self.layout.rows(self.q_net_target.networks_of(observations, slice(2)))
        return self.layout.rows(self.q_net.networks[-1](observations)), self._critics(critics)

    def _online_estimates(self, observations: PyTorchObs) -> tuple[th.Tensor, ...]:
        outputs = self.layout.rows(self.q_net(observations))
        return outputs[-1], self._critics(outputs[:-1])

    def _policy_and_q_values(self, estimates: tuple[th.Tensor, ...], mask: th.Tensor | None) -> tuple[th.Tensor, th.Tensor]:
        return operators.policy(estimates[0], 1.0, mask), estimates[-1]

    def _value(self, estimates: tuple[th.Tensor, ...], mask: th.Tensor | None) -> th.Tensor:
        # V(s) = sum_a pi(a|s) * (q(s, a) - ent_coef * log pi(a|s)) (arXiv:1910.07207, equation 10)
        value = operators.expectation(*self._policy_and_q_values(estimates, mask), mask)
        return value + self.current_temperature * operators.entropy(estimates[0], 1.0, mask)

    @property
    def _has_bonus(self) -> bool:
        return self.munchausen_alpha > 0

    def _bonus(
        self, estimates: tuple[th.Tensor, ...], actions: th.Tensor, mask: th.Tensor | None
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        # alpha * clip(ent_coef * log pi(a|s), clip, 0), of the action that was taken
        log_policy = operators.scaled_log_policy(estimates[0], 1.0, mask).gather(1, actions)
        log_policy = self._joint(self.current_temperature * log_policy)
        return munchausen_bonus(log_policy, self.munchausen_alpha, self.munchausen_clip)

    def _compute_loss(self, replay_data: Any, targets: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        mask = self._mask_rows(replay_data)
        outputs = self.layout.rows(self.q_net(replay_data.observations))
        q_values, logits = outputs[:-1], outputs[-1]
        taken = self._taken(q_values, replay_data.actions)  # (2, n_targets, 1)
        errors = (taken - targets) ** 2
        if self.q_clip < float("inf"):
            # The larger of the errors with and without the clip, for each sample (arXiv:2209.10081)
            with th.no_grad():
                old = self.layout.rows(self.q_net_target.networks_of(replay_data.observations, slice(2)))
                old_taken = self._taken(old, replay_data.actions)
            clipped = old_taken + (taken - old_taken).clamp(-self.q_clip, self.q_clip)
            errors = th.maximum(errors, (clipped - targets) ** 2)
        # The actor maximises sum_a pi(a|s) * (q(s, a) - ent_coef * log pi(a|s))
        actor_value = self._value((logits, self._critics(q_values.detach())), mask)
        actor_loss = self._joint(-actor_value)
        if self.entropy_penalty > 0:
            entropies = operators.entropy(logits, 1.0, mask)
            behaviour = replay_data.extras["entropies"].to(entropies.dtype).reshape(-1, 1)
            # The entropy of a joint policy is the sum of its heads'
            actor_loss = actor_loss + self.entropy_penalty * self._joint(behaviour - entropies) ** 2
        return errors.sum(dim=0) + actor_loss, logits.detach()
