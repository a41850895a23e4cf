"""The growing replay buffers: the contents of SB3's buffers, in storage that is allocated as it fills."""

import pickle
import warnings
import weakref

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import PLANES, VECTOR, MaskedEnv, RecordedEnv, assert_same, is_same, make_model, random_transitions, snapshot
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sb3_softq import MPO, MunchausenDQN, SACDiscrete, replay
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


def make_buffers(kind, buffer_size, n_envs=1, storage_device=None):
    growing_class, sb3_class, observation_space, kwargs = kind
    if storage_device is not None and kwargs.get("optimize_memory_usage"):
        pytest.skip("not for storage on a device")
    arguments = (buffer_size, observation_space, ACTIONS, "cpu", n_envs)
    return growing_class(*arguments, **kwargs, storage_device=storage_device), sb3_class(*arguments, **kwargs)


def transitions(kind, n_envs, n_rows):
    return random_transitions(kind[2], ACTIONS, n_envs, n_rows)


def assert_same_samples(buffer, other, batch_size=200):
    """Both buffers draw the same minibatch from the same random numbers."""
    samples = []
    for one in (buffer, other):
        set_random_seed(1)
        samples.append({**one.sample(batch_size)._asdict(), "next random number": th.tensor(np.random.random())})
    for name, expected in samples[1].items():
        values = samples[0][name]
        parts = [(values[key], expected[key]) for key in expected] if isinstance(expected, dict) else [(values, expected)]
        for ours, theirs in parts:
            assert (ours is None and theirs is None) or (ours.dtype == theirs.dtype and bool((ours == theirs).all())), name


@pytest.fixture
def small_steps(monkeypatch):
    """Storage can be doubled, but there is never memory for more at once."""
    grow = replay.GrowingStorage._grow
    monkeypatch.setattr(
        replay.GrowingStorage, "_grow", lambda self, capacity: capacity <= 2 * self.capacity and grow(self, capacity)
    )


@pytest.mark.parametrize("storage_device", [None, "cpu"])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("buffer_size", [1, 2, 5, 30, 1000])
def test_samples_are_those_of_sb3(kind, buffer_size, n_envs, storage_device, small_steps):
    # Sizes that fill up and wrap around
    if buffer_size < 2 * n_envs and kind[3].get("optimize_memory_usage"):
        pytest.skip("SB3 cannot keep a transition in one row of shared observations")
    growing, sb3 = make_buffers(kind, buffer_size, n_envs, storage_device)
    for transition in transitions(kind, n_envs, n_rows=50):
        growing.add(*transition)
        sb3.add(*transition)
        assert (growing.size(), growing.pos, growing.full) == (sb3.size(), sb3.pos, sb3.full)
        assert_same_samples(growing, sb3, batch_size=20)
    assert growing.buffer_size == sb3.buffer_size


def test_samples_of_storage_that_is_there_at_once(kind):
    growing, sb3 = make_buffers(kind, buffer_size=5000)
    for transition in transitions(kind, n_envs=1, n_rows=2058):
        growing.add(*transition)
        sb3.add(*transition)
    assert growing.capacity == 5000
    assert_same_samples(growing, sb3)


def storage_bytes(buffer):
    return sum(array.nbytes for _, _, array in buffer._arrays())


def test_storage_is_there_at_once_where_it_fits_easily(kind, monkeypatch):
    buffer, _ = make_buffers(kind, buffer_size=300)
    monkeypatch.setattr(replay, "psutil", Memory(available=2 * 250 * storage_bytes(buffer)))
    capacities = set()
    for transition in transitions(kind, n_envs=1, n_rows=310):
        buffer.add(*transition)
        capacities.add(buffer.capacity)
    # What half of the free memory holds, then the rest
    assert capacities == {250, 300}


def test_storage_grows_as_it_fills(kind, small_steps):
    buffer, _ = make_buffers(kind, buffer_size=300)
    assert buffer.capacity == 1
    capacities = set()
    for transition in transitions(kind, n_envs=1, n_rows=310):
        buffer.add(*transition)
        capacities.add(buffer.capacity)
    # Doubled each time, up to buffer_size and no further
    assert capacities == {2, 4, 8, 16, 32, 64, 128, 256, 300}
    assert buffer.full and buffer.size() == 300


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


@pytest.mark.parametrize("storage_device", [None, "cpu"])
@pytest.mark.parametrize("moment", [0, 10, 50])
def test_pickle_keeps_contents_and_goes_on(kind, moment, storage_device, small_steps):
    growing, sb3 = make_buffers(kind, buffer_size=40, storage_device=storage_device)
    for i, transition in enumerate(transitions(kind, n_envs=1, n_rows=60)):
        if i == moment:
            growing = pickle.loads(pickle.dumps(growing))
            assert growing.capacity == 40 if storage_device and moment else growing.capacity < 40 or moment == 50
            assert isinstance(growing.rewards, np.ndarray if storage_device is None else th.Tensor)
        growing.add(*transition)
        sb3.add(*transition)
        assert_same_samples(growing, sb3, batch_size=20)


def test_a_file_holds_the_rows_in_use(kind):
    buffer, _ = make_buffers(kind, buffer_size=5000)
    for transition in transitions(kind, n_envs=1, n_rows=20):
        buffer.add(*transition)
    assert buffer.capacity == 5000
    loaded = pickle.loads(pickle.dumps(buffer))
    assert loaded.capacity == 21 and loaded.buffer_size == 5000
    assert_same_samples(loaded, buffer)


@pytest.mark.parametrize("storage_device", [None, "cpu"])
def test_a_file_does_not_grow_by_sampling(kind, storage_device):
    buffer, _ = make_buffers(kind, buffer_size=40, storage_device=storage_device)
    for transition in transitions(kind, n_envs=1, n_rows=20):
        buffer.add(*transition)
    size = len(pickle.dumps(buffer))
    buffer.sample(5)
    assert len(pickle.dumps(buffer)) == size


@pytest.mark.parametrize("storage_device", [None, "cpu"])
def test_reset_starts_again(kind, storage_device):
    growing, sb3 = make_buffers(kind, buffer_size=20, storage_device=storage_device)
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
    """np.zeros raises MemoryError for arrays of more rows, but only at its fourth call: a failure half way."""
    allocate, calls = np.zeros, []

    def zeros(shape, *args, **kwargs):
        if isinstance(shape, tuple) and shape and shape[0] > n_rows:
            calls.append(shape)
            if len(calls) > 3:
                raise MemoryError
        return allocate(shape, *args, **kwargs)

    monkeypatch.setattr(np, "zeros", zeros)


@pytest.mark.parametrize("shortage", ["little is free", "allocation fails"])
def test_short_of_memory_it_stays_at_its_size(kind, shortage, small_steps, monkeypatch):
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
    monkeypatch.setattr(replay, "psutil", Memory(available=3 * row_bytes))
    capacities = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for transition in random_transitions(VECTOR, ACTIONS, 1, 7):
            buffer.add(*transition)
            capacities.append(buffer.capacity)
    # Doubled, but by no more than fits into nine tenths of what is free
    assert capacities == [2, 4, 4, 6, 6, 8, 8] and buffer.buffer_size == 1000


def test_training_goes_on_when_memory_runs_out(algorithm, small_steps, monkeypatch):
    model = make_model(algorithm, buffer_size=10_000, train_freq=1)
    model.learn(30)
    monkeypatch.setattr(replay, "psutil", Memory(available=0))
    with pytest.warns(UserWarning, match="Not enough memory for the replay buffer"):
        model.learn(100, reset_num_timesteps=False)
    assert model.num_timesteps == 130 and model._n_updates == 110
    assert model.replay_buffer.size() == model.replay_buffer.capacity == 32


def test_model_holds_no_storage_until_it_learns(algorithm, small_steps):
    model = make_model(algorithm, buffer_size=1_000_000)
    assert model.replay_buffer.capacity == 1
    model.learn(30)
    assert model.replay_buffer.capacity == 64  # 32 steps, and one row more
    assert model.buffer_size == 1_000_000


@pytest.mark.parametrize(("buffer_size", "n_steps"), [(1, 1), (2, 1), (5, 3), (2, 3)])
def test_model_learns_from_a_tiny_buffer(algorithm, buffer_size, n_steps):
    model = make_model(algorithm, buffer_size=buffer_size, n_steps=n_steps, learning_starts=0, batch_size=4)
    model.learn(40)
    assert model.replay_buffer.full and model.replay_buffer.capacity == buffer_size
    assert model._n_updates > 0


# ---------------------------------------------------------------------- views of the arrays


def test_an_array_that_is_replaced_or_changed_is_sampled(kind):
    growing, sb3 = make_buffers(kind, buffer_size=50, n_envs=2)
    for transition in transitions(kind, n_envs=2, n_rows=40):
        growing.add(*transition)
        sb3.add(*transition)
    for buffer in (growing, sb3):
        buffer.sample(3)
        buffer.rewards = buffer.rewards * 2
        buffer.dones[3:9] = 1
        if isinstance(buffer.observations, dict):
            buffer.observations["vector"] = -buffer.observations["vector"]
    assert_same_samples(growing, sb3)


def test_arrays_of_before_growing_are_not_kept(small_steps):
    buffer = GrowingReplayBuffer(5000, VECTOR, ACTIONS)
    rows = list(random_transitions(VECTOR, ACTIONS, 1, 20))
    for transition in rows[:10]:
        buffer.add(*transition)
    buffer.sample(3)
    old = weakref.ref(buffer.observations)
    for transition in rows[10:]:
        buffer.add(*transition)
    assert old() is None


# ---------------------------------------------------------------------- storage on a device

EXTRAS = {"action_masks": ((3,), "bool"), "next_action_masks": ((3,), "bool"), "log_probs": ((), np.float32)}
# What SB3's buffers cannot store or sample
RICH = {
    "one step": dict(extra_fields=EXTRAS),
    "n-step": dict(extra_fields=EXTRAS, n_steps=3),
    "steps": dict(extra_fields=EXTRAS, n_steps=3, keep_steps=True),
    "steps, no timeouts": dict(extra_fields=EXTRAS, n_steps=4, keep_steps=True, handle_timeout_termination=False),
}


def make_rich(observation_space, options, n_envs=1, buffer_size=30, storage_device=None):
    buffer_class = GrowingDictReplayBuffer if observation_space is DICT else GrowingReplayBuffer
    return buffer_class(buffer_size, observation_space, ACTIONS, "cpu", n_envs, storage_device=storage_device, **options)


def add_rich(buffers, n_rows):
    """The same random transitions and extras for all, with a cut of the segments now and then."""
    rng, n_envs = np.random.default_rng(0), buffers[0].n_envs
    for i, transition in enumerate(random_transitions(buffers[0].observation_space, ACTIONS, n_envs, n_rows)):
        masks, next_masks = rng.random((2, n_envs, 3)) < 0.5
        extras = dict(action_masks=masks, next_action_masks=next_masks, log_probs=rng.normal(size=n_envs))
        for buffer in buffers:
            buffer.pending = extras
            buffer.add(*transition)
            if i % 7 == 0:
                buffer.end_segments()


def drawn(buffer, batch_size=100):
    """A minibatch; of its segments, the steps that count."""
    set_random_seed(1)
    samples = buffer.sample(batch_size)
    steps = samples.steps and tree_map(lambda array: array[samples.steps["valid"][:, -array.shape[1] :]], samples.steps)
    return samples._replace(steps=steps)._asdict()


@pytest.mark.parametrize("n_rows", [1, 9, 10, 47])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("observation_space", [VECTOR, DICT], ids=["vector", "dict"])
@pytest.mark.parametrize("options", RICH.values(), ids=RICH)
def test_storage_on_a_device_samples_what_the_host_does(options, observation_space, n_envs, n_rows):
    host = make_rich(observation_space, options, n_envs)
    device = make_rich(observation_space, options, n_envs, storage_device="cpu")
    add_rich([host, device], n_rows)
    assert_same(drawn(device), drawn(host))
    assert device.transition_bytes == host.transition_bytes
    assert isinstance(host.rewards, np.ndarray) and isinstance(device.rewards, th.Tensor)
    # Moved with what they hold, they go on
    host.store_on("cpu")
    device.store_on(None)
    assert isinstance(device.rewards, np.ndarray) and isinstance(host.rewards, th.Tensor)
    add_rich([host, device], 8)
    assert_same(drawn(device), drawn(host))


@pytest.mark.parametrize("storage_device", [None, "cpu"])
def test_the_end_of_segments_is_marked_where_an_episode_goes_on(storage_device):
    buffer = make_rich(VECTOR, dict(n_steps=3), n_envs=3, storage_device=storage_device)
    obs = np.zeros((3, 4))
    # One goes on, one terminates, one is cut by a time limit
    infos = [{}, {}, {"TimeLimit.truncated": True}]
    buffer.add(obs, obs, np.zeros(3), np.zeros(3), np.array([False, True, True]), infos)
    buffer.end_segments()
    assert buffer.dones[0].tolist() == [0, 1, 1] and buffer.timeouts[0].tolist() == [1, 0, 1]


@pytest.mark.parametrize("storage_device", [None, "cpu"])
@pytest.mark.parametrize("observation_space", [VECTOR, DICT], ids=["vector", "dict"])
@pytest.mark.parametrize("options", [{}, *RICH.values()], ids=["plain", *RICH])
def test_minibatches_go_to_the_device_of_the_model(options, observation_space, storage_device):
    buffer = make_rich(observation_space, options, storage_device=storage_device)
    add_rich([buffer], 20)
    expected = buffer.sample(5)
    buffer.device = th.device("meta")  # the one other device that every machine has
    samples = buffer.sample(5)
    assert_same(tree_map(np.shape, samples), tree_map(np.shape, expected))
    assert {leaf.device.type for leaf in tree_leaves(samples) if leaf is not None} == {"meta"}


class Operations(TorchDispatchMode):
    """Records the names of the tensor operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", RICH.values(), ids=RICH)
def test_nothing_waits_for_the_device(options):
    buffer = make_rich(DICT, options, n_envs=2, storage_device="cpu")
    add_rich([buffer], 20)
    (transition,) = random_transitions(DICT, ACTIONS, 2, 1)
    with Operations() as operations:
        buffer.add(*transition)
    assert [name for name in operations.names if name != "select"] == ["copy_"]
    with Operations() as operations:
        buffer.sample(10)
    assert "index_select" in operations.names
    waiting = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_to_copy", "unique"}
    assert not waiting & set(operations.names)


def test_storage_on_a_device_is_allocated_at_the_first_transition():
    buffer = make_rich(VECTOR, {}, buffer_size=3000, n_envs=2, storage_device="cpu")
    assert buffer.capacity == 1
    buffer.add(*next(random_transitions(VECTOR, ACTIONS, 2, 1)))
    assert buffer.capacity == 1500
    # A file holds what is in use
    assert len(pickle.dumps(buffer)) < 10_000


@pytest.mark.parametrize("storage_device", [None, "auto", "cuda", "cuda:3", th.device("cuda")])
def test_a_device_that_is_not_there_is_the_host(storage_device, monkeypatch):
    monkeypatch.setattr(th.cuda, "device_count", lambda: 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        buffer = make_rich(VECTOR, {}, storage_device=storage_device)
    assert buffer.storage_device is None and isinstance(buffer.rewards, np.ndarray)
    messages = [str(warning.message) for warning in caught]
    if storage_device in (None, "auto"):
        assert messages == []
    else:
        assert messages == [
            f"storage_device={str(storage_device)!r} is not there: transitions are stored in the host's memory"
        ]


def test_auto_is_the_device_of_the_model_if_that_is_a_gpu(monkeypatch):
    monkeypatch.setattr(th.cuda, "device_count", lambda: 0)
    buffer = make_rich(VECTOR, {})
    buffer.device = th.device("cuda")
    with pytest.warns(UserWarning, match="storage_device='auto' is not there"):
        buffer.store_on("auto")


def test_free_memory_of_a_gpu_includes_what_pytorch_holds_unused(monkeypatch):
    numbers = dict(mem_get_info=(1000, 9000), memory_reserved=500, memory_allocated=200)
    for name, value in numbers.items():
        monkeypatch.setattr(th.cuda, name, lambda device, value=value: value)
    assert replay.free_bytes(th.device("cuda:0")) == 1300


@pytest.mark.parametrize(
    ("storage_device", "options", "message"),
    [
        ("gpu", {}, "storage_device must be None, 'auto', 'cpu' or a CUDA device, not 'gpu': "),
        ("meta", {}, "storage_device must be None, 'auto', 'cpu' or a CUDA device, not 'meta': "),
        (1.5, {}, "storage_device must be None, 'auto', 'cpu' or a CUDA device, not 1.5: "),
        (
            "cpu",
            dict(optimize_memory_usage=True, handle_timeout_termination=False),
            "storage_device='cpu' keeps observations and next observations apart: pass optimize_memory_usage=False",
        ),
    ],
)
def test_storage_devices_that_cannot_be_used(storage_device, options, message):
    with pytest.raises(ValueError, match=message):
        make_rich(VECTOR, options, storage_device=storage_device)


def test_vec_normalize_is_refused_when_learning_starts():
    env = VecNormalize(DummyVecEnv([lambda: RecordedEnv(ACTIONS)]))
    model = make_model(MunchausenDQN, env, replay_buffer_kwargs=dict(storage_device="cpu"))
    with pytest.raises(ValueError, match=r"VecNormalize .* storage_device='cpu' .*: pass storage_device=None"):
        model.learn(1)
    buffer = make_rich(VECTOR, {}, storage_device="cpu")
    buffer.add(*next(random_transitions(VECTOR, ACTIONS, 1, 1)))
    with pytest.raises(ValueError, match="VecNormalize"):
        buffer.sample(2, env=env)


@pytest.mark.parametrize("n_envs", [1, 2])
def test_too_little_memory_on_the_device_is_an_error(n_envs, monkeypatch):
    # 16 bytes of each observation, 8 of the action, and a reward, an end and a time limit that are aligned to 8 bytes
    row_bytes = n_envs * (2 * 16 + 8 + 3 * 8)
    n_rows = 1000 // n_envs
    memory = Memory(available=n_rows * row_bytes - 1)
    monkeypatch.setattr(replay, "psutil", memory)
    message = (
        f"buffer_size=1000 transitions take {n_rows * row_bytes} bytes, and storage_device='cpu' has {memory.available} free, "
        f"enough for buffer_size={1000 - n_envs}: pass a smaller buffer_size"
    )
    with pytest.raises(MemoryError, match=message):
        make_rich(VECTOR, {}, n_envs, 1000, "cpu")
    make_rich(VECTOR, {}, n_envs, 1000 - n_envs, "cpu")
    memory.available += 1
    buffer = make_rich(VECTOR, {}, n_envs, 1000, "cpu")
    # Taken by something else in the meantime
    memory.available -= 1
    (transition,) = random_transitions(VECTOR, ACTIONS, n_envs, 1)
    with pytest.raises(MemoryError, match=message):
        buffer.add(*transition)
    memory.available += 1
    buffer.add(*transition)
    assert buffer.size() == 1
    # What is loaded stays on the host
    saved = pickle.dumps(buffer)
    memory.available -= 1
    with pytest.warns(UserWarning, match="is loaded into the host's memory. buffer_size=1000 transitions take"):
        loaded = pickle.loads(saved)
    assert isinstance(loaded.rewards, np.ndarray)
    assert_same(drawn(loaded), drawn(buffer))


def test_a_file_of_a_device_that_is_not_there_is_loaded_into_the_hosts_memory(monkeypatch):
    monkeypatch.setattr(th.cuda, "device_count", lambda: 0)
    buffer = make_rich(DICT, RICH["steps"], n_envs=2, storage_device="cpu")
    add_rich([buffer], 20)
    expected = drawn(buffer)
    buffer.storage_device = th.device("cuda:0")
    saved = pickle.dumps(buffer)
    with pytest.warns(UserWarning, match="storage_device='cuda:0' is not there"):
        loaded = pickle.loads(saved)
    assert loaded.storage_device is None and isinstance(loaded.rewards, np.ndarray)
    assert_same(drawn(loaded), expected)


MODELS = {
    "one step": (MunchausenDQN, RecordedEnv, {}),
    "masks": (MunchausenDQN, MaskedEnv, dict(n_steps=3)),
    "extras": (SACDiscrete, MaskedEnv, dict(entropy_penalty=0.5)),
    "retrace": (MPO, RecordedEnv, dict(n_steps=3, retrace=True)),
    "dict": (MunchausenDQN, lambda actions: RecordedEnv(actions, DICT), dict(policy="MultiInputPolicy")),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def make_stored(request):
    """A model with two environments, by where its transitions are."""
    algorithm, env, kwargs = request.param

    def make(storage_device):
        env_of_two = DummyVecEnv([lambda: env(ACTIONS)] * 2)
        options = dict(replay_buffer_kwargs=dict(storage_device=storage_device), buffer_size=80, train_freq=4)
        return make_model(algorithm, env_of_two, **options, **kwargs)

    return make


def test_training_does_not_depend_on_where_transitions_are(make_stored):
    learned = []
    for storage_device in (None, "cpu"):
        model = make_stored(storage_device)
        # A second call ends the segments of the first
        learned.append([snapshot(model.learn(60, reset_num_timesteps=False)) for _ in range(2)])
    assert isinstance(model.replay_buffer.rewards, th.Tensor) and model.replay_buffer.full and model._n_updates > 0
    assert_same(*learned)
    assert not is_same(*learned[0])


@pytest.mark.parametrize("saved_on", [None, "cpu"])
@pytest.mark.parametrize("loaded_on", [None, "cpu"])
def test_a_loaded_replay_buffer_is_where_the_model_wants_it(make_stored, saved_on, loaded_on, tmp_path):
    model = make_stored(saved_on).learn(60)
    model.save_replay_buffer(tmp_path / "buffer")
    other = make_stored(loaded_on)
    other.load_replay_buffer(tmp_path / "buffer")
    assert isinstance(other.replay_buffer.rewards, np.ndarray if loaded_on is None else th.Tensor)
    assert other.replay_buffer.storage_device == (None if loaded_on is None else th.device(loaded_on))
    assert_same(drawn(other.replay_buffer), drawn(model.replay_buffer))
    other.learn(40, reset_num_timesteps=False)
    assert other.replay_buffer.full and other._n_updates > 0
