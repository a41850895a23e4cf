"""Munchausen SAC."""

import math
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, ReplayBufferSamples, Schedule
from stable_baselines3.common.utils import polyak_update
from stable_baselines3.sac.policies import SACPolicy
from torch.nn import functional as F

from sb3_softq.actor_critic.base import ActorCriticAlgorithm
from sb3_softq.checks import check_number
from sb3_softq.diagnostics import name_divergence


class MunchausenSAC(ActorCriticAlgorithm, SAC):
    """
    SB3's SAC whose reward carries the scaled log-policy of the replayed action.

    As in :class:`~sb3_softq.MunchausenDQN`, that term regularises the policy towards the previous one. Here it is a
    log-density, without an upper bound, and very low at the ends of the action range: both bounds of its clip are needed.
    After Vieillard, Pietquin and Geist 2020 (arXiv:2007.14430), which has discrete actions only.

    Parameters not described here are those of :class:`stable_baselines3.SAC`.

    :param policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` or a policy class
    :param env: the environment, with a Box action space (a registered name works too)
    :param munchausen_alpha: weight of the scaled log-policy, between 0 (SB3's SAC, to the last bit) and 1
    :param munchausen_clip: bounds of the scaled log-policy ``ent_coef * log pi(a|s)`` before it is weighted: a pair, the
        lower one at most 0 and the upper at least 0, or the lower alone, with an upper one of 0. Infinities for none
    :raises ValueError: for an argument or a space that the algorithm cannot use
    :raises TypeError: for an argument of the wrong type
    """

    def __init__(
        self,
        policy: str | type[SACPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        ent_coef: str | float = "auto",
        munchausen_alpha: float = 0.9,
        munchausen_clip: float | tuple[float, float] = (-1.0, 1.0),
        target_update_interval: int = 1,
        target_entropy: str | float = "auto",
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        use_sde_at_warmup: bool = False,
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
            ent_coef,
            target_update_interval,
            target_entropy,
            use_sde,
            sde_sample_freq,
            use_sde_at_warmup,
            stats_window_size,
            tensorboard_log,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        # SB3 writes into the dict that it gets
        self.policy_kwargs = {} if policy_kwargs is None else policy_kwargs
        self.munchausen_alpha = munchausen_alpha
        self.munchausen_clip = munchausen_clip
        if _init_setup_model:
            self._setup_model()

    # ------------------------------------------------------------------ setting up, saving

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_number("munchausen_alpha", self.munchausen_alpha, 0, 1)
        clip = self.munchausen_clip
        if isinstance(clip, (tuple, list)):
            if len(clip) != 2:
                raise ValueError(f"munchausen_clip must be a lower and an upper bound, not {clip!r}")
            check_number("the lower bound in munchausen_clip", clip[0], maximum=0, finite=False)
            check_number("the upper bound in munchausen_clip", clip[1], 0, finite=False)
        else:
            check_number("munchausen_clip", clip, maximum=0, finite=False)
        _check_auto("ent_coef", self.ent_coef, 0.0, initial=True)
        _check_auto("target_entropy", self.target_entropy, -math.inf, initial=False)

    def _setup_model(self) -> None:
        # What SB3's SAC writes into its arguments is taken out again: they stay as they were passed
        policy_kwargs, target_entropy = self.policy_kwargs, self.target_entropy
        self.policy_kwargs = {**policy_kwargs, "use_sde": self.use_sde}
        if target_entropy == "auto":  # which SB3 takes from the environment, and a loaded model may have none
            self.target_entropy = -float(np.prod(self.action_space.shape))  # type: ignore[arg-type]
        super()._setup_model()
        self._target_entropy = float(self.target_entropy)
        self.policy_kwargs, self.target_entropy = policy_kwargs, target_entropy
        clip = self.munchausen_clip
        self._clip_low, self._clip_high = clip if isinstance(clip, (tuple, list)) else (clip, 0.0)

    def _excluded_save_params(self) -> list[str]:
        derived = ["_target_entropy", "_clip_low", "_clip_high", "batch_norm_stats", "batch_norm_stats_target"]
        return [*super()._excluded_save_params(), *derived]

    # ------------------------------------------------------------------ learning

    def _optimizers(self) -> list[th.optim.Optimizer]:
        learned = [] if self.ent_coef_optimizer is None else [self.ent_coef_optimizer]
        return [self.actor.optimizer, self.critic.optimizer, *learned]

    def _targets_due(self, gradient_step: int) -> bool:
        return gradient_step % self.target_update_interval == 0  # SB3's SAC counts within a call

    def _update(self, replay_data: ReplayBufferSamples) -> dict[str, th.Tensor]:
        # The same operations on the same random numbers as in SB3's SAC, so that munchausen_alpha=0 is SB3's SAC
        if self.use_sde:
            self.actor.reset_noise()
        actions_pi, log_prob = self._act(replay_data.observations, replay_data)
        ent_coef = self.ent_coef_tensor if self.log_ent_coef is None else self.log_ent_coef.detach().exp()

        with th.no_grad():
            log_policy = self._scaled_log_policy(replay_data, ent_coef)
            targets = self._compute_targets(replay_data, ent_coef, log_policy)
        current_q_values = self.critic(replay_data.observations, replay_data.actions)
        critic_loss = th.as_tensor(0.5 * sum(F.mse_loss(current_q, targets) for current_q in current_q_values))
        quantities = {"action_values": th.cat(current_q_values), "targets": targets}
        self._optimize(self.critic.optimizer, critic_loss, replay_data, **quantities)

        q_values_pi = th.cat(self.critic(replay_data.observations, actions_pi), dim=1).min(dim=1, keepdim=True).values
        actor_loss = (ent_coef * log_prob - q_values_pi).mean()
        self._optimize(self.actor.optimizer, actor_loss, replay_data, log_policy=log_prob, action_values=q_values_pi)
        metrics = {
            "ent_coef": ent_coef.detach().reshape(()),
            "actor_loss": actor_loss.detach(),
            "critic_loss": critic_loss.detach(),
            "munchausen_term": log_policy.mean(),
            "munchausen_clip_fraction": ((log_policy <= self._clip_low) | (log_policy >= self._clip_high)).float().mean(),
            "entropy": -log_prob.detach().mean(),
            "q_value_mean": q_values_pi.detach().mean(),
        }
        if self.ent_coef_optimizer is not None:
            metrics["ent_coef_loss"] = self._update_ent_coef(log_prob.detach(), replay_data)
        return metrics

    def _act(self, observations: PyTorchObs, replay_data: ReplayBufferSamples) -> tuple[th.Tensor, th.Tensor]:
        """Actions of the policy, and their log-densities ``(batch_size, 1)``."""
        try:
            actions, log_prob = self.actor.action_log_prob(observations)
        except ValueError as error:  # torch's distributions refuse what is not finite
            broken = {"policy": th.tensor(math.nan)}
            raise name_divergence(replay_data, broken, self._n_updates, self.num_timesteps) from error
        return actions, log_prob.reshape(-1, 1)

    def _scaled_log_policy(self, replay_data: ReplayBufferSamples, ent_coef: th.Tensor) -> th.Tensor:
        """``ent_coef * log pi(a|s)`` of the replayed actions, clipped; the actor has just been evaluated at s."""
        log_prob = self.actor.action_dist.log_prob(replay_data.actions)
        return (ent_coef * log_prob.reshape(-1, 1)).clamp(self._clip_low, self._clip_high)

    def _compute_targets(self, replay_data: ReplayBufferSamples, ent_coef: th.Tensor, log_policy: th.Tensor) -> th.Tensor:
        # r + alpha * clip(T log pi(a|s)) + gamma * (min_i Q_i(s', a') - T log pi(a'|s')), a' from the policy
        next_actions, next_log_prob = self._act(replay_data.next_observations, replay_data)
        next_q_values = th.cat(self.critic_target(replay_data.next_observations, next_actions), dim=1)
        next_values = next_q_values.min(dim=1, keepdim=True).values - ent_coef * next_log_prob
        return self._bellman_target(replay_data, next_values) + self.munchausen_alpha * log_policy

    def _update_ent_coef(self, log_prob: th.Tensor, replay_data: ReplayBufferSamples) -> th.Tensor:
        # After the networks, which use the value before: an update that breaks off has changed nothing
        assert self.log_ent_coef is not None and self.ent_coef_optimizer is not None
        loss = -(self.log_ent_coef * (log_prob + self._target_entropy)).mean()
        self._optimize(self.ent_coef_optimizer, loss, replay_data, log_policy=log_prob)
        return loss.detach()

    def _update_targets(self) -> None:
        polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)
        polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)


def _check_auto(name: str, value: str | float, minimum: float, initial: bool) -> None:
    """Raise unless ``value`` is a number or, as SB3's SAC takes it, ``"auto"`` or, with ``initial``, ``"auto_0.1"``."""
    if isinstance(value, str) and value != "auto":
        try:
            number = float(value.removeprefix("auto_") if initial else value)
        except ValueError:
            forms = "a number, 'auto' or like 'auto_0.1'" if initial else "a number or 'auto'"
            raise ValueError(f"{name} must be {forms}, not {value!r}") from None
        is_initial = value.startswith("auto_")
        check_number(f"the initial value in {name}" if is_initial else name, number, minimum, positive=is_initial)
    elif not isinstance(value, str):
        check_number(name, value, minimum)
