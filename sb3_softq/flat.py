"""
Parameters, gradients and optimiser moments as views of one flat tensor each.

A network of this family has a dozen small tensors, and an update in SB3 spends most of its time on calling an operation
for each of them. With the modules' tensors as views of one, zeroing the gradients, their norm, clipping, the optimiser's
step and the target network's update are one operation each. The modules and the optimiser stay what they are: their
tensors keep their shapes, their state dicts the usual format, and any optimiser works on them.
"""

from collections.abc import Iterable
from typing import Any

import torch as th
from stable_baselines3.common.utils import polyak_update
from torch import nn


def clip_coefficient(norm: th.Tensor, max_grad_norm: float) -> th.Tensor:
    """
    What a gradient is multiplied by so that it is no longer than ``max_grad_norm``; as in ``clip_grad_norm_``.

    :param norm: its norm, without dimensions
    :param max_grad_norm: largest norm
    """
    return (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)


class FlatParameters:
    """
    The parameters of a network, and their gradients, as views of :attr:`data` and :attr:`grad`.

    Whatever replaces a parameter's tensor (moving the network to another device, for instance) ends that; ask
    :meth:`intact`, and make a new object.

    :param parameters: parameters for which :meth:`possible` holds
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.data = th.cat([parameter.detach().reshape(-1) for parameter in self.parameters])
        self.grad = th.zeros_like(self.data)
        self._grads = self.views(self.grad)
        for parameter, data, grad in zip(self.parameters, self.views(self.data), self._grads, strict=True):
            parameter.data = data
            parameter.grad = grad
        self._pointers = [parameter.data_ptr() for parameter in self.parameters]

    @staticmethod
    def possible(parameters: Iterable[nn.Parameter]) -> bool:
        """
        Whether there are parameters, all of them trainable and of one dtype on one device.

        :param parameters: parameters of a network
        """
        parameters = list(parameters)
        kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
        return len(kinds) == 1 and all(parameter.requires_grad for parameter in parameters)

    def views(self, flat: th.Tensor) -> list[th.Tensor]:
        """
        A flat tensor cut into the parameters' shapes.

        :param flat: ``(n_parameters,)``
        :return: views of it
        """
        pieces = flat.split([parameter.numel() for parameter in self.parameters])
        return [piece.view(parameter.shape) for piece, parameter in zip(pieces, self.parameters, strict=True)]

    def in_place(self) -> bool:
        """Whether the parameters are still the views that this object made."""
        return [parameter.data_ptr() for parameter in self.parameters] == self._pointers

    def intact(self) -> bool:
        """Whether the parameters and gradients are still the views that this object made."""
        grads = zip(self.parameters, self._grads, strict=True)
        return self.in_place() and all([own.grad is grad and own.requires_grad for own, grad in grads])


class FlatOptimizer:
    """
    Steps of an optimiser on :class:`FlatParameters`.

    The moments of Adam (or of AdamW without weight decay) are flat tensors too, of which the optimiser's state holds views,
    and on the CPU a step is one fused operation. Every other optimiser takes its own step, which sees the parameters in their
    shapes.

    :param optimizer: optimiser of all the flat parameters
    :param flat: the parameters
    """

    def __init__(self, optimizer: th.optim.Optimizer, flat: FlatParameters) -> None:
        self.optimizer = optimizer
        self.flat = flat
        # Whether the moments are flat tensors, of which the optimiser holds views
        self.shares_moments = self._can_share_moments()
        # Whether a step is one fused operation on the flat tensors
        self.fused = self.shares_moments and flat.data.device.type == "cpu"
        if self.shares_moments:
            self._share_moments()

    def _can_share_moments(self) -> bool:
        groups = self.optimizer.param_groups
        served = type(self.optimizer) in (th.optim.Adam, th.optim.AdamW) and hasattr(th, "_fused_adam_")
        if not served or self.flat.data.device.type not in ("cpu", "cuda") or len(groups) != 1:
            return False
        unusual = any(groups[0].get(option) for option in ("amsgrad", "maximize", "differentiable", "capturable", "fused"))
        hooks = self.optimizer._optimizer_step_pre_hooks or self.optimizer._optimizer_step_post_hooks
        same = [id(own) for own in groups[0]["params"]] == [id(own) for own in self.flat.parameters]
        steps = {float(state["step"]) for state in self._states() if "step" in state}
        complete = sum("step" in state for state in self._states()) in (0, len(self.flat.parameters))
        return same and complete and len(steps) <= 1 and not unusual and not hooks

    def _states(self) -> list[dict[str, Any]]:
        return [self.optimizer.state.get(parameter, {}) for parameter in self.flat.parameters]

    def _share_moments(self) -> None:
        """Move the optimiser's state into flat tensors, of which it holds views from then on."""
        self.exp_avg, self.exp_avg_sq = th.zeros_like(self.flat.data), th.zeros_like(self.flat.data)
        # A step counter for each parameter, as the optimiser keeps them
        self.steps = th.zeros(len(self.flat.parameters))
        moments = zip(self.flat.views(self.exp_avg), self.flat.views(self.exp_avg_sq), strict=True)
        self._shared = [
            {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
            for step, (exp_avg, exp_avg_sq) in zip(self.steps.unbind(), moments, strict=True)
        ]
        for parameter, old, new in zip(self.flat.parameters, self._states(), self._shared, strict=True):
            for name, value in old.items():
                new[name].copy_(th.as_tensor(value))
            self.optimizer.state[parameter] = new

    def settings(self) -> dict[str, Any]:
        """What of Adam's step is constant."""
        return {name: self.optimizer.param_groups[0][name] for name in ("betas", "eps")}

    @property
    def n_steps(self) -> int:
        """Steps so far."""
        return int(self.steps[0])

    def count_steps(self, n_steps: int) -> None:
        """
        Count steps that were taken elsewhere.

        :param n_steps: their number
        """
        self.steps.add_(n_steps)

    def intact(self) -> bool:
        """Whether the optimiser's state is still what this object made (loading a state replaces it)."""
        if not self.shares_moments:
            return not self._can_share_moments()
        state = self.optimizer.state
        shared = zip(self.flat.parameters, self._shared, strict=True)
        return all([parameter in state and state[parameter] is own for parameter, own in shared])

    def step(self) -> None:
        """One step with the gradients in ``flat.grad``."""
        if not self.fused:
            self.optimizer.step()
            return
        group = self.optimizer.param_groups[0]
        self.steps.add_(1)
        th._fused_adam_(
            [self.flat.data],
            [self.flat.grad],
            [self.exp_avg],
            [self.exp_avg_sq],
            [],
            [self.steps[0]],
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=None,
            found_inf=None,
        )


class Updater:
    """
    What an update does to a network after the loss: gradients, clipping, the optimiser's step, the target network.

    This is the plain form, one operation for each parameter and each purpose; :class:`FlatUpdater` is the fast one.

    :param network: the trained network
    :param target: its target network
    :param optimizer: the optimiser of all trainable parameters of ``network``
    """

    def __init__(self, network: nn.Module, target: nn.Module, optimizer: th.optim.Optimizer) -> None:
        self.network, self.target, self.optimizer = network, target, optimizer

    def intact(self) -> bool:
        """Whether the object still serves: nothing it refers to was replaced."""
        return True

    def backward(self, loss: th.Tensor) -> tuple[Any, th.Tensor]:
        """
        Gradients of a loss, for :meth:`set_gradient`, and their norm.

        :param loss: without dimensions
        """
        self.optimizer.zero_grad()
        loss.backward()
        return None, nn.utils.get_total_norm([own.grad for own in self.network.parameters() if own.grad is not None])

    def set_gradient(self, gradient: Any) -> None:
        """
        Give the parameters their gradients.

        :param gradient: what :meth:`backward` returned
        """

    def clip(self, norm: th.Tensor, max_grad_norm: float) -> None:
        """
        Make the gradient shorter where it is too long.

        :param norm: its norm
        :param max_grad_norm: largest norm
        """
        nn.utils.clip_grads_with_norm_(self.network.parameters(), max_grad_norm, norm)

    def step(self) -> None:
        """One step of the optimiser."""
        self.optimizer.step()

    def update_target(self, tau: float) -> None:
        """
        Move the target network's parameters towards the network's.

        :param tau: Polyak coefficient; 1 copies
        """
        polyak_update(self.network.parameters(), self.target.parameters(), tau)


class FlatUpdater(Updater):
    """:class:`Updater` on flat tensors: the same numbers, up to the order of the sum in the norm, in fewer operations."""

    def __init__(self, network: nn.Module, target: nn.Module, optimizer: th.optim.Optimizer) -> None:
        super().__init__(network, target, optimizer)
        self.flat = FlatParameters(network.parameters())
        self.flat_target = FlatParameters(target.parameters())
        self.flat_optimizer = FlatOptimizer(optimizer, self.flat)

    @staticmethod
    def possible(network: nn.Module, target: nn.Module, optimizer: th.optim.Optimizer) -> bool:
        """
        Whether flat parameters can serve.

        :param network: the trained network
        :param target: its target network
        :param optimizer: the optimiser of all trainable parameters of ``network``
        """
        # Weight decay leaves parameters alone that have no gradient; a flat gradient is zero there, which does not tell
        decays = any(group.get("weight_decay") for group in optimizer.param_groups)
        flat = FlatParameters.possible(network.parameters()) and FlatParameters.possible(target.parameters())
        return flat and not decays

    def intact(self) -> bool:
        return self.flat.intact() and self.flat_target.in_place() and self.flat_optimizer.intact()

    def backward(self, loss: th.Tensor) -> tuple[Any, th.Tensor]:
        self.flat.grad.zero_()
        loss.backward()
        return self.flat.grad, th.linalg.vector_norm(self.flat.grad)

    def set_gradient(self, gradient: Any) -> None:
        if gradient is not self.flat.grad:
            self.flat.grad.copy_(gradient)

    def clip(self, norm: th.Tensor, max_grad_norm: float) -> None:
        # Multiplying by 1 is left out where looking costs nothing
        if norm.device.type != "cpu" or norm.item() + 1e-6 > max_grad_norm:
            self.flat.grad.mul_(clip_coefficient(norm, max_grad_norm))

    def step(self) -> None:
        self.flat_optimizer.step()

    def update_target(self, tau: float) -> None:
        with th.no_grad():
            self.flat_target.data.lerp_(self.flat.data, tau)
