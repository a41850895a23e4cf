"""Targets of n-step returns whose steps carry their regularisation."""

from typing import TYPE_CHECKING, Any

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs

if TYPE_CHECKING:
    from sb3_softq.value_based.base import ValueBasedAlgorithm


def concatenate(*observations: PyTorchObs) -> Any:
    """
    Observations one after the other.

    :param observations: batches of observations
    :return: one batch
    """
    if isinstance(observations[0], dict):
        return {key: th.cat([obs[key] for obs in observations]) for key in observations[0]}  # type: ignore[index,call-overload]
    return th.cat(observations)  # type: ignore[arg-type]


def _flat(steps: PyTorchObs) -> Any:
    """Steps of segments, ``(batch_size, n, ...)``, in one dimension."""
    if isinstance(steps, dict):
        return {key: value.flatten(end_dim=1) for key, value in steps.items()}
    return steps.flatten(end_dim=1)


def n_step_targets(model: "ValueBasedAlgorithm", replay_data: Any) -> tuple[th.Tensor, dict[str, th.Tensor]]:
    """
    Targets of segments of up to n steps, built from their last step back.

    With ``R(k)`` the reward of step k and the bonus of its action, the plain form is the return of the regularised problem,

        ``G(k) = R(k) + gamma * (G(k + 1) + omega(s(k + 1)))``,

    where ``omega`` is the regularisation that V contains (``V = sum_a pi q + omega``: for soft Q-learning the temperature
    times the entropy). The tree backup takes the action of the segment with the probability of the current policy only:

        ``G(k) = R(k) + gamma * (V(s(k + 1)) + pi(a | s(k + 1)) * (G(k + 1) - q(s(k + 1), a)))``.

    Both end with the value of the last state, if the episode did not terminate.

    :param model: the algorithm, with its operators and networks
    :param replay_data: segments with their steps, see :class:`~sb3_softq.replay.Samples`
    :return: targets, and what to log of them
    """
    steps, layout = replay_data.steps, model.layout
    batch_size, n_steps = steps["rewards"].shape
    # The networks see all states at once: the segments' steps from the second on, their first ones and their ends
    states = [_flat(steps["observations"]), replay_data.next_observations]
    states += [replay_data.observations] if model._has_bonus else []
    sizes = [batch_size * (n_steps - 1) * layout.n_heads] + [batch_size * layout.n_heads] * (len(states) - 1)
    pieces = list(zip(*(tensor.split(sizes) for tensor in model._estimates(concatenate(*states))), strict=True))
    actions = steps["actions"].flatten(end_dim=1)
    step_masks = steps["action_masks"].flatten(end_dim=1) if "action_masks" in steps else None
    mask = layout.mask_rows(step_masks, batch_size * (n_steps - 1), model.device)

    def by_step(values: th.Tensor) -> tuple[th.Tensor, ...]:
        """Of each step, ``(n_targets, 1)``."""
        if model.factorisation == "independent" and layout.n_heads > 1:
            values = values.view(batch_size, n_steps - 1, layout.n_heads).transpose(1, 2).reshape(-1, n_steps - 1)
        return values.view(-1, n_steps - 1).split(1, dim=1)

    end = model._joint(model._value(pieces[1], model._mask_rows(replay_data, "next_action_masks")))
    end = (1.0 - model._per_target(replay_data.dones)) * end
    rewards = list(model._per_target(steps["rewards"]).split(1, dim=1))
    valid = model._per_target(steps["valid"]).split(1, dim=1)
    metrics: dict[str, th.Tensor] = {}
    if model._has_bonus:
        bonus, metrics = model._bonus(pieces[2], layout.action_rows(replay_data.actions), model._mask_rows(replay_data))
        rewards[0] = rewards[0] + bonus
        for k, bonus in enumerate(by_step(model._bonus(pieces[0], layout.action_rows(actions), mask)[0])):
            rewards[k + 1] = rewards[k + 1] + bonus
    if model.tree_backup:
        policy, q_values = model._policy_and_q_values(pieces[0], mask)
        values = by_step(model._joint(model._value(pieces[0], mask)))
        taken = by_step(model._taken(q_values, actions))
        # The probability of a joint action is the product of its heads'
        probabilities = by_step(model._taken(policy.log(), actions).exp())
    else:
        omega = by_step(model._joint(model._regularisation(pieces[0], mask)))

    target = rewards[-1] + model.gamma * end
    for k in reversed(range(n_steps - 1)):
        if model.tree_backup:
            after = values[k] + probabilities[k] * (target - taken[k])
        else:
            after = omega[k] + target
        # A segment that is over leads to its end
        target = rewards[k] + model.gamma * th.where(valid[k + 1], after, end)
    return target, metrics
