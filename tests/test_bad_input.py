"""Bad input: errors that name what is wrong and what would be right, and training that stops before it does harm."""

import math
import re

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import (
    PLANES,
    VALUE_BASED,
    VECTOR,
    RandomEnv,
    assert_same,
    fill_buffer,
    has_parameter,
    is_same,
    make_model,
    snapshot,
)
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_softq import CVI, DPP, DivergenceError, MirrorDescentDQN, SACDiscrete
from sb3_softq.value_based.policies import QPolicy

NAN, INF = math.nan, math.inf
NOT_LEARNED = "temperature='auto_?.*' cannot be learned .*pass a number, a callable or a schedule"

# (argument, value, error, pattern of the message); an algorithm is tested with the arguments that it has
BAD_ARGUMENTS = [
    ("temperature", NAN, ValueError, "temperature must be finite, not nan"),
    ("temperature", INF, ValueError, "temperature must be finite, not inf"),
    ("temperature", -0.1, ValueError, "temperature must be at least 0, not -0.1"),
    ("temperature", "lin_x", ValueError, "temperature must be written like 'lin_0.1', not 'lin_x'"),
    ("temperature", "lin_-0.1", ValueError, "temperature must be positive, not -0.1"),
    ("temperature", "foo", ValueError, "temperature must be a number, a callable or a schedule like 'lin_0.1', not 'foo'"),
    ("temperature", "auto_0", ValueError, f"temperature must be positive, not 0|{NOT_LEARNED}"),
    ("temperature", "auto_x", ValueError, f"temperature must be written like 'auto_0.1', not 'auto_x'|{NOT_LEARNED}"),
    ("temperature", True, TypeError, "temperature must be a number, not True of type bool"),
    ("temperature", None, TypeError, "temperature must be a number, not None"),
    ("target_entropy", 0.7, ValueError, r"target_entropy must be at most log\(2\) = 0.6931 nats.*not 0.7"),
    ("target_entropy", "auto_1.5", ValueError, "target_entropy must be between 0 and 1, not 1.5"),
    ("target_entropy", "foo", ValueError, "target_entropy must be a number, 'auto' or like 'auto_0.3', not 'foo'"),
    ("target_entropy", False, TypeError, "target_entropy must be a number, not False"),
    ("munchausen_alpha", -0.1, ValueError, "munchausen_alpha must be between 0 and 1, not -0.1"),
    ("munchausen_alpha", 1.1, ValueError, "munchausen_alpha must be between 0 and 1, not 1.1"),
    ("munchausen_alpha", NAN, ValueError, "munchausen_alpha must be finite, not nan"),
    ("munchausen_alpha", "0.9", TypeError, "munchausen_alpha must be a number, not '0.9' of type str"),
    ("munchausen_alpha", True, TypeError, "munchausen_alpha must be a number, not True of type bool"),
    ("munchausen_clip", 0.5, ValueError, "munchausen_clip must be at most 0, not 0.5"),
    ("munchausen_clip", INF, ValueError, "munchausen_clip must be at most 0, not inf"),
    ("munchausen_clip", NAN, ValueError, "munchausen_clip must be finite, not nan"),
    ("munchausen_clip", None, TypeError, "munchausen_clip must be a number, not None"),
    ("double_q", "no", TypeError, "double_q must be .*not 'no'"),
    ("torch_compile", "yes", TypeError, "torch_compile must be .*not 'yes'"),
    ("exploration", "greedy", ValueError, r"exploration must be one of \['boltzmann', 'eps_greedy', .*\], not 'greedy'"),
    ("exploration", 0.1, TypeError, "exploration must be one of .*, not 0.1 of type float"),
    ("exploration_fraction", 0, ValueError, "exploration_fraction must be positive, not 0"),
    ("exploration_fraction", 1.5, ValueError, "exploration_fraction must be between 0 and 1, not 1.5"),
    ("exploration_initial_eps", -0.1, ValueError, "exploration_initial_eps must be between 0 and 1, not -0.1"),
    ("exploration_final_eps", 2, ValueError, "exploration_final_eps must be between 0 and 1, not 2"),
    ("buffer_size", 0, ValueError, "buffer_size must be at least 1, not 0"),
    ("buffer_size", 1e4, TypeError, "buffer_size must be a whole number, not 10000.0 of type float"),
    ("batch_size", 0, ValueError, "batch_size must be at least 1, not 0"),
    ("batch_size", "32", TypeError, "batch_size must be a whole number, not '32' of type str"),
    ("learning_starts", -1, ValueError, "learning_starts must be at least 0, not -1"),
    ("tau", 1.1, ValueError, "tau must be between 0 and 1, not 1.1"),
    ("tau", "0.1", TypeError, "tau must be a number, not '0.1'"),
    ("gamma", 1.01, ValueError, "gamma must be between 0 and 1, not 1.01"),
    ("gamma", NAN, ValueError, "gamma must be finite, not nan"),
    ("gradient_steps", -2, ValueError, "gradient_steps must be at least -1, not -2"),
    ("gradient_steps", 1.5, TypeError, "gradient_steps must be a whole number, not 1.5"),
    ("n_quantiles", 0, ValueError, "n_quantiles must be at least 1, not 0"),
    ("n_target_quantiles", -1, ValueError, "n_target_quantiles must be at least 1, not -1"),
    ("n_policy_quantiles", 2.5, TypeError, "n_policy_quantiles must be a whole number, not 2.5"),
    ("operator", "max", ValueError, r"operator must be one of \['boltzmann', 'logsumexp'\], not 'max'"),
    ("gap_clip", 1.0, ValueError, "gap_clip must be at most 0, not 1.0"),
    ("preference_clip", 0, ValueError, "preference_clip must be positive, not 0"),
    ("parametrisation", "Q", ValueError, r"parametrisation must be one of \['preference', 'q'\], not 'Q'"),
    ("momentum", 1.5, ValueError, "momentum must be between 0 and 1, not 1.5"),
    ("momentum", "inverse", ValueError, "momentum must be .*'inverse_time'.* not 'inverse'"),
    ("momentum", "inverse_time_0", ValueError, "momentum must be .* not 'inverse_time_0'"),
    ("averaged", "td", ValueError, r"averaged must be one of \['q_values', 'targets'\], not 'td'"),
    ("kl_coef", -0.1, ValueError, "kl_coef must be at least 0, not -0.1"),
    ("ent_coef", -0.1, ValueError, "ent_coef must be at least 0, not -0.1"),
    ("greedy_step", "proximal", ValueError, "greedy_step must be one of .*'dual_averaging'.* not 'proximal'"),
    ("regularised_evaluation", 1, TypeError, "regularised_evaluation must be True or False, not 1"),
    ("entropy_penalty", -1, ValueError, "entropy_penalty must be at least 0, not -1"),
    ("average_q", "yes", TypeError, "average_q must be True or False, not 'yes'"),
    ("q_clip", -0.5, ValueError, "q_clip must be at least 0, not -0.5"),
    ("n_steps", 0, ValueError, "n_steps must be at least 1, not 0"),
    ("factorisation", "product", ValueError, r"factorisation must be one of \['sum', 'independent'\], not 'product'"),
    ("n_step_bonus", 1, TypeError, "n_step_bonus must be True or False, not 1"),
    ("tree_backup", None, TypeError, "tree_backup must be True or False, not None"),
    ("n_steps", 3.0, TypeError, "n_steps must be a whole number, not 3.0"),
    ("target_update_interval", 0, ValueError, "target_update_interval must be at least 1, not 0"),
    ("target_update_interval", True, TypeError, "target_update_interval must be a whole number, not True"),
    ("max_grad_norm", 0, ValueError, "max_grad_norm must be positive, not 0"),
    ("max_grad_norm", NAN, ValueError, "max_grad_norm must be finite, not nan"),
    ("train_freq", "foo", ValueError, "train_freq.*must be an integer.*foo"),
    ("train_freq", (1, "epoch"), ValueError, "train_freq.*must be either 'step' or 'episode' not 'epoch'"),
]
CASES = [
    pytest.param(algorithm, {name: value}, error, message, id=f"{key}-{name}-{value}")
    for key, algorithm in VALUE_BASED.items()
    for name, value, error, message in BAD_ARGUMENTS
    if has_parameter(algorithm, name)
]


@pytest.fixture(scope="module")
def saved_models(tmp_path_factory):
    """Class -> the file of a saved model."""
    paths = {algorithm: tmp_path_factory.mktemp("models") / f"{key}.zip" for key, algorithm in VALUE_BASED.items()}
    for algorithm, path in paths.items():
        make_model(algorithm).save(path)
    return paths


@pytest.mark.parametrize(("algorithm", "kwargs", "error", "message"), CASES)
def test_bad_argument(algorithm, kwargs, error, message):
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        algorithm("MlpPolicy", "CartPole-v1", device="cpu", **kwargs)


@pytest.mark.parametrize(("algorithm", "kwargs", "error", "message"), CASES)
def test_bad_argument_when_loading(algorithm, kwargs, error, message, saved_models):
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        algorithm.load(saved_models[algorithm], device="cpu", **kwargs)


def test_boltzmann_exploration_needs_a_temperature(algorithm):
    if not has_parameter(algorithm, "temperature"):
        return  # it acts on a policy network
    with pytest.raises(ValueError, match=r"temperature must be positive, not 0.*exploration='eps_greedy'"):
        make_model(algorithm, temperature=0, exploration="boltzmann")
    for exploration in ("eps_greedy", "boltzmann_eps"):
        make_model(algorithm, temperature=0, exploration=exploration)


def test_learned_temperature_where_it_cannot_be(algorithm):
    if not has_parameter(algorithm, "temperature"):
        return
    for temperature in ("auto", "auto_0.1"):
        if algorithm.learns_temperature:
            make_model(algorithm, temperature=temperature)
        else:
            with pytest.raises(ValueError, match=NOT_LEARNED):
                make_model(algorithm, temperature=temperature)


def test_tree_backup_needs_our_buffer():
    with pytest.raises(ValueError, match=r"tree_backup=True needs .*not replay_buffer_class=ReplayBuffer: leave it None"):
        make_model(CVI, n_steps=3, tree_backup=True, replay_buffer_class=ReplayBuffer)


def test_what_excludes_each_other():
    with pytest.raises(ValueError, match=r"munchausen_alpha must be below 1, not 1, .*use DPP"):
        make_model(CVI, munchausen_alpha=1)
    with pytest.raises(ValueError, match="kl_coef and ent_coef must not both be 0: pass a positive"):
        make_model(MirrorDescentDQN, kl_coef=0, ent_coef=0)
    with pytest.raises(ValueError, match=r"ent_coef must be positive, not 0, with greedy_step='dual_averaging'.*MomentumDQN"):
        make_model(MirrorDescentDQN, ent_coef=0, greedy_step="dual_averaging")
    with pytest.raises(ValueError, match=r"ent_coef must be a number, 'auto' or like 'auto_0.1', not 'lin_0.1'"):
        make_model(SACDiscrete, ent_coef="lin_0.1")
    with pytest.raises(ValueError, match=r"ent_coef must be written like 'auto_0.1', not 'auto_x'"):
        make_model(SACDiscrete, ent_coef="auto_x")
    with pytest.raises(ValueError, match=r"ent_coef must be positive, not 0"):
        make_model(SACDiscrete, ent_coef="auto_0")
    with pytest.raises(ValueError, match=r"parametrisation='q' needs .* not policy=OnePolicy: derive it from SumQPolicy"):
        make_model(DPP, policy=type("OnePolicy", (QPolicy,), {}), parametrisation="q")
    with pytest.raises(ValueError, match=r"target_entropy must be at most log\(2\)"):
        make_model(SACDiscrete, target_entropy=0.8)


def test_fixed_temperature_in_place_of_a_saved_learned_one(saved_models):
    # What a model has learned cannot be used by another kind of temperature: say so, in terms of the argument
    for algorithm, path in saved_models.items():
        if algorithm.learns_temperature:
            name = "temperature" if has_parameter(algorithm, "temperature") else "ent_coef"
            with pytest.raises(ValueError, match=f"{name}=0.1 is not learned"):
                algorithm.load(path, device="cpu", **{name: 0.1})


# ---------------------------------------------------------------------- spaces

MLP, CNN, MULTI = "MlpPolicy", "CnnPolicy", "MultiInputPolicy"
BAD_OBSERVATIONS = [
    (CNN, VECTOR, "CnnPolicy reads images.*use MlpPolicy"),
    (CNN, spaces.Discrete(3), "CnnPolicy reads images.*use MlpPolicy"),
    (CNN, spaces.Box(0, 1, (1, 10, 10, 3), np.float32), "CnnPolicy reads images.*use MlpPolicy"),
    (CNN, spaces.Box(0, 1, (84, 84, 3), np.float32), "CnnPolicy reads planes.*uint8.*normalized_image=True"),
    (CNN, spaces.Box(0, 1, (10, 2, 3), np.bool_), "at least 3x3.*use MlpPolicy"),
    (CNN, spaces.Dict(image=PLANES), "MultiInputPolicy"),
    (MLP, spaces.Dict(vector=VECTOR), "MultiInputPolicy"),
    (MULTI, VECTOR, "MultiInputPolicy reads Dict observations.*use MlpPolicy"),
    (MULTI, PLANES, "MultiInputPolicy reads Dict observations.*use (MlpPolicy|CnnPolicy)"),
    (MLP, spaces.Tuple([VECTOR, VECTOR]), "observation_space=Tuple.*wrap the environment"),
]


@pytest.mark.parametrize(("policy", "observation_space", "message"), BAD_OBSERVATIONS)
def test_observations_that_the_policy_cannot_read(algorithm, policy, observation_space, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        make_model(algorithm, RandomEnv(observation_space), policy)


@pytest.mark.parametrize("observation_space", [VECTOR, spaces.Dict(vector=VECTOR)])
def test_policy_class_that_cannot_read_the_observations(algorithm, observation_space):
    wrong = MULTI if observation_space is VECTOR else MLP
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        make_model(algorithm, RandomEnv(observation_space), algorithm.policy_aliases[wrong])


@pytest.mark.parametrize(
    ("action_space", "message"),
    [
        (spaces.Box(-1.0, 1.0, (2,), np.float32), "takes Discrete, MultiDiscrete or MultiBinary.* not action_space=Box.*SAC"),
        (spaces.Discrete(3, start=1), r"must start at 0, not as in action_space=Discrete\(3, start=1\)"),
        (spaces.MultiDiscrete([2, 3], start=[0, 1]), "must start at 0, not as in action_space=MultiDiscrete"),
    ],
)
def test_actions_that_the_algorithm_cannot_take(algorithm, action_space, message):
    env = RandomEnv(VECTOR)
    env.action_space = action_space
    with pytest.raises(ValueError, match=re.compile(f"{algorithm.__name__} {message}|{message}", re.DOTALL)):
        make_model(algorithm, env)


def test_unknown_policy_and_unknown_argument(algorithm):
    with pytest.raises(ValueError, match="Policy FooPolicy unknown"):
        make_model(algorithm, policy="FooPolicy")
    with pytest.raises(TypeError, match="foo"):
        make_model(algorithm, foo=1)


def test_episodes_of_several_environments(algorithm):
    # SB3's assertion: rl-zoo3 prunes on it as on a ValueError
    model = make_model(algorithm, make_vec_env("CartPole-v1", n_envs=2), train_freq=(1, "episode"))
    with pytest.raises(AssertionError, match="only one env"):
        model.learn(10)


def test_reset_result_instead_of_an_observation(algorithm):
    # The common mistake with Gymnasium's reset(), which SB3's predict() explains
    env = gym.make("CartPole-v1")
    with pytest.raises(ValueError, match="tuple"):
        make_model(algorithm).predict(env.reset())


# ---------------------------------------------------------------------- divergence: what comes from the environment

BREAK_AT = 30


class BreakingEnv(gym.Env):
    """
    Gives a broken number once.

    :param where: ``"reward"``, ``"observation"``, ``"terminal observation"`` or ``"reset"`` (of the second episode)
    :param value: the broken number
    :param at: step at which it comes; 0 for the first reset
    :param as_dict: whether observations are a Dict
    """

    def __init__(self, where, value=NAN, at=BREAK_AT, as_dict=False):
        self.where, self.value, self.at, self.as_dict = where, value, at, as_dict
        vector = spaces.Box(-INF, INF, (3,), np.float32)
        self.observation_space = spaces.Dict(number=spaces.Discrete(2), vector=vector) if as_dict else vector
        self.action_space = spaces.Discrete(2)
        self.total_steps = 0

    def observe(self, is_broken):
        vector = self.np_random.normal(size=3).astype(np.float32)
        if is_broken:
            vector[1] = self.value
        return {"number": 1, "vector": vector} if self.as_dict else vector

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(self.where == "reset" and self.total_steps == self.at), {}

    def step(self, action):
        self.total_steps += 1
        now = self.total_steps == self.at
        ends = now and self.where in ("terminal observation", "reset")
        reward = self.value if now and self.where == "reward" else self.np_random.normal()
        observation = self.observe(now and self.where in ("observation", "terminal observation"))
        return observation, reward, ends and self.where == "reset", ends and self.where != "reset", {}


class Snapshots(BaseCallback):
    """Keeps the learned numbers as they were at the last step, before its transition was looked at."""

    def _on_step(self):
        self.last = snapshot(self.model)
        return True


def assert_stops(model, message, total_timesteps=60):
    """Learning raises, names what broke, leaves the learned numbers, and the model can be saved."""
    callback = Snapshots()
    before = snapshot(model)
    with pytest.raises(DivergenceError, match=re.compile(message, re.DOTALL)) as error:
        model.learn(total_timesteps, callback)
    assert isinstance(error.value, ValueError)
    last = getattr(callback, "last", before)
    assert_same(snapshot(model), last)
    return is_same(before, last)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["reward", "observation", "terminal observation", "reset"])
def test_broken_number_from_the_environment(algorithm, where, value, tmp_path):
    model = make_model(algorithm, BreakingEnv(where, value), train_freq=1)
    name = "rewards" if where == "reward" else "observations"
    learned_nothing = assert_stops(model, f"{name}.*not finite.*step {BREAK_AT}.*{value}")
    assert not learned_nothing and model.num_timesteps == BREAK_AT
    # Nothing broken was stored either: the model can be saved, loaded and trained in a mended environment
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    model = algorithm.load(tmp_path / "model", BreakingEnv("nowhere"), device="cpu")
    model.load_replay_buffer(tmp_path / "buffer")
    model.learn(20, reset_num_timesteps=False)
    assert model.num_timesteps == BREAK_AT + 20


@pytest.mark.parametrize("where", ["observation", "terminal observation", "reset"])
def test_broken_number_in_a_dict(algorithm, where):
    model = make_model(algorithm, BreakingEnv(where, as_dict=True), MULTI, train_freq=1)
    assert_stops(model, rf"observations\['vector'\].*not finite.*step {BREAK_AT}")


@pytest.mark.parametrize("as_dict", [False, True])
def test_broken_first_observation(algorithm, as_dict):
    model = make_model(algorithm, BreakingEnv("reset", at=0, as_dict=as_dict), MULTI if as_dict else MLP)
    learned_nothing = assert_stops(model, "observations.*not finite.*step 0")
    assert learned_nothing


@pytest.mark.parametrize("where", ["reward", "observation", "terminal observation"])
def test_broken_number_from_one_of_several_environments(algorithm, where):
    env = DummyVecEnv([lambda: BreakingEnv("nowhere"), lambda: BreakingEnv(where, INF, at=15)])
    model = make_model(algorithm, env, train_freq=1)
    assert_stops(model, "not finite.*step 30")


@pytest.mark.parametrize(
    ("where", "value"), [("reward", NAN), ("reward", INF), ("observation", NAN), ("observation", -INF), ("reset", INF)]
)
@pytest.mark.parametrize("training", [True, False], ids=["updating", "frozen"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_broken_number_behind_normalisation(algorithm, where, value, training):
    # Its clipping makes a large number of an infinity, but the replay buffer stores what was not normalised
    env = VecNormalize(DummyVecEnv([lambda: BreakingEnv(where, value)]), training=training)
    assert_stops(make_model(algorithm, env, train_freq=1), f"not finite.*step {BREAK_AT}")


def test_broken_number_before_learning_starts(algorithm):
    model = make_model(algorithm, BreakingEnv("reward"), learning_starts=50)
    assert_stops(model, f"rewards.*not finite.*step {BREAK_AT}")
    assert model._n_updates == 0


# ---------------------------------------------------------------------- divergence: what is computed


def make_filled(algorithm, **kwargs):
    """A model that has trained, with random transitions in its replay buffer."""
    model = make_model(algorithm, RandomEnv(VECTOR), **kwargs)
    fill_buffer(model, 50)
    model.num_timesteps = 7
    model.train(gradient_steps=2, batch_size=16)
    return model


def assert_train_stops(model, message, gradient_steps=1):
    before = snapshot(model)
    with pytest.raises(DivergenceError, match=re.compile(message, re.DOTALL)):
        model.train(gradient_steps, batch_size=50)
    return before


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", ["observations", "next_observations", "rewards"])
def test_broken_number_in_the_replay_buffer(algorithm, name, value, tmp_path):
    model = make_filled(algorithm)
    getattr(model.replay_buffer, name)[:] = value
    before = assert_train_stops(model, rf"\b{name}\b.*update 3, at step 7, is not finite")
    assert_same(snapshot(model), before)
    assert model._n_updates == 2
    model.save(tmp_path / "model")


def test_one_broken_number_in_the_replay_buffer(algorithm):
    # One row of many: the updates before it is drawn are made, the one that draws it is not
    model = make_filled(algorithm)
    model.replay_buffer.rewards[11] = NAN
    with pytest.raises(DivergenceError, match="rewards"):
        model.train(gradient_steps=100, batch_size=4)
    numbers = [tensor for tensor in model.policy.state_dict().values()]
    numbers += [value for state in model.policy.optimizer.state_dict()["state"].values() for value in state.values()]
    assert all(bool(th.isfinite(number).all()) for number in numbers)
    steps = {float(state["step"]) for state in model.policy.optimizer.state_dict()["state"].values()}
    assert steps == {float(model._n_updates)}, "the updates that were made are the ones that were counted"


@pytest.mark.parametrize(("network", "name"), [("q_net", "action values"), ("q_net_target", "targets")])
def test_broken_number_in_the_weights(algorithm, network, name):
    model = make_filled(algorithm)
    with th.no_grad():
        next(getattr(model, network).parameters())[0, 0] = NAN
    if network == "q_net" and not model.acts_on_q_values:
        name = "loss"  # what it acts on is not broken
    before = assert_train_stops(model, f"{name}.*update 3, at step 7, is not finite")
    after = snapshot(model)
    th.testing.assert_close(after["policy"], before["policy"], rtol=0, atol=0, equal_nan=True)
    assert_same(after["policy.optimizer"], before["policy.optimizer"])


def test_loss_that_overflows(algorithm):
    model = make_filled(algorithm)
    model.replay_buffer.rewards[:] = 3e38
    before = assert_train_stops(model, "loss.*update 3, at step 7, is not finite.*learning_rate", gradient_steps=3)
    assert_same(snapshot(model), before)


def test_learning_stops_when_it_diverges(algorithm):
    # Steps so large that the action values overflow: the step at which they do is that of the message
    kwargs = dict(policy_kwargs=dict(net_arch=[], optimizer_class=th.optim.SGD), learning_rate=3e38, max_grad_norm=INF)
    kwargs |= dict(n_quantiles=1) if has_parameter(algorithm, "n_quantiles") else {}  # whose losses are a sum
    model = make_model(algorithm, RandomEnv(VECTOR), temperature=0.1, train_freq=1, **kwargs)
    with pytest.raises(DivergenceError, match="is not finite") as error:
        model.learn(1000)
    assert f"update {model._n_updates + 1}, at step {model.num_timesteps}," in str(error.value)
    assert model._n_updates > 0
    assert all(bool(th.isfinite(tensor).all()) for tensor in model.policy.state_dict().values())


@pytest.mark.parametrize(("saved", "wanted"), [("q", "preference"), ("preference", "q")])
def test_dpp_saved_in_the_other_parametrisation(saved, wanted, tmp_path):
    # Its networks are others, which the weights do not fit
    make_model(DPP, parametrisation=saved).save(tmp_path / "dpp")
    DPP.load(tmp_path / "dpp", device="cpu")
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict"):
        DPP.load(tmp_path / "dpp", device="cpu", parametrisation=wanted)
