"""Soft Q-learning with continuous actions."""

import math
from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, ReplayBufferSamples, Schedule
from torch.nn import functional as F

from sb3_softq import losses
from sb3_softq.actor_critic.base import ActorCriticAlgorithm
from sb3_softq.actor_critic.policies import CnnSoftQPolicy, MultiInputSoftQPolicy, SoftQPolicy, sampled_q_values
from sb3_softq.checks import check_choice, check_integer
from sb3_softq.replay import n_states
from sb3_softq.temperature import Temperature

PROPOSALS = ("uniform", "policy")

# Width of the kernels around the policy's particles that actions are proposed from, before these are squashed
PROPOSAL_STD = 0.5


class SoftQLearning(ActorCriticAlgorithm):
    """
    Soft Q-learning with continuous actions: the policy is ``exp(q / temperature)``, whatever its shape, by a network that
    learns to sample it.

    The critics' target is the soft value, an integral over the actions that is estimated by importance sampling. The
    sampling network turns noise into actions; amortised Stein variational gradient descent moves these towards the policy
    and apart from each other, so that it can keep several modes.
    Haarnoja et al. 2017 (arXiv:1702.08165).

    Parameters not described here are those of :class:`stable_baselines3.SAC`.

    :param policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` or a policy class
    :param env: the environment, with a Box action space (a registered name works too)
    :param temperature: weight of the entropy in the unit of the rewards (the inverse of the paper's reward scale): a
        positive number, a schedule as rl-zoo3 writes it (``"lin_0.1"``), or a callable of the remaining progress
    :param n_fixed_particles: actions in each state that the Stein direction is estimated from, at least 2
    :param n_updated_particles: actions in each state that it moves
    :param n_value_particles: actions in each next state that the soft value is estimated from
    :param value_proposal: where these come from: ``"uniform"`` over the range of the actions, which suits few dimensions,
        or ``"policy"``, from Gaussian kernels around particles of the policy
    :param target_update_interval: updates between two of the target network
    :raises ValueError: for an argument or a space that the algorithm cannot use
    :raises TypeError: for an argument of the wrong type
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": SoftQPolicy,
        "CnnPolicy": CnnSoftQPolicy,
        "MultiInputPolicy": MultiInputSoftQPolicy,
    }
    policy: SoftQPolicy

    def __init__(
        self,
        policy: str | type[SoftQPolicy],
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
        temperature: float | str | Schedule = 0.1,
        n_fixed_particles: int = 8,
        n_updated_particles: int = 8,
        n_value_particles: int = 16,
        value_proposal: str = "uniform",
        target_update_interval: int = 1,
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
        self.temperature = temperature
        self.n_fixed_particles = n_fixed_particles
        self.n_updated_particles = n_updated_particles
        self.n_value_particles = n_value_particles
        self.value_proposal = value_proposal
        self.target_update_interval = target_update_interval
        if _init_setup_model:
            self._setup_model()

    # ------------------------------------------------------------------ setting up, saving

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_integer("n_fixed_particles", self.n_fixed_particles, 2)
        check_integer("n_updated_particles", self.n_updated_particles, 1)
        check_integer("n_value_particles", self.n_value_particles, 1)
        check_choice("value_proposal", self.value_proposal, PROPOSALS)
        if not isinstance(self.temperature, str) and self.temperature == 0:
            raise ValueError("temperature must be positive, not 0: a policy without entropy is that of stable_baselines3.TD3")

    def _setup_model(self) -> None:
        super()._setup_model()
        self._temperature_module = Temperature(self.temperature, learnable=False)
        self._temperature_module.update(self._current_progress_remaining)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_temperature_module"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.actor.optimizer", "policy.critic.optimizer"], []

    @property
    def current_temperature(self) -> float:
        """The temperature now; just above 0 where a schedule ends at 0."""
        return max(float(self._temperature_module.value), 1e-6)

    # ------------------------------------------------------------------ learning

    def _on_step(self) -> None:
        self._temperature_module.update(self._current_progress_remaining)

    def _optimizers(self) -> list[th.optim.Optimizer]:
        return [self.policy.actor.optimizer, self.policy.critic.optimizer]

    def _update_targets(self) -> None:
        self._move_target(self.policy.critic, self.policy.critic_target)

    def _update(self, replay_data: ReplayBufferSamples) -> dict[str, th.Tensor]:
        with th.no_grad():
            next_values, metrics = self._soft_values(replay_data.next_observations)
            targets = self._bellman_target(replay_data, next_values)
        current_q_values = th.stack(self.policy.critic(replay_data.observations, replay_data.actions))
        critic_loss = 0.5 * F.mse_loss(current_q_values, targets.expand_as(current_q_values)) * len(current_q_values)
        quantities = {"values_of_the_next_states": next_values, "action_values": current_q_values, "targets": targets}
        self._optimize(self.policy.critic.optimizer, critic_loss, replay_data, **quantities)

        particles, directions = self._stein(replay_data.observations)
        # Descent on this moves the particles along their directions
        actor_loss = -(directions * particles).sum(dim=2).mean()
        self._optimize(self.policy.actor.optimizer, actor_loss, replay_data, stein_directions=directions, **quantities)
        return {
            "critic_loss": critic_loss.detach(),
            "actor_loss": actor_loss.detach(),
            "temperature": th.as_tensor(self.current_temperature, device=self.device),
            "q_value_mean": current_q_values.detach().mean(),
            "stein_norm": directions.norm(dim=2).mean(),
            "particle_std": particles.detach().tanh().std(dim=1, correction=0).mean(),
            **metrics,
        }

    def _soft_values(self, observations: PyTorchObs) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """Importance-sampled soft values of the target critics ``(batch_size, 1)``, and what to log; without gradients."""
        actions, log_densities = self._propose(observations)
        q_values = sampled_q_values(self.policy.critic_target, observations, actions).amin(dim=0)
        weights = th.softmax(q_values / self.current_temperature - log_densities, dim=1)
        metrics = {"effective_samples": (1 / weights.square().sum(dim=1)).mean()}
        return losses.sampled_soft_value(q_values, log_densities, self.current_temperature), metrics

    def _propose(self, observations: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """
        Actions to estimate the soft value from.

        :param observations: states
        :return: actions ``(batch_size, n_value_particles, action_dim)``, and the logs of the densities they come from
            ``(batch_size, n_value_particles)``
        """
        actor = self.policy.actor
        noise = actor.draw_noise(n_states(observations), self.n_value_particles)
        if self.value_proposal == "uniform":
            actions = th.empty_like(noise).uniform_(-1, 1)
            return actions, th.full_like(actions[..., 0], -actor.noise_dim * math.log(2))
        # One draw from each kernel, as good as independent ones of their mixture, whose density is known
        centers = actor(observations, noise)
        particles = centers + PROPOSAL_STD * th.randn_like(centers)
        distances = (particles.unsqueeze(2) - centers.unsqueeze(1)).square().sum(dim=3) / PROPOSAL_STD**2
        log_kernels = -0.5 * distances - actor.noise_dim * math.log(PROPOSAL_STD * math.sqrt(2 * math.pi))
        log_densities = th.logsumexp(log_kernels, dim=2) - math.log(self.n_value_particles)
        return particles.tanh(), log_densities - losses.squash_log_det(particles)

    def _stein(self, observations: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """
        Particles of the policy before they are squashed, with gradients, and the Stein directions to move them along.

        :param observations: states
        :return: twice ``(batch_size, n_updated_particles, action_dim)``
        """
        actor = self.policy.actor
        n_rows = n_states(observations)
        with th.no_grad():
            fixed = actor(observations, actor.draw_noise(n_rows, self.n_fixed_particles))
        fixed.requires_grad_()
        q_values = sampled_q_values(self.policy.critic, observations, fixed.tanh()).amin(dim=0)
        # Density of the policy before squashing, where it has no edges
        log_density = q_values / self.current_temperature + losses.squash_log_det(fixed)
        (scores,) = th.autograd.grad(log_density.sum(), fixed)
        updated = actor(observations, actor.draw_noise(n_rows, self.n_updated_particles))
        return updated, losses.stein_direction(fixed.detach(), scores, updated.detach())
