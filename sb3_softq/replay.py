"""
Replay buffers of Stable-Baselines3 whose storage grows as it fills.

A buffer of the usual million image transitions asks for tens of gigabytes before the first step. Here storage is
allocated at the first transition, as far as it fits easily into the memory that is free, and grows when it is full, up to
``buffer_size``: a short training, or a model that was loaded to be looked at, holds what it uses.
"""

import functools
import warnings
from typing import Any, NamedTuple

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import PyTorchObs, ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from torch.utils._pytree import tree_map, tree_map_only


def n_states(observations: PyTorchObs) -> int:
    """
    Number of states in a batch of observations.

    :param observations: a tensor, or a dict of them
    """
    return len(next(iter(observations.values())) if isinstance(observations, dict) else observations)


class Samples(NamedTuple):
    """
    A minibatch: the fields of SB3's samples, and two that only the buffers here have.

    With n-step returns, the first five describe a segment of up to n steps that ends early with its episode: observations
    and actions of its first step, next observations and dones of its last, the discounted sum of its rewards.
    """

    observations: PyTorchObs
    actions: th.Tensor
    next_observations: PyTorchObs
    #: 1 where the episode terminated, not where it was cut by a time limit
    dones: th.Tensor
    rewards: th.Tensor
    #: ``gamma ** length`` of segments, ``(batch_size, 1)``; None for single steps
    discounts: th.Tensor | None = None
    #: what else was stored with the transition: of a segment, with its first step, but ``next_...`` with its last
    extras: dict[str, th.Tensor] | None = None
    #: the steps of segments: ``rewards`` and ``valid`` of all n (``(batch_size, n)``), ``observations``, ``actions`` and the
    #: extras of all but the first (``(batch_size, n - 1, ...)``)
    steps: dict[str, Any] | None = None


@functools.lru_cache
def discount_powers(gamma: float, n_steps: int, device: th.device) -> th.Tensor:
    """
    Powers of the discount factor, computed in float32 as SB3 does.

    :param gamma: the discount factor
    :param n_steps: the highest exponent
    :param device: where the tensor is
    :return: ``gamma ** k`` for k from 0, ``(n_steps + 1,)``
    """
    return th.from_numpy(gamma ** np.arange(n_steps + 1, dtype=np.float32)).to(device)


def carve(block: th.Tensor, fields: Any) -> Any:
    """
    Views of a block of bytes, as rows that hold all fields of a transition one after the other.

    :param block: bytes, ``(n_rows, n_envs, row_bytes)``
    :param fields: arrays or tensors ``(any, n_envs, ...)``, in dicts: the dtypes and shapes of the views
    :return: the same dicts, of tensors ``(n_rows, n_envs, ...)``
    """
    stop = 0

    def view(array: Any) -> th.Tensor:
        nonlocal stop
        start, stop = stop, stop + field_bytes(array)
        size = array[0, 0].nbytes
        return block[..., start : start + size].view(th.as_tensor(array).dtype).view(*block.shape[:2], *array.shape[2:])

    return tree_map(view, fields)


def field_bytes(array: Any) -> int:
    """
    Bytes that a field of one transition takes in a block, where all begin at multiples of 8.

    :param array: array or tensor ``(any, n_envs, ...)``
    """
    return -(-array[0, 0].nbytes // 8) * 8


class GrowingStorage(ReplayBuffer):
    """
    Mixin before one of SB3's buffers: its arrays have :attr:`capacity` rows, at most ``buffer_size``.

    If the memory runs out, the buffer stays at the size it has, with a warning, and overwrites its oldest transitions:
    the training goes on.

    With a ``storage_device`` the same fields are tensors there, allocated in full at the first transition; a transition goes
    to them by one copy and a minibatch is gathered from them, and neither waits for the device.

    :param buffer_size: number of transitions to keep
    :param observation_space: observation space of the environment
    :param action_space: action space of the environment
    :param device: where minibatches go
    :param n_envs: number of environments
    :param n_steps: length of the segments that are sampled
    :param gamma: discount within a segment
    :param keep_steps: whether segments come with their single steps (:attr:`Samples.steps`)
    :param extra_fields: name -> (shape, dtype) of what is stored beside each transition; :attr:`pending` is where
        :meth:`add` takes it from
    :param storage_device: where transitions are kept: None for NumPy arrays, a CUDA device (or ``"cpu"``) for tensors there,
        ``"auto"`` for ``device`` if that is a CUDA device and None otherwise
    :raises ValueError: for a ``storage_device`` that cannot be used, or not with the other arguments
    :raises MemoryError: if the ``storage_device`` has less free memory than ``buffer_size`` transitions take
    """

    #: Where transitions are kept: None for NumPy arrays
    storage_device: th.device | None = None
    # What is at the storage device: bytes, (capacity, n_envs, row_bytes), of which all fields are views; and on the host
    # such a row of one transition, as bytes and as fields
    _block: th.Tensor | None = None
    _incoming: tuple[th.Tensor, dict[str, Any]] | None = None

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        n_steps: int = 1,
        gamma: float = 0.99,
        keep_steps: bool = False,
        extra_fields: dict[str, tuple[tuple[int, ...], Any]] | None = None,
        storage_device: th.device | str | None = None,
        **kwargs: Any,
    ) -> None:
        # SB3 allocates in its constructor: a single row, whose dtypes and shapes all later ones have
        super().__init__(n_envs, observation_space, action_space, device, n_envs=n_envs, **kwargs)
        self.buffer_size = max(buffer_size // n_envs, 1)
        self.n_steps, self.gamma, self.keep_steps = n_steps, gamma, keep_steps
        self.extras = {
            name: np.zeros((1, n_envs, *shape), dtype=dtype) for name, (shape, dtype) in (extra_fields or {}).items()
        }
        #: What the next :meth:`add` stores besides its arguments, ``(n_envs, ...)`` each
        self.pending: dict[str, np.ndarray] = {}
        # id of an array -> the array, and its memory as a tensor with one row for each transition
        self._views: dict[int, tuple[Any, th.Tensor]] = {}
        self.store_on(storage_device)

    # ------------------------------------------------------------------ storage

    @property
    def capacity(self) -> int:
        """Number of rows (of ``n_envs`` transitions) that the storage has."""
        return len(self.rewards)

    @functools.cached_property
    def transition_bytes(self) -> int:
        """Memory that one transition takes; the same for as long as the buffer lives."""
        return sum(array.nbytes for _, _, array in self._arrays()) // (self.capacity * self.n_envs)

    def _fields(self) -> dict[str, Any]:
        """The attributes that hold transitions: arrays ``(capacity, n_envs, ...)``, or dicts of them."""
        names = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts", "extras")
        return {name: self.__dict__[name] for name in names if name in self.__dict__}

    def _arrays(self) -> list[tuple[Any, str, Any]]:
        """All storage as (owner, name, array), where the owner is the buffer's ``__dict__`` or a dict of observations."""
        arrays: list[tuple[Any, str, Any]] = []
        for name, field in self._fields().items():
            if isinstance(field, dict):
                arrays += [(field, key, array) for key, array in field.items()]
            else:
                arrays.append((self.__dict__, name, field))
        return arrays

    def _reserve(self, n_rows: int) -> None:
        """Make room for at least ``n_rows`` rows, if ``buffer_size`` and the memory allow it."""
        n_rows = min(n_rows, self.buffer_size)
        if n_rows <= self.capacity:
            return
        self._views = {}  # they would keep the old arrays alive
        if self.storage_device is not None:
            self._check_memory(self.storage_device)
            self._allocate(self.storage_device, self.buffer_size)
            return
        free_rows = free_bytes(th.device("cpu")) // (self.transition_bytes * self.n_envs)
        limit = min(self.buffer_size, self.capacity + int(0.9 * free_rows))
        doubled = max(n_rows, 2 * self.capacity)
        # What fits easily is there at once: it takes no memory until it is written, and an array that grows is copied
        if limit < n_rows or not any(self._grow(min(size, limit)) for size in (max(doubled, free_rows // 2), doubled)):
            self._stop_growing()

    def _grow(self, capacity: int) -> bool:
        """Whether there is memory for ``capacity`` rows, which the arrays have then."""
        old_capacity, arrays = self.capacity, self._arrays()
        try:
            # Fresh pages of np.zeros take no memory until they are written, and an array is gone before the next one grows
            while arrays:
                owner, name, array = arrays.pop()
                owner[name] = np.zeros((capacity, *array.shape[1:]), dtype=array.dtype)
                owner[name][: len(array)] = array
                del array
        except MemoryError:  # maybe half way
            for owner, name, array in self._arrays():
                owner[name] = array[:old_capacity]
            return False
        return True

    def _stop_growing(self) -> None:
        warnings.warn(
            f"Not enough memory for the replay buffer to grow to buffer_size={self.buffer_size * self.n_envs}: it stays at "
            f"{self.capacity * self.n_envs} transitions and overwrites the oldest. Pass a smaller buffer_size to avoid this."
        )
        self.buffer_size = self.capacity

    # ------------------------------------------------------------------ storage on a device

    def store_on(self, storage_device: th.device | str | None) -> None:
        """
        Move the storage, with what it holds.

        :param storage_device: where to, as in the constructor; a CUDA device that is not there stands for None, with a
            warning, as SB3 takes the CPU for a ``device`` that is not there
        :raises ValueError: for a device that cannot be used
        :raises MemoryError: if it has too little free memory; the storage stays where it was
        """
        device = self._find_device(storage_device)
        if device == self.storage_device:
            return
        if device is not None:
            if self.optimize_memory_usage:
                raise ValueError(
                    f"storage_device={str(storage_device)!r} keeps observations and next observations apart: "
                    "pass optimize_memory_usage=False, or storage_device=None"
                )
            self._check_memory(device)
        self.__dict__.update(self._host_fields())
        self.storage_device, self._block, self._incoming, self._views = None, None, None, {}
        if device is not None:
            self._allocate(device, 1 if self.size() == 0 else self.buffer_size)

    def _find_device(self, storage_device: th.device | str | None) -> th.device | None:
        if storage_device is None or (storage_device == "auto" and self.device.type != "cuda"):
            return None
        try:
            device = self.device if storage_device == "auto" else th.device(storage_device)
            if device.type not in ("cpu", "cuda"):
                raise ValueError(f"transitions cannot be stored on {device}")
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"storage_device must be None, 'auto', 'cpu' or a CUDA device, not {storage_device!r}: {error}"
            ) from error
        if device.type == "cuda" and (device.index or 0) >= th.cuda.device_count():
            warnings.warn(f"storage_device={str(storage_device)!r} is not there: transitions are stored in the host's memory")
            return None
        return th.empty(0, device=device).device  # with its number

    def _check_memory(self, device: th.device) -> None:
        free = free_bytes(device)
        row_bytes = self.n_envs * sum(field_bytes(array) for _, _, array in self._arrays())
        if self.buffer_size * row_bytes > free:
            raise MemoryError(
                f"buffer_size={self.buffer_size * self.n_envs} transitions take {self.buffer_size * row_bytes} bytes, and "
                f"storage_device={str(device)!r} has {free} free, enough for buffer_size={free // row_bytes * self.n_envs}: "
                "pass a smaller buffer_size that leaves room for the networks, or storage_device=None"
            )

    def _allocate(self, device: th.device, n_rows: int) -> None:
        """Storage on a device in one piece, with what the arrays of the host hold."""
        fields = self._fields()
        shape = (self.n_envs, sum(field_bytes(array) for _, _, array in self._arrays()))
        block = th.zeros((n_rows, *shape), dtype=th.uint8, device=device)
        if self.size() > 0:
            # By way of the host, where copies of single fields do not take the device's memory
            rows = th.zeros((self.size(), *shape), dtype=th.uint8)
            tree_map(lambda view, array: view.copy_(th.from_numpy(array[: len(view)])), carve(rows, fields), fields)
            block[: len(rows)] = rows
        row = th.zeros((1, *shape), dtype=th.uint8)
        self._incoming = row[0], tree_map(th.Tensor.numpy, carve(row, fields))
        self._block, self.storage_device = block, device
        self.__dict__.update(carve(block, fields))

    def _host_fields(self) -> dict[str, Any]:
        """The :meth:`_fields` as NumPy arrays: the rows in use, and one more that ``optimize_memory_usage`` writes to."""
        n_rows = self.size() + 1
        if self._block is None:
            return tree_map(lambda array: array[:n_rows], self._fields())
        return tree_map(th.Tensor.numpy, carve(self._block[:n_rows].cpu(), self._fields()))

    def _fetchable(self, tensor: th.Tensor) -> th.Tensor:
        """A tensor of the host where the storage's device can fetch it without being waited for."""
        # The allocator of pinned memory does not give it away again before the copy is done
        return tensor.pin_memory() if self.storage_device.type == "cuda" else tensor  # type: ignore[union-attr]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **self._host_fields(), "_block": None, "_incoming": None, "_views": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, storage_device=None, _views={})
        try:
            self.store_on(state.get("storage_device"))
        except MemoryError as error:
            warnings.warn(f"The replay buffer is loaded into the host's memory. {error}")

    # ------------------------------------------------------------------ storing

    def add(  # type: ignore[override]
        self,
        obs: Any,
        next_obs: Any,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        pos = self.pos
        if not self.full and pos + 2 > len(self.rewards):
            self._reserve(pos + 2)  # optimize_memory_usage writes past the current row
        # To the arrays, or by way of a row that the device fetches
        fields, row = (self.__dict__, pos) if self._incoming is None else (self._incoming[1], 0)
        _write(fields["observations"], row, obs)
        if self.optimize_memory_usage:
            _write(fields["observations"], (row + 1) % self.buffer_size, next_obs)
        else:
            _write(fields["next_observations"], row, next_obs)
        _write(fields["actions"], row, action)
        fields["rewards"][row] = reward
        fields["dones"][row] = done
        if self.handle_timeout_termination:
            fields["timeouts"][row] = [info.get("TimeLimit.truncated", False) for info in infos]
        for name, array in fields["extras"].items():
            array[row] = self.pending[name]
        if self._incoming is not None:
            self._block[pos].copy_(self._fetchable(self._incoming[0]), non_blocking=True)  # type: ignore[index]
        self.pos += 1
        if self.pos == self.buffer_size:
            self.full = True
            self.pos = 0

    def end_segments(self) -> None:
        """No segment leads from the newest transition to the next one, which belongs to another episode."""
        if self.n_steps == 1 or self.size() == 0:
            return
        newest = (self.pos - 1) % self.buffer_size
        if self.handle_timeout_termination:
            self.timeouts[newest] = 1 - self.dones[newest] * (1 - self.timeouts[newest])
        else:
            self.dones[newest] = 1  # as SB3 does, where nothing tells a time limit from an end

    # ------------------------------------------------------------------ sampling

    def check_normalisation(self, env: VecNormalize | None) -> None:
        """
        Raise if minibatches cannot be normalised.

        :param env: the environment that normalises, if any
        :raises ValueError: if transitions are on a device
        """
        if env is not None and self.storage_device is not None:
            raise ValueError(
                f"VecNormalize normalises minibatches on the host, and storage_device={str(self.storage_device)!r} keeps them "
                "on a device: pass storage_device=None, or an environment without VecNormalize"
            )

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> Samples:  # type: ignore[override]
        """The samples at rows of the buffer, each of a random environment, gathered by tensors: no copy but the gathering."""
        self.check_normalisation(env)
        # Where rows and environments are one dimension. Drawn as SB3 draws them, which from one environment takes no number
        index = batch_inds
        if self.n_envs > 1:
            index = batch_inds * self.n_envs + np.random.randint(0, self.n_envs, size=len(batch_inds))
        first = last = th.from_numpy(index)
        if self.storage_device is not None:
            first = last = self._fetchable(first).to(self.storage_device, non_blocking=True)
        if self.n_steps == 1:
            rewards, discounts, steps = self._gather_rewards(first, env).unsqueeze(1), None, None
        else:
            segments, valid = self._segments(first)
            lengths = valid.sum(dim=1, keepdim=True)
            last = segments.gather(1, lengths - 1).squeeze(1)
            powers = discount_powers(float(self.gamma), self.n_steps, first.device)
            all_rewards = self._gather_rewards(segments, env)
            rewards = (all_rewards * (powers[:-1] * valid)).sum(dim=1, keepdim=True)
            discounts = powers.take(lengths)
            steps = self._gather_steps(segments[:, 1:], env) if self.keep_steps else None
            if steps is not None:
                steps |= {"rewards": all_rewards, "valid": valid}
        dones = self._gather(self.dones, last)
        if self.handle_timeout_termination:
            dones = th.addcmul(dones, dones, self._gather(self.timeouts, last), value=-1)  # dones * (1 - timeouts)
        samples = Samples(
            observations=self._gather_observations(self.observations, first, env),
            actions=self._gather(self.actions, first),
            next_observations=self._gather_next_observations(last, env),
            dones=dones.unsqueeze(1),
            rewards=rewards,
            discounts=discounts,
            extras=self._gather_extras(first, last),
            steps=steps,
        )
        if rewards.device == self.device:
            return samples
        return tree_map_only(th.Tensor, lambda tensor: tensor.to(self.device), samples)

    def _segments(self, first: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        The indices of segments, and which of their steps count: those up to the end of the episode, or to the newest
        transition; ``(batch_size, n_steps)`` both.
        """
        steps = th.arange(0, self.n_steps * self.n_envs, self.n_envs, device=first.device)
        index = (first.unsqueeze(1) + steps) % (self.buffer_size * self.n_envs)
        newest = index // self.n_envs == (self.pos - 1) % self.buffer_size
        index = index.clamp(max=self.capacity * self.n_envs - 1)  # what lies beyond never counts
        ends = newest | (self._gather(self.dones, index) > 0)
        if self.handle_timeout_termination:
            ends |= self._gather(self.timeouts, index) > 0
        return index, ends.cumsum(dim=1) == ends  # no end before

    def _rows(self, array: Any) -> th.Tensor:
        """The memory of an array as a tensor with one row for each transition, ``(capacity * n_envs, ...)``."""
        known = self._views.get(id(array))
        if known is None:  # the first of a storage that has grown, or one that was replaced
            arrays = [array for _, _, array in self._arrays()]
            self._views = {id(array): (array, th.as_tensor(array).view(-1, *array.shape[2:])) for array in arrays}
            known = self._views[id(array)]
        return known[1]

    def _gather(self, array: Any, index: th.Tensor) -> Any:
        """The transitions of an array, or of each of a dict, at indices of any shape."""
        if isinstance(array, dict):
            return {key: self._gather(value, index) for key, value in array.items()}
        if index.ndim == 1:
            return self._rows(array).index_select(0, index)
        return self._rows(array).index_select(0, index.reshape(-1)).unflatten(0, index.shape)

    def _gather_extras(self, first: th.Tensor, last: th.Tensor) -> dict[str, th.Tensor] | None:
        # What is stored of a next state belongs, as the next observation, to the last step of a segment
        extras = {
            name: self._gather(array, last if name.startswith("next_") else first) for name, array in self.extras.items()
        }
        return extras or None

    def _gather_observations(self, array: Any, index: th.Tensor, env: VecNormalize | None) -> Any:
        observations = self._gather(array, index)
        if env is None:
            return observations
        return tree_map(th.from_numpy, env.normalize_obs(tree_map(th.Tensor.numpy, observations)))

    def _gather_next_observations(self, index: th.Tensor, env: VecNormalize | None) -> Any:
        if not self.optimize_memory_usage:
            return self._gather_observations(self.next_observations, index, env)
        following = (index + self.n_envs) % (self.buffer_size * self.n_envs)
        return self._gather_observations(self.observations, following, env)

    def _gather_rewards(self, index: th.Tensor, env: VecNormalize | None) -> th.Tensor:
        rewards: th.Tensor = self._gather(self.rewards, index)
        return rewards if env is None else th.from_numpy(env.normalize_reward(rewards.numpy()).astype(np.float32))

    def _gather_steps(self, index: th.Tensor, env: VecNormalize | None) -> dict[str, Any]:
        # Normalised with their steps in one dimension, as an environment's observations are
        observations = self._gather_observations(self.observations, index.reshape(-1), env)
        return {
            "observations": tree_map(lambda tensor: tensor.unflatten(0, index.shape), observations),
            "actions": self._gather(self.actions, index),
            **self._gather(self.extras, index),
        }


class GrowingReplayBuffer(GrowingStorage, ReplayBuffer):
    """SB3's ``ReplayBuffer``, or its n-step buffer, allocated as it fills."""


class GrowingDictReplayBuffer(GrowingStorage, DictReplayBuffer):  # type: ignore[misc]
    """SB3's ``DictReplayBuffer``, allocated as it fills, with n-step returns as well."""


def _write(array: Any, row: int, value: Any) -> None:
    """Copy a value into a row of an array, or each of a dict of them."""
    if isinstance(array, dict):
        for key in array:
            _write(array[key], row, value[key])
    else:
        array[row] = value.reshape(array.shape[1:])


def free_bytes(device: th.device) -> int:
    """
    Free memory of a device.

    :param device: the CPU or a CUDA device
    """
    if device.type == "cuda":
        unused = th.cuda.memory_reserved(device) - th.cuda.memory_allocated(device)  # PyTorch's own reserve
        return th.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available  # type: ignore[no-any-return]


def split_samples(samples: ReplayBufferSamples, n_batches: int) -> list[ReplayBufferSamples]:
    """
    Cut samples into minibatches of one size.

    :param samples: ``n_batches * batch_size`` samples
    :param n_batches: number of minibatches
    :return: views of the samples
    """
    if n_batches == 1:
        return [samples]

    def split(field: Any) -> Any:
        if isinstance(field, dict):
            pieces = {key: split(value) for key, value in field.items()}
            return [{key: piece[i] for key, piece in pieces.items()} for i in range(n_batches)]
        return [None] * n_batches if field is None else field.chunk(n_batches)

    return [type(samples)(*fields) for fields in zip(*map(split, samples), strict=True)]
