"""Maximum a posteriori policy optimisation."""

import math
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, ReplayBufferSamples, Schedule
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from sb3_softq import losses
from sb3_softq.actor_critic.base import ActorCriticAlgorithm
from sb3_softq.actor_critic.policies import CnnMPOPolicy, MPOPolicy, MultiInputMPOPolicy, sampled_q_values
from sb3_softq.checks import check_bool, check_integer, check_number

# What is learned of a multiplier stays above the first of these, and the log of a temperature below the second
RAW_MIN, TEMPERATURE_LOG_MAX = -18.0, 18.0


class Multipliers(nn.Module):
    """
    Lagrange multipliers, positive, with their optimiser.

    Of a temperature the log is learned: it moves by a factor, whatever the scale of the rewards. The others, which weigh
    the policy's KL divergences, are the softplus of what is learned: where noise alone moves the policy by more than its
    bound, they rise by a constant step instead of without measure.

    :param initial: name -> (initial value, number of multipliers); the names of temperatures begin with "temperature"
    :param learning_rate: step size of what is learned
    """

    def __init__(self, initial: dict[str, tuple[float, int]], learning_rate: float) -> None:
        super().__init__()
        self.raw = nn.ParameterDict()
        for name, (value, size) in initial.items():
            # The inverse of softplus is log(exp(x) - 1), in a form that does not overflow
            raw = math.log(value) if self._is_temperature(name) else value + math.log(-math.expm1(-value))
            self.raw[name] = nn.Parameter(th.full((size,), raw))
        self.optimizer = th.optim.Adam(self.parameters(), lr=learning_rate)

    @staticmethod
    def _is_temperature(name: str) -> bool:
        return name.startswith("temperature")

    def __getitem__(self, name: str) -> th.Tensor:
        return self.raw[name].exp() if self._is_temperature(name) else F.softplus(self.raw[name])

    def clamp(self) -> None:
        """Keep what is learned within the range of floating-point numbers."""
        with th.no_grad():
            for name, raw in self.raw.items():
                raw.clamp_(RAW_MIN, TEMPERATURE_LOG_MAX if self._is_temperature(name) else None)


class PolicyEvaluation(NamedTuple):
    """
    What the target networks say of states.

    :param policy: mean and scale of a Gaussian, or the log-probabilities of all actions
    :param actions: drawn from the Gaussian ``(batch_size, n_action_samples, action_dim)``; all of Discrete ones are there
    :param q_values: of these actions, ``(batch_size, n_action_samples)`` or ``(batch_size, n_actions)``
    :param values: their mean under the policy, ``(batch_size, 1)``
    """

    policy: Any
    actions: th.Tensor | None
    q_values: th.Tensor
    values: th.Tensor


class MPO(ActorCriticAlgorithm):
    """
    Maximum a posteriori policy optimisation: the policy is fitted to its own actions, weighted by their values, within a
    bound on how far it moves.

    Each update evaluates actions of the old policy, gives them weights ``exp(q / temperature)`` (the E-step, its
    temperature learned so that the weights are ``epsilon`` nats from uniform), and maximises the weighted likelihood of
    the policy, with bounds on the KL divergence from the old one (the M-step). The old policy and the critics' targets
    are copied every ``target_update_interval`` updates. Box actions have a Gaussian, whose mean and covariance are bounded
    apart; Discrete ones a categorical policy, with exact expectations.
    Abdolmaleki et al. 2018 (arXiv:1806.06920, arXiv:1812.02256).

    Parameters not described here are those of :class:`stable_baselines3.SAC`.

    :param policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` or a policy class
    :param env: the environment, with a Box or a Discrete action space (a registered name works too)
    :param tau: Polyak coefficient of the targets' update: 1 copies
    :param n_steps: length of the returns; they are not corrected for the policy's changes unless ``retrace`` is set
    :param n_action_samples: actions drawn in each state; not used for Discrete actions
    :param epsilon: bound on the KL divergence of the weights from uniform ones, in nats: below ``log(n_action_samples)``
    :param epsilon_mean: bound on the KL divergence that the Gaussian's mean may cause between two copies
    :param epsilon_covariance: the same for its covariance
    :param epsilon_policy: the same for a categorical policy
    :param epsilon_penalty: bound on the KL divergence of the action penalty's weights
    :param per_dimension_kl: whether the bounds of mean and covariance are for each dimension of the actions, with a
        multiplier for each, instead of for their sum
    :param action_penalty: whether samples outside of the range of the actions, where they are clipped, lose weight
    :param init_temperature: where the temperatures start, in the unit of the values
    :param init_alpha: where the multipliers of the policy's KL divergences start
    :param dual_learning_rate: step size of the logs of temperatures, and of the multipliers (of their inverse softplus)
    :param retrace: whether returns over ``n_steps`` are corrected (Munos et al. 2016, arXiv:1606.02647), for which the
        log-probabilities of actions are stored
    :param target_update_interval: updates between two copies of the networks to their targets
    :param max_grad_norm: largest norm of a gradient
    :raises ValueError: for an argument or a space that the algorithm cannot use
    :raises TypeError: for an argument of the wrong type
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MPOPolicy,
        "CnnPolicy": CnnMPOPolicy,
        "MultiInputPolicy": MultiInputMPOPolicy,
    }
    action_spaces: ClassVar[tuple[type[spaces.Space], ...]] = (spaces.Box, spaces.Discrete)
    other_actions: ClassVar[str] = "wrap the environment so that it has one of them"

    policy: MPOPolicy
    multipliers: Multipliers

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
        n_action_samples: int = 20,
        epsilon: float = 0.1,
        epsilon_mean: float = 0.01,
        epsilon_covariance: float = 1e-3,
        epsilon_policy: float = 0.01,
        epsilon_penalty: float = 1e-3,
        per_dimension_kl: bool = False,
        action_penalty: bool = True,
        init_temperature: float = 1.0,
        init_alpha: float = 1.0,
        dual_learning_rate: float = 1e-2,
        retrace: bool = False,
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
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            sde_support=False,
            support_multi_env=True,
        )
        self.n_action_samples = n_action_samples
        self.epsilon = epsilon
        self.epsilon_mean = epsilon_mean
        self.epsilon_covariance = epsilon_covariance
        self.epsilon_policy = epsilon_policy
        self.epsilon_penalty = epsilon_penalty
        self.per_dimension_kl = per_dimension_kl
        self.action_penalty = action_penalty
        self.init_temperature = init_temperature
        self.init_alpha = init_alpha
        self.dual_learning_rate = dual_learning_rate
        self.retrace = retrace
        self.target_update_interval = target_update_interval
        self.max_grad_norm = max_grad_norm
        if _init_setup_model:
            self._setup_model()

    # ------------------------------------------------------------------ setting up, saving

    @property
    def is_discrete(self) -> bool:
        """Whether actions are enumerated instead of sampled."""
        return isinstance(self.action_space, spaces.Discrete)

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_integer("n_action_samples", self.n_action_samples, 2)
        for name in ("epsilon", "epsilon_mean", "epsilon_covariance", "epsilon_policy", "epsilon_penalty"):
            check_number(name, getattr(self, name), positive=True)
        for name in ("init_temperature", "init_alpha", "dual_learning_rate"):
            check_number(name, getattr(self, name), positive=True)
        for name in ("per_dimension_kl", "action_penalty", "retrace"):
            check_bool(name, getattr(self, name))
        check_number("max_grad_norm", self.max_grad_norm, positive=True, finite=False)
        self._check_epsilon()
        if self.per_dimension_kl and self.policy_kwargs.get("full_covariance"):
            raise ValueError(
                "per_dimension_kl=True needs independent actions: the KL divergence of a full covariance has no dimensions. "
                "Pass per_dimension_kl=False or policy_kwargs=dict(full_covariance=False)"
            )
        if self.retrace:
            self._check_retrace()

    def _check_epsilon(self) -> None:
        is_discrete = self.is_discrete
        n = int(self.action_space.n) if isinstance(self.action_space, spaces.Discrete) else self.n_action_samples
        if n > 1 and self.epsilon >= math.log(n):
            raise ValueError(
                f"epsilon must be below log({'n_actions' if is_discrete else 'n_action_samples'}) = log({n}) = "
                f"{math.log(n):.4g}, the KL divergence of all weight on one action, not {self.epsilon!r}"
            )

    def _check_retrace(self) -> None:
        if self.action_noise is not None:
            raise ValueError("retrace=True needs the log-probabilities of actions, which action_noise changes: pass None")
        if self.replay_buffer_class is not None:
            raise ValueError(
                f"retrace=True needs this package's replay buffer, not {self.replay_buffer_class.__name__}: "
                "pass replay_buffer_class=None"
            )

    def _setup_model(self) -> None:
        super()._setup_model()
        self.multipliers = Multipliers(self._initial_multipliers(), self.dual_learning_rate).to(self.device)

    def _initial_multipliers(self) -> dict[str, tuple[float, int]]:
        """Name -> (initial value, number)."""
        initial = {"temperature": (self.init_temperature, 1)}
        if self.is_discrete:
            return {**initial, "alpha_policy": (self.init_alpha, 1)}
        if self.action_penalty:
            initial["temperature_penalty"] = (self.init_temperature, 1)
        n = int(np.prod(self.action_space.shape)) if self.per_dimension_kl else 1  # type: ignore[arg-type]
        return {**initial, "alpha_mean": (self.init_alpha, n), "alpha_covariance": (self.init_alpha, n)}

    def _storage_options(self) -> dict[str, Any]:
        return dict(super()._storage_options(), keep_steps=self.retrace)

    def _extra_fields(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        if not self.retrace:
            return {}
        shape = () if self.is_discrete else (int(np.prod(self.action_space.shape)),)  # type: ignore[arg-type]
        # Actions before they were clipped to their range, and their log-probabilities
        return {"drawn_actions": (shape, np.float32), "log_probs": ((), np.float32)}

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "multipliers", "_drawn"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.actor.optimizer", "policy.critic.optimizer", "multipliers", "multipliers.optimizer"], []

    # ------------------------------------------------------------------ collecting, for Retrace

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        if not self.retrace:
            return super()._sample_action(learning_starts, action_noise, n_envs)
        if self.num_timesteps < learning_starts:
            actions, buffer_actions = super()._sample_action(learning_starts, action_noise, n_envs)
            # Uniform over the actions, or over the cube that they are scaled to
            log_volume = math.log(self.action_space.n) if self.is_discrete else buffer_actions[0].size * math.log(2)  # type: ignore[attr-defined]
            drawn, log_probs = buffer_actions, np.full(n_envs, -log_volume)
        else:
            drawn, log_probs = self._draw(n_envs)
            buffer_actions = drawn if self.is_discrete else drawn.clip(-1, 1)
            actions = drawn if self.is_discrete else self.policy.unscale_action(buffer_actions)
        flat = drawn.reshape(n_envs) if self.is_discrete else drawn.reshape(n_envs, -1)
        self._drawn = {"drawn_actions": flat, "log_probs": log_probs}
        return actions, buffer_actions

    def _draw(self, n_envs: int) -> tuple[np.ndarray, np.ndarray]:
        """Actions of the policy for the last observations, before they are clipped, and their log-probabilities."""
        assert self._last_obs is not None
        with th.no_grad():
            policy = self.policy.actor(self.policy.obs_to_tensor(self._last_obs)[0])
            if self.is_discrete:
                drawn = th.multinomial(policy.exp(), 1)
                log_probs = policy.gather(1, drawn)
            else:
                drawn = losses.gaussian_sample(policy[0], policy[1], 1)
                log_probs = losses.gaussian_log_prob(drawn, *policy)
        shape = (n_envs, *self.action_space.shape)  # type: ignore[misc]
        return drawn.cpu().numpy().reshape(shape), log_probs.flatten().cpu().numpy()

    def _pending(self) -> dict[str, np.ndarray]:
        return self._drawn if self.retrace else {}

    # ------------------------------------------------------------------ learning

    def _optimizers(self) -> list[th.optim.Optimizer]:
        return [self.policy.actor.optimizer, self.policy.critic.optimizer]

    def _update(self, replay_data: ReplayBufferSamples) -> dict[str, th.Tensor]:
        with th.no_grad():
            evaluation = self._evaluate(replay_data.next_observations)
            targets = self._compute_targets(replay_data, evaluation)
        # (n_critics, batch_size, 1)
        current_q_values = self._q_values_of(self.policy.critic, replay_data.observations, replay_data.actions)
        critic_loss = 0.5 * F.mse_loss(current_q_values, targets.expand_as(current_q_values)) * len(current_q_values)
        actor_loss, dual_loss, metrics = self._improve(replay_data.next_observations, evaluation)

        quantities = {"values_of_the_next_states": evaluation.q_values, "action_values": current_q_values, "targets": targets}
        self._optimize(self.policy.critic.optimizer, critic_loss, replay_data, **quantities)
        self._optimize(self.policy.actor.optimizer, actor_loss, replay_data, **quantities)
        self._optimize(self.multipliers.optimizer, dual_loss, replay_data, **quantities)
        self.multipliers.clamp()
        return {
            "critic_loss": critic_loss.detach(),
            "actor_loss": actor_loss.detach(),
            "dual_loss": dual_loss.detach(),
            "q_value_mean": evaluation.values.mean(),
            **metrics,
        }

    def _update_targets(self) -> None:
        self._move_target(self.policy.critic, self.policy.critic_target)
        self._move_target(self.policy.actor, self.policy.actor_target)

    # What the old policy is worth

    def _evaluate(self, observations: PyTorchObs) -> PolicyEvaluation:
        """Actions of the old policy and their values, of the target networks; called without gradients."""
        policy = self.policy.actor_target(observations)
        if self.is_discrete:
            q_values = self.policy.critic_target(observations).amin(dim=0)
            return PolicyEvaluation(policy, None, q_values, (policy.exp() * q_values).sum(dim=1, keepdim=True))
        actions = losses.gaussian_sample(policy[0], policy[1], self.n_action_samples)
        # The environment clips actions, and so do the critics
        q_values = sampled_q_values(self.policy.critic_target, observations, actions.clamp(-1, 1)).amin(dim=0)  # type: ignore[arg-type]
        return PolicyEvaluation(policy, actions, q_values, q_values.mean(dim=1, keepdim=True))

    def _q_values_of(self, critic: Any, observations: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """Values of taken actions, ``(n_critics, batch_size, 1)``."""
        if self.is_discrete:
            q_values = critic(observations)
            return q_values.gather(2, actions.expand(len(q_values), -1, -1))
        return th.stack(critic(observations, actions))

    def _log_probs_of(self, policy: Any, actions: th.Tensor) -> th.Tensor:
        """Log-probabilities of taken actions, ``(batch_size, 1)``."""
        if self.is_discrete:
            return policy.gather(1, actions.long().reshape(-1, 1))
        return losses.gaussian_log_prob(actions.unsqueeze(1), *policy)

    def _compute_targets(self, replay_data: Any, evaluation: PolicyEvaluation) -> th.Tensor:
        """
        Regression targets of the taken actions; called without gradients.

        :param replay_data: a minibatch
        :param evaluation: of the next states
        :return: ``(batch_size, 1)``
        """
        steps = getattr(replay_data, "steps", None)
        if steps is None:
            # r + gamma * E_pi Q(s', .)
            return self._bellman_target(replay_data, evaluation.values)
        batch_size, n_steps = steps["rewards"].shape
        observations = tree_map(lambda tensor: tensor.flatten(0, 1), steps["observations"])
        later = self._evaluate(observations)
        log_ratios = self._log_probs_of(later.policy, steps["drawn_actions"].flatten(0, 1))
        log_ratios = log_ratios.reshape(batch_size, -1) - steps["log_probs"]
        critic = self.policy.critic_target
        q_values = self._q_values_of(critic, replay_data.observations, replay_data.actions).amin(dim=0)
        later_q_values = self._q_values_of(critic, observations, steps["actions"].flatten(0, 1)).amin(dim=0)
        # The state after a step is that of the next one, and after the last step of the segment the next state
        is_last = F.one_hot(steps["valid"].sum(dim=1) - 1, n_steps)
        next_values = F.pad(later.values.reshape(batch_size, -1), (0, 1)) * (1 - is_last) + evaluation.values * is_last
        return losses.retrace(
            steps["rewards"],
            self.gamma * (1 - replay_data.dones * is_last),
            th.cat([q_values, later_q_values.reshape(batch_size, -1)], dim=1),
            next_values,
            log_ratios,
            steps["valid"].to(q_values.dtype),
        )

    # A better policy, near the old one

    def _improve(
        self, observations: PyTorchObs, evaluation: PolicyEvaluation
    ) -> tuple[th.Tensor, th.Tensor, dict[str, th.Tensor]]:
        """
        E-step and M-step.

        :param observations: states to improve the policy in
        :param evaluation: of the old policy in these
        :return: losses of the actor and of the multipliers, and what to log
        """
        weights, dual_loss, metrics = self._e_step(evaluation)
        if self.is_discrete:
            old, new = evaluation.policy, self.policy.actor(observations)
            actor_loss = -(weights * new).sum(dim=1).mean()
            divergences = {"policy": ((old.exp() * (old - new)).sum(dim=1, keepdim=True), self.epsilon_policy)}
            metrics["entropy"] = -(new.detach().exp() * new.detach()).sum(dim=1).mean()
        else:
            assert evaluation.actions is not None
            (old_mean, old_scale), (mean, scale) = evaluation.policy, self.policy.actor(observations)
            actor_loss = losses.decoupled_cross_entropy(weights, evaluation.actions, evaluation.policy, (mean, scale))
            divergences = {
                "mean": (losses.gaussian_mean_kl(old_mean, old_scale, mean), self.epsilon_mean),
                "covariance": (losses.gaussian_covariance_kl(old_scale, scale), self.epsilon_covariance),
            }
            stds = scale.detach() if scale.ndim == 2 else scale.detach().norm(dim=2)
            metrics["std"] = stds.mean()
        for name, (kl, epsilon) in divergences.items():
            kl_of_dims = kl.mean(dim=0)
            if len(alpha := self.multipliers[f"alpha_{name}"]) == 1:
                kl_of_dims = kl_of_dims.sum(dim=0, keepdim=True)
            penalty, dual = losses.kl_penalty(kl_of_dims, alpha, epsilon)
            actor_loss, dual_loss = actor_loss + penalty, dual_loss + dual
            metrics |= {f"kl_{name}": kl_of_dims.detach().mean(), f"alpha_{name}": alpha.detach().mean()}
        return actor_loss, dual_loss, metrics

    def _e_step(self, evaluation: PolicyEvaluation) -> tuple[th.Tensor, th.Tensor, dict[str, th.Tensor]]:
        """Weights of the actions without gradients, the loss of the temperatures, and what to log."""
        weights, dual_loss, metrics = self._weights(evaluation)
        if evaluation.actions is not None:
            metrics["out_of_range"] = (evaluation.actions.abs() > 1).to(weights.dtype).mean()
            if self.action_penalty:
                temperature = self.multipliers["temperature_penalty"]
                costs = losses.out_of_range_cost(evaluation.actions)
                # Both improved policies are fitted
                weights = weights + losses.exponential_weights(costs, temperature.detach())
                dual_loss = dual_loss + losses.temperature_dual(costs, temperature, self.epsilon_penalty)
                metrics["temperature_penalty"] = temperature.detach().mean()
        return weights, dual_loss, metrics

    def _weights(self, evaluation: PolicyEvaluation) -> tuple[th.Tensor, th.Tensor, dict[str, th.Tensor]]:
        """Weights of the actions by their values, the loss of the temperature, and what to log."""
        temperature = self.multipliers["temperature"]
        fixed = temperature.detach()
        log_policy = evaluation.policy if self.is_discrete else None
        if log_policy is not None:
            weights = losses.categorical_weights(evaluation.q_values, log_policy, fixed)
        else:
            weights = losses.exponential_weights(evaluation.q_values, fixed)
        dual_loss = losses.temperature_dual(evaluation.q_values, temperature, self.epsilon, log_policy)
        return weights, dual_loss, {"temperature": fixed.mean(), "effective_samples": 1 / weights.square().sum(dim=1).mean()}
