"""The value-based family: everything that its algorithms have in common."""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, ReplayBufferSamples, Schedule
from stable_baselines3.common.utils import LinearSchedule, get_parameters_by_name, polyak_update
from torch.nn import functional as F

from sb3_softq import operators
from sb3_softq.checks import check_bool, check_choice, check_integer, check_number
from sb3_softq.compiled import CompiledTraining
from sb3_softq.diagnostics import find_divergence, policy_statistics
from sb3_softq.flat import FlatUpdater, Updater
from sb3_softq.off_policy import RegularisedAlgorithm
from sb3_softq.replay import GrowingStorage, split_samples
from sb3_softq.temperature import Temperature
from sb3_softq.value_based.policies import CnnQPolicy, MultiInputQPolicy, QNetwork, QPolicy, is_vector_space

# Memory of the minibatches that are sampled at once: a few of Atari's, hundreds of a classic control task's
CHUNK_BYTES = 2**23

# Updates between two reports to the logger: the statistics cost as much as a third of a small network's update
REPORT_INTERVAL = 16

EXPLORATIONS = ("boltzmann", "eps_greedy", "boltzmann_eps")


class ValueBasedAlgorithm(RegularisedAlgorithm):
    """
    Base of the algorithms that learn action values and act on them.

    An algorithm is its :meth:`_compute_targets`, and :meth:`_compute_loss` where it differs. This class owns the rest:
    sampling, the optimiser step, gradient clipping, target networks, exploration, logging, the guard against divergence
    and saving.

    Parameters not described here are those of :class:`stable_baselines3.DQN`.

    :param policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` or a policy class
    :param env: the environment, with a Discrete action space (a registered name works too)
    :param buffer_size: number of transitions to keep; storage grows as it fills
    :param tau: Polyak coefficient of the target network's update (1 copies), not a temperature
    :param n_steps: length of the returns. The rewards are summed; the bonuses of the regularisation enter at the first
        step and the bootstrap only, as in the published codes
    :param temperature: weight of the entropy in the unit of the rewards: a number, a schedule as rl-zoo3 writes it
        (``"lin_0.1"`` falls linearly to 0), or a callable of the remaining progress
    :param target_update_interval: environment steps between two updates of the target network
    :param exploration: how the agent acts while it trains: ``"boltzmann"`` samples its own policy, ``"eps_greedy"`` takes the
        best action but with probability epsilon a random one, drawn independently for each environment, and
        ``"boltzmann_eps"`` replaces the best action by a sample
    :param exploration_fraction: fraction of the training over which epsilon falls
    :param exploration_initial_eps: initial epsilon
    :param exploration_final_eps: final epsilon
    :param max_grad_norm: largest norm of a gradient
    :param torch_compile: whether to compile the updates (``torch.compile``; needs a C++ compiler). The first updates wait
        for the compiler, the later ones are several times faster; where it cannot be used, a warning says why
    :param target_entropy: what a learned temperature aims at, see :func:`~sb3_softq.temperature.entropy_target`
    :raises ValueError: for an argument or a space that the algorithm cannot use
    :raises TypeError: for an argument of the wrong type
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": QPolicy,
        "CnnPolicy": CnnQPolicy,
        "MultiInputPolicy": MultiInputQPolicy,
    }
    # Whether temperature="auto" is possible
    learns_temperature: ClassVar[bool] = False
    # Whether updates run on flat tensors where they can; the plain path is there to compare with
    flat_parameters: ClassVar[bool] = True

    exploration_schedule: Schedule
    policy: QPolicy
    q_net: QNetwork
    q_net_target: QNetwork

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
        temperature: float | str | Schedule = 0.03,
        target_update_interval: int = 10_000,
        exploration: str = "boltzmann",
        exploration_fraction: float = 0.1,
        exploration_initial_eps: float = 1.0,
        exploration_final_eps: float = 0.05,
        max_grad_norm: float = 10,
        torch_compile: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        target_entropy: float | str = "auto",
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
        self.target_entropy = target_entropy
        self.target_update_interval = target_update_interval
        self.exploration = exploration
        self.exploration_fraction = exploration_fraction
        self.exploration_initial_eps = exploration_initial_eps
        self.exploration_final_eps = exploration_final_eps
        self.max_grad_norm = max_grad_norm
        self.torch_compile = torch_compile
        # "epsilon" for the epsilon-greedy exploration
        self.exploration_rate = 0.0
        # Calls of env.step(), for the target network's updates
        self._n_calls = 0

    # ------------------------------------------------------------------ setting up, saving

    def _check_arguments(self) -> None:
        """Raise for what the algorithm cannot use. Called whenever the model is set up, also after loading."""
        if not isinstance(self.action_space, spaces.Discrete):
            raise ValueError(
                f"{type(self).__name__} takes Discrete actions, not action_space={self.action_space}: "
                "for Box actions use an actor-critic algorithm, such as stable_baselines3.SAC"
            )
        if self.action_space.start != 0:
            raise ValueError(f"{type(self).__name__} takes Discrete actions from 0 on, not action_space={self.action_space}")
        super()._check_arguments()
        check_integer("target_update_interval", self.target_update_interval, 1)
        check_choice("exploration", self.exploration, EXPLORATIONS)
        check_number("exploration_fraction", self.exploration_fraction, 0, 1, positive=True)
        check_number("exploration_initial_eps", self.exploration_initial_eps, 0, 1)
        check_number("exploration_final_eps", self.exploration_final_eps, 0, 1)
        check_bool("torch_compile", self.torch_compile)
        check_number("max_grad_norm", self.max_grad_norm, positive=True, finite=False)
        if self.exploration == "boltzmann" and not isinstance(self.temperature, str) and self.temperature == 0:
            raise ValueError(
                "temperature must be positive, not 0, with exploration='boltzmann', which would never explore: "
                "pass a positive temperature or exploration='eps_greedy'"
            )

    def _setup_model(self) -> None:
        super()._setup_model()
        self._create_aliases()
        self._updater: Updater | None = None
        # Losses and gradient norms since the last report
        self._losses: list[tuple[th.Tensor, th.Tensor]] = []
        self._next_report = 0
        self._compiled = CompiledTraining(self)
        # Shape of the observations that need no preprocessing; no shape is equal to None
        self._vector_shape = self.observation_space.shape if is_vector_space(self.observation_space) else None
        # Running statistics of batch norm, which the target network copies
        self.batch_norm_stats = get_parameters_by_name(self.q_net, ["running_"])
        self.batch_norm_stats_target = get_parameters_by_name(self.q_net_target, ["running_"])
        self.exploration_schedule = LinearSchedule(
            self.exploration_initial_eps, self.exploration_final_eps, self.exploration_fraction
        )
        self.temperature_module = Temperature(
            self.temperature,
            self.target_entropy,
            int(self.action_space.n),  # type: ignore[attr-defined]
            self.lr_schedule(1),
            learnable=self.learns_temperature,
        ).to(self.device)
        self.temperature_module.update(self._current_progress_remaining)

    def _create_aliases(self) -> None:
        self.q_net = self.policy.q_net  # type: ignore[assignment]
        self.q_net_target = self.policy.q_net_target  # type: ignore[assignment]

    def _excluded_save_params(self) -> list[str]:
        derived = ["q_net", "q_net_target", "batch_norm_stats", "batch_norm_stats_target", "exploration_schedule"]
        derived += ["temperature_module", "_updater", "_vector_shape", "_losses", "_next_report", "_compiled"]
        return [*super()._excluded_save_params(), *derived]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer", *self.temperature_module.torch_names("temperature_module")], []

    def set_parameters(self, load_path_or_dict: Any, exact_match: bool = True, device: th.device | str = "auto") -> None:
        if exact_match and isinstance(load_path_or_dict, dict) and "policy.optimizer" in load_path_or_dict:
            saved = any(name.startswith("temperature_module") for name in load_path_or_dict)
            if saved != self.temperature_module.learned:
                raise ValueError(
                    f"temperature={self.temperature!r} is {'not ' if saved else ''}learned, but that of the parameters is"
                    f"{'' if saved else ' not'}: pass the kind of temperature that was saved"
                )
        super().set_parameters(load_path_or_dict, exact_match, device)

    # ------------------------------------------------------------------ acting

    @property
    def current_temperature(self) -> operators.Temperature:
        """The temperature now: a number, or, where it is learned, a tensor without dimensions."""
        return self.temperature_module.value

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Actions for observations: the best ones, or, if not ``deterministic``, as the agent explores.

        :param observation: one observation, or one per environment
        :param state: not used, for recurrent policies
        :param episode_start: not used, for recurrent policies
        :param deterministic: whether to take the action of the highest value
        :return: the actions, and ``state`` as it came
        """
        q_values, vectorized_env = self._act_on(observation)
        if deterministic or self.exploration == "eps_greedy":
            actions = q_values.argmax(dim=1).cpu().numpy()
        else:
            actions = self._sample_policy(q_values).cpu().numpy()
        if not deterministic and self.exploration != "boltzmann":
            for i in np.flatnonzero(np.random.rand(len(actions)) < self.exploration_rate):
                actions[i] = self.action_space.sample()
        return (actions if vectorized_env else actions.squeeze(axis=0)), state

    def _act_on(self, observation: np.ndarray | dict[str, np.ndarray]) -> tuple[th.Tensor, bool]:
        """Action values of observations, without gradients, and whether there was a dimension for the environments."""
        if isinstance(observation, tuple):
            raise ValueError(
                "The observation is a tuple. With Gymnasium, reset() returns (observation, info): "
                "write `obs, info = env.reset()`, and pass obs"
            )
        self.policy.set_training_mode(False)
        if isinstance(observation, np.ndarray) and observation.shape[1:] == self._vector_shape:
            # What obs_to_tensor() does for a batch of vectors, less the copies
            obs_tensor: PyTorchObs = th.as_tensor(np.require(observation, requirements="W"), device=self.device)
            vectorized_env = True
        else:
            obs_tensor, vectorized_env = self.policy.obs_to_tensor(observation)
        with th.no_grad():
            return self.policy.q_values(obs_tensor), vectorized_env

    def _sample_policy(self, q_values: th.Tensor) -> th.Tensor:
        """Actions drawn from the Boltzmann policy, by adding Gumbel noise to the logits; ``(batch_size,)``."""
        # argmax(q + temperature * gumbel) needs no division: at temperature 0 it is the greedy action
        gumbel = -th.empty_like(q_values).exponential_().log()
        return (q_values + self.current_temperature * gumbel).argmax(dim=1)

    def _evaluate(self, observation: np.ndarray | dict[str, np.ndarray], function: Any) -> np.ndarray:
        q_values, vectorized_env = self._act_on(observation)
        result = function(q_values, self.current_temperature).cpu().numpy()
        return result if vectorized_env else result[0]

    def q_values(self, observation: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
        """
        Action values that the agent acts on.

        :param observation: one observation, or one per environment
        :return: ``(n_actions,)``, or ``(n_observations, n_actions)``
        """
        return self._evaluate(observation, lambda q_values, temperature: q_values)

    def action_probs(self, observation: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
        """
        Probabilities of the Boltzmann policy at the current temperature, without epsilon.

        :param observation: one observation, or one per environment
        :return: ``(n_actions,)``, or ``(n_observations, n_actions)``
        """
        return self._evaluate(observation, operators.policy)

    def soft_value(self, observation: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
        """
        Values of states, entropy included: :func:`sb3_softq.operators.soft_value` of the action values.

        :param observation: one observation, or one per environment
        :return: ``()``, or ``(n_observations,)``
        """
        return self._evaluate(observation, lambda *args: operators.soft_value(*args).squeeze(1))

    # ------------------------------------------------------------------ collecting

    def _on_step(self) -> None:
        """Update the target network and the schedules; called after each step in the environments."""
        self._n_calls += 1
        # Each call to step() corresponds to n_envs transitions
        if self._n_calls % max(self.target_update_interval // self.n_envs, 1) == 0:
            self._get_updater().update_target(self.tau)
            polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)
        if not self.temperature_module.constant:
            self.temperature_module.update(self._current_progress_remaining)
        self.exploration_rate = self.exploration_schedule(self._current_progress_remaining)
        if self.exploration != "boltzmann":
            self.logger.record("rollout/exploration_rate", self.exploration_rate)

    # ------------------------------------------------------------------ learning

    def _target_q_values(self, replay_data: ReplayBufferSamples) -> tuple[th.Tensor, th.Tensor]:
        """The target network's action values at s and s', of one pass through it; ``(batch_size, n_actions)`` each."""
        observations, next_observations = replay_data.observations, replay_data.next_observations
        if isinstance(observations, dict):
            both: Any = {key: th.cat([observations[key], next_observations[key]]) for key in observations}  # type: ignore[index,call-overload]
        else:
            both = th.cat([observations, next_observations])
        q_values, next_q_values = self.q_net_target(both).chunk(2)
        return q_values, next_q_values

    def _compute_targets(self, replay_data: ReplayBufferSamples) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        Regression targets of the taken actions; called without gradients.

        :param replay_data: a minibatch
        :return: targets ``(batch_size, 1)``, and what to log of them, as tensors without dimensions
        """
        raise NotImplementedError

    def _compute_loss(self, replay_data: ReplayBufferSamples, targets: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Loss of each sample: Huber, as in SB3's DQN.

        :param replay_data: a minibatch
        :param targets: what :meth:`_compute_targets` returned, ``(batch_size, 1)``
        :return: losses ``(batch_size, 1)``, and the action values that the agent acts on, ``(batch_size, n_actions)``
        """
        q_values = self.q_net(replay_data.observations)
        current_q_values = q_values.gather(1, replay_data.actions)
        return F.smooth_l1_loss(current_q_values, targets, reduction="none"), q_values.detach()

    def _bellman_target(
        self, replay_data: ReplayBufferSamples, next_values: th.Tensor, bonus: th.Tensor | float = 0.0
    ) -> th.Tensor:
        """``rewards + bonus + discount * (1 - done) * next_values``, for one-step and n-step minibatches."""
        discounts = self.gamma if replay_data.discounts is None else replay_data.discounts
        return operators.bellman_target(replay_data.rewards + bonus, replay_data.dones, discounts, next_values)

    def _targets_frozen(self) -> bool:
        """Whether targets stay as they are while :meth:`train` runs, so that all of a call can be computed together."""
        return not self.temperature_module.learned

    def _minibatches(
        self, gradient_steps: int, batch_size: int
    ) -> Iterator[tuple[ReplayBufferSamples, th.Tensor, dict[str, th.Tensor]]]:
        """
        The minibatches of a call of :meth:`train`, with their targets and what to log of these.

        Our own buffers are sampled for many minibatches at once, and frozen targets are computed for them together.
        """
        assert self.replay_buffer is not None
        at_once = self.batches_at_once(batch_size)
        for start in range(0, gradient_steps, at_once):
            n_batches = min(at_once, gradient_steps - start)
            samples = self.replay_buffer.sample(n_batches * batch_size, env=self._vec_normalize_env)
            minibatches = split_samples(samples, n_batches)
            if self._targets_frozen():
                with th.no_grad():
                    targets, metrics = self._compute_targets(samples)
                for minibatch, minibatch_targets in zip(minibatches, targets.chunk(n_batches), strict=True):
                    yield minibatch, minibatch_targets, metrics
            else:
                for minibatch in minibatches:
                    with th.no_grad():
                        targets, metrics = self._compute_targets(minibatch)
                    yield minibatch, targets, metrics

    def batches_at_once(self, batch_size: int) -> int:
        """
        Number of minibatches to sample together: many where they are small; a user's own buffer is asked for each.

        :param batch_size: size of a minibatch
        """
        if not isinstance(self.replay_buffer, GrowingStorage):
            return 1
        return max(1, CHUNK_BYTES // (batch_size * self.replay_buffer.transition_bytes))

    def _get_updater(self) -> Updater:
        """What applies gradients and updates the target network: on flat tensors where these can serve."""
        if self._updater is None or self._updater.optimizer is not self.policy.optimizer or not self._updater.intact():
            flat = self.flat_parameters and FlatUpdater.possible(self.q_net, self.q_net_target, self.policy.optimizer)
            self._updater = (FlatUpdater if flat else Updater)(self.q_net, self.q_net_target, self.policy.optimizer)
        return self._updater

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        updater = self._get_updater()
        if self.torch_compile and (gradient_steps := self._compiled.train(updater, gradient_steps, batch_size)) == 0:
            return

        for replay_data, targets, target_metrics in self._minibatches(gradient_steps, batch_size):  # noqa: B007
            sample_losses, q_values = self._compute_loss(replay_data, targets)
            loss = sample_losses.mean()
            grad_norm = updater.backward(loss, self.max_grad_norm)
            if not math.isfinite(loss.item() + grad_norm.item()):
                raise find_divergence(replay_data, targets, q_values, loss, self._n_updates, self.num_timesteps)
            updater.step()
            self._n_updates += 1
            self._losses.append((loss.detach(), grad_norm))
            if self.temperature_module.learned:
                entropies = operators.entropy(q_values, self.current_temperature)
                self.temperature_module.learn(entropies, self.policy.optimizer.param_groups[0]["lr"])

        self._report(q_values, target_metrics)

    def _report(self, q_values: th.Tensor, target_metrics: dict[str, th.Tensor]) -> None:
        """Log the means since the last report, and statistics of the last minibatch, with one read from the device."""
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if self._n_updates < self._next_report:
            return
        self._next_report = self._n_updates + REPORT_INTERVAL
        losses, grad_norms = (th.cat([tensor.reshape(-1) for tensor in pieces]) for pieces in zip(*self._losses, strict=True))
        self._losses.clear()
        metrics = {
            "loss": losses.mean(),
            "grad_norm": grad_norms.mean(),
            **policy_statistics(q_values, self.current_temperature),
            **target_metrics,
        }
        for name, value in zip(metrics, th.stack(list(metrics.values())).tolist(), strict=True):
            self.logger.record(f"train/{name}", value)
