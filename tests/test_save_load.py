"""Saving and loading: what was learned comes back, what was passed stays as it was passed."""

import inspect
import io
import json
import math
import pickle
import zipfile
from copy import deepcopy

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import QUICK, VALUE_BASED, VECTOR, RandomEnv, assert_same, has_parameter, is_same, make_model, snapshot
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.utils import set_random_seed

from sb3_softq import SQN, MomentumDQN
from sb3_softq.replay import GrowingReplayBuffer

# Everything moves in few steps
LIVELY = dict(tau=0.3, target_update_interval=1, learning_rate=0.01, exploration="boltzmann_eps")


def train(algorithm, env="CartPole-v1", total_timesteps=100, **kwargs):
    """A model whose every learned number has moved."""
    return make_model(algorithm, env, **{**LIVELY, **kwargs}).learn(total_timesteps)


def save_and_load(model, tmp_path, env=None, **kwargs):
    model.save(tmp_path / "model")
    return type(model).load(tmp_path / "model", env=env, device="cpu", **kwargs)


def assert_trains_alike(model, other, n_updates=3):
    """From the same random numbers, both learn the same."""
    other.set_logger(model.logger)
    for one in (model, other):
        set_random_seed(7)
        one.train(gradient_steps=n_updates, batch_size=16)
        one._on_step()
    assert_same(snapshot(model), snapshot(other))


# ---------------------------------------------------------------------- what was learned

COUNTERS = (
    "num_timesteps",
    "_n_updates",
    "_n_calls",
    "_episode_num",
    "_total_timesteps",
    "_current_progress_remaining",
    "exploration_rate",
)


def test_everything_learned_comes_back(algorithm, tmp_path):
    model = train(algorithm)
    fresh = make_model(algorithm)
    loaded = save_and_load(model, tmp_path)
    assert_same(snapshot(loaded), snapshot(model))
    for name in COUNTERS:
        assert getattr(loaded, name) == getattr(model, name) != getattr(fresh, name), name
    assert float(loaded.current_temperature) == float(model.current_temperature)
    assert not is_same(loaded.q_net.state_dict(), loaded.q_net_target.state_dict())
    assert {"policy", "policy.optimizer"} <= set(model.get_parameters())
    observations = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    np.testing.assert_array_equal(loaded.q_values(observations), model.q_values(observations))
    np.testing.assert_array_equal(loaded.action_probs(observations), model.action_probs(observations))


def test_learned_temperature_and_its_optimizer_come_back(tmp_path):
    model = train(SQN, temperature="auto_0.2")
    loaded = save_and_load(model, tmp_path)
    assert {"temperature_module", "temperature_module.optimizer"} <= set(loaded.get_parameters())
    assert float(loaded.current_temperature) == float(model.current_temperature) != pytest.approx(0.2, rel=0.01)
    states = [one.temperature_module.optimizer.state_dict() for one in (model, loaded)]
    assert_same(*states)
    assert states[1]["state"][0]["step"] == model._n_updates


@pytest.mark.parametrize("optimizer", [th.optim.Adam, th.optim.AdamW, th.optim.RMSprop])
def test_training_goes_on_as_if_never_saved(algorithm, optimizer, tmp_path):
    model = train(algorithm, policy_kwargs=dict(net_arch=[16], optimizer_class=optimizer))
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = save_and_load(model, tmp_path, env=model.get_env())
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert_trains_alike(model, loaded)
    assert loaded._n_updates == model._n_updates


@pytest.mark.parametrize("algorithm_kwargs", [{}, dict(n_steps=3)], ids=["one step", "n-step"])
def test_learning_goes_on_after_loading(algorithm, algorithm_kwargs, tmp_path):
    model = train(algorithm, **algorithm_kwargs)
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = save_and_load(model, tmp_path, env=make_vec_env("CartPole-v1"))
    loaded.load_replay_buffer(tmp_path / "buffer")
    n_updates, n_transitions = loaded._n_updates, loaded.replay_buffer.size()
    loaded.learn(60, reset_num_timesteps=False)
    assert loaded.num_timesteps == 160
    assert loaded._n_updates == n_updates + 15, "four steps each, from the first on: learning has started already"
    assert loaded.replay_buffer.size() == n_transitions + 60
    assert not is_same(snapshot(loaded)["policy"], snapshot(model)["policy"])
    loaded.learn(60)
    assert loaded.num_timesteps == 60


def test_learning_without_the_old_buffer(algorithm, tmp_path):
    loaded = save_and_load(train(algorithm), tmp_path, env=make_vec_env("CartPole-v1", n_envs=3))
    loaded.learn(60)
    assert loaded.n_envs == 3 and loaded.replay_buffer.size() * 3 == loaded.num_timesteps


def test_model_is_saved_to_and_loaded_from_memory(algorithm):
    model, file = train(algorithm), io.BytesIO()
    model.save(file)
    assert_same(snapshot(algorithm.load(file, device="cpu")), snapshot(model))


def test_parameters_can_be_copied(algorithm):
    model, other = train(algorithm), make_model(algorithm, **{**LIVELY, "seed": 1})
    assert not is_same(snapshot(model), snapshot(other))
    other.set_parameters(snapshot(model))
    assert_same(snapshot(model), snapshot(other))
    other.replay_buffer = model.replay_buffer
    assert_trains_alike(model, other)


def test_parameters_that_do_not_fit(algorithm):
    model = make_model(algorithm)
    parameters = snapshot(model)
    with pytest.raises(ValueError, match="not_an_object"):
        model.set_parameters({**parameters, "not_an_object": {}})
    with pytest.raises(ValueError, match="do not match"):
        model.set_parameters({"policy": parameters["policy"]}, exact_match=True)
    less = {name: tensor for name, tensor in list(parameters["policy"].items())[:-1]}
    with pytest.raises(RuntimeError, match="Missing key"):
        model.set_parameters({**parameters, "policy": less})
    half = {name: tensor / 2 for name, tensor in less.items()}
    model.set_parameters({"policy": half}, exact_match=False)
    assert_same({name: model.policy.state_dict()[name] for name in half}, half)


# ---------------------------------------------------------------------- the file


def read_data(path):
    """The file's attributes: (as JSON, names of the pickled ones)."""
    with zipfile.ZipFile(path) as file:
        data = json.loads(file.read("data"))
    pickled = {name for name, value in data.items() if isinstance(value, dict) and ":serialized:" in value}
    return data, pickled


# SB3's own attributes that are no JSON
PICKLED_BY_SB3 = {
    "policy_class",
    "observation_space",
    "action_space",
    "train_freq",
    "lr_schedule",
    "ep_info_buffer",
    "ep_success_buffer",
    "_last_obs",
    "_last_original_obs",
    "_last_episode_starts",
}


def test_file_holds_json_and_no_pickles_of_ours(algorithm, tmp_path):
    model = train(algorithm, target_update_interval=3)
    model.save(tmp_path / "model.zip")
    data, pickled = read_data(tmp_path / "model.zip")
    assert pickled <= PICKLED_BY_SB3
    for name in inspect.signature(algorithm.__init__).parameters:
        if name not in NOT_STORED | PICKLED_BY_SB3:
            assert STORED_AS.get(name, name) in data, name


def test_file_holds_arguments_counters_and_nothing_derived(algorithm, tmp_path):
    model = train(algorithm)
    model.save(tmp_path / "model.zip")
    data, _ = read_data(tmp_path / "model.zip")
    base = set(vars(SAC("MlpPolicy", "Pendulum-v1", buffer_size=1, device="cpu")))  # another off-policy algorithm's
    arguments = set(inspect.signature(algorithm.__init__).parameters)
    counters = {"exploration_rate", "_n_calls", "_current_progress_remaining"}
    if algorithm is MomentumDQN:
        counters |= {"_n_iterations", "_n_updates_copied"}
    assert set(data) - base - arguments <= counters


def test_callables_are_the_only_pickles_of_ours(algorithm, tmp_path):
    model = make_model(algorithm, temperature=lambda progress: 0.1 + progress)
    model.save(tmp_path / "model.zip")
    _, pickled = read_data(tmp_path / "model.zip")
    assert pickled - PICKLED_BY_SB3 == {"temperature"}
    loaded = algorithm.load(tmp_path / "model.zip", device="cpu")
    assert loaded.temperature(0.5) == pytest.approx(0.6) and loaded.current_temperature == pytest.approx(1.1)


def test_tensors_load_without_pickle(algorithm, tmp_path):
    train(algorithm).save(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as file:
        names = [name for name in file.namelist() if name.endswith(".pth")]
        assert len(names) >= 3
        for name in names:
            th.load(io.BytesIO(file.read(name)), weights_only=True)


def test_file_does_not_grow_with_the_buffer(algorithm, tmp_path):
    sizes = []
    for buffer_size in (10, 5000):
        train(algorithm, RandomEnv(VECTOR), 300, buffer_size=buffer_size, gradient_steps=0).save(tmp_path / "model.zip")
        sizes.append((tmp_path / "model.zip").stat().st_size)
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


def test_loading_allocates_no_storage(algorithm, tmp_path):
    model = train(algorithm, buffer_size=1_000_000)
    assert model.replay_buffer.capacity == 1_000_000
    loaded = save_and_load(model, tmp_path)
    assert loaded.replay_buffer.capacity == 1 and loaded.replay_buffer.size() == 0
    assert loaded.buffer_size == loaded.replay_buffer.buffer_size == 1_000_000


def test_excluded_and_included_attributes(algorithm, tmp_path):
    model = make_model(algorithm, verbose=2)
    model.save(tmp_path / "without", exclude=["verbose"])
    assert algorithm.load(tmp_path / "without", device="cpu").verbose == 0
    model.save(tmp_path / "with", exclude=["verbose"], include=["verbose"])
    loaded = algorithm.load(tmp_path / "with", device="cpu", custom_objects=dict(learning_rate=2e-5, dummy=1.0))
    assert loaded.verbose == 2 and loaded.learning_rate == 2e-5 and not hasattr(loaded, "dummy")


def test_device(algorithm, tmp_path):
    model = algorithm("MlpPolicy", "CartPole-v1", device="cpu")
    assert model.device == model.policy.device == th.device("cpu")
    loaded = type(model).load(save(model, tmp_path), device="auto")
    expected = "cuda" if th.cuda.is_available() else "cpu"
    assert loaded.device.type == loaded.policy.device.type == loaded.replay_buffer.device.type == expected
    assert all(parameter.device.type == expected for parameter in loaded.temperature_module.parameters())


def save(model, tmp_path):
    model.save(tmp_path / "model")
    return tmp_path / "model"


# ---------------------------------------------------------------------- what was passed

# A value for each constructor argument that is not its default
ARGUMENTS = dict(
    learning_rate=0.02,
    buffer_size=123,
    learning_starts=7,
    batch_size=9,
    tau=0.7,
    gamma=0.8,
    train_freq=(3, "step"),
    gradient_steps=2,
    replay_buffer_class=ReplayBuffer,
    replay_buffer_kwargs=dict(handle_timeout_termination=False),
    optimize_memory_usage=True,
    n_steps=1,
    n_step_bonus=False,
    tree_backup=False,
    factorisation="independent",
    temperature="lin_0.4",
    target_entropy="auto_0.3",
    double_q=True,
    munchausen_alpha=0.6,
    munchausen_clip=-math.inf,
    n_quantiles=5,
    n_target_quantiles=6,
    n_policy_quantiles=7,
    operator="logsumexp",
    gap_clip=-2.0,
    preference_clip=50.0,
    parametrisation="q",
    momentum="inverse_time_3",
    averaged="targets",
    kl_coef=0.2,
    ent_coef=0.1,
    greedy_step="direct",
    regularised_evaluation=False,
    entropy_penalty=0.0,
    average_q=True,
    q_clip=0.5,
    target_update_interval=11,
    exploration="boltzmann_eps",
    exploration_fraction=0.3,
    exploration_initial_eps=0.8,
    exploration_final_eps=0.2,
    max_grad_norm=math.inf,
    stats_window_size=13,
    tensorboard_log=None,
    policy_kwargs=dict(net_arch=[7], dueling=True, optimizer_class=th.optim.SGD, optimizer_kwargs=dict(weight_decay=0.1)),
    torch_compile=True,
    verbose=0,
    seed=5,
)
NOT_STORED = {"self", "policy", "env", "device", "_init_setup_model"}
STORED_AS = {"stats_window_size": "_stats_window_size"}


def arguments_of(algorithm):
    return {name: value for name, value in ARGUMENTS.items() if has_parameter(algorithm, name)}


def assert_arguments_kept(model, arguments):
    for name, value in arguments.items():
        if name == "train_freq":  # which SB3 turns into an object of its own
            assert (model.train_freq.frequency, model.train_freq.unit.value) == value
        else:
            stored = getattr(model, STORED_AS.get(name, name))
            assert stored == value and type(stored) is type(value), name


def test_table_has_every_argument():
    for algorithm in VALUE_BASED.values():
        assert set(inspect.signature(algorithm.__init__).parameters) <= NOT_STORED | set(ARGUMENTS), algorithm


@pytest.mark.filterwarnings("ignore:torch_compile=True:UserWarning")  # not with this optimiser
def test_arguments_are_kept_as_they_were_passed(algorithm, tmp_path):
    arguments = arguments_of(algorithm)
    passed = deepcopy(arguments)
    model = algorithm("MlpPolicy", "CartPole-v1", device="cpu", **passed)
    assert_arguments_kept(model, arguments)
    model.learn(30)
    assert_arguments_kept(model, arguments)
    loaded = save_and_load(model, tmp_path, env=make_vec_env("CartPole-v1"))
    assert_arguments_kept(loaded, arguments)
    loaded.learn(30)
    assert_arguments_kept(loaded, arguments)
    for _ in range(2):
        loaded._setup_model()
        assert_arguments_kept(loaded, arguments)
    assert passed == arguments, "what the user passed is not changed either"


def test_defaults_are_kept(algorithm, tmp_path):
    arguments = {
        name: parameter.default
        for name, parameter in inspect.signature(algorithm.__init__).parameters.items()
        if name not in NOT_STORED | {"train_freq"}
    }
    # SB3 stores empty dicts for None
    arguments.update(policy_kwargs={}, replay_buffer_kwargs={})
    model = algorithm("MlpPolicy", "CartPole-v1", device="cpu")
    assert_arguments_kept(model, arguments)
    assert_arguments_kept(save_and_load(model, tmp_path), arguments)


def test_arguments_of_the_buffer_are_kept_with_n_step_returns(algorithm, tmp_path):
    passed = dict(handle_timeout_termination=False)
    model = make_model(algorithm, n_steps=3, gamma=0.9, replay_buffer_kwargs=passed)
    assert passed == dict(handle_timeout_termination=False), "the next model may be built from the same dict"
    assert model.replay_buffer_kwargs == passed and model.replay_buffer_class is None
    loaded = save_and_load(model, tmp_path)
    assert isinstance(loaded.replay_buffer, GrowingReplayBuffer)
    assert (loaded.replay_buffer.n_steps, loaded.replay_buffer.gamma) == (3, 0.9)
    assert not loaded.replay_buffer.handle_timeout_termination


def test_no_setup_without_init_setup_model(algorithm):
    model = algorithm("MlpPolicy", "CartPole-v1", device="cpu", _init_setup_model=False)
    assert not hasattr(model, "policy") and model.replay_buffer is None
    model._setup_model()
    assert model.learn(10).num_timesteps >= 10


def yaml_settings(algorithm):
    """What rl-zoo3 passes for a trained model, too: every key of the YAML file."""
    settings = dict(
        QUICK, learning_rate=1e-3, buffer_size=200, train_freq=2, gradient_steps=-1, gamma=0.98, exploration="boltzmann_eps"
    )
    settings.update(target_update_interval=5, exploration_fraction=0.2, exploration_final_eps=0.1, n_steps=2)
    settings.update({name: ARGUMENTS[name] for name in ("munchausen_alpha", "double_q") if has_parameter(algorithm, name)})
    return settings


def test_continuing_with_the_settings_of_the_yaml_file(algorithm, tmp_path):
    settings = yaml_settings(algorithm)
    path = save(make_model(algorithm, **settings).learn(40), tmp_path)
    arguments = {name: value for name, value in settings.items() if name != "device"}
    loaded = algorithm.load(path, env=make_vec_env("CartPole-v1"), device="cpu", tensorboard_log=None, **arguments)
    loaded.learn(40)
    assert loaded.num_timesteps == 40
    arguments["train_freq"] = (2, "step")
    assert_arguments_kept(loaded, arguments)


def test_loading_with_other_settings(algorithm, tmp_path):
    path = save(train(algorithm), tmp_path)
    changes = dict(
        learning_rate=0.5, buffer_size=77, train_freq=(5, "step"), gamma=0.5, n_steps=3, exploration="eps_greedy", batch_size=3
    )
    scheduled = has_parameter(algorithm, "temperature") and not algorithm.learns_temperature
    if scheduled:
        changes.update(temperature="lin_0.7")
    loaded = algorithm.load(path, env=make_vec_env("CartPole-v1"), device="cpu", exploration_final_eps=0.5, **changes)
    assert_arguments_kept(loaded, changes)
    assert loaded.lr_schedule(1.0) == 0.5
    assert (loaded.replay_buffer.buffer_size, loaded.replay_buffer.n_steps, loaded.replay_buffer.gamma) == (77, 3, 0.5)
    if scheduled:
        assert loaded.current_temperature == 0.0, "the saved model is at the end of its schedule"
    loaded.learn(50)
    assert loaded.exploration_rate == 0.5
    assert loaded.policy.optimizer.param_groups[0]["lr"] == 0.5


def test_loading_with_another_network_is_refused(algorithm, tmp_path):
    path = save(make_model(algorithm), tmp_path)
    with pytest.raises(ValueError, match="policy kwargs"):
        algorithm.load(path, device="cpu", policy_kwargs=dict(net_arch=[32]))


def test_loading_for_another_environment_is_refused(algorithm, tmp_path):
    path = save(make_model(algorithm), tmp_path)
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        algorithm.load(path, env=RandomEnv(spaces.Discrete(3)), device="cpu")


def test_data_of_the_file_is_that_of_the_model(algorithm, tmp_path):
    model = make_model(algorithm)
    data, parameters, variables = load_from_zip_file(save(model, tmp_path), device="cpu")
    name = "temperature" if has_parameter(algorithm, "temperature") else "ent_coef"
    assert data[name] == getattr(model, name)
    assert set(parameters) == set(model.get_parameters())
    assert not variables


# ---------------------------------------------------------------------- policies by themselves

POLICIES = {
    "MlpPolicy": (VECTOR, dict(net_arch=[16, 8], dueling=True, optimizer_class=th.optim.AdamW)),
    "CnnPolicy": (spaces.Box(0.0, 1.0, (10, 10, 4), np.bool_), dict(features_extractor_kwargs=dict(features_dim=16))),
    "MultiInputPolicy": (spaces.Dict(vector=VECTOR, image=spaces.Box(0, 255, (10, 10, 1), np.uint8)), {}),
}


def make_policy(algorithm, name):
    space, policy_kwargs = POLICIES[name]
    model = make_model(algorithm, RandomEnv(space), name, policy_kwargs=policy_kwargs, target_update_interval=1, tau=0.3)
    return model.learn(40).policy, model


def sample_tensor(model):
    space = model.observation_space
    space.seed(0)
    return model.policy.obs_to_tensor(space.sample())[0]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("how", ["save", "deepcopy", "pickle"])
def test_policy_comes_back(algorithm, name, how, tmp_path):
    policy, model = make_policy(algorithm, name)
    if how == "save":
        policy.save(tmp_path / "policy")
        copy = type(policy).load(tmp_path / "policy", device="cpu")
    elif how == "deepcopy":
        copy = deepcopy(policy)
    else:
        copy = pickle.loads(pickle.dumps(policy))
    assert type(copy) is type(policy)
    assert_same(copy.state_dict(), policy.state_dict())
    observations = sample_tensor(model)
    th.testing.assert_close(copy.q_values(observations), policy.q_values(observations))
    assert copy.predict(model.observation_space.sample(), deterministic=True)[0].shape == ()
    # It is a copy: training the model leaves it alone
    before = deepcopy(copy.state_dict())
    model.train(gradient_steps=3, batch_size=16)
    assert_same(copy.state_dict(), before)
    assert not is_same(policy.state_dict(), before)


def test_model_learns_on_with_a_copied_policy(algorithm):
    model = train(algorithm)
    other = make_model(algorithm, **LIVELY)
    other.policy.load_state_dict(deepcopy(model.policy.state_dict()))
    other.policy.optimizer.load_state_dict(deepcopy(model.policy.optimizer.state_dict()))
    if model.temperature_module.learned:
        other.set_parameters({name: value for name, value in snapshot(model).items() if "temperature" in name}, False)
    other.replay_buffer = model.replay_buffer
    assert_trains_alike(model, other)
