"""The value-based family: everything that its algorithms have in common."""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, ReplayBufferSamples, Schedule
from stable_baselines3.common.utils import LinearSchedule, get_parameters_by_name, polyak_update
from stable_baselines3.common.vec_env import VecEnv
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from sb3_softq import operators
from sb3_softq.actions import (
    DISCRETE_SPACES,
    ActionLayout,
    TerminalActionMasks,
    action_masks,
    check_mask,
    check_valid,
    greedy_actions,
    has_action_masks,
)
from sb3_softq.checks import check_bool, check_choice, check_integer, check_number
from sb3_softq.compiled import CompiledTraining
from sb3_softq.diagnostics import find_divergence, policy_statistics
from sb3_softq.flat import FlatUpdater, Updater
from sb3_softq.off_policy import RegularisedAlgorithm
from sb3_softq.replay import GrowingStorage, Samples, n_states, split_samples
from sb3_softq.temperature import Temperature
from sb3_softq.traced import TracedTraining
from sb3_softq.value_based.n_step import concatenate, n_step_targets
from sb3_softq.value_based.policies import CnnQPolicy, MultiInputQPolicy, QNetwork, QPolicy, is_vector_space

# Memory of the minibatches that are sampled at once: a few of Atari's, hundreds of a classic control task's
CHUNK_BYTES = 2**23

# Updates between two reports to the logger: the statistics cost as much as a third of a small network's update
REPORT_INTERVAL = 64

EXPLORATIONS = ("boltzmann", "eps_greedy", "boltzmann_eps")
FACTORISATIONS = ("sum", "independent")


def _extras(samples: Any) -> dict[str, th.Tensor]:
    """The extras of samples; nothing for those of SB3's buffers, which have none."""
    return getattr(samples, "extras", None) or {}


class ValueBasedAlgorithm(RegularisedAlgorithm):
    """
    Base of the algorithms that learn action values and act on them.

    They share one target,

        ``r + bonus(s, a) + gamma * (1 - done) * V(s')``,

    and an algorithm is its :meth:`_value`, with :meth:`_bonus`, :meth:`_estimates` and :meth:`_compute_loss` where it has a
    bonus, other networks or another loss. This class owns the rest: n-step returns, heads of actions, masks, sampling, the
    optimiser step, gradient clipping, target networks, exploration, logging, the guard against divergence and saving.

    If the environment has a method ``action_masks()``, as sb3-contrib's MaskablePPO expects it, only valid actions are
    taken and enter the targets.

    Parameters not described here are those of :class:`stable_baselines3.DQN`.

    :param policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` or a policy class
    :param env: the environment, with a Discrete, MultiDiscrete or MultiBinary action space (a registered name works too)
    :param buffer_size: number of transitions to keep; storage grows as it fills
    :param tau: Polyak coefficient of the target network's update (1 copies), not a temperature
    :param n_steps: length of the returns
    :param n_step_bonus: whether the steps within an n-step return carry the entropy and the bonus that belong to them, or,
        as in the published codes and in SB3, only their reward
    :param tree_backup: whether n-step returns are corrected for actions that the current policy would not have taken, by
        its probabilities (tree backup, Precup et al. 2000); includes ``n_step_bonus``
    :param factorisation: of actions with several heads (MultiDiscrete, MultiBinary): ``"sum"``, the action value is the sum of
        the heads' values, or ``"independent"``, each head is an agent of its own with the same reward
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
    # What the constructor calls the temperature
    temperature_name: ClassVar[str] = "temperature"
    # Whether the agent acts on action values, not on another network
    acts_on_q_values: ClassVar[bool] = True
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
        n_step_bonus: bool = True,
        tree_backup: bool = False,
        temperature: float | str | Schedule = 0.03,
        target_update_interval: int = 10_000,
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
        self.n_step_bonus = n_step_bonus
        self.tree_backup = tree_backup
        self.factorisation = factorisation
        # "epsilon" for the epsilon-greedy exploration
        self.exploration_rate = 0.0
        # Calls of env.step(), for the target network's updates
        self._n_calls = 0

    # ------------------------------------------------------------------ setting up, saving

    def _check_arguments(self) -> None:
        """Raise for what the algorithm cannot use. Called whenever the model is set up, also after loading."""
        if not isinstance(self.action_space, DISCRETE_SPACES):
            raise ValueError(
                f"{type(self).__name__} takes Discrete, MultiDiscrete or MultiBinary actions, not action_space="
                f"{self.action_space}: for Box actions use an actor-critic algorithm, such as stable_baselines3.SAC"
            )
        self.layout = ActionLayout(self.action_space)
        super()._check_arguments()
        check_integer("target_update_interval", self.target_update_interval, 1)
        check_choice("exploration", self.exploration, EXPLORATIONS)
        check_number("exploration_fraction", self.exploration_fraction, 0, 1, positive=True)
        check_number("exploration_initial_eps", self.exploration_initial_eps, 0, 1)
        check_number("exploration_final_eps", self.exploration_final_eps, 0, 1)
        check_bool("torch_compile", self.torch_compile)
        check_bool("n_step_bonus", self.n_step_bonus)
        check_bool("tree_backup", self.tree_backup)
        check_choice("factorisation", self.factorisation, FACTORISATIONS)
        if self.tree_backup and self.replay_buffer_class is not None:
            raise ValueError(
                "tree_backup=True needs the steps of a return, which the package's own replay buffers keep, not "
                f"replay_buffer_class={self.replay_buffer_class.__name__}: leave it None"
            )
        check_number("max_grad_norm", self.max_grad_norm, positive=True, finite=False)
        if self.exploration == "boltzmann" and not isinstance(self.temperature, str) and self.temperature == 0:
            raise ValueError(
                "temperature must be positive, not 0, with exploration='boltzmann', which would never explore: "
                "pass a positive temperature or exploration='eps_greedy'"
            )

    def _setup_model(self) -> None:
        self._masking = has_action_masks(self.env)
        self._masks: np.ndarray | None = None
        super()._setup_model()
        self._create_aliases()
        self._updater: Updater | None = None
        # Losses and gradient norms since the last report
        self._losses: list[tuple[th.Tensor, th.Tensor]] = []
        self._next_report = 0
        self._traced = TracedTraining(self)
        self._compiled = CompiledTraining(self)
        # Shape of the observations that need no preprocessing; no shape is equal to None
        self._vector_shape = self.observation_space.shape if is_vector_space(self.observation_space) else None
        # Running statistics of batch norm, which the target network copies
        self.batch_norm_stats = get_parameters_by_name(self.q_net, ["running_"])
        self.batch_norm_stats_target = get_parameters_by_name(self.q_net_target, ["running_"])
        self.exploration_schedule = LinearSchedule(
            self.exploration_initial_eps, self.exploration_final_eps, self.exploration_fraction
        )
        self.temperature_module = self._make_temperature().to(self.device)
        self.temperature_module.update(self._current_progress_remaining)

    def _make_temperature(self) -> Temperature:
        sizes = self.layout.sizes
        return Temperature(
            self.temperature,
            self.target_entropy,
            sizes,
            self.lr_schedule(1),
            learnable=self.learns_temperature,
            name=self.temperature_name,
        )

    def _storage_options(self) -> dict[str, Any]:
        keep_steps = self.n_step_bonus or self.tree_backup
        return dict(super()._storage_options(), keep_steps=keep_steps)

    def _extra_fields(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        if not self._masking:
            return {}
        n_values = self.layout.n_values
        return {name: ((n_values,), "bool") for name in ("action_masks", "next_action_masks")}

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        if not isinstance(env, VecEnv) and has_action_masks(env):
            env = TerminalActionMasks(env)
        return OffPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)

    def _create_aliases(self) -> None:
        self.q_net = self.policy.q_net  # type: ignore[assignment]
        self.q_net_target = self.policy.q_net_target  # type: ignore[assignment]

    def _excluded_save_params(self) -> list[str]:
        derived = ["q_net", "q_net_target", "batch_norm_stats", "batch_norm_stats_target", "exploration_schedule"]
        derived += ["temperature_module", "_updater", "_vector_shape", "_losses", "_next_report", "_traced", "_compiled"]
        derived += ["layout", "_masking", "_masks", "_pending_masks"]
        return [*super()._excluded_save_params(), *derived]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer", *self.temperature_module.torch_names("temperature_module")], []

    def set_parameters(self, load_path_or_dict: Any, exact_match: bool = True, device: th.device | str = "auto") -> None:
        if exact_match and isinstance(load_path_or_dict, dict) and "policy.optimizer" in load_path_or_dict:
            saved = any(name.startswith("temperature_module") for name in load_path_or_dict)
            if saved != self.temperature_module.learned:
                raise ValueError(
                    f"{self.temperature_name}={self.temperature!r} is {'not ' if saved else ''}learned, but that of the "
                    f"parameters is{'' if saved else ' not'}: pass the kind of temperature that was saved"
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
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Actions for observations: the best ones, or, if not ``deterministic``, as the agent explores.

        :param observation: one observation, or one per environment
        :param state: not used, for recurrent policies
        :param episode_start: not used, for recurrent policies
        :param deterministic: whether to take the action of the highest value
        :param action_masks: which actions are valid, ``(n_actions,)`` or ``(n_envs, n_actions)`` (of several heads: one after
            the other), as for sb3-contrib's MaskablePPO; None for all
        :return: the actions, and ``state`` as it came
        """
        observations, vectorized_env = self._acting_observations(observation)
        masks = self._padded_masks(action_masks, n_states(observations))
        sample = not deterministic and self.exploration != "eps_greedy"
        actions = self.layout.to_env(self._traced.act(observations, masks, sample))
        if not deterministic and self.exploration != "boltzmann":
            exploring = np.flatnonzero(np.random.rand(len(actions)) < self.exploration_rate)
            if action_masks is None:
                for i in exploring:
                    actions[i] = self.action_space.sample()
            elif len(exploring) > 0:
                actions[exploring] = self._random_actions(self.layout.mask_rows(masks, len(actions)))[exploring]
        return (actions if vectorized_env else actions.squeeze(axis=0)), state

    def _act(self, observations: PyTorchObs, masks: th.Tensor | None, sample: bool) -> tuple[th.Tensor, th.Tensor]:
        """
        Actions, ``(n_rows,)``, and the values of the rows that they are chosen by, ``(n_rows, n_actions)``.

        :param observations: states
        :param masks: valid actions in the layout of the network's values, or None for all
        :param sample: whether to sample the policy, not to take its best actions
        """
        values = self.policy.acting_values(observations)
        rows, mask = self.layout.rows(values), self.layout.mask_rows(masks, len(values), values.device)
        return (self._sample_policy(rows, mask) if sample else greedy_actions(rows, mask)), rows

    def _padded_masks(self, action_masks: np.ndarray | None, n_observations: int) -> th.Tensor | None:
        """Checked masks in the layout of the network's values; None for all actions."""
        if action_masks is None:
            return None
        flat = [check_mask(mask, self.layout.n_flat, "predict()") for mask in np.atleast_2d(action_masks)]
        padded = self.layout.padded_mask(np.stack(flat))
        if len(padded) != n_observations:
            raise ValueError(f"predict() needs a mask for each of its {n_observations} observations, not {len(padded)}")
        check_valid(padded, self.layout, "predict()'s observation")
        return th.from_numpy(padded).to(self.device)

    def _acting_rows(self, values: th.Tensor, action_masks: np.ndarray | None) -> tuple[th.Tensor, th.Tensor | None]:
        """Values of the states and heads, and which of them are valid."""
        masks = self._padded_masks(action_masks, len(values))
        return self.layout.rows(values), self.layout.mask_rows(masks, len(values), values.device)

    def _random_actions(self, mask: th.Tensor | None) -> np.ndarray:
        """Uniform draws from the valid actions of rows."""
        assert mask is not None
        return self.layout.to_env(greedy_actions(th.rand(mask.shape, device=mask.device), mask))

    def _acting_observations(self, observation: np.ndarray | dict[str, np.ndarray]) -> tuple[PyTorchObs, bool]:
        """Observations as tensors, and whether there was a dimension for the environments."""
        if isinstance(observation, tuple):
            raise ValueError(
                "The observation is a tuple. With Gymnasium, reset() returns (observation, info): "
                "write `obs, info = env.reset()`, and pass obs"
            )
        self.policy.set_training_mode(False)
        if isinstance(observation, np.ndarray) and observation.shape[1:] == self._vector_shape:
            # What obs_to_tensor() does for a batch of vectors, less the copies
            return th.as_tensor(np.require(observation, requirements="W"), device=self.device), True
        return self.policy.obs_to_tensor(observation)

    def _act_on(self, observation: np.ndarray | dict[str, np.ndarray], function: Any) -> tuple[Any, bool]:
        """A function of observations as tensors, without gradients, and whether there was a dimension for the environments."""
        observations, vectorized_env = self._acting_observations(observation)
        with th.no_grad():
            return function(observations), vectorized_env

    def _sample_policy(self, rows: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
        """Actions drawn from the policy, by adding Gumbel noise to its logits; ``(n_rows,)``."""
        # argmax(q + temperature * gumbel) needs no division: at temperature 0 it is the greedy action
        gumbel = -th.empty_like(rows).exponential_().log()
        return greedy_actions(rows + self._acting_temperature * gumbel, mask)

    @property
    def _acting_temperature(self) -> operators.Temperature:
        """The policy is the softmax of the acting values divided by this."""
        return self.current_temperature

    def q_values(self, observation: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
        """
        Action values.

        :param observation: one observation, or one per environment
        :return: ``(n_actions,)``, or ``(n_observations, n_actions)``; of several heads, one after the other
        """
        values, vectorized_env = self._act_on(observation, self.policy.q_values)
        result = self.layout.flat(values).cpu().numpy()
        return result if vectorized_env else result[0]

    def action_probs(
        self, observation: np.ndarray | dict[str, np.ndarray], action_masks: np.ndarray | None = None
    ) -> np.ndarray:
        """
        Probabilities of the policy (the Boltzmann one at the current temperature, where there is no actor), without epsilon.

        :param observation: one observation, or one per environment
        :param action_masks: valid actions, as for :meth:`predict`
        :return: ``(n_actions,)``, or ``(n_observations, n_actions)``; of several heads, one after the other
        """
        values, vectorized_env = self._act_on(observation, self.policy.acting_values)
        rows, mask = self._acting_rows(values, action_masks)
        probabilities = operators.policy(rows, self._acting_temperature, mask).view(len(values), -1)
        result = self.layout.flat(probabilities).cpu().numpy()
        return result if vectorized_env else result[0]

    def soft_value(
        self, observation: np.ndarray | dict[str, np.ndarray], action_masks: np.ndarray | None = None
    ) -> np.ndarray:
        """
        Values of states: the expectation of the action values under the policy, and its regularisation.

        :param observation: one observation, or one per environment
        :param action_masks: valid actions, as for :meth:`predict`
        :return: ``()``, or ``(n_observations,)``; of several heads, their sum, or of independent ones their mean
        """
        estimates, vectorized_env = self._act_on(observation, lambda obs: self._online_estimates(obs))
        n_states = len(estimates[0]) // self.layout.n_heads
        _, mask = self._acting_rows(estimates[0].view(n_states, -1), action_masks)
        with th.no_grad():
            values = self._value(estimates, mask).view(n_states, self.layout.n_heads, -1).mean(dim=2)
            values = values.mean(dim=1) if self.factorisation == "independent" else values.sum(dim=1)
        return values.cpu().numpy() if vectorized_env else values.cpu().numpy()[0]

    # ------------------------------------------------------------------ collecting

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._setup_learn(*args, **kwargs)
        self._masking = has_action_masks(self.env)
        self._prepare_storage()
        self._masks = self._read_masks(self._last_obs) if self._masking else None
        return result

    def _prepare_storage(self) -> None:
        """A replay buffer that stores what is needed, of which the model may not have known before, such as masks."""
        assert self.replay_buffer is not None
        needed = set(self._extra_fields())
        own = isinstance(self.replay_buffer, GrowingStorage)
        stored = set(self.replay_buffer.extras) if isinstance(self.replay_buffer, GrowingStorage) else set()
        if stored == needed:
            return
        if self.replay_buffer_class is not None or not own:
            raise ValueError(
                f"{' and '.join(sorted(needed))} are stored by the package's own replay buffers, not by "
                f"{type(self.replay_buffer).__name__}: leave replay_buffer_class=None"
            )
        if self.replay_buffer.size() > 0:
            if self._masking != ("action_masks" in stored):
                raise ValueError(
                    f"The environment has {'' if self._masking else 'no '}action_masks(), but that of the transitions in the "
                    f"replay buffer had {'none' if self._masking else 'them'}: train on such a one, or with a new buffer"
                )
            raise ValueError(
                f"The transitions in the replay buffer hold {sorted(stored)} and not {sorted(needed)}, which the "
                "model needs now: train with the arguments that they were collected with, or with a new buffer"
            )
        self.replay_buffer = self._make_replay_buffer()

    def _read_masks(self, observation: Any) -> np.ndarray:
        """Masks of the environments' current states, ``(n_envs, n_heads * width)``."""
        masks = self.layout.padded_mask(action_masks(self.env, self.layout.n_flat))  # type: ignore[arg-type]
        check_valid(masks, self.layout, "environment", lambda i: tree_map(lambda array: array[i], observation))
        return masks

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        if self._masks is None:
            return super()._sample_action(learning_starts, action_noise, n_envs)
        if self.num_timesteps < learning_starts:
            actions = self._random_actions(self.layout.mask_rows(th.from_numpy(self._masks), len(self._masks)))
        else:
            assert self._last_obs is not None
            actions, _ = self.predict(self._last_obs, deterministic=False, action_masks=self._flat_masks())
        return actions, actions

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        if self._masks is None:
            super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
            return
        masks = self._read_masks(new_obs)
        self._pending_masks = {"action_masks": self._masks, "next_action_masks": self._next_masks(masks, dones, infos)}
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        self._masks = masks

    def _pending(self) -> dict[str, np.ndarray]:
        return {} if self._masks is None else self._pending_masks

    def _flat_masks(self) -> np.ndarray | None:
        """Masks of the environments' current states as they gave them, ``(n_envs, n_actions)``; None without masks."""
        return None if self._masks is None else self._masks[:, self.layout.columns]

    def _next_masks(self, masks: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]]) -> np.ndarray:
        """Masks of the next states, which at the end of an episode are not those of the environments' current states."""
        assert self._masks is not None
        next_masks = masks.copy()
        for i in np.flatnonzero(dones):
            terminal = infos[i].get("terminal_action_masks") if infos[i].get("TimeLimit.truncated") else None
            if terminal is None:
                # Nothing is known of it. A terminated state has no value, one cut by a time limit is much like that before
                next_masks[i] = self._masks[i]
            else:
                next_masks[i] = self.layout.padded_mask(check_mask(terminal, self.layout.n_flat, f"environment {i}")[None])[0]
        check_valid(next_masks, self.layout, "environment", lambda i: infos[i].get("terminal_observation"))
        return next_masks

    def _on_step(self) -> None:
        """Update the target network and the schedules; called after each step in the environments."""
        self._n_calls += 1
        # Each call to step() corresponds to n_envs transitions
        if self._n_calls % max(self.target_update_interval // self.n_envs, 1) == 0:
            self._update_target()
        if not self.temperature_module.constant:
            self.temperature_module.update(self._current_progress_remaining)
        self.exploration_rate = self.exploration_schedule(self._current_progress_remaining)
        if self.exploration != "boltzmann":
            self.logger.record("rollout/exploration_rate", self.exploration_rate)

    def _update_target(self) -> None:
        """Move the target network towards the online one, which begins the next iteration."""
        self._get_updater().update_target(self.tau)
        polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)

    # ------------------------------------------------------------------ learning

    def _joint(self, rows: th.Tensor) -> th.Tensor:
        """
        Values of joint actions, or of states, from those of their heads: the sum, or, of independent heads, as they are.

        :param rows: ``(..., batch_size * n_heads, k)``
        :return: ``(..., batch_size, k)``, or of independent heads ``(..., batch_size * n_heads, k)``: the shape of the targets
        """
        if self.layout.n_heads == 1 or self.factorisation == "independent":
            return rows
        return rows.unflatten(-2, (-1, self.layout.n_heads)).sum(dim=-2)

    def _taken(self, rows: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        Values of the actions that were taken, see :meth:`_joint`.

        :param rows: ``(batch_size * n_heads, n_actions)``, or of several networks ``(n_networks, ...)``
        :param actions: ``(batch_size, n_heads)``
        """
        index = self.layout.action_rows(actions)
        return self._joint(rows.gather(-1, index if rows.ndim == 2 else index.expand(len(rows), -1, -1)))

    def _per_target(self, values: th.Tensor) -> th.Tensor:
        """What samples have, ``(batch_size, k)``, as targets have it: once for each of independent heads."""
        if self.layout.n_heads == 1 or self.factorisation == "sum":
            return values
        return values.repeat_interleave(self.layout.n_heads, dim=0)

    def _mask_rows(self, replay_data: Any, name: str = "action_masks") -> th.Tensor | None:
        """Mask of the rows of a minibatch; None if every action is valid."""
        return self.layout.mask_rows(_extras(replay_data).get(name), len(replay_data.actions), self.device)

    def _estimates(self, observations: PyTorchObs) -> tuple[th.Tensor, ...]:
        """
        What the networks say of states, for targets: the target network's action values.

        :param observations: states
        :return: tensors with one row for each state and head, ``(n_rows, n_actions)``: the first defines the policy, the last
            are the action values
        """
        return (self.layout.rows(self.q_net_target(observations)),)

    def _pair_estimates(self, replay_data: Any) -> tuple[tuple[th.Tensor, ...], tuple[th.Tensor, ...]]:
        """:meth:`_estimates` of the states and of the next ones, in one pass through the networks."""
        both = self._estimates(concatenate(replay_data.observations, replay_data.next_observations))
        estimates, next_estimates = zip(*(tensor.chunk(2) for tensor in both), strict=True)
        return estimates, next_estimates

    def _online_estimates(self, observations: PyTorchObs) -> tuple[th.Tensor, ...]:
        """:meth:`_estimates` of the online networks, for :meth:`soft_value`."""
        return (self.layout.rows(self.policy.q_values(observations)),)

    def _value(self, estimates: tuple[th.Tensor, ...], mask: th.Tensor | None) -> th.Tensor:
        """
        The operator V of the algorithm.

        :param estimates: what :meth:`_estimates` returned
        :param mask: valid actions, ``(n_rows, n_actions)``, or None for all
        :return: values, ``(n_rows, 1)``
        """
        raise NotImplementedError

    def _bonus(
        self, estimates: tuple[th.Tensor, ...], actions: th.Tensor, mask: th.Tensor | None
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        What is added to the reward of an action.

        :param estimates: what :meth:`_estimates` returned
        :param actions: ``(n_rows, 1)``
        :param mask: valid actions, ``(n_rows, n_actions)``, or None for all
        :return: the bonus of the joint action (see :meth:`_joint`), and what to log the mean of: name -> tensor
        """
        raise NotImplementedError

    def _policy_and_q_values(self, estimates: tuple[th.Tensor, ...], mask: th.Tensor | None) -> tuple[th.Tensor, th.Tensor]:
        """
        The policy that :meth:`_value` is the value of, and the action values under it.

        :param estimates: what :meth:`_estimates` returned
        :param mask: valid actions, ``(n_rows, n_actions)``, or None for all
        :return: ``(n_rows, n_actions)`` both
        """
        return operators.policy(estimates[0], self.current_temperature, mask), estimates[-1]

    def _regularisation(self, estimates: tuple[th.Tensor, ...], mask: th.Tensor | None) -> th.Tensor:
        """What :meth:`_value` contains beyond the expectation of the action values, ``(n_rows, 1)``."""
        policy, q_values = self._policy_and_q_values(estimates, mask)
        return self._value(estimates, mask) - operators.expectation(policy, q_values, mask)

    @property
    def _has_bonus(self) -> bool:
        """Whether :meth:`_bonus` adds anything."""
        return False

    def _compute_targets(self, replay_data: Any) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        Regression targets of the taken actions; called without gradients.

        :param replay_data: a minibatch
        :return: targets, of the shape that :meth:`_joint` gives, and what to log the mean of
        """
        if getattr(replay_data, "steps", None) is not None:
            return n_step_targets(self, replay_data)
        next_mask = self._mask_rows(replay_data, "next_action_masks")
        # r + bonus(s, a) + gamma * (1 - done) * V(s')
        if not self._has_bonus:
            next_values = self._joint(self._value(self._estimates(replay_data.next_observations), next_mask))
            return self._bellman_target(replay_data, next_values), {}
        estimates, next_estimates = self._pair_estimates(replay_data)
        next_values = self._joint(self._value(next_estimates, next_mask))
        actions = self.layout.action_rows(replay_data.actions)
        bonus, metrics = self._bonus(estimates, actions, self._mask_rows(replay_data))
        return self._bellman_target(replay_data, next_values, bonus), metrics

    def _compute_loss(self, replay_data: Any, targets: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Loss of each sample: Huber, as in SB3's DQN.

        :param replay_data: a minibatch
        :param targets: what :meth:`_compute_targets` returned
        :return: losses of the targets' shape, and the acting values of the rows, ``(n_rows, n_actions)``
        """
        q_values = self.layout.rows(self.q_net(replay_data.observations))
        current_q_values = self._taken(q_values, replay_data.actions)
        return F.smooth_l1_loss(current_q_values, targets, reduction="none"), q_values.detach()

    def _excess_entropy(self, replay_data: Any, q_values: th.Tensor) -> list[th.Tensor]:
        """
        What a learned temperature learns from; nothing of another.

        :param replay_data: a minibatch
        :param q_values: its acting values, see :meth:`_compute_loss`
        """
        if not self.temperature_module.learned:
            return []
        mask = self._mask_rows(replay_data)
        return [self.temperature_module.excess_entropy(operators.entropy(q_values, self._acting_temperature, mask), mask)]

    def _bellman_target(self, replay_data: Any, next_values: th.Tensor, bonus: th.Tensor | float = 0.0) -> th.Tensor:
        """``rewards + bonus + discount * (1 - done) * next_values``, for one-step and n-step minibatches."""
        discounts = self.gamma if replay_data.discounts is None else self._per_target(replay_data.discounts)
        rewards, dones = self._per_target(replay_data.rewards), self._per_target(replay_data.dones)
        return operators.bellman_target(rewards + bonus, dones, discounts, next_values)

    def _targets_frozen(self) -> bool:
        """Whether targets stay as they are while :meth:`train` runs, so that all of a call can be computed together."""
        return not self.temperature_module.learned

    def _minibatches(
        self, updater: Updater, gradient_steps: int, batch_size: int
    ) -> Iterator[tuple[ReplayBufferSamples, th.Tensor | None, dict[str, th.Tensor] | None]]:
        """
        The minibatches of a call of :meth:`train`, with their targets and what to log of these.

        Our own buffers are sampled for many minibatches at once, and frozen targets are computed for them together; others
        are left to the update.
        """
        assert self.replay_buffer is not None
        at_once = self.batches_at_once(batch_size)
        for start in range(0, gradient_steps, at_once):
            n_batches = min(at_once, gradient_steps - start)
            samples = self._sample(n_batches * batch_size)
            minibatches = split_samples(samples, n_batches)
            if n_batches > 1 and self._targets_frozen():
                targets, metrics = self._traced.targets(updater, samples)
                for minibatch, minibatch_targets in zip(minibatches, targets.chunk(n_batches), strict=True):
                    yield minibatch, minibatch_targets, metrics
            else:
                for minibatch in minibatches:
                    yield minibatch, None, None

    def _sample(self, n_samples: int) -> Any:
        """Samples of the replay buffer, with what the algorithm adds to them."""
        return self._extend(self.replay_buffer.sample(n_samples, env=self._vec_normalize_env))  # type: ignore[union-attr]

    def _extend(self, samples: Any) -> Any:
        """Samples with the :meth:`_inputs` among their extras."""
        inputs = self._inputs(len(samples.actions))
        return Samples(*samples)._replace(extras={**_extras(samples), **inputs}) if inputs else samples

    def _inputs(self, n_samples: int) -> dict[str, th.Tensor]:
        """
        What the hooks need beyond the transitions: as part of the samples, compiled updates see it change.

        :param n_samples: number of samples
        :return: name -> ``(n_samples, ...)``
        """
        return {}

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
        gradient_steps = self._compiled.train(updater, gradient_steps, batch_size)
        if gradient_steps == 0:
            return

        for replay_data, targets, metrics in self._minibatches(updater, gradient_steps, batch_size):
            update = self._traced.update(updater, replay_data, targets, metrics)
            loss, grad_norm, q_values = update[:3]
            if not math.isfinite(loss.item() + grad_norm.item()):
                raise find_divergence(replay_data, update.targets, q_values, loss, self._n_updates, self.num_timesteps)
            updater.clip(grad_norm, self.max_grad_norm)
            updater.step()
            self._n_updates += 1
            self._losses.append((loss, grad_norm))
            if update.excess_entropy is not None:
                self.temperature_module.learn(update.excess_entropy, self.policy.optimizer.param_groups[0]["lr"])

        self._report(q_values, update.metrics, self._mask_rows(replay_data))

    def _report(self, q_values: th.Tensor, target_metrics: dict[str, th.Tensor], mask: th.Tensor | None) -> None:
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
            "temperature": th.as_tensor(self.current_temperature, dtype=q_values.dtype, device=q_values.device),
            **policy_statistics(q_values, self._acting_temperature, mask, self.acts_on_q_values),
            **{name: values.to(q_values.dtype).mean() for name, values in target_metrics.items()},
        }
        self._record(metrics)
