"""What is measured during training, and the guard that stops a diverging one."""

import math
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_softq import operators


class DivergenceError(ValueError):
    """
    A reward, an observation or a loss is not finite.

    Raised before the weights are changed by it, so the model can still be saved. A ``ValueError``, because that is what
    rl-zoo3's hyperparameter search prunes a trial for.
    """


def check_finite(name: str, values: Any, num_timesteps: int) -> None:
    """
    Raise if anything that came from the environments is not finite.

    :param name: what it is
    :param values: an array, a dict of arrays, or None
    :param num_timesteps: environment steps so far
    :raises DivergenceError: if there is a NaN or an infinity
    """
    if isinstance(values, dict):
        for key, value in values.items():
            check_finite(f"{name}[{key!r}]", value, num_timesteps)
    elif values is not None and (values := np.asarray(values)).dtype.kind == "f" and not np.isfinite(values).all():
        raise DivergenceError(
            f"{name} of the environment are not finite at step {num_timesteps}: {values[~np.isfinite(values)][:3]}. "
            "The model was not changed by them; check the environment"
        )


def find_divergence(
    replay_data: ReplayBufferSamples,
    targets: th.Tensor,
    q_values: th.Tensor,
    loss: th.Tensor,
    n_updates: int,
    num_timesteps: int,
) -> DivergenceError:
    """
    The error that names the first quantity of an update that is not finite, in the order in which they are computed.

    :param replay_data: the minibatch
    :param targets: its targets
    :param q_values: its action values
    :param loss: its loss
    :param n_updates: gradient steps so far
    :param num_timesteps: environment steps so far
    :return: the error, to be raised
    """
    return name_divergence(
        replay_data, {"action values": q_values, "targets": targets, "loss": loss}, n_updates, num_timesteps
    )


def name_divergence(
    replay_data: ReplayBufferSamples, computed: dict[str, th.Tensor], n_updates: int, num_timesteps: int
) -> DivergenceError:
    """
    As :func:`find_divergence`, for any quantities.

    :param replay_data: the minibatch
    :param computed: what was computed from it, in that order: name -> tensor
    :param n_updates: gradient steps so far
    :param num_timesteps: environment steps so far
    :return: the error, to be raised
    """
    quantities: dict[str, th.Tensor] = {}
    for name in ("observations", "next_observations"):
        values = getattr(replay_data, name)
        quantities |= (
            {f"{name}[{key!r}]": value for key, value in values.items()} if isinstance(values, dict) else {name: values}
        )
    quantities |= {"rewards": replay_data.rewards, **computed}
    broken = [name for name, value in quantities.items() if not bool(th.isfinite(value).all())]
    return DivergenceError(
        f"The {broken[0] if broken else 'gradient'} of update {n_updates + 1}, at step {num_timesteps}, is not finite. "
        "The weights are those before it. Try a smaller learning_rate or max_grad_norm, or scale the rewards"
    )


def policy_statistics(
    q_values: th.Tensor, temperature: operators.Temperature, mask: th.Tensor | None = None, are_q_values: bool = True
) -> dict[str, th.Tensor]:
    """
    What the logger shows of a minibatch of the values that an agent acts on.

    :param q_values: action values, or an actor's logits, ``(batch_size, n_actions)``
    :param temperature: the policy is the softmax of the values divided by this
    :param mask: valid actions, ``(batch_size, n_actions)``
    :param are_q_values: whether they are action values
    :return: tensors without dimensions: the mean ``entropy`` of the policy in nats and as a fraction of its maximum
        (``entropy_fraction``); of action values also the mean ``action_gap`` between the best and the second best action, and
        ``q_value_mean``
    """
    entropy = operators.entropy(q_values, temperature, mask).mean()
    n_actions = q_values.shape[1]
    if mask is None:
        maximum_entropy: Any = math.log(n_actions)
        best = q_values.topk(min(2, n_actions), dim=1).values
        gap, mean = (best[:, 0] - best[:, -1]).mean(), q_values.mean()
    else:
        n_valid = mask.sum(dim=1)
        # Where no state leaves a choice, 0 of 0 is 0
        maximum_entropy = n_valid.to(q_values.dtype).log().mean().clamp(min=1e-12)
        best = q_values.masked_fill(~mask, -math.inf).topk(min(2, n_actions), dim=1).values
        # A state with a single valid action has no gap
        gap = th.where(n_valid > 1, best[:, 0] - best[:, -1], 0.0).mean()
        mean = q_values[mask].mean()
    fraction = entropy / maximum_entropy if mask is not None or n_actions > 1 else entropy
    statistics = {"entropy": entropy, "entropy_fraction": fraction}
    return {**statistics, "action_gap": gap, "q_value_mean": mean} if are_q_values else statistics
