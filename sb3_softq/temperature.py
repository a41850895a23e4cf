"""The temperature of an entropy-regularised policy: fixed, scheduled or learned, in one class."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch as th
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule, update_learning_rate
from torch import nn

from sb3_softq.checks import check_number

# Fraction of log(n_actions) that "auto" aims at. SAC-Discrete's published 0.98 cannot be kept up with two actions, where
# it allows action values to differ by a third of the temperature only, so that the temperature grows without bound.
DEFAULT_ENTROPY_FRACTION = 0.5


def _number_after(name: str, value: str, prefix: str, example: str) -> float:
    try:
        return float(value.removeprefix(prefix))
    except ValueError:
        raise ValueError(f"{name} must be written like {example!r}, not {value!r}") from None


def entropy_target(target_entropy: float | str, n_actions: int | list[int]) -> float:
    """
    Entropy that a learned temperature aims at, in nats.

    :param target_entropy: nats, or ``"auto"`` / ``"auto_0.3"`` for a fraction of ``log(n_actions)``
    :param n_actions: number of actions, or of those of each head, whose mean entropy is meant
    :return: nats
    :raises ValueError: if no policy over ``n_actions`` actions can have it
    """
    sizes = n_actions if isinstance(n_actions, list) else [n_actions]
    maximum = sum(math.log(size) for size in sizes) / len(sizes)
    fraction = entropy_fraction(target_entropy)
    if fraction is not None:
        return fraction * maximum
    assert not isinstance(target_entropy, str)  # for mypy
    check_number("target_entropy", target_entropy, 0.0)
    if target_entropy > maximum:
        log = f"log({sizes[0]})" if len(sizes) == 1 else f"the mean of the logs of {sizes}"
        raise ValueError(
            f"target_entropy must be at most {log} = {maximum:.4g} nats, the entropy of the uniform policy, "
            f"not {target_entropy!r}"
        )
    return float(target_entropy)


def entropy_fraction(target_entropy: float | str) -> float | None:
    """
    The fraction that a target entropy like ``"auto_0.3"`` names; None for a number of nats.

    :param target_entropy: see :func:`entropy_target`
    :raises ValueError: for an unknown string, or a fraction that is not between 0 and 1
    """
    if not isinstance(target_entropy, str):
        return None
    if target_entropy == "auto":
        return DEFAULT_ENTROPY_FRACTION
    if not target_entropy.startswith("auto_"):
        raise ValueError(f"target_entropy must be a number, 'auto' or like 'auto_0.3', not {target_entropy!r}")
    fraction = _number_after("target_entropy", target_entropy, "auto_", "auto_0.3")
    check_number("the fraction in target_entropy", fraction, 0.0, 1.0)
    return fraction


def temperature_schedule(temperature: float | str | Schedule, name: str = "temperature") -> Schedule:
    """
    Schedule of a temperature that is not learned.

    :param temperature: a number, ``"lin_0.1"`` (falls linearly to 0 over the training, as rl-zoo3 writes schedules), or a
        callable of the remaining progress, which falls from 1 to 0
    :param name: how the user calls the argument
    :return: a function of the remaining progress
    """
    if isinstance(temperature, str):
        if not temperature.startswith("lin_"):
            raise ValueError(f"{name} must be a number, a callable or a schedule like 'lin_0.1', not {temperature!r}")
        initial_value = _number_after(name, temperature, "lin_", "lin_0.1")
        check_number(f"the initial value in {name}", initial_value, positive=True)
        return LinearSchedule(initial_value, 0.0, 1.0)
    if callable(temperature):
        return temperature
    check_number(name, temperature, 0.0)
    return ConstantSchedule(float(temperature))


class Temperature(nn.Module):
    """
    Weight of the entropy, in the unit of the rewards.

    A learned temperature minimises ``log_temperature * (entropy - target_entropy)``: it falls while the policy is more
    random than the target, and grows while it is less. Being a module, it is saved, restored and moved with its optimiser
    (:attr:`optimizer`) as policies are.

    :param temperature: a number of at least 0; a schedule string (``"lin_0.1"``); a callable of the remaining progress; or,
        for a learned one, ``"auto"`` (initial value 1) or ``"auto_0.1"`` (initial value 0.1)
    :param target_entropy: see :func:`entropy_target`; used by a learned temperature only
    :param n_actions: number of actions, or of those of each head
    :param learning_rate: step size of a learned temperature
    :param learnable: whether the algorithm can learn its temperature
    :param name: how the user calls the temperature
    :raises TypeError: for an argument of the wrong type
    :raises ValueError: for an argument that is out of range, or an unknown string
    """

    def __init__(
        self,
        temperature: float | str | Schedule,
        target_entropy: float | str = "auto",
        n_actions: int | list[int] = 2,
        learning_rate: float = 1e-4,
        learnable: bool = True,
        name: str = "temperature",
    ) -> None:
        super().__init__()
        self.learned = isinstance(temperature, str) and temperature.startswith("auto")
        # Whether there is nothing to update
        self.constant = not isinstance(temperature, str) and not callable(temperature)
        self._replacement: th.Tensor | None = None
        if not self.learned:
            self.schedule = temperature_schedule(temperature, name)
            self.update(1.0)
            return
        assert isinstance(temperature, str)  # for mypy
        if not learnable:
            raise ValueError(
                f"{name}={temperature!r} cannot be learned by this algorithm: pass a number, a callable or a schedule "
                "like 'lin_0.1' (SQN learns its temperature)"
            )
        initial_value = 1.0
        if temperature != "auto":
            initial_value = _number_after(name, temperature, "auto_", "auto_0.1")
            check_number(f"the initial value in {name}", initial_value, positive=True)
        self.target_entropy = entropy_target(target_entropy, n_actions)
        self.target_fraction = entropy_fraction(target_entropy)
        self.log_temperature = nn.Parameter(th.tensor(math.log(initial_value)))
        self.optimizer = th.optim.Adam([self.log_temperature], lr=learning_rate)

    @property
    def value(self) -> float | th.Tensor:
        """Current temperature: a number, or for a learned one a detached tensor without dimensions."""
        if self._replacement is not None:
            return self._replacement
        return self.log_temperature.detach().exp() if self.learned else self._value

    def update(self, progress_remaining: float) -> None:
        """
        Follow the schedule; a learned temperature has none.

        :param progress_remaining: falls from 1 to 0 during training
        """
        if not self.learned:
            value = self.schedule(progress_remaining)
            check_number(f"temperature (its schedule at remaining progress {progress_remaining:g})", value, 0.0)
            self._value = float(value)

    def excess_entropy(self, entropies: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
        """
        By how much the policy is more random than the target, on average; the gradient of a learned temperature's log.

        :param entropies: entropies of the current policy in nats, ``(batch_size, 1)``
        :param mask: valid actions, ``(batch_size, n_actions)``; a target that is a fraction is one of their number's log
        :return: nats, without dimensions
        """
        if mask is None or self.target_fraction is None:
            return entropies.mean() - self.target_entropy
        return (entropies - self.target_fraction * mask.sum(dim=1, keepdim=True).to(entropies.dtype).log()).mean()

    def learn(self, excess_entropy: th.Tensor, learning_rate: float) -> None:
        """
        One gradient step of a learned temperature.

        :param excess_entropy: see :meth:`excess_entropy`; without dimensions
        :param learning_rate: step size
        """
        update_learning_rate(self.optimizer, learning_rate)
        # J(log_temperature) = log_temperature * (H - H_target), whose gradient is the mean difference
        self.log_temperature.grad = excess_entropy.to(self.log_temperature)
        self.optimizer.step()

    # What traced updates need: they take the temperature as an input, and compiled ones learn it themselves

    def inputs(self) -> list[th.Tensor]:
        """The value as a tensor, just above 0 where a schedule ends at 0; nothing where it is constant."""
        if self.constant:
            return []
        return [self.log_temperature.detach().exp() if self.learned else th.tensor(max(self._value, 1e-8), dtype=th.float64)]

    def adam_state(self) -> list[th.Tensor]:
        """The log of a learned temperature and the optimiser's moments; to be changed in place."""
        state = self.optimizer.state[self.log_temperature]
        if not state:
            zeros = {"step": th.zeros(()), **{name: th.zeros_like(self.log_temperature) for name in ("exp_avg", "exp_avg_sq")}}
            state.update(zeros)
        # With a dimension: torch 2.13 does not write a float64 without one back out of compiled code
        return [tensor.view(1) for tensor in (self.log_temperature.data, state["exp_avg"], state["exp_avg_sq"])]

    @property
    def n_steps(self) -> int:
        """Steps of a learned temperature so far."""
        return int(self.optimizer.state.get(self.log_temperature, {}).get("step", 0))

    def count_steps(self, n_steps: int) -> None:
        """
        Count steps that were taken elsewhere.

        :param n_steps: their number
        """
        self.optimizer.state[self.log_temperature]["step"] += n_steps

    @contextmanager
    def replaced(self, inputs: list[th.Tensor]) -> Iterator[None]:
        """
        Context in which :attr:`value` comes from :meth:`inputs`.

        :param inputs: a tensor without dimensions, or nothing
        """
        self._replacement = inputs[0] if inputs else None
        try:
            yield
        finally:
            self._replacement = None

    def extra_repr(self) -> str:
        return f"learned, target_entropy={self.target_entropy:.4g}" if self.learned else f"{self.schedule}"

    def torch_names(self, name: str) -> list[str]:
        """
        Names of what has to be saved, for ``_get_torch_save_params()``.

        :param name: name of the attribute that holds the temperature
        """
        return [name, f"{name}.optimizer"] if self.learned else []
