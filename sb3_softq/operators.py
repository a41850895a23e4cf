"""
Regularised Bellman operators: the mathematics of the whole value-based family, once.

Pure functions of batched tensors: no networks, no state, no decisions about gradients. Arguments come in the order of
time and have the shapes of Stable-Baselines3: action values ``(batch_size, n_actions)``; actions, rewards, dones and
discounts ``(batch_size, 1)``; values ``(batch_size, 1)``.

Every function takes

- a ``temperature``, in the unit of the action values: a number, or a tensor that broadcasts against ``(batch_size, 1)``.
  The number 0 is the hard limit (max, argmax), not a division; a tensor is taken to be positive.
- an optional boolean ``mask`` of the valid actions, ``(batch_size, n_actions)``, with at least one valid action per row.
  An invalid action has probability 0 and log-probability -inf.

The one update that the algorithms share is

    target = r + alpha * clip(q(s, a) - V(s), low, 0) + gamma * (1 - done) * V(s')

and :func:`bellman_target`, :func:`gap_bonus` and the values (:func:`soft_value`, :func:`mellowmax`,
:func:`boltzmann_value`, :func:`double_soft_value`) are its parts.
"""

import math
from collections.abc import Callable

import torch as th

Temperature = float | th.Tensor


def _is_hard(temperature: Temperature) -> bool:
    """Whether the temperature is the number 0. Tensors are never read: that would wait for the device."""
    return not isinstance(temperature, th.Tensor) and temperature == 0


def _masked(q_values: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
    """Action values with -inf at the invalid actions; asserts the shapes."""
    assert q_values.ndim == 2, f"q_values must be (batch_size, n_actions), not {tuple(q_values.shape)}"
    if mask is None:
        return q_values
    assert mask.shape == q_values.shape, f"mask {tuple(mask.shape)} must have the shape of q_values {tuple(q_values.shape)}"
    assert mask.dtype == th.bool, f"mask must be boolean, not {mask.dtype}"
    return q_values.masked_fill(~mask, -math.inf)


def _logits(q_values: th.Tensor, temperature: Temperature) -> tuple[th.Tensor, th.Tensor]:
    """
    ``(q - max q) / temperature``, and ``max q`` as a constant.

    The maximum is taken off first: of action values of 1000 at a temperature of 0.03, division would keep three digits.
    """
    maximum = q_values.detach().amax(dim=1, keepdim=True)
    return (q_values - maximum) / temperature, maximum


def expectation(probabilities: th.Tensor, values: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    """
    ``sum_a pi(a | s) values(s, a)``, where actions that are not valid add nothing, whatever their values.

    :param probabilities: ``(batch_size, n_actions)``
    :param values: ``(batch_size, n_actions)``
    :param mask: valid actions, ``(batch_size, n_actions)``
    :return: ``(batch_size, 1)``
    """
    if mask is not None:
        values = values.masked_fill(~mask, 0.0)  # before the product: its gradient would hold 0 * -inf too
    return (probabilities * values).sum(dim=1, keepdim=True)


def soft_value(q_values: th.Tensor, temperature: Temperature, mask: th.Tensor | None = None) -> th.Tensor:
    """
    Log-sum-exp value, ``temperature * log sum_a exp(q(s, a) / temperature)``: the value of the maximum-entropy policy.

    Between ``max_a q`` and ``max_a q + temperature * log(n_actions)``; the maximum at temperature 0.
    Haarnoja et al. 2017 (arXiv:1702.08165).

    :param q_values: action values, ``(batch_size, n_actions)``
    :param temperature: weight of the entropy, at least 0
    :param mask: valid actions, ``(batch_size, n_actions)``
    :return: values, ``(batch_size, 1)``
    """
    q_values = _masked(q_values, mask)
    if _is_hard(temperature):
        return q_values.amax(dim=1, keepdim=True)
    logits, maximum = _logits(q_values, temperature)
    # The largest logit is 0, so that nothing overflows and the sum is at least 1
    return maximum + temperature * logits.exp().sum(dim=1, keepdim=True).log()


def mellowmax(q_values: th.Tensor, temperature: Temperature, mask: th.Tensor | None = None) -> th.Tensor:
    """
    Log-mean-exp value, ``soft_value - temperature * log(n_valid_actions)``: regularised towards the uniform policy.

    Between the mean and the maximum of the valid action values. Asadi and Littman 2017 (arXiv:1612.05628).

    :param q_values: action values, ``(batch_size, n_actions)``
    :param temperature: weight of the KL divergence from the uniform policy, at least 0
    :param mask: valid actions, ``(batch_size, n_actions)``
    :return: values, ``(batch_size, 1)``
    """
    value = soft_value(q_values, temperature, mask)
    if _is_hard(temperature):
        return value
    if mask is None:
        return value - temperature * math.log(q_values.shape[1])
    return value - temperature * mask.sum(dim=1, keepdim=True).to(q_values.dtype).log()


def policy(q_values: th.Tensor, temperature: Temperature, mask: th.Tensor | None = None) -> th.Tensor:
    """
    Boltzmann policy ``softmax(q / temperature)``; at temperature 0 the greedy one, on the first of equal maxima.

    :param q_values: action values, ``(batch_size, n_actions)``
    :param temperature: at least 0
    :param mask: valid actions, ``(batch_size, n_actions)``
    :return: probabilities, ``(batch_size, n_actions)``
    """
    q_values = _masked(q_values, mask)
    if _is_hard(temperature):
        return th.zeros_like(q_values).scatter_(1, q_values.argmax(dim=1, keepdim=True), 1.0)
    return th.softmax(_logits(q_values, temperature)[0], dim=1)


def scaled_log_policy(q_values: th.Tensor, temperature: Temperature, mask: th.Tensor | None = None) -> th.Tensor:
    """
    ``temperature * log policy``, which is ``q - soft_value(q)``: at most 0, -inf for invalid actions.

    Its limit at temperature 0 is ``q - max q``, the negative action gap. Unchanged when a constant is added to ``q``.
    Vieillard et al. 2020 (arXiv:2007.14430).

    :param q_values: action values, ``(batch_size, n_actions)``
    :param temperature: at least 0
    :param mask: valid actions, ``(batch_size, n_actions)``
    :return: scaled log-probabilities, ``(batch_size, n_actions)``
    """
    q_values = _masked(q_values, mask)
    if _is_hard(temperature):
        return q_values - q_values.amax(dim=1, keepdim=True)
    return temperature * th.log_softmax(_logits(q_values, temperature)[0], dim=1)


def boltzmann_value(q_values: th.Tensor, temperature: Temperature, mask: th.Tensor | None = None) -> th.Tensor:
    """
    Average of the action values under their own Boltzmann policy: ``soft_value - temperature * entropy``.

    Not a contraction as a Bellman operator (Asadi and Littman 2017); the operator of DPP (Azar et al. 2012).

    :param q_values: action values, ``(batch_size, n_actions)``
    :param temperature: at least 0
    :param mask: valid actions, ``(batch_size, n_actions)``
    :return: values, ``(batch_size, 1)``
    """
    if _is_hard(temperature):
        return soft_value(q_values, temperature, mask)
    return expectation(policy(q_values, temperature, mask), q_values, mask)


def double_soft_value(
    q_values: th.Tensor,
    evaluation_q_values: th.Tensor,
    temperature: Temperature,
    mask: th.Tensor | None = None,
) -> th.Tensor:
    """
    Soft value of the policy of one network as another one evaluates it:
    ``E_{a ~ pi1}[q2 - temperature * log pi1] = soft_value(q1) + E_{a ~ pi1}[q2 - q1]``.

    At temperature 0 the target of Double DQN, ``q2(argmax q1)``; with equal networks :func:`soft_value`.

    :param q_values: values that define the policy, ``(batch_size, n_actions)``
    :param evaluation_q_values: values that evaluate it, ``(batch_size, n_actions)``
    :param temperature: at least 0
    :param mask: valid actions, ``(batch_size, n_actions)``
    :return: values, ``(batch_size, 1)``
    """
    assert q_values.shape == evaluation_q_values.shape, (
        f"q_values {tuple(q_values.shape)} and evaluation_q_values {tuple(evaluation_q_values.shape)} must have one shape"
    )
    difference = expectation(policy(q_values, temperature, mask), evaluation_q_values - q_values, mask)
    return soft_value(q_values, temperature, mask) + difference


def entropy(q_values: th.Tensor, temperature: Temperature, mask: th.Tensor | None = None) -> th.Tensor:
    """
    Entropy of the Boltzmann policy in nats, between 0 (also at temperature 0) and the log of the number of valid actions.

    :param q_values: action values, ``(batch_size, n_actions)``
    :param temperature: at least 0
    :param mask: valid actions, ``(batch_size, n_actions)``
    :return: entropies, ``(batch_size, 1)``
    """
    q_values = _masked(q_values, mask)
    if _is_hard(temperature):
        return th.zeros_like(q_values[:, :1])
    log_policy = th.log_softmax(_logits(q_values, temperature)[0], dim=1)
    return -expectation(log_policy.exp(), log_policy, mask)


def kl_divergence(log_policy: th.Tensor, other_log_policy: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    """
    ``KL(policy || other)`` in nats of two categorical policies given as log-probabilities.

    Infinite where ``other`` excludes an action that ``policy`` takes.

    :param log_policy: normalised log-probabilities, ``(batch_size, n_actions)``
    :param other_log_policy: normalised log-probabilities, ``(batch_size, n_actions)``
    :param mask: valid actions, ``(batch_size, n_actions)``
    :return: divergences, ``(batch_size, 1)``
    """
    assert log_policy.ndim == 2 and log_policy.shape == other_log_policy.shape, (
        f"log-policies must have one shape (batch_size, n_actions), not {tuple(log_policy.shape)} "
        f"and {tuple(other_log_policy.shape)}"
    )
    # An action of probability 0 adds nothing, also where the other policy excludes it too
    impossible = log_policy == -math.inf if mask is None else (log_policy == -math.inf) | ~mask
    difference = (log_policy - other_log_policy).masked_fill(impossible, 0.0)
    return expectation(log_policy.exp(), difference, mask)


def gap_bonus(
    q_values: th.Tensor,
    actions: th.Tensor,
    temperature: Temperature,
    clip: float = -math.inf,
    mask: th.Tensor | None = None,
    value: Callable[[th.Tensor, Temperature, th.Tensor | None], th.Tensor] = soft_value,
) -> th.Tensor:
    """
    Gap-increasing term ``max(q(s, a) - V(s), clip)`` at the taken action.

    With the default ``value`` it is the scaled log-policy of Munchausen (arXiv:2007.14430, equation 2), and at
    temperature 0 the term of advantage learning: never above 0. With :func:`mellowmax` or :func:`boltzmann_value` it is
    the term of CVI or DPP, which can be positive.

    :param q_values: action values at s, ``(batch_size, n_actions)``
    :param actions: taken actions, ``(batch_size, 1)``
    :param temperature: at least 0
    :param clip: lower bound of the term, at most 0; -inf for none
    :param mask: valid actions, ``(batch_size, n_actions)``
    :param value: the operator V, one of this module's values
    :return: bonus, not yet weighted, ``(batch_size, 1)``
    """
    assert actions.shape == (q_values.shape[0], 1), f"actions must be ({q_values.shape[0]}, 1), not {tuple(actions.shape)}"
    if value is soft_value:
        gap = scaled_log_policy(q_values, temperature, mask).gather(1, actions)
    else:
        gap = q_values.gather(1, actions) - value(q_values, temperature, mask)
    return gap if clip == -math.inf else gap.clamp(min=clip)


def bellman_target(
    rewards: th.Tensor,
    dones: th.Tensor,
    discounts: th.Tensor | float,
    next_values: th.Tensor,
) -> th.Tensor:
    """
    ``rewards + (1 - dones) * discounts * next_values``, the one-step (or n-step) target.

    A bonus belongs to the reward: it stays on terminal transitions.

    :param rewards: rewards, with the bonus if there is one, ``(batch_size, 1)``
    :param dones: 1 where the episode terminated (not where it was cut by a time limit), ``(batch_size, 1)``
    :param discounts: the discount, or one per sample (``gamma ** n`` for n-step returns), ``(batch_size, 1)``
    :param next_values: values of the next state, ``(batch_size, 1)``, or their quantiles, ``(batch_size, n_quantiles)``
    :return: targets, of the shape of ``next_values``
    """
    assert rewards.shape == dones.shape == (len(next_values), 1) and next_values.ndim == 2, (
        f"rewards {tuple(rewards.shape)} and dones {tuple(dones.shape)} must be (batch_size, 1), next_values "
        f"{tuple(next_values.shape)} (batch_size, 1) or (batch_size, n_quantiles)"
    )
    assert not isinstance(discounts, th.Tensor) or discounts.shape in (rewards.shape, ()), (
        f"discounts must be a number or {tuple(rewards.shape)}, not {tuple(discounts.shape)}"
    )
    return rewards + (1.0 - dones) * discounts * next_values
