"""How the agents act, and what they say of their policy: predict(), q_values(), action_probs(), soft_value()."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import PLANES, SOFTMAX, VECTOR, RandomEnv, make_model, sample_batch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_softq import CVI, DPP, SQN, operators, tabular

TEMPERATURE = 0.2
OBSERVATION = np.array([0.5, -1.0, 0.3, 0.8], np.float32)
SPACES = {
    "vector": ("MlpPolicy", VECTOR),
    "matrix": ("MlpPolicy", spaces.Box(-1.0, 1.0, (4, 4), np.float32)),
    "number": ("MlpPolicy", spaces.Box(-1.0, 1.0, (1,), np.float32)),
    "float64": ("MlpPolicy", spaces.Box(-1.0, 1.0, (4,), np.float64)),
    "discrete": ("MlpPolicy", spaces.Discrete(5)),
    "bits": ("MlpPolicy", spaces.MultiBinary(4)),
    "planes": ("CnnPolicy", PLANES),
    "image": ("CnnPolicy", spaces.Box(0, 255, (10, 12, 3), np.uint8)),
    "dict": ("MultiInputPolicy", spaces.Dict(vector=VECTOR, number=spaces.Discrete(4), planes=PLANES)),
}


@pytest.fixture(params=SOFTMAX.values(), ids=SOFTMAX)
def softmax_algorithm(request):
    """Each algorithm whose policy is the softmax of its action values."""
    return request.param


@pytest.fixture
def model(softmax_algorithm):
    """A model of four actions whose policy is far from uniform, also between its twins if it has them."""
    return make_acting(softmax_algorithm)


def make_acting(algorithm, **kwargs):
    kwargs = dict(exploration="boltzmann", temperature=TEMPERATURE) | kwargs
    model = make_model(algorithm, RandomEnv(VECTOR, n_actions=4), **kwargs)
    biases = th.tensor([[0.0, 0.3, 0.1, 0.2], [0.15, 0.2, 0.05, 0.25]])
    for network, bias in zip(getattr(model.q_net, "networks", [model.q_net]), biases, strict=False):
        (network.head if hasattr(network, "head") else network.q_net)[-1].bias.data.copy_(bias)
    probabilities = model.action_probs(OBSERVATION)
    assert probabilities.min() > 0.01 and probabilities.max() - probabilities.min() > 0.2
    return model


def frequencies(model, n=40_000, deterministic=False):
    """How often each action is taken, and the standard deviation that the frequency of a given probability has."""
    set_random_seed(0)
    actions, _ = model.predict(np.tile(OBSERVATION, (n, 1)), deterministic=deterministic)
    return np.bincount(actions, minlength=4) / n, lambda probabilities: np.sqrt(probabilities * (1 - probabilities) / n)


def assert_frequencies(model, probabilities):
    observed, deviation = frequencies(model)
    assert (np.abs(observed - probabilities) <= 4.5 * deviation(probabilities) + 1e-9).all(), (observed, probabilities)


# ---------------------------------------------------------------------- shapes


@pytest.mark.parametrize(("policy", "space"), SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("exploration", ["boltzmann", "eps_greedy", "boltzmann_eps"])
def test_shapes(algorithm, policy, space, exploration):
    env = RandomEnv(space)
    model = make_model(algorithm, env, policy, exploration=exploration)
    space.seed(0)
    single, several = space.sample(), sample_batch(space, 6)
    for deterministic in (True, False):
        for exploration_rate in (0.0, 1.0):
            model.exploration_rate = exploration_rate
            action, state = model.predict(single, deterministic=deterministic)
            assert action.shape == () and env.action_space.contains(action) and state is None
            actions, _ = model.predict(several, deterministic=deterministic)
            assert actions.shape == (6,) and all(env.action_space.contains(action) for action in actions)
    assert model.q_values(single).shape == model.action_probs(single).shape == (3,)
    assert model.q_values(several).shape == model.action_probs(several).shape == (6, 3)
    assert model.soft_value(single).shape == () and model.soft_value(several).shape == (6,)
    for function in (model.q_values, model.action_probs, model.soft_value):
        assert function(several).dtype == np.float32


def test_single_action_is_an_array_without_dimensions(model):
    # As from SB3's algorithms; a NumPy scalar is none
    for deterministic in (True, False):
        assert isinstance(model.predict(OBSERVATION, deterministic=deterministic)[0], np.ndarray)


@pytest.mark.parametrize(("policy", "space"), SPACES.values(), ids=SPACES)
def test_rows_of_a_batch_are_the_single_observations(algorithm, policy, space):
    model = make_model(algorithm, RandomEnv(space), policy)
    space.seed(0)
    several = sample_batch(space, 4)
    rows = [{key: value[i] for key, value in several.items()} if isinstance(several, dict) else several[i] for i in range(4)]
    for function in (model.q_values, model.action_probs, model.soft_value):
        np.testing.assert_allclose(function(several), [function(row) for row in rows], rtol=1e-4, atol=1e-5)
    best, _ = model.predict(several, deterministic=True)
    assert [int(model.predict(row, deterministic=True)[0]) for row in rows] == best.tolist()


def test_observations_are_handled_as_predict_does(algorithm):
    # Channels last, as the environment gives them, and first, as the VecEnv hands them on
    model = make_model(algorithm, RandomEnv(spaces.Box(0, 255, (12, 10, 3), np.uint8)), "CnnPolicy")
    image = np.random.default_rng(0).integers(0, 256, (12, 10, 3)).astype(np.uint8)
    np.testing.assert_array_equal(model.q_values(image), model.q_values(image.transpose(2, 0, 1)))
    np.testing.assert_allclose(model.q_values(image), model.q_values(image[None])[0], rtol=1e-5)


def test_observations_of_another_dtype(model):
    expected = model.q_values(OBSERVATION)
    for dtype in (np.float64, np.float16):
        np.testing.assert_allclose(model.q_values(OBSERVATION.astype(dtype)), expected, rtol=1e-2)
        np.testing.assert_allclose(model.q_values(OBSERVATION[None].astype(dtype))[0], expected, rtol=1e-2)


def test_observations_that_cannot_be_written_to(model, recwarn):
    read_only = OBSERVATION[None].copy()
    read_only.flags.writeable = False
    th.set_warn_always(True)
    try:
        np.testing.assert_allclose(model.q_values(read_only), model.q_values(OBSERVATION[None]))
    finally:
        th.set_warn_always(False)
    assert len(recwarn) == 0


def test_observations_of_the_wrong_shape_are_refused(model):
    for wrong in (np.zeros(3, np.float32), np.zeros((2, 3), np.float32), np.zeros((2, 1, 4), np.float32)):
        with pytest.raises(ValueError, match="Unexpected observation shape"):
            model.predict(wrong)
        with pytest.raises(ValueError, match="Unexpected observation shape"):
            model.q_values(wrong)


def test_recurrent_arguments_are_accepted(model):
    state = (np.ones(3),)
    actions, same_state = model.predict(OBSERVATION[None], state=state, episode_start=np.ones(1, bool), deterministic=True)
    assert actions.shape == (1,) and same_state is state


# ---------------------------------------------------------------------- consistency


def test_values_and_probabilities_fit_together(model):
    observations = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    q_values = model.q_values(observations).astype(np.float64)
    np.testing.assert_allclose(model.action_probs(observations), tabular.boltzmann_policy(q_values, TEMPERATURE), rtol=1e-4)
    value = {CVI: tabular.mellowmax, DPP: tabular.boltzmann_value}.get(type(model), tabular.soft_value)
    np.testing.assert_allclose(model.soft_value(observations), value(q_values, TEMPERATURE), rtol=1e-4)
    assert (model.predict(observations, deterministic=True)[0] == q_values.argmax(axis=1)).all()
    tensor = th.as_tensor(observations)
    np.testing.assert_array_equal(model.policy.q_values(tensor).detach().numpy(), model.q_values(observations))
    assert (model.policy.predict(observations, deterministic=True)[0] == q_values.argmax(axis=1)).all()


def test_twins_act_on_the_smaller_values():
    model = make_acting(SQN)
    observations = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    first, second = (network(th.as_tensor(observations)).detach().numpy() for network in model.q_net.networks)
    assert (first < second).any() and (second < first).any()
    np.testing.assert_allclose(model.q_values(observations), np.minimum(first, second))


def test_without_temperature_it_is_greedy(softmax_algorithm):
    model = make_acting(softmax_algorithm, temperature=lambda progress: TEMPERATURE * progress)
    model.temperature_module.update(0.0)
    best = model.q_values(OBSERVATION).argmax()
    np.testing.assert_array_equal(model.action_probs(OBSERVATION), np.eye(4)[best])
    assert model.soft_value(OBSERVATION) == model.q_values(OBSERVATION).max()
    assert_frequencies(model, np.eye(4)[best])


def test_current_temperature_is_used(softmax_algorithm):
    model = make_acting(softmax_algorithm, temperature=lambda progress: TEMPERATURE * progress)
    before = model.action_probs(OBSERVATION)
    model.temperature_module.update(0.5)
    sharper = model.action_probs(OBSERVATION)
    np.testing.assert_allclose(sharper, before**2 / (before**2).sum(), rtol=1e-4)


def test_learned_temperature_is_used():
    model = make_acting(SQN, temperature=f"auto_{TEMPERATURE}")
    np.testing.assert_allclose(
        model.action_probs(OBSERVATION), tabular.boltzmann_policy(model.q_values(OBSERVATION), TEMPERATURE), rtol=1e-4
    )
    assert_frequencies(model, model.action_probs(OBSERVATION))


def test_asking_changes_nothing(model):
    before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    observations = np.tile(OBSERVATION, (3, 1))
    copy = observations.copy()
    model.q_values(observations)[:] = 0
    model.action_probs(observations)
    model.soft_value(observations)
    model.predict(observations)
    np.testing.assert_array_equal(observations, copy)
    for name, tensor in model.policy.state_dict().items():
        assert th.equal(tensor, before[name]) and not tensor.requires_grad


# ---------------------------------------------------------------------- exploration


def test_boltzmann_exploration_samples_the_policy(model):
    model.exploration_rate = 0.5  # has no part in it
    assert_frequencies(model, model.action_probs(OBSERVATION))


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_epsilon_greedy_exploration(softmax_algorithm, epsilon):
    model = make_acting(softmax_algorithm, exploration="eps_greedy")
    model.exploration_rate = epsilon
    greedy = np.eye(4)[model.q_values(OBSERVATION).argmax()]
    assert_frequencies(model, (1 - epsilon) * greedy + epsilon / 4)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_both_explorations(softmax_algorithm, epsilon):
    model = make_acting(softmax_algorithm, exploration="boltzmann_eps")
    model.exploration_rate = epsilon
    assert_frequencies(model, (1 - epsilon) * model.action_probs(OBSERVATION) + epsilon / 4)


@pytest.mark.parametrize("exploration", ["boltzmann", "eps_greedy", "boltzmann_eps"])
def test_deterministic_actions_are_the_best(softmax_algorithm, exploration):
    model = make_acting(softmax_algorithm, exploration=exploration)
    model.exploration_rate = 1.0
    observed, _ = frequencies(model, n=100, deterministic=True)
    np.testing.assert_array_equal(observed, np.eye(4)[model.q_values(OBSERVATION).argmax()])


@pytest.mark.parametrize("exploration", ["boltzmann", "eps_greedy", "boltzmann_eps"])
def test_environments_explore_independently(softmax_algorithm, exploration):
    # Two environments with the same observation, asked often: the joint frequencies are the products of their own
    model = make_acting(softmax_algorithm, exploration=exploration)
    model.exploration_rate, n = 0.5, 4000
    set_random_seed(0)
    pairs = np.array([model.predict(np.stack([OBSERVATION, OBSERVATION]))[0] for _ in range(n)])
    joint = np.histogram2d(pairs[:, 0], pairs[:, 1], bins=[np.arange(5)] * 2)[0] / n
    expected = np.outer(joint.sum(axis=1), joint.sum(axis=0))
    assert (np.abs(joint - expected) <= 5 * np.sqrt(expected * (1 - expected) / n) + 1e-9).all()
    # With one coin for all environments, both would be random at once: 1/4 more of the equal pairs than that
    assert len(np.unique(pairs, axis=0)) == 16


class ActionRecorder(BaseCallback):
    """The actions that the environments are given."""

    def __init__(self):
        super().__init__()
        self.actions = []

    def _on_step(self):
        self.actions.append(self.locals["actions"])
        return True


def test_first_actions_are_uniform(algorithm):
    # Until learning_starts the policy is not asked
    env = DummyVecEnv([lambda: RandomEnv(VECTOR, n_actions=4)] * 4)
    model = make_model(algorithm, env, learning_starts=2000, exploration="eps_greedy", exploration_final_eps=0.0)
    model.exploration_schedule = lambda progress: 0.0
    recorder = ActionRecorder()
    model.learn(2000, recorder)
    counts = np.bincount(np.concatenate(recorder.actions), minlength=4)
    assert (np.abs(counts / 2000 - 0.25) < 4.5 * np.sqrt(0.25 * 0.75 / 2000)).all()


def test_learning_acts_as_predict_does(algorithm):
    env = DummyVecEnv([lambda: RandomEnv(VECTOR, n_actions=4)] * 4)
    kwargs = dict(learning_starts=0, gradient_steps=0, exploration="eps_greedy", exploration_final_eps=0.0)
    model = make_model(algorithm, env, **kwargs)
    model.exploration_schedule = lambda progress: 0.0
    recorder = ActionRecorder()
    model.learn(400, recorder)
    rows = len(recorder.actions)
    observations = model.replay_buffer.observations[:rows].reshape(-1, 4)
    best = model.predict(observations, deterministic=True)[0]
    np.testing.assert_array_equal(np.concatenate(recorder.actions), best)
    np.testing.assert_array_equal(model.replay_buffer.actions[:rows].reshape(-1), best)


def test_plays_an_episode(algorithm):
    env = gym.make("CartPole-v1")
    model = make_model(algorithm)
    observation, _ = env.reset(seed=0)
    done = False
    while not done:
        action, _ = model.predict(observation)
        observation, _, terminated, truncated, _ = env.step(action)
        done = terminated or truncated


def test_actions_fit_several_environments(algorithm):
    env = make_vec_env("CartPole-v1", n_envs=3)
    model = make_model(algorithm, env)
    observations = env.reset()
    for _ in range(10):
        observations, *_ = env.step(model.predict(observations)[0])


def test_policy_statistics_are_the_operators(model):
    # The three questions are the operators, of the values that the agent acts on
    q_values = th.as_tensor(model.q_values(OBSERVATION[None]))
    assert float(operators.soft_value(q_values, TEMPERATURE)) == pytest.approx(float(model.soft_value(OBSERVATION)))
    np.testing.assert_allclose(operators.policy(q_values, TEMPERATURE)[0], model.action_probs(OBSERVATION), rtol=1e-5)
