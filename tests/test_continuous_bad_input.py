"""Bad input to the actor-critic family: errors that name what is wrong and what would be right, before harm is done."""

import math
import re

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from continuous import ACTOR_CRITIC, BoxEnv, box_actions, make_filled
from gymnasium import spaces
from helpers import VECTOR, RandomEnv, assert_same, make_model, snapshot
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_softq import MPO, RERPI, DivergenceError, MunchausenSAC, SoftQLearning

NAN, INF = math.nan, math.inf
PAIR = "munchausen_clip must be a lower and an upper bound"

# (argument, value, error, pattern of the message); an algorithm is tested with the arguments that it has
BAD_ARGUMENTS = [
    ("buffer_size", 0, ValueError, "buffer_size must be at least 1, not 0"),
    ("batch_size", 2.5, TypeError, "batch_size must be a whole number, not 2.5"),
    ("tau", 1.5, ValueError, "tau must be between 0 and 1, not 1.5"),
    ("gamma", NAN, ValueError, "gamma must be finite, not nan"),
    ("gradient_steps", -2, ValueError, "gradient_steps must be at least -1, not -2"),
    ("target_update_interval", 0, ValueError, "target_update_interval must be at least 1, not 0"),
    ("n_steps", 0, ValueError, "n_steps must be at least 1, not 0"),
    ("munchausen_alpha", 1.1, ValueError, "munchausen_alpha must be between 0 and 1, not 1.1"),
    ("munchausen_alpha", "0.9", TypeError, "munchausen_alpha must be a number, not '0.9'"),
    ("munchausen_clip", 0.5, ValueError, "munchausen_clip must be at most 0, not 0.5"),
    ("munchausen_clip", (0.5, 1.0), ValueError, "the lower bound in munchausen_clip must be at most 0, not 0.5"),
    ("munchausen_clip", (-1.0, -0.5), ValueError, "the upper bound in munchausen_clip must be at least 0, not -0.5"),
    ("munchausen_clip", (-1.0, NAN), ValueError, "the upper bound in munchausen_clip must be finite, not nan"),
    ("munchausen_clip", (-1.0,), ValueError, PAIR),
    ("munchausen_clip", None, TypeError, "munchausen_clip must be a number, not None"),
    ("ent_coef", "foo", ValueError, "ent_coef must be a number, 'auto' or like 'auto_0.1', not 'foo'"),
    ("ent_coef", "auto_-1", ValueError, "the initial value in ent_coef must be positive, not -1"),
    ("ent_coef", -0.1, ValueError, "ent_coef must be at least 0, not -0.1"),
    ("ent_coef", None, TypeError, "ent_coef must be a number, not None"),
    ("target_entropy", "foo", ValueError, "target_entropy must be a number or 'auto', not 'foo'"),
    ("target_entropy", NAN, ValueError, "target_entropy must be finite, not nan"),
    ("temperature", 0, ValueError, "temperature must be positive, not 0.*TD3"),
    ("temperature", -1.0, ValueError, "temperature must be at least 0, not -1"),
    ("temperature", "auto", ValueError, "temperature='auto' cannot be learned by this algorithm"),
    ("temperature", "foo", ValueError, "temperature must be a number, a callable or a schedule"),
    ("n_fixed_particles", 1, ValueError, "n_fixed_particles must be at least 2, not 1"),
    ("n_updated_particles", 0, ValueError, "n_updated_particles must be at least 1, not 0"),
    ("n_value_particles", 0, ValueError, "n_value_particles must be at least 1, not 0"),
    ("value_proposal", "gaussian", ValueError, r"value_proposal must be one of \['uniform', 'policy'\], not 'gaussian'"),
    ("n_action_samples", 1, ValueError, "n_action_samples must be at least 2, not 1"),
    ("epsilon", 0.0, ValueError, "epsilon must be positive, not 0"),
    ("epsilon", 3.0, ValueError, r"epsilon must be below log\(n_action_samples\) = log\(20\) = 2.996, .*, not 3.0"),
    ("epsilon_mean", 0.0, ValueError, "epsilon_mean must be positive, not 0"),
    ("epsilon_covariance", -1.0, ValueError, "epsilon_covariance must be positive, not -1"),
    ("epsilon_policy", 0.0, ValueError, "epsilon_policy must be positive, not 0"),
    ("epsilon_penalty", NAN, ValueError, "epsilon_penalty must be finite, not nan"),
    ("init_temperature", 0.0, ValueError, "init_temperature must be positive, not 0"),
    ("init_alpha", 0.0, ValueError, "init_alpha must be positive, not 0"),
    ("dual_learning_rate", -1e-3, ValueError, "dual_learning_rate must be positive, not -0.001"),
    ("per_dimension_kl", 1, TypeError, "per_dimension_kl must be True or False, not 1"),
    ("action_penalty", "yes", TypeError, "action_penalty must be True or False, not 'yes'"),
    ("retrace", 1, TypeError, "retrace must be True or False, not 1"),
    ("max_grad_norm", 0.0, ValueError, "max_grad_norm must be positive, not 0"),
    ("weighting", "softmax", ValueError, r"weighting must be one of \['rank', 'exponential', 'identity'\], not 'softmax'"),
]
CASES = [
    pytest.param(algorithm, {name: value}, error, message, id=f"{key}-{name}-{value}")
    for key, algorithm in ACTOR_CRITIC.items()
    for name, value, error, message in BAD_ARGUMENTS
    if name in algorithm.__init__.__annotations__
]


@pytest.fixture(params=ACTOR_CRITIC.values(), ids=ACTOR_CRITIC)
def algorithm(request):
    """Each actor-critic algorithm of the package."""
    return request.param


@pytest.fixture(scope="module")
def saved_models(tmp_path_factory):
    paths = {algorithm: tmp_path_factory.mktemp("models") / f"{key}.zip" for key, algorithm in ACTOR_CRITIC.items()}
    for algorithm, path in paths.items():
        make_model(algorithm, "Pendulum-v1").save(path)
    return paths


@pytest.mark.parametrize(("algorithm", "kwargs", "error", "message"), CASES)
def test_bad_argument(algorithm, kwargs, error, message, saved_models):
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        algorithm("MlpPolicy", "Pendulum-v1", device="cpu", **kwargs)
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        algorithm.load(saved_models[algorithm], device="cpu", **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(full_covariance=1), TypeError, "full_covariance in policy_kwargs must be True or False, not 1"),
        (dict(initial_std=0.0), ValueError, "initial_std in policy_kwargs must be positive, not 0"),
        (dict(n_critics=0), ValueError, "n_critics in policy_kwargs must be at least 1, not 0"),
    ],
)
def test_bad_argument_of_the_policy(kwargs, error, message):
    for algorithm in (MPO, RERPI) if "n_critics" not in kwargs else (MPO, RERPI, SoftQLearning):
        with pytest.raises(error, match=message):
            make_model(algorithm, BoxEnv(), policy_kwargs=kwargs)


def test_arguments_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"per_dimension_kl=True needs independent actions.*full_covariance=False"):
        make_model(MPO, BoxEnv(), per_dimension_kl=True, policy_kwargs=dict(full_covariance=True))
    noise = NormalActionNoise(np.zeros(2), np.ones(2))
    for kwargs, message in [
        (dict(action_noise=noise), "retrace=True needs the log-probabilities of actions, which action_noise changes"),
        (dict(replay_buffer_class=ReplayBuffer), "retrace=True needs this package's replay buffer, not ReplayBuffer: pass"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_model(MPO, BoxEnv(), retrace=True, **kwargs)
    with pytest.raises(ValueError, match=r"epsilon must be below log\(n_actions\) = log\(3\)"):
        make_model(MPO, RandomEnv(VECTOR), epsilon=1.2)


# ---------------------------------------------------------------------- spaces


@pytest.mark.parametrize("cls", [MunchausenSAC, SoftQLearning, RERPI])
def test_discrete_actions_are_sent_to_who_takes_them(cls):
    for env in (RandomEnv(VECTOR), DummyVecEnv([lambda: RandomEnv(VECTOR)])):
        with pytest.raises(ValueError, match=rf"{cls.__name__} takes Box actions, not action_space=Discrete\(3\): .*use MPO"):
            make_model(cls, env)


def test_other_actions(algorithm):
    for space in (spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3)):
        env = RandomEnv(VECTOR)
        env.action_space = space
        with pytest.raises(
            ValueError, match=rf"{algorithm.__name__} takes Box.*actions, not action_space={type(space).__name__}"
        ):
            make_model(algorithm, env)
    env.action_space = spaces.Discrete(3, start=1)
    if algorithm is MPO:
        with pytest.raises(ValueError, match="MPO takes Discrete actions from 0 on"):
            make_model(algorithm, env)


@pytest.mark.parametrize("bounds", [(-INF, INF), (-1.0, INF)])
def test_unbounded_actions(algorithm, bounds):
    env = BoxEnv(action_space=spaces.Box(*bounds, (2,), np.float32))
    with pytest.raises(ValueError, match=f"{algorithm.__name__} needs bounded actions.*finite bounds"):
        make_model(algorithm, env)


def test_another_environment_is_checked_too(algorithm, saved_models):
    model = make_model(algorithm, BoxEnv())
    with pytest.raises(ValueError, match=r"actions|Action spaces do not match"):
        model.set_env(RandomEnv(VECTOR))
    with pytest.raises(ValueError, match=r"actions|spaces do not match"):
        algorithm.load(saved_models[algorithm], env=BoxEnv(action_space=box_actions(3)), device="cpu")


def test_observations_that_no_policy_reads(algorithm):
    with pytest.raises(ValueError, match=r"observation_space=Tuple.*wrap the environment"):
        make_model(algorithm, BoxEnv(spaces.Tuple([VECTOR, VECTOR])))
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        make_model(algorithm, BoxEnv(spaces.Dict(a=VECTOR)))


def test_reset_result_instead_of_an_observation(algorithm):
    with pytest.raises(ValueError, match="tuple"):
        make_model(algorithm, "Pendulum-v1").predict(gym.make("Pendulum-v1").reset())


# ---------------------------------------------------------------------- divergence


def all_numbers(model):
    numbers = snapshot(model)
    for name in model._get_torch_save_params()[1]:
        numbers[name] = getattr(model, name).detach().clone()
    return numbers


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", ["observations", "next_observations", "rewards"])
def test_broken_number_in_the_replay_buffer(algorithm, name, value, tmp_path):
    model = make_filled(algorithm)
    model.num_timesteps = 7
    model.train(2, batch_size=16)
    getattr(model.replay_buffer, name)[:] = value
    before = all_numbers(model)
    with pytest.raises(DivergenceError, match=rf"\b{name}\b of update 3, at step 7, is not finite"):
        model.train(1, batch_size=16)
    assert_same(all_numbers(model), before)
    assert model._n_updates == 2
    model.save(tmp_path / "model")


def test_broken_number_in_the_weights(algorithm):
    model = make_filled(algorithm)
    with th.no_grad():
        next(model.policy.critic_target.parameters())[0, 0] = NAN
    with pytest.raises(DivergenceError, match=r"(targets|values of the next states) of update 1, at step 0, is not finite"):
        model.train(1, batch_size=16)
    assert all(bool(th.isfinite(tensor).all()) for tensor in model.policy.actor.state_dict().values())


def test_loss_that_overflows(algorithm):
    model = make_filled(algorithm)
    model.replay_buffer.rewards[:] = 3e38
    before = all_numbers(model)
    with pytest.raises(DivergenceError, match=r"loss of update 1.*is not finite.*learning_rate"):
        model.train(3, batch_size=16)
    assert_same(all_numbers(model), before)


class BreakingEnv(BoxEnv):
    """Gives a reward that is not a number at its 30th step."""

    n_total = 0

    def step(self, action):
        self.n_total += 1
        observation, reward, *rest = super().step(action)
        return observation, NAN if self.n_total == 30 else reward, *rest


def test_broken_number_from_the_environment(algorithm):
    model = make_model(algorithm, BreakingEnv())
    with pytest.raises(DivergenceError, match="rewards of the environment are not finite at step 30"):
        model.learn(60)
    assert model.num_timesteps == 30 and np.isfinite(model.replay_buffer.rewards).all()
