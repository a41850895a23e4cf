"""The actor-critic family: what users of Stable-Baselines3 count on, and that what was learned and passed comes back."""

import inspect
import io
import json
import math
import pickle
import zipfile
from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from continuous import ACTOR_CRITIC, BoxEnv, box_actions, fill_scaled, make_filled
from gymnasium import spaces
from helpers import VECTOR, RandomEnv, assert_same, is_same, make_model, snapshot
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import LinearSchedule, set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize
from torch import nn

from sb3_softq import MPO, RERPI, MunchausenSAC, SoftQLearning

MLP, CNN, MULTI = "MlpPolicy", "CnnPolicy", "MultiInputPolicy"


@pytest.fixture(params=ACTOR_CRITIC.values(), ids=ACTOR_CRITIC)
def algorithm(request):
    """Each actor-critic algorithm of the package."""
    return request.param


def parameters_of(function):
    return inspect.signature(function).parameters


def has(algorithm, name):
    return name in parameters_of(algorithm.__init__)


def learned(model):
    """All learned numbers: networks, optimisers, multipliers, an entropy coefficient."""
    numbers = snapshot(model)
    for name in model._get_torch_save_params()[1]:
        numbers[name] = getattr(model, name).detach().clone()
    return numbers


def learn(model, total_timesteps=60, **kwargs):
    before = learned(model)
    model.learn(total_timesteps, **kwargs)
    after = learned(model)
    assert model.num_timesteps >= total_timesteps and model._n_updates > 0
    assert not is_same(before["policy"], after["policy"])
    assert all(bool(th.isfinite(tensor).all()) for tensor in after["policy"].values())
    return model


# ---------------------------------------------------------------------- constructors


def test_constructor_has_the_parameters_of_sac_in_its_order(algorithm):
    sac, ours = parameters_of(SAC.__init__), parameters_of(algorithm.__init__)
    shared = [name for name in sac if name in ours]
    assert [name for name in ours if name in sac] == shared
    # What is SAC's own, or needs gSDE
    own = {"ent_coef", "target_entropy", "use_sde", "sde_sample_freq", "use_sde_at_warmup"}
    assert set(sac) - set(shared) <= own and (algorithm is not MunchausenSAC or set(shared) == set(sac))
    for name in set(shared) - {"self", "policy"}:
        assert ours[name].annotation == sac[name].annotation, name
    for name in ours:
        explained = f":param {name}:" in algorithm.__doc__ or (algorithm is RERPI and f":param {name}:" in MPO.__doc__)
        changed = name not in sac or ours[name].default != sac[name].default
        assert explained or not changed, f"{name} is new or has another default, which the class has to explain"
    assert all(parameter.annotation is not parameter.empty for name, parameter in ours.items() if name != "self")
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in ours.values())


def test_rerpi_has_the_parameters_of_mpo():
    mpo, rerpi = parameters_of(MPO.__init__), parameters_of(RERPI.__init__)
    assert set(mpo) - set(rerpi) == {"retrace", "epsilon_policy"} and set(rerpi) - set(mpo) == {"weighting"}
    assert [name for name in rerpi if name in mpo] == [name for name in mpo if name in rerpi]
    for name in set(mpo) & set(rerpi):
        assert (mpo[name].default, mpo[name].annotation) == (rerpi[name].default, rerpi[name].annotation), name


def test_learn_has_the_parameters_of_sac_and_a_default_length(algorithm):
    assert list(parameters_of(algorithm.learn)) == list(parameters_of(SAC.learn))
    ours = [parameter for name, parameter in parameters_of(algorithm.learn).items() if name != "self"]
    assert all(parameter.default is not parameter.empty for parameter in ours)


# ---------------------------------------------------------------------- training options


class WithBatchNorm(BaseFeaturesExtractor):
    """Normalises by the batch and drops half of the features."""

    def __init__(self, observation_space):
        super().__init__(observation_space, observation_space.shape[0])
        self.layers = nn.Sequential(nn.BatchNorm1d(self.features_dim), nn.Dropout(0.5))

    def forward(self, observations):
        return self.layers(observations)


OPTIONS = {
    "defaults": {},
    "steps": dict(train_freq=(3, "step"), gradient_steps=2),
    "episodes": dict(train_freq=(1, "episode"), gradient_steps=-1),
    "n-step returns": dict(n_steps=3),
    "shared observations": dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False)),
    "Polyak": dict(tau=0.01, target_update_interval=1),
    "hard updates": dict(tau=1.0, target_update_interval=10),
    "action noise": dict(action_noise=NormalActionNoise(np.zeros(2), 0.1 * np.ones(2))),
    "scheduled learning rate": dict(learning_rate=LinearSchedule(1e-3, 1e-5, 0.5)),
    "undiscounted": dict(gamma=1.0),
    "deep": dict(policy_kwargs=dict(net_arch=[8, 8, 8], activation_fn=nn.Tanh)),
    "linear": dict(policy_kwargs=dict(net_arch=[])),
    "different networks": dict(policy_kwargs=dict(net_arch=dict(pi=[8], qf=[16, 16]))),
    "default network": dict(policy_kwargs=None),
    "AdamW": dict(policy_kwargs=dict(optimizer_class=th.optim.AdamW, optimizer_kwargs=dict(weight_decay=0.1))),
    "batch norm": dict(policy_kwargs=dict(features_extractor_class=WithBatchNorm, net_arch=[16])),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_trains_with(algorithm, options):
    learn(make_model(algorithm, BoxEnv(), **options))


def test_policy_by_class(algorithm):
    learn(make_model(algorithm, BoxEnv(), policy=algorithm.policy_aliases[MLP]))


@pytest.mark.parametrize(
    ("n_envs", "train_freq", "gradient_steps", "n_updates"),
    [(1, 4, 1, 6), (1, (4, "step"), 3, 18), (1, 4, -1, 24), (3, 2, -1, 24), (3, 2, 1, 4), (1, (1, "episode"), 1, 3)],
)
def test_number_of_updates(algorithm, n_envs, train_freq, gradient_steps, n_updates):
    env = DummyVecEnv([BoxEnv] * n_envs)
    model = make_model(algorithm, env, train_freq=train_freq, gradient_steps=gradient_steps, learning_starts=0)
    model.learn(24)
    assert model._n_updates == n_updates


def test_learning_rate_follows_its_schedule(algorithm):
    model = make_model(algorithm, BoxEnv(), learning_rate=lambda progress: 1e-3 * progress, learning_starts=0)
    model.learn(20)
    for optimizer in model._optimizers():
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
    assert model.logger.name_to_value["train/learning_rate"] == pytest.approx(0.0, abs=1e-9)


def test_gradients_are_clipped():
    policy_kwargs = dict(optimizer_class=th.optim.SGD)
    for algorithm in (MPO, RERPI):
        model = make_filled(algorithm, policy_kwargs=policy_kwargs, max_grad_norm=0.01, learning_rate=0.1)
        model.replay_buffer.rewards *= 1000
        before = th.nn.utils.parameters_to_vector(model.policy.critic.parameters()).detach().clone()
        model.train(1, batch_size=16)
        step = th.nn.utils.parameters_to_vector(model.policy.critic.parameters()).detach() - before
        assert float(step.norm()) == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize("use", [dict(use_sde=True), dict(use_sde=True, sde_sample_freq=4, use_sde_at_warmup=True)])
def test_state_dependent_exploration(use):
    learn(make_model(MunchausenSAC, BoxEnv(), **use))


# ---------------------------------------------------------------------- policies and spaces

IMAGE = spaces.Box(0, 255, (36, 40, 1), np.uint8)
OBSERVATIONS = {
    "vector": (MLP, VECTOR),
    "matrix": (MLP, spaces.Box(-1.0, 1.0, (2, 3), np.float32)),
    "float64": (MLP, spaces.Box(-1.0, 1.0, (3,), np.float64)),
    "bytes": (MLP, spaces.Box(0, 255, (3,), np.uint8)),
    "discrete": (MLP, spaces.Discrete(5)),
    "multi-discrete": (MLP, spaces.MultiDiscrete([4, 3])),
    "multi-binary": (MLP, spaces.MultiBinary(8)),
    "image": (CNN, IMAGE),
    "dict": (MULTI, spaces.Dict(vector=VECTOR, number=spaces.Discrete(4), image=IMAGE)),
}
ENVIRONMENTS = {"Box": BoxEnv, "Discrete": RandomEnv}


def environments_of(algorithm):
    return ENVIRONMENTS.values() if algorithm is MPO else [BoxEnv]


@pytest.mark.parametrize(("policy", "observation_space"), OBSERVATIONS.values(), ids=OBSERVATIONS)
def test_trains_on_observations(algorithm, policy, observation_space):
    policy_kwargs = dict(net_arch=[16])
    if policy == CNN:
        policy_kwargs["features_extractor_kwargs"] = dict(features_dim=16)
    elif policy == MULTI:
        policy_kwargs["features_extractor_kwargs"] = dict(cnn_output_dim=16)
    for environment in environments_of(algorithm):
        env = environment(observation_space)
        kwargs = dict(policy_kwargs=policy_kwargs, batch_size=4, buffer_size=100, learning_starts=10)
        model = learn(make_model(algorithm, env, policy, **kwargs), 16)
        evaluate_policy(model, env, n_eval_episodes=1, warn=False)


@pytest.mark.parametrize(
    "action_space",
    [
        box_actions(1),
        box_actions(2, 3),
        spaces.Box(-3.0, 5.0, (2,), np.float32),
        spaces.Box(np.array([-1.0, 0.0]), np.array([2.0, 10.0]), dtype=np.float64),
    ],
    ids=str,
)
def test_actions_are_in_their_range_and_stored_scaled(algorithm, action_space):
    env = BoxEnv(action_space=action_space)
    model = learn(make_model(algorithm, env))
    observations = np.stack([VECTOR.sample() for _ in range(50)])
    for deterministic in (False, True):
        actions, _ = model.predict(observations, deterministic=deterministic)
        assert actions.shape == (50, *action_space.shape)
        assert all(action_space.contains(action.astype(action_space.dtype)) for action in actions)
    assert model.predict(observations[0])[0].shape == action_space.shape
    stored = model.replay_buffer.actions[: model.replay_buffer.pos]
    assert np.abs(stored).max() <= 1 and stored.min() < -0.5 and stored.max() > 0.5


def test_discrete_actions():
    model = learn(make_model(MPO, RandomEnv(VECTOR, n_actions=4)))
    observations = np.stack([VECTOR.sample() for _ in range(50)])
    actions, _ = model.predict(observations)
    assert actions.shape == (50,) and set(actions) <= set(range(4)) and len(set(actions)) > 1
    assert model.predict(observations[0], deterministic=True)[0].shape == ()
    learn(make_model(MPO, RandomEnv(VECTOR, n_actions=1)))


def test_deterministic_actions_are_deterministic(algorithm):
    model = make_model(algorithm, BoxEnv())
    observations = np.stack([VECTOR.sample() for _ in range(5)])
    one, other = (model.predict(observations, deterministic=True)[0] for _ in range(2))
    np.testing.assert_array_equal(one, other)
    assert not np.array_equal(model.predict(observations)[0], model.predict(observations)[0])


def test_images_are_normalised(algorithm):
    policy_kwargs = dict(net_arch=[16], features_extractor_kwargs=dict(features_dim=16))
    model = make_model(algorithm, BoxEnv(IMAGE), CNN, policy_kwargs=policy_kwargs, buffer_size=10)
    inputs = []
    model.policy.actor.features_extractor.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    model.predict(np.full((36, 40, 1), 255, np.uint8))
    assert inputs[0].shape == (1, 1, 36, 40) and float(inputs[0].max()) == 1.0


@pytest.mark.parametrize("vec_env", [DummyVecEnv, SubprocVecEnv])
def test_several_environments(algorithm, vec_env):
    for options in (dict(), dict(n_steps=3, retrace=True)):
        if "retrace" in options and not has(algorithm, "retrace"):
            continue
        env = make_vec_env("Pendulum-v1", n_envs=3, vec_env_cls=vec_env)
        model = learn(make_model(algorithm, env, **options))
        assert model.replay_buffer.size() == model.num_timesteps // 3
        env.close()


@pytest.mark.parametrize("options", [dict(), dict(n_steps=3), dict(retrace=True, n_steps=3)], ids=str)
def test_normalised_observations_and_rewards(algorithm, options, tmp_path):
    if "retrace" in options and not has(algorithm, "retrace"):
        pytest.skip("Retrace is MPO's")
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=2))
    model = learn(make_model(algorithm, env, **options))
    # Stored as they came; normalised when they are sampled
    assert model.replay_buffer.rewards[:20].min() < -1.5
    assert np.abs(model.replay_buffer.sample(50, env=env).rewards.numpy()).max() <= 10
    env.training = False
    evaluate_policy(model, env, n_eval_episodes=1, warn=False)


def test_image_stacks_and_dict_observations(algorithm):
    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=False)
    kwargs = dict(policy_kwargs=dict(net_arch=[16], features_extractor_kwargs=dict(features_dim=16)), batch_size=4)
    model = learn(
        make_model(algorithm, VecFrameStack(DummyVecEnv([lambda: env]), n_stack=4), CNN, buffer_size=50, **kwargs), 30
    )
    assert model.observation_space.shape == (4, 40, 40)
    env = SimpleMultiObsEnv(discrete_actions=False)
    kwargs["policy_kwargs"]["features_extractor_kwargs"] = dict(cnn_output_dim=16)
    learn(make_model(algorithm, env, MULTI, buffer_size=50, **kwargs), 30)


@pytest.mark.parametrize("continuous", [True, False])
def test_hindsight_replay(algorithm, continuous):
    if not continuous and algorithm is not MPO:
        pytest.skip("Discrete actions")
    env = BitFlippingEnv(n_bits=4, continuous=continuous, max_steps=4)
    kwargs = dict(replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=dict(n_sampled_goal=2))
    learn(make_model(algorithm, env, MULTI, **kwargs))


# ---------------------------------------------------------------------- callbacks, logs, determinism


def test_same_seed_same_result(algorithm):
    results = []
    for seed in (3, 3, 4):
        model = make_model(algorithm, "Pendulum-v1", seed=seed).learn(60)
        results.append((learned(model), evaluate_policy(model, model.get_env(), 2, warn=False)))
    assert_same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert not is_same(results[0][0], results[2][0])


def test_callbacks(algorithm, tmp_path):
    callbacks = [
        EvalCallback(gym.make("Pendulum-v1"), eval_freq=40, n_eval_episodes=1, best_model_save_path=str(tmp_path), warn=False),
        CheckpointCallback(40, str(tmp_path), save_replay_buffer=True),
    ]
    make_model(algorithm, "Pendulum-v1").learn(80, callbacks)
    for name in ("best_model", "rl_model_80_steps"):
        algorithm.load(tmp_path / name, device="cpu")

    class Stop(BaseCallback):
        def _on_step(self):
            return self.n_calls < 30

    assert make_model(algorithm, "Pendulum-v1").learn(80, Stop()).num_timesteps == 30


LOGGED = {
    MunchausenSAC: {"ent_coef", "ent_coef_loss", "munchausen_term", "munchausen_clip_fraction", "entropy"},
    SoftQLearning: {"temperature", "effective_samples", "stein_norm", "particle_std"},
    MPO: {"temperature", "effective_samples", "temperature_penalty", "alpha_mean", "alpha_covariance", "kl_mean", "std"},
    RERPI: {"alpha_mean", "alpha_covariance", "kl_mean", "kl_covariance", "out_of_range", "std", "dual_loss"},
}
EVERYWHERE = {"actor_loss", "critic_loss", "q_value_mean", "n_updates", "learning_rate"}


def test_what_is_logged(algorithm):
    model = make_filled(algorithm)
    model.train(3, batch_size=16)
    values = {name.removeprefix("train/"): value for name, value in model.logger.name_to_value.items()}
    assert LOGGED[algorithm] | EVERYWHERE <= set(values)
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in values.values())
    assert values["n_updates"] == 3


def test_the_log_has_means_over_a_call(algorithm):
    model = make_filled(algorithm)
    found = []
    update = model._update
    model._update = lambda replay_data: found.append(update(replay_data)) or found[-1]
    model.train(4, batch_size=16)
    for name in found[0]:
        mean = np.mean([float(metrics[name]) for metrics in found])
        assert model.logger.name_to_value[f"train/{name}"] == pytest.approx(mean, rel=1e-4, abs=1e-5), name


# ---------------------------------------------------------------------- what was learned comes back

LIVELY = dict(tau=0.3, target_update_interval=1, learning_rate=0.01)
# Every form in which there are numbers to learn
FORMS = {
    "msac": (MunchausenSAC, {}),
    "msac-fixed": (MunchausenSAC, dict(ent_coef=0.2)),
    "msac-sde": (MunchausenSAC, dict(use_sde=True)),
    "sql": (SoftQLearning, dict(temperature="lin_0.3")),
    "mpo": (MPO, {}),
    "mpo-per-dimension": (MPO, dict(per_dimension_kl=True)),
    "mpo-full": (MPO, dict(policy_kwargs=dict(net_arch=[16], full_covariance=True))),
    "mpo-retrace": (MPO, dict(retrace=True, n_steps=3)),
    "mpo-discrete": (MPO, {}),
    "rerpi": (RERPI, {}),
    "rerpi-exponential": (RERPI, dict(weighting="exponential", action_penalty=False)),
}


@pytest.fixture(params=FORMS)
def trained(request):
    """A model whose every learned number has moved, and an environment for it."""
    algorithm, options = FORMS[request.param]
    env = RandomEnv if "discrete" in request.param else BoxEnv
    return make_model(algorithm, env(VECTOR), **{**LIVELY, **options}).learn(60), env


def save_and_load(model, tmp_path, **kwargs):
    model.save(tmp_path / "model")
    return type(model).load(tmp_path / "model", device="cpu", **kwargs)


def assert_trains_alike(model, other, n_updates=3):
    other.set_logger(model.logger)
    for one in (model, other):
        set_random_seed(7)
        one.train(gradient_steps=n_updates, batch_size=16)
    assert_same(learned(model), learned(other))


def test_everything_learned_comes_back(trained, tmp_path):
    model, _ = trained
    loaded = save_and_load(model, tmp_path)
    assert_same(learned(loaded), learned(model))
    for name in ("num_timesteps", "_n_updates", "_episode_num", "_current_progress_remaining"):
        assert getattr(loaded, name) == getattr(model, name), name
    assert not is_same(model.policy.critic.state_dict(), model.policy.critic_target.state_dict())
    observations = np.stack([VECTOR.sample() for _ in range(20)])
    actions = [one.predict(observations, deterministic=True)[0] for one in (model, loaded)]
    np.testing.assert_array_equal(*actions)


def test_multipliers_have_moved_and_come_back(tmp_path):
    for algorithm in (MPO, RERPI):
        model = make_model(algorithm, BoxEnv(), per_dimension_kl=True).learn(60)
        fresh, loaded = make_model(algorithm, BoxEnv(), per_dimension_kl=True), save_and_load(model, tmp_path)
        names = {"alpha_mean", "alpha_covariance", "temperature_penalty"} | ({"temperature"} if algorithm is MPO else set())
        assert set(model.multipliers.raw) == names
        for name in names:
            assert not th.equal(model.multipliers[name], fresh.multipliers[name]), name
            assert th.equal(model.multipliers[name], loaded.multipliers[name]), name
        states = [one.multipliers.optimizer.state_dict()["state"] for one in (model, loaded)]
        assert len(states[0]) == len(names) and float(states[0][0]["step"]) == model._n_updates
        assert_same(*states)


def test_training_goes_on_as_if_never_saved(trained, tmp_path):
    model, env = trained
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = save_and_load(model, tmp_path, env=env(VECTOR))
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert_trains_alike(model, loaded)
    loaded.learn(30, reset_num_timesteps=False)
    assert loaded.num_timesteps == 90


def test_parameters_can_be_copied(trained):
    model, env = trained
    other = make_model(type(model), env(VECTOR), **{name: getattr(model, name) for name in ("policy_kwargs", *LIVELY)}, **{
        name: getattr(model, name) for name in FORM_ARGUMENTS if has(type(model), name)
    })  # fmt: skip
    other.set_parameters(snapshot(model))
    assert_same(snapshot(other), snapshot(model))


FORM_ARGUMENTS = (
    "ent_coef",
    "use_sde",
    "temperature",
    "per_dimension_kl",
    "retrace",
    "n_steps",
    "weighting",
    "action_penalty",
)


def test_file_holds_json_and_no_pickles_of_ours(trained, tmp_path):
    model, _ = trained
    model.save(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as file:
        data = json.loads(file.read("data"))
        for name in file.namelist():
            if name.endswith(".pth"):
                th.load(io.BytesIO(file.read(name)), weights_only=True)
    pickled = {name for name, value in data.items() if isinstance(value, dict) and ":serialized:" in value}
    of_sb3 = {"policy_class", "observation_space", "action_space", "train_freq", "lr_schedule"}
    of_sb3 |= {"ep_info_buffer", "ep_success_buffer", "_last_obs", "_last_original_obs", "_last_episode_starts"}
    assert pickled <= of_sb3
    base = set(vars(SAC("MlpPolicy", "Pendulum-v1", buffer_size=1, device="cpu")))
    arguments = set(parameters_of(type(model).__init__)) | set(parameters_of(MPO.__init__))
    assert set(data) - base - arguments <= {"_current_progress_remaining"}, "nothing derived is saved"


def test_loading_allocates_no_storage(algorithm, tmp_path):
    model = make_model(algorithm, BoxEnv(), buffer_size=1_000_000).learn(30)
    assert model.replay_buffer.capacity == 1_000_000
    loaded = save_and_load(model, tmp_path)
    assert loaded.replay_buffer.capacity == 1 and loaded.replay_buffer.buffer_size == 1_000_000


@pytest.mark.parametrize("how", ["save", "deepcopy", "pickle"])
def test_policy_comes_back(trained, how, tmp_path):
    model, _ = trained
    if how == "deepcopy" and model.use_sde:
        pytest.skip("SB3's exploration matrices of gSDE cannot be copied")
    if how == "save":
        model.policy.save(tmp_path / "policy")
        copy = type(model.policy).load(tmp_path / "policy", device="cpu")
    else:
        copy = deepcopy(model.policy) if how == "deepcopy" else pickle.loads(pickle.dumps(model.policy))
    assert_same(copy.state_dict(), model.policy.state_dict())
    observations = np.stack([VECTOR.sample() for _ in range(20)])
    actions = [one.predict(observations, deterministic=True)[0] for one in (model.policy, copy)]
    np.testing.assert_array_equal(*actions)
    before = deepcopy(copy.state_dict())
    model.train(gradient_steps=2, batch_size=16)
    assert_same(copy.state_dict(), before)


# ---------------------------------------------------------------------- what was passed stays

ARGUMENTS = dict(
    learning_rate=0.02, buffer_size=123, learning_starts=7, batch_size=9, tau=0.7, gamma=0.8, train_freq=(3, "step"),
    gradient_steps=2, action_noise=None, replay_buffer_class=ReplayBuffer, optimize_memory_usage=True, n_steps=1,
    replay_buffer_kwargs=dict(handle_timeout_termination=False), target_update_interval=11, stats_window_size=13,
    tensorboard_log=None, verbose=0, seed=5, max_grad_norm=7.0,
    policy_kwargs=dict(net_arch=[7], optimizer_class=th.optim.SGD, optimizer_kwargs=dict(weight_decay=0.1)),
    # MunchausenSAC
    ent_coef="auto_0.3", munchausen_alpha=0.6, munchausen_clip=-2.0, target_entropy="auto", use_sde=False,
    sde_sample_freq=3, use_sde_at_warmup=True,
    # SoftQLearning
    temperature="lin_0.4", n_fixed_particles=5, n_updated_particles=4, n_value_particles=3, value_proposal="policy",
    # MPO, RERPI
    n_action_samples=7, epsilon=0.2, epsilon_mean=0.3, epsilon_covariance=0.4, epsilon_policy=0.5, epsilon_penalty=0.6,
    per_dimension_kl=True, action_penalty=False, init_temperature=0.7, init_alpha=0.8, dual_learning_rate=0.9,
    retrace=False, weighting="identity",
)  # fmt: skip
NOT_STORED = {"self", "policy", "env", "device", "_init_setup_model"}


def arguments_of(algorithm, names=ARGUMENTS):
    return {name: names[name] for name in parameters_of(algorithm.__init__) if name in names}


def assert_arguments_kept(model, arguments):
    for name, value in arguments.items():
        if name == "train_freq":
            assert (model.train_freq.frequency, model.train_freq.unit.value) == value
            continue
        stored = getattr(model, {"stats_window_size": "_stats_window_size"}.get(name, name))
        if name == "munchausen_clip" and isinstance(stored, list):
            stored = tuple(stored)  # JSON has no tuples
        assert stored == value and type(stored) is type(value), name


def test_table_has_every_argument():
    for algorithm in ACTOR_CRITIC.values():
        assert set(parameters_of(algorithm.__init__)) <= NOT_STORED | set(ARGUMENTS), algorithm


def test_arguments_are_kept_as_they_were_passed(algorithm, tmp_path):
    arguments = arguments_of(algorithm)
    passed = deepcopy(arguments)
    model = algorithm(MLP, "Pendulum-v1", device="cpu", **passed)
    assert_arguments_kept(model, arguments)
    model.learn(30)
    assert_arguments_kept(model, arguments)
    loaded = save_and_load(model, tmp_path, env=make_vec_env("Pendulum-v1"))
    assert_arguments_kept(loaded, arguments)
    for _ in range(2):
        loaded._setup_model()
        assert_arguments_kept(loaded, arguments)
    assert passed == arguments, "what the user passed is not changed either"


def test_defaults_are_kept(algorithm, tmp_path):
    defaults = {name: parameter.default for name, parameter in parameters_of(algorithm.__init__).items()}
    arguments = {name: value for name, value in defaults.items() if name not in NOT_STORED | {"train_freq"}}
    arguments.update(policy_kwargs={}, replay_buffer_kwargs={})  # SB3 stores empty dicts for None
    model = algorithm(MLP, "Pendulum-v1", device="cpu")
    assert_arguments_kept(model, arguments)
    assert_arguments_kept(save_and_load(model, tmp_path), arguments)


def test_loading_with_other_settings(algorithm, tmp_path):
    model = make_model(algorithm, BoxEnv()).learn(30)
    names = ("learning_rate", "buffer_size", "gamma", "batch_size", "tau", "munchausen_alpha", "epsilon", "temperature")
    changes = {name: value for name, value in arguments_of(algorithm).items() if name in names}
    loaded = save_and_load(model, tmp_path, env=BoxEnv(), n_steps=3, **changes)
    assert_arguments_kept(loaded, changes)
    assert loaded.replay_buffer.n_steps == 3 and loaded.replay_buffer.buffer_size == 123
    loaded.learn(30)
    assert loaded._optimizers()[0].param_groups[0]["lr"] == 0.02


def test_no_setup_without_init_setup_model(algorithm):
    model = algorithm(MLP, "Pendulum-v1", device="cpu", _init_setup_model=False)
    assert not hasattr(model, "policy") and model.replay_buffer is None
    model._setup_model()
    assert model.learn(10).num_timesteps >= 10


def test_temperature_follows_its_schedule():
    model = make_model(SoftQLearning, BoxEnv(), temperature="lin_0.4")
    assert model.current_temperature == pytest.approx(0.4)
    model.learn(30)
    assert model.current_temperature == pytest.approx(0.0, abs=1e-5) and model.current_temperature > 0
    fill_scaled(model)
    model.train(2, batch_size=16)
