"""Discrete, MultiDiscrete and MultiBinary actions as one layout: heads of equal width, and the masks of valid actions."""

import math
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

DISCRETE_SPACES = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


class ActionLayout:
    """
    The heads of a discrete action space.

    A network gives ``n_heads * width`` values for a state, where ``width`` is the size of the largest head; smaller heads
    leave their last values unused. Seen as :meth:`rows`, one for each state and head, they have the shape that the operators
    take, with a mask for what is unused. A Discrete space is one head.

    :param action_space: a Discrete, MultiDiscrete or MultiBinary space whose actions start at 0
    :raises ValueError: for another space, or actions that are no vectors (SB3 stores no others)
    """

    def __init__(self, action_space: spaces.Space) -> None:
        sizes, starts = _head_sizes(action_space)
        if any(start != 0 for start in starts):
            raise ValueError(f"Actions must start at 0, not as in action_space={action_space}: wrap the environment")
        if len(action_space.shape or ()) > 1:
            raise ValueError(
                f"Actions must be vectors, not as in action_space={action_space}: wrap the environment to flatten them"
            )
        self.sizes = sizes
        self.n_heads = len(sizes)
        self.width = max(sizes)
        is_used = np.arange(self.width) < np.array(sizes)[:, None]
        #: Which values of ``(n_heads, width)`` belong to an action; None if all do
        self.used = None if is_used.all() else th.from_numpy(is_used)
        #: Positions of the actions, in the order of a flat mask
        self.columns = np.flatnonzero(is_used)
        self.is_discrete = isinstance(action_space, spaces.Discrete)
        self.shape, self.dtype = action_space.shape, action_space.dtype

    @property
    def n_values(self) -> int:
        """Number of values that a network gives for a state."""
        return self.n_heads * self.width

    @property
    def n_flat(self) -> int:
        """Number of actions of all heads together: the length of a mask."""
        return sum(self.sizes)

    def rows(self, values: th.Tensor) -> th.Tensor:
        """
        One row for each state and head.

        :param values: ``(..., batch_size, n_heads * width)``
        :return: ``(..., batch_size * n_heads, width)``
        """
        return values if self.n_heads == 1 else values.reshape(*values.shape[:-2], -1, self.width)

    def action_rows(self, actions: th.Tensor) -> th.Tensor:
        """
        Actions as indices of rows.

        :param actions: ``(batch_size, n_heads)``
        :return: ``(batch_size * n_heads, 1)``
        """
        return actions.long().reshape(-1, 1)

    def mask_rows(self, masks: th.Tensor | None, batch_size: int, device: th.device | str = "cpu") -> th.Tensor | None:
        """
        Which values of :meth:`rows` are valid actions; None if all are.

        :param masks: valid actions in the layout of the network's values, ``(batch_size, n_heads * width)``, or None for all
        :param batch_size: number of states
        :param device: where the result goes
        :return: ``(batch_size * n_heads, width)``
        """
        if masks is not None:
            return self.rows(masks)
        if self.used is None:
            return None
        return self.used.to(device).repeat(batch_size, 1)

    def padded_mask(self, masks: np.ndarray) -> np.ndarray:
        """
        Masks in the layout of the network's values.

        :param masks: ``(n_envs, n_flat)``
        :return: ``(n_envs, n_heads * width)``
        """
        if self.used is None:
            return masks
        padded = np.zeros((len(masks), self.n_values), dtype=bool)
        padded[:, self.columns] = masks
        return padded

    def flat(self, values: th.Tensor) -> th.Tensor:
        """
        Values without those that belong to no action.

        :param values: ``(batch_size, n_heads * width)``
        :return: ``(batch_size, n_flat)``
        """
        return values if self.used is None else values[:, th.from_numpy(self.columns).to(values.device)]

    def to_env(self, actions: th.Tensor) -> np.ndarray:
        """
        Actions of rows as the environment takes them.

        :param actions: ``(batch_size * n_heads,)``
        :return: ``(batch_size, *action_space.shape)``
        """
        if self.is_discrete:
            return actions.cpu().numpy()
        return actions.cpu().numpy().reshape(-1, *self.shape).astype(self.dtype)  # type: ignore[misc]


def greedy_actions(rows: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
    """
    The best valid action of each row.

    :param rows: ``(n_rows, n_actions)``
    :param mask: valid actions, ``(n_rows, n_actions)``, or None for all
    :return: ``(n_rows,)``
    """
    return (rows if mask is None else rows.masked_fill(~mask, -math.inf)).argmax(dim=1)


def _head_sizes(action_space: spaces.Space) -> tuple[list[int], list[int]]:
    """The number of actions of each head, and the first action of each."""
    if isinstance(action_space, spaces.Discrete):
        return [int(action_space.n)], [int(action_space.start)]
    if isinstance(action_space, spaces.MultiDiscrete):
        return action_space.nvec.reshape(-1).tolist(), np.asarray(action_space.start).reshape(-1).tolist()
    if isinstance(action_space, spaces.MultiBinary):
        n_heads = int(np.prod(action_space.shape))
        return [2] * n_heads, [0] * n_heads
    raise ValueError(f"Discrete, MultiDiscrete or MultiBinary actions are needed, not action_space={action_space}")


# ---------------------------------------------------------------------- masks, by MaskablePPO's contract


class TerminalActionMasks(gym.Wrapper):
    """
    Puts the mask of the last state of an episode that a time limit cut into ``info["terminal_action_masks"]``.

    A vectorised environment resets itself at the end of an episode, after which its mask is the next episode's. Models wrap
    an environment with ``action_masks()`` by themselves; who makes the VecEnv makes this wrapper too (outside the time
    limit). Without it, the mask of the state before is taken for the last state's.
    """

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """As the environment's, with ``info["terminal_action_masks"]`` where a time limit cut the episode."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        if truncated and not terminated:
            info["terminal_action_masks"] = self.env.get_wrapper_attr("action_masks")()
        return obs, reward, terminated, truncated, info


def has_action_masks(env: VecEnv | gym.Env | None) -> bool:
    """
    Whether an environment says which actions are valid, by a method ``action_masks()`` as for sb3-contrib's MaskablePPO.

    :param env: a vectorised or a single environment
    """
    if isinstance(env, VecEnv):
        return bool(env.has_attr("action_masks"))
    return isinstance(env, gym.Env) and env.has_wrapper_attr("action_masks")


def action_masks(env: VecEnv, n_flat: int) -> np.ndarray:
    """
    The valid actions of the environments' current states.

    :param env: a vectorised environment for which :func:`has_action_masks` holds
    :param n_flat: number of actions of all heads together
    :return: boolean, ``(n_envs, n_flat)``
    :raises TypeError: if a mask holds anything but booleans (or 0 and 1)
    :raises ValueError: if a mask has another shape
    """
    masks = [check_mask(mask, n_flat, f"environment {i}") for i, mask in enumerate(env.env_method("action_masks"))]
    return np.stack(masks)


def check_mask(mask: Any, n_flat: int, whose: str) -> np.ndarray:
    """
    A mask as a boolean array.

    :param mask: what the environment gave
    :param n_flat: its right length
    :param whose: whose mask it is, for the message
    :return: boolean, ``(n_flat,)``
    :raises TypeError: if it holds anything but booleans (or 0 and 1)
    :raises ValueError: if it has another shape
    """
    array = np.asarray(mask)
    if array.dtype.kind not in "biu" or (array.dtype.kind != "b" and not np.isin(array, (0, 1)).all()):
        raise TypeError(f"The action mask of {whose} must hold booleans, not {array.dtype}: {mask!r}")
    if array.shape != (n_flat,):
        raise ValueError(
            f"The action mask of {whose} must have the shape ({n_flat},), one value for each action (of all heads, one after "
            f"the other), not {array.shape}"
        )
    return array.astype(bool)


def check_valid(masks: np.ndarray, layout: ActionLayout, whose: str, observation: Callable[[int], Any] | None = None) -> None:
    """
    Raise for a state without a valid action.

    :param masks: masks in the layout of the network's values, ``(n_states, n_heads * width)``
    :param layout: the heads
    :param whose: what has the masks, for the message, which adds its number
    :param observation: gives the observation of a number, for the message
    :raises ValueError: if a head has no valid action
    """
    valid = masks.reshape(-1, layout.n_heads, layout.width).any(axis=2)
    if not valid.all():
        i, head = (int(index) for index in np.argwhere(~valid)[0])
        raise ValueError(
            f"No action is valid{'' if layout.is_discrete else f' for head {head}'} in a state of {whose} {i}"
            f"{'' if observation is None else f', whose observation is {observation(i)}'}: its mask must leave at least one, "
            "also in the last state of an episode that a time limit cut"
        )
