"""The growing replay buffers: the contents of SB3's buffers, in storage that is allocated as it fills."""

import pickle
import warnings

import numpy as np
import pytest
from gymnasium import spaces
from helpers import PLANES, VECTOR, make_model, random_transitions
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.utils import set_random_seed

from sb3_softq import replay
from sb3_softq.replay import GrowingDictReplayBuffer, GrowingReplayBuffer

ACTIONS = spaces.Discrete(3)
DICT = spaces.Dict(vector=VECTOR, number=spaces.Discrete(4), planes=PLANES)
# name -> (our class, SB3's class, observation space, arguments)
BUFFERS = {
    "plain": (GrowingReplayBuffer, ReplayBuffer, VECTOR, {}),
    "discrete": (GrowingReplayBuffer, ReplayBuffer, spaces.Discrete(5), {}),
    "planes": (GrowingReplayBuffer, ReplayBuffer, PLANES, {}),
    "no timeouts": (GrowingReplayBuffer, ReplayBuffer, VECTOR, dict(handle_timeout_termination=False)),
    "memory": (
        GrowingReplayBuffer,
        ReplayBuffer,
        VECTOR,
        dict(optimize_memory_usage=True, handle_timeout_termination=False),
    ),
    "dict": (GrowingDictReplayBuffer, DictReplayBuffer, DICT, {}),
    "n-step": (GrowingReplayBuffer, NStepReplayBuffer, VECTOR, dict(n_steps=3, gamma=0.9)),
}


@pytest.fixture(params=BUFFERS.values(), ids=BUFFERS)
def kind(request):
    return request.param


def make_buffers(kind, buffer_size, n_envs=1):
    growing_class, sb3_class, observation_space, kwargs = kind
    arguments = (buffer_size, observation_space, ACTIONS, "cpu", n_envs)
    return growing_class(*arguments, **kwargs), sb3_class(*arguments, **kwargs)


def transitions(kind, n_envs, n_rows):
    return random_transitions(kind[2], ACTIONS, n_envs, n_rows)


def assert_same_samples(buffer, other, batch_size=200):
    """Both buffers draw the same minibatch from the same random numbers."""
    samples = []
    for one in (buffer, other):
        set_random_seed(1)
        samples.append(one.sample(batch_size)._asdict())
    for name, expected in samples[1].items():
        values = samples[0][name]
        parts = [(values[key], expected[key]) for key in expected] if isinstance(expected, dict) else [(values, expected)]
        for ours, theirs in parts:
            assert (ours is None and theirs is None) or (ours.dtype == theirs.dtype and bool((ours == theirs).all())), name


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("buffer_size", [1, 2, 5, 30, 1000])
def test_samples_are_those_of_sb3(kind, buffer_size, n_envs, monkeypatch):
    # Small steps of growth, and sizes that fill up and wrap around
    monkeypatch.setattr(replay, "MINIMUM_CAPACITY", 4)
    if buffer_size < 2 * n_envs and kind[3].get("optimize_memory_usage"):
        pytest.skip("SB3 cannot keep a transition in one row of shared observations")
    growing, sb3 = make_buffers(kind, buffer_size, n_envs)
    for transition in transitions(kind, n_envs, n_rows=50):
        growing.add(*transition)
        sb3.add(*transition)
        assert (growing.size(), growing.pos, growing.full) == (sb3.size(), sb3.pos, sb3.full)
        assert_same_samples(growing, sb3, batch_size=20)
    assert growing.buffer_size == sb3.buffer_size


def test_samples_after_growing_from_the_default_capacity(kind):
    growing, sb3 = make_buffers(kind, buffer_size=5000)
    for transition in transitions(kind, n_envs=1, n_rows=2 * replay.MINIMUM_CAPACITY + 10):
        growing.add(*transition)
        sb3.add(*transition)
    assert_same_samples(growing, sb3)


def storage_bytes(buffer):
    return sum(array.nbytes for _, _, array in buffer._arrays())


def test_storage_grows_as_it_fills(kind):
    buffer, _ = make_buffers(kind, buffer_size=3000)
    assert buffer.capacity == 1
    capacities = []
    for transition in transitions(kind, n_envs=1, n_rows=3100):
        buffer.add(*transition)
        capacities.append(buffer.capacity)
    # Doubled each time, up to buffer_size and no further
    assert sorted(set(capacities)) == [replay.MINIMUM_CAPACITY, 2 * replay.MINIMUM_CAPACITY, 3000]
    assert buffer.full and buffer.size() == 3000


def test_a_huge_buffer_takes_no_memory_before_the_first_transition():
    images = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    buffer = GrowingReplayBuffer(10**9, images, ACTIONS)
    assert storage_bytes(buffer) < 100_000
    assert buffer.buffer_size == 10**9 and buffer.size() == 0


@pytest.mark.parametrize("n_envs", [1, 4])
def test_capacity_counts_rows_of_all_environments(n_envs):
    buffer = GrowingReplayBuffer(100, VECTOR, ACTIONS, n_envs=n_envs)
    for transition in random_transitions(VECTOR, ACTIONS, n_envs, 200):
        buffer.add(*transition)
    assert buffer.capacity == buffer.buffer_size == 100 // n_envs


def test_pickle_keeps_contents_and_goes_on_growing(kind, monkeypatch):
    monkeypatch.setattr(replay, "MINIMUM_CAPACITY", 4)
    growing, sb3 = make_buffers(kind, buffer_size=40)
    for i, transition in enumerate(transitions(kind, n_envs=1, n_rows=60)):
        if i == 10:
            growing = pickle.loads(pickle.dumps(growing))
            assert growing.capacity < 40
        growing.add(*transition)
        sb3.add(*transition)
        assert_same_samples(growing, sb3, batch_size=20)


def test_reset_starts_again(kind):
    growing, sb3 = make_buffers(kind, buffer_size=20)
    for transition in transitions(kind, n_envs=1, n_rows=30):
        growing.add(*transition)
    growing.reset()
    for transition in transitions(kind, n_envs=1, n_rows=10):
        growing.add(*transition)
        sb3.add(*transition)
    assert growing.size() == 10
    assert_same_samples(growing, sb3)


class Memory:
    """Stands in for psutil: that many bytes are free."""

    def __init__(self, available):
        self.available = available

    def virtual_memory(self):
        return self


def fail_to_allocate_more_than(n_rows, monkeypatch):
    """np.zeros raises MemoryError for arrays of more rows, but only at its third call: a failure half way."""
    allocate, calls = np.zeros, []

    def zeros(shape, *args, **kwargs):
        if isinstance(shape, tuple) and shape and shape[0] > n_rows:
            calls.append(shape)
            if len(calls) > 2:
                raise MemoryError
        return allocate(shape, *args, **kwargs)

    monkeypatch.setattr(np, "zeros", zeros)


@pytest.mark.parametrize("shortage", ["little is free", "allocation fails"])
def test_short_of_memory_it_stays_at_its_size(kind, shortage, monkeypatch):
    monkeypatch.setattr(replay, "MINIMUM_CAPACITY", 4)
    monkeypatch.setattr(replay, "psutil", None)
    growing, _ = make_buffers(kind, buffer_size=1000)
    rows = list(transitions(kind, n_envs=1, n_rows=60))
    for transition in rows[:10]:
        growing.add(*transition)
    size = growing.capacity
    assert 10 <= size < 20
    if shortage == "little is free":
        monkeypatch.setattr(replay, "psutil", Memory(available=0))
    else:
        fail_to_allocate_more_than(size, monkeypatch)
    with pytest.warns(UserWarning, match=f"stays at {size} transitions") as record:
        for transition in rows[10:]:
            growing.add(*transition)
    assert len(record) == 1 and "buffer_size=1000" in str(record[0].message)
    monkeypatch.undo()

    # From now on it is a buffer of that size
    sb3 = kind[1](size, kind[2], ACTIONS, "cpu", 1, **kind[3])
    for transition in rows:
        sb3.add(*transition)
    assert growing.capacity == growing.buffer_size == size
    assert (growing.pos, growing.full) == (sb3.pos, sb3.full)
    assert_same_samples(growing, sb3)


def test_memory_limits_how_far_it_doubles(monkeypatch):
    buffer = GrowingReplayBuffer(1000, VECTOR, ACTIONS)
    row_bytes = storage_bytes(buffer)
    monkeypatch.setattr(replay, "MINIMUM_CAPACITY", 4)
    monkeypatch.setattr(replay, "psutil", Memory(available=5 * row_bytes))
    rows = list(random_transitions(VECTOR, ACTIONS, 1, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for transition in rows[:7]:
            buffer.add(*transition)
    # Four rows at first, then as many more as fit into nine tenths of what is free
    assert buffer.capacity == 8 and buffer.buffer_size == 1000


def test_training_goes_on_when_memory_runs_out(algorithm, monkeypatch):
    monkeypatch.setattr(replay, "MINIMUM_CAPACITY", 16)
    model = make_model(algorithm, buffer_size=10_000, train_freq=1)
    model.learn(30)
    monkeypatch.setattr(replay, "psutil", Memory(available=0))
    with pytest.warns(UserWarning, match="Not enough memory for the replay buffer"):
        model.learn(100, reset_num_timesteps=False)
    assert model.num_timesteps == 130 and model._n_updates == 110
    assert model.replay_buffer.size() == model.replay_buffer.capacity == 32


def test_model_holds_no_storage_until_it_learns(algorithm):
    model = make_model(algorithm, buffer_size=1_000_000)
    assert model.replay_buffer.capacity == 1
    model.learn(30)
    assert model.replay_buffer.capacity == replay.MINIMUM_CAPACITY
    assert model.buffer_size == 1_000_000


@pytest.mark.parametrize(("buffer_size", "n_steps"), [(1, 1), (2, 1), (5, 3), (2, 3)])
def test_model_learns_from_a_tiny_buffer(algorithm, buffer_size, n_steps):
    model = make_model(algorithm, buffer_size=buffer_size, n_steps=n_steps, learning_starts=0, batch_size=4)
    model.learn(40)
    assert model.replay_buffer.full and model.replay_buffer.capacity == buffer_size
    assert model._n_updates > 0
