"""The actor-critic family: everything that its algorithms have in common."""

import math
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import GymEnv, ReplayBufferSamples
from stable_baselines3.common.utils import polyak_update
from stable_baselines3.common.vec_env import VecEnv

from sb3_softq import operators
from sb3_softq.checks import check_integer
from sb3_softq.diagnostics import name_divergence
from sb3_softq.off_policy import RegularisedAlgorithm


class ActorCriticAlgorithm(RegularisedAlgorithm):
    """
    Base of the algorithms that learn a critic and an actor.

    An algorithm is its :meth:`_update`. This class owns the loop around it, the guarded optimiser step, the target
    networks' turn, logging, and the check of the action space.
    """

    # Action spaces, and what to say to those who come with others
    action_spaces: ClassVar[tuple[type[spaces.Space], ...]] = (spaces.Box,)
    other_actions: ClassVar[str] = "for Discrete actions use MPO or SACDiscrete"

    target_update_interval: int
    max_grad_norm: float = math.inf

    # ------------------------------------------------------------------ setting up

    @classmethod
    def _wrap_env(cls, env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:  # type: ignore[override]
        # Every environment passes here, before SB3's own assertions
        vec_env = RegularisedAlgorithm._wrap_env(env, verbose, monitor_wrapper)
        cls._check_action_space(vec_env.action_space)
        return vec_env

    @classmethod
    def _check_action_space(cls, action_space: spaces.Space) -> None:
        if not isinstance(action_space, cls.action_spaces):
            names = " or ".join(space.__name__ for space in cls.action_spaces)
            raise ValueError(f"{cls.__name__} takes {names} actions, not action_space={action_space}: {cls.other_actions}")
        if isinstance(action_space, spaces.Discrete) and action_space.start != 0:
            raise ValueError(f"{cls.__name__} takes Discrete actions from 0 on, not action_space={action_space}")
        if isinstance(action_space, spaces.Box) and not np.isfinite([action_space.low, action_space.high]).all():
            raise ValueError(
                f"{cls.__name__} needs bounded actions, which it scales to [-1, 1], not action_space={action_space}: "
                "give the environment finite bounds (gymnasium.wrappers.TransformAction)"
            )

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_integer("target_update_interval", self.target_update_interval, 1)

    # ------------------------------------------------------------------ learning

    def _optimizers(self) -> list[th.optim.Optimizer]:
        """The optimisers whose step size follows ``learning_rate``."""
        raise NotImplementedError

    def _update(self, replay_data: ReplayBufferSamples) -> dict[str, th.Tensor]:
        """
        One update of all networks but the targets.

        :param replay_data: a minibatch
        :return: what to log, as tensors without dimensions
        """
        raise NotImplementedError

    def _update_targets(self) -> None:
        """Move the target networks."""
        raise NotImplementedError

    def _move_target(self, online: th.nn.Module, target: th.nn.Module) -> None:
        """A target network goes towards the online one; buffers, such as the statistics of batch norm, are copied."""
        polyak_update(online.parameters(), target.parameters(), self.tau)
        for buffer, target_buffer in zip(online.buffers(), target.buffers(), strict=True):
            target_buffer.copy_(buffer)

    def _targets_due(self, gradient_step: int) -> bool:
        """
        Whether the target networks are updated now.

        :param gradient_step: number of the update in this call of :meth:`train`
        """
        return self._n_updates % self.target_update_interval == 0

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        self.policy.set_training_mode(True)
        self._update_learning_rate(self._optimizers())
        metrics = []
        for gradient_step in range(gradient_steps):
            replay_data = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)  # type: ignore[union-attr]
            metrics.append(self._update(replay_data))
            self._n_updates += 1
            if self._targets_due(gradient_step):
                self._update_targets()
        self._report(metrics)

    def _optimize(
        self,
        optimizer: th.optim.Optimizer,
        loss: th.Tensor,
        replay_data: ReplayBufferSamples,
        **quantities: th.Tensor,
    ) -> th.Tensor:
        """
        One step of an optimiser, and of its parameters only: other networks that the loss goes through get no gradient.

        :param optimizer: the optimiser
        :param loss: a tensor without dimensions
        :param replay_data: the minibatch, and
        :param quantities: what was computed from it on the way to the loss: what an error message looks through
        :return: norm of the gradient, before it is clipped
        :raises DivergenceError: if the loss or its gradient is not finite; nothing has changed then
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        optimizer.zero_grad()
        loss.backward(inputs=parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        grad_norm = th.linalg.vector_norm(th.stack([th.linalg.vector_norm(gradient) for gradient in gradients]))
        if not math.isfinite((loss.detach() + grad_norm).item()):
            computed = {name.replace("_", " "): tensor for name, tensor in quantities.items()}
            raise name_divergence(replay_data, {**computed, "loss": loss}, self._n_updates, self.num_timesteps)
        if self.max_grad_norm < math.inf:
            scale = (self.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(scale)
        optimizer.step()
        return grad_norm

    def _report(self, metrics: list[dict[str, th.Tensor]]) -> None:
        """Log the means over a call of :meth:`train`, with one read from the device."""
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if not metrics:
            return
        self._record({name: th.stack([one[name] for one in metrics]).mean() for name in metrics[0]})

    def _bellman_target(self, replay_data: ReplayBufferSamples, next_values: th.Tensor) -> th.Tensor:
        """``rewards + discount * (1 - done) * next_values``, for one-step and n-step minibatches."""
        discounts: Any = self.gamma if replay_data.discounts is None else replay_data.discounts
        return operators.bellman_target(replay_data.rewards, replay_data.dones, discounts, next_values)
