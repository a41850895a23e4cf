"""What users of Stable-Baselines3 count on: policies, spaces, environments, training options, callbacks, logs."""

import inspect
import math
from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import (
    PLANES,
    VARIANTS,
    VECTOR,
    RandomEnv,
    assert_same,
    fill_buffer,
    is_same,
    make_model,
    snapshot,
)
from stable_baselines3 import DQN, HerReplayBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, IdentityEnv, SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule, set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize
from torch import nn

from sb3_softq import SQN, MirrorDescentDQN, MunchausenDQN, MunchausenIQN, SACDiscrete, SoftDQN
from sb3_softq.value_based.base import ValueBasedAlgorithm
from sb3_softq.value_based.gap_increasing import GapIncreasingAlgorithm
from sb3_softq.value_based.policies import SmallImageCNN


def networks(model):
    """The online networks: one, or the twins."""
    return list(getattr(model.q_net, "networks", [model.q_net]))


def assert_trained(model, before):
    """The weights have changed, and all numbers are finite."""
    after = snapshot(model)["policy"]
    assert not is_same(before["policy"], after)
    assert all(bool(th.isfinite(tensor).all()) for tensor in after.values())
    assert model._n_updates > 0


def learn(model, total_timesteps=60, **kwargs):
    before = snapshot(model)
    model.learn(total_timesteps, **kwargs)
    assert model.num_timesteps >= total_timesteps
    assert_trained(model, before)
    return model


# ---------------------------------------------------------------------- constructors


def parameters_of(function):
    return inspect.signature(function).parameters


def test_constructor_has_the_parameters_of_dqn_in_its_order(algorithm):
    dqn = [name for name in parameters_of(DQN.__init__) if name != "policy"]
    ours = parameters_of(algorithm.__init__)
    assert [name for name in ours if name in dqn] == dqn
    for name in dqn:
        if name not in ("temperature", "self"):
            assert ours[name].annotation == parameters_of(DQN.__init__)[name].annotation, name
    assert all(parameter.annotation is not parameter.empty for name, parameter in ours.items() if name != "self")
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in ours.values())


def test_shared_parameters_are_those_of_the_base(algorithm):
    base, ours = parameters_of(ValueBasedAlgorithm.__init__), parameters_of(algorithm.__init__)
    shared = [name for name in ours if name in base and name not in ("self", "policy", "target_entropy")]
    assert shared == [name for name in base if name in shared]
    # A learned temperature only has a target; an ent_coef is a temperature; quantiles have no tree backup
    assert set(base) - set(ours) <= {"target_entropy", "temperature", "tree_backup"}
    assert {"temperature", "ent_coef"} & set(ours)
    documented = algorithm.__doc__
    for name in shared:
        assert ours[name].annotation == base[name].annotation, name
        if ours[name].default != base[name].default:
            assert f":param {name}:" in documented, f"{name} has a default of its own, which the class has to explain"
    for name in set(ours) - set(base):
        assert f":param {name}:" in documented, name


def test_learn_has_the_parameters_of_dqn_and_a_default_length(algorithm):
    assert list(parameters_of(algorithm.learn)) == list(parameters_of(DQN.learn))
    ours = [parameter for name, parameter in parameters_of(algorithm.learn).items() if name != "self"]
    assert all(parameter.default is not parameter.empty for parameter in ours)


# ---------------------------------------------------------------------- training options


class MLPWithBatchNorm(BaseFeaturesExtractor):
    """Flattens, normalises by the batch and drops half of the features."""

    def __init__(self, observation_space):
        super().__init__(observation_space, get_flattened_obs_dim(observation_space))
        self.batch_norm = nn.BatchNorm1d(self.features_dim)
        self.layers = nn.Sequential(nn.Flatten(), self.batch_norm, nn.Dropout(0.5))

    def forward(self, observations):
        return self.layers(observations)


OPTIONS = {
    "defaults": {},
    "each step": dict(train_freq=1),
    "steps": dict(train_freq=(3, "step"), gradient_steps=2),
    "episodes": dict(train_freq=(1, "episode")),
    "an update for each step": dict(gradient_steps=-1),
    "n-step returns": dict(n_steps=3),
    "shared observations": dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False)),
    "Polyak": dict(tau=0.01, target_update_interval=1),
    "hard updates": dict(tau=1.0, target_update_interval=10),
    "Boltzmann": dict(exploration="boltzmann", temperature=0.1),
    "epsilon-greedy": dict(exploration="eps_greedy", exploration_fraction=0.5),
    "both explorations": dict(exploration="boltzmann_eps", temperature=0.0),
    "scheduled temperature": dict(temperature="lin_0.1"),
    "temperature by a function": dict(temperature=ConstantSchedule(0.1)),
    "scheduled learning rate": dict(learning_rate=LinearSchedule(1e-3, 1e-5, 0.5)),
    "no clipping": dict(max_grad_norm=math.inf),
    "large batch": dict(batch_size=100),
    "undiscounted": dict(gamma=1.0),
    "verbose": dict(verbose=2),
    "deep": dict(policy_kwargs=dict(net_arch=[8, 8, 8], activation_fn=nn.Tanh)),
    "linear": dict(policy_kwargs=dict(net_arch=[])),
    "dueling": dict(policy_kwargs=dict(net_arch=[16, 16], dueling=True)),
    "linear dueling": dict(policy_kwargs=dict(net_arch=[], dueling=True)),
    "default network": dict(policy_kwargs=None),
    "RMSprop": dict(policy_kwargs=dict(optimizer_class=th.optim.RMSprop, optimizer_kwargs=dict(alpha=0.9))),
    "AdamW": dict(policy_kwargs=dict(optimizer_class=th.optim.AdamW, optimizer_kwargs=dict(weight_decay=0.1))),
    "SGD": dict(policy_kwargs=dict(optimizer_class=th.optim.SGD)),
    "own features": dict(policy_kwargs=dict(features_extractor_class=MLPWithBatchNorm, net_arch=[16])),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_trains_with(algorithm, options):
    learn(make_model(algorithm, **options))


def test_policy_by_class(algorithm):
    learn(make_model(algorithm, policy=algorithm.policy_aliases["MlpPolicy"]))


@pytest.mark.parametrize(
    ("n_envs", "train_freq", "gradient_steps", "n_updates"),
    [
        (1, 4, 1, 6),
        (1, (4, "step"), 3, 18),
        (1, 4, -1, 24),
        (3, 2, -1, 24),
        (3, 2, 1, 4),
        (8, 1, 2, 6),
        (1, 4, 0, 0),
        (1, (1, "episode"), 1, 3),  # episodes have ten steps, and the last one is finished
        (1, (1, "episode"), -1, 30),
    ],
)
def test_number_of_updates(algorithm, n_envs, train_freq, gradient_steps, n_updates):
    env = DummyVecEnv([lambda: RandomEnv(VECTOR)] * n_envs)
    model = make_model(algorithm, env, train_freq=train_freq, gradient_steps=gradient_steps, learning_starts=0)
    before = deepcopy(model.q_net.state_dict())
    model.learn(24)
    assert model._n_updates == n_updates
    assert is_same(before, model.q_net.state_dict()) == (n_updates == 0)


def test_nothing_is_learned_before_learning_starts(algorithm):
    model = make_model(algorithm, learning_starts=40, train_freq=1)
    model.learn(40)
    assert model._n_updates == 0
    model.learn(41)
    assert model._n_updates == 1


@pytest.mark.parametrize(
    ("n_envs", "target_update_interval", "n_target_updates"), [(1, 10, 4), (1, 1, 48), (8, 16, 3), (8, 20, 3), (8, 3, 6)]
)
def test_target_network_is_updated_at_its_interval(algorithm, n_envs, target_update_interval, n_target_updates, recwarn):
    # No gradient steps: the distance to the online network, 1 at first, is halved by each update. An interval below the
    # number of environments means every call of env.step(), without a warning: for Polyak averaging that is the default
    env, idle = DummyVecEnv([lambda: RandomEnv(VECTOR)] * n_envs), dict(gradient_steps=0, train_freq=1)
    model = make_model(algorithm, env, tau=0.5, target_update_interval=target_update_interval, **idle)
    with th.no_grad():
        for online, target in zip(model.q_net.parameters(), model.q_net_target.parameters(), strict=True):
            target.copy_(online + 1)
    model.learn(48)
    for online, target in zip(model.q_net.parameters(), model.q_net_target.parameters(), strict=True):
        th.testing.assert_close(target - online, th.full_like(online, 0.5**n_target_updates), rtol=0.01, atol=1e-6)
    assert len(recwarn) == 0


def test_target_network_is_left_alone_by_gradient_steps(algorithm):
    model = make_model(algorithm, RandomEnv(VECTOR), tau=1.0, target_update_interval=10_000, train_freq=1)
    before = {name: tensor.clone() for name, tensor in model.q_net_target.state_dict().items()}
    learn(model)
    assert_same(model.q_net_target.state_dict(), before)


def test_gradients_are_clipped(algorithm):
    # With plain gradient descent a step is at most learning_rate * max_grad_norm long
    policy_kwargs = dict(optimizer_class=th.optim.SGD)
    model = make_model(
        algorithm, RandomEnv(VECTOR), policy_kwargs=policy_kwargs, max_grad_norm=0.01, learning_rate=0.1, temperature=0.1
    )
    fill_buffer(model, 50)
    model.replay_buffer.rewards *= 1000
    before = th.nn.utils.parameters_to_vector(model.q_net.parameters()).detach().clone()
    model.train(gradient_steps=1, batch_size=16)
    step = th.nn.utils.parameters_to_vector(model.q_net.parameters()).detach() - before
    assert float(step.norm()) == pytest.approx(0.001, rel=1e-3)
    assert model.logger.name_to_value["train/grad_norm"] > 0.01, "the norm before clipping is logged"


class Recorder(BaseCallback):
    """What the model says of itself at each step."""

    def __init__(self, function):
        super().__init__()
        self.function, self.values = function, []

    def _on_step(self):
        self.values.append(self.function(self.model))
        return True


@pytest.mark.parametrize(
    ("temperature", "expected"), [("lin_0.1", lambda p: 0.1 * p), (lambda p: 1.0 + p**2, lambda p: 1.0 + p**2)]
)
def test_temperature_follows_its_schedule(algorithm, temperature, expected):
    model = make_model(algorithm, temperature=temperature, train_freq=1)
    recorder = Recorder(lambda model: model.current_temperature)
    model.learn(50, recorder)
    # The callback comes before the schedule's next value
    np.testing.assert_allclose(recorder.values, [expected(1 - step / 50) for step in range(50)], atol=1e-12)
    assert model.current_temperature == pytest.approx(expected(0.0))


def test_scheduled_temperature_is_the_one_of_the_targets(algorithm):
    model = make_model(algorithm, RandomEnv(VECTOR), temperature=lambda progress: 0.1 + progress)
    model.learn(40)
    fixed = make_model(algorithm, RandomEnv(VECTOR), temperature=0.1)
    fixed.set_parameters(model.get_parameters())
    replay_data = model._sample(20)
    assert_same(model._compute_targets(replay_data)[0], fixed._compute_targets(replay_data)[0])


def test_learning_rate_follows_its_schedule(algorithm):
    model = make_model(algorithm, learning_rate=lambda progress: 1e-3 * progress, train_freq=1, learning_starts=0)
    recorder = Recorder(lambda model: model.policy.optimizer.param_groups[0]["lr"])
    model.learn(20, recorder)
    np.testing.assert_allclose(recorder.values[1:], [1e-3 * (1 - step / 20) for step in range(1, 20)], atol=1e-12)


def test_epsilon_follows_its_schedule(algorithm):
    model = make_model(
        algorithm, exploration="eps_greedy", exploration_fraction=0.5, exploration_initial_eps=0.9, exploration_final_eps=0.1
    )
    recorder = Recorder(lambda model: model.exploration_rate)
    model.learn(40, recorder)
    expected = [0.9 - 0.8 * min(step / 20, 1) for step in range(1, 40)]
    np.testing.assert_allclose(recorder.values[1:], expected, atol=1e-12)
    assert model.exploration_rate == pytest.approx(0.1)
    assert model.logger.name_to_value["rollout/exploration_rate"] == pytest.approx(0.1)


# ---------------------------------------------------------------------- policies and spaces

IMAGE = spaces.Box(0, 255, (10, 10, 3), np.uint8)
OBSERVATIONS = {
    "vector": ("MlpPolicy", VECTOR),
    "matrix": ("MlpPolicy", spaces.Box(-1.0, 1.0, (2, 3), np.float32)),
    "float64": ("MlpPolicy", spaces.Box(-1.0, 1.0, (3,), np.float64)),
    "bytes": ("MlpPolicy", spaces.Box(0, 255, (3,), np.uint8)),
    "16 bits": ("MlpPolicy", spaces.Box(0, 1000, (3,), np.uint16)),
    "whole numbers": ("MlpPolicy", spaces.Box(-5, 5, (3,), np.int32)),
    "one number": ("MlpPolicy", spaces.Box(-1.0, 1.0, (1,), np.float32)),
    "discrete": ("MlpPolicy", spaces.Discrete(5)),
    "multi-discrete": ("MlpPolicy", spaces.MultiDiscrete([4, 3])),
    "multi-binary": ("MlpPolicy", spaces.MultiBinary(8)),
    "matrix of bits": ("MlpPolicy", spaces.MultiBinary((3, 2))),
    "planes for MLP": ("MlpPolicy", PLANES),
    "image for MLP": ("MlpPolicy", IMAGE),
    "planes": ("CnnPolicy", PLANES),
    "ten planes": ("CnnPolicy", spaces.Box(0.0, 1.0, (10, 10, 10), np.bool_)),
    "float planes": ("CnnPolicy", spaces.Box(0.0, 1.0, (10, 10, 4), np.float32)),
    "planes first": ("CnnPolicy", spaces.Box(0.0, 1.0, (4, 10, 10), np.bool_)),
    "small image": ("CnnPolicy", IMAGE),
    "small image, channels first": ("CnnPolicy", spaces.Box(0, 255, (3, 12, 10), np.uint8)),
    "smallest image for NatureCNN": ("CnnPolicy", spaces.Box(0, 255, (36, 40, 1), np.uint8)),
    "dict": ("MultiInputPolicy", spaces.Dict(vector=VECTOR, number=spaces.Discrete(4), bits=spaces.MultiBinary(3))),
    "dict with images": (
        "MultiInputPolicy",
        spaces.Dict(small=IMAGE, planes=PLANES, large=spaces.Box(0, 255, (36, 36, 1), np.uint8), vector=VECTOR),
    ),
}


@pytest.mark.parametrize(("policy", "observation_space"), OBSERVATIONS.values(), ids=OBSERVATIONS)
def test_trains_on_observations(algorithm, policy, observation_space):
    policy_kwargs = dict(net_arch=[16])
    if isinstance(observation_space, spaces.Dict):
        policy_kwargs.update(features_extractor_kwargs=dict(cnn_output_dim=16))
    env = RandomEnv(observation_space)
    model = learn(make_model(algorithm, env, policy, policy_kwargs=policy_kwargs), 40)
    evaluate_policy(model, env, n_eval_episodes=1, warn=False)
    observation, _ = env.reset(seed=0)
    assert model.q_values(observation).shape == (3,)


@pytest.mark.parametrize("channel_first", [False, True])
def test_trains_on_atari_like_images(algorithm, channel_first):
    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=True, channel_first=channel_first)
    env = VecFrameStack(DummyVecEnv([lambda: env]), n_stack=4)
    model = learn(make_model(algorithm, env, "CnnPolicy", buffer_size=100), 30)
    assert all(isinstance(network.features_extractor, NatureCNN) for network in networks(model))
    assert model.observation_space.shape == (4, 40, 40)


@pytest.mark.parametrize("channel_last", [False, True])
def test_trains_on_dict_observations(algorithm, channel_last):
    policy_kwargs = dict(net_arch=[16], features_extractor_kwargs=dict(cnn_output_dim=16))
    env = DummyVecEnv([lambda: SimpleMultiObsEnv(channel_last=channel_last)])
    env = VecFrameStack(env, n_stack=2, channels_order={"vec": None, "img": "last" if channel_last else "first"})
    model = make_model(algorithm, env, "MultiInputPolicy", policy_kwargs=policy_kwargs, buffer_size=100)
    learn(model, 40)


def test_hindsight_replay(algorithm):
    env = BitFlippingEnv(n_bits=4, continuous=False, max_steps=4)
    kwargs = dict(replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=dict(n_sampled_goal=2))
    learn(make_model(algorithm, env, "MultiInputPolicy", **kwargs))


def test_one_action(algorithm):
    model = learn(make_model(algorithm, RandomEnv(VECTOR, n_actions=1)))
    observation = VECTOR.sample()
    assert model.action_probs(observation) == pytest.approx([1.0])
    assert model.soft_value(observation) == pytest.approx(model.q_values(observation)[0], abs=1e-6)
    assert model.logger.name_to_value["train/entropy"] == pytest.approx(0.0, abs=1e-6)


def first_layer_input(extractor, observations):
    """What the first convolution of a features extractor reads."""
    inputs = []
    convolution = next(module for module in extractor.modules() if isinstance(module, nn.Conv2d))
    handle = convolution.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    extractor(observations)
    handle.remove()
    return inputs[0]


@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((10, 10, 4), (0, 3, 1, 2)),
        ((4, 10, 10), (0, 1, 2, 3)),
        ((12, 10, 3), (0, 3, 1, 2)),
        ((3, 12, 10), (0, 1, 2, 3)),
        # MinAtar's Seaquest has as many planes as rows: last, as the documentation says
        ((10, 10, 10), (0, 3, 1, 2)),
    ],
)
def test_small_images_are_read_along_their_channels(shape, order):
    extractor = SmallImageCNN(spaces.Box(0.0, 1.0, shape, np.bool_))
    observations = th.rand(5, *shape)
    th.testing.assert_close(first_layer_input(extractor, observations), observations.permute(*order))
    assert extractor(observations).shape == (5, extractor.features_dim)


@pytest.mark.parametrize(
    ("space", "extractor"),
    [
        (PLANES, SmallImageCNN),
        (IMAGE, SmallImageCNN),
        (spaces.Box(0, 255, (35, 84, 3), np.uint8), SmallImageCNN),
        (spaces.Box(0, 255, (84, 84, 3), np.uint8), NatureCNN),
    ],
)
def test_extractor_is_chosen_by_the_size_of_the_image(algorithm, space, extractor):
    model = make_model(algorithm, RandomEnv(space), "CnnPolicy", policy_kwargs={})
    assert all(type(network.features_extractor) is extractor for network in networks(model))
    # The extractor ends with a hidden layer: one linear layer follows
    assert all(network.net_arch == [] for network in networks(model))


def test_images_are_normalised_and_planes_are_not(algorithm):
    space = spaces.Box(0, 255, (10, 10, 1), np.uint8)
    model = make_model(algorithm, RandomEnv(space), "CnnPolicy")
    network = networks(model)[0]
    inputs = []
    network.features_extractor.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    model.q_values(np.full((10, 10, 1), 255, np.uint8))
    assert float(inputs[0].max()) == 1.0
    planes = make_model(algorithm, RandomEnv(PLANES), "CnnPolicy")
    networks(planes)[0].features_extractor.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    planes.q_values(np.ones((10, 10, 4), np.bool_))
    assert float(inputs[1].max()) == 1.0


def test_dueling_streams(algorithm):
    model = make_model(algorithm, RandomEnv(VECTOR), policy_kwargs=dict(net_arch=[16, 8], dueling=True))
    for network in networks(model):
        head = (network.head if hasattr(network, "head") else network.q_net)[-1]
        features = th.randn(5, 16)
        advantage, value = head.advantage(features), head.value(features)
        assert advantage.shape == (5, 3) and value.shape == (5, 1)
        th.testing.assert_close(head(features), value + advantage - advantage.mean(dim=1, keepdim=True))


def test_dict_of_a_vector_is_the_same_as_the_vector(algorithm):
    models = []
    for policy, space in (("MlpPolicy", VECTOR), ("MultiInputPolicy", spaces.Dict(vector=VECTOR))):
        space.seed(0)
        env = RandomEnv(space)
        model = make_model(algorithm, env, policy, seed=1)
        fill_buffer(model, 100)
        models.append(model)
    vector, as_dict = models
    for name in ("observations", "next_observations"):
        getattr(as_dict.replay_buffer, name)["vector"][:] = getattr(vector.replay_buffer, name)
    for name in ("actions", "rewards", "dones", "timeouts"):
        getattr(as_dict.replay_buffer, name)[:] = getattr(vector.replay_buffer, name)
    for model in models:
        set_random_seed(2)
        model.train(gradient_steps=5, batch_size=16)
    observation = VECTOR.sample()
    np.testing.assert_allclose(vector.q_values(observation), as_dict.q_values({"vector": observation}), rtol=1e-5)


# ---------------------------------------------------------------------- batch norm and dropout


def batch_norm_numbers(network):
    numbers = network.state_dict()
    return {name: tensor.clone() for name, tensor in numbers.items() if "batch_norm" in name}


def test_batch_norm_is_updated_by_training_and_copied_with_the_target(algorithm):
    policy_kwargs = dict(features_extractor_class=MLPWithBatchNorm, net_arch=[16])
    model = make_model(algorithm, RandomEnv(VECTOR), policy_kwargs=policy_kwargs, target_update_interval=10_000)
    online, target = batch_norm_numbers(model.q_net), batch_norm_numbers(model.q_net_target)
    learn(model)
    assert not is_same(online, batch_norm_numbers(model.q_net))
    assert_same(target, batch_norm_numbers(model.q_net_target))
    # The running statistics are copied, whatever the Polyak coefficient is for the weights
    model = make_model(
        algorithm, RandomEnv(VECTOR), policy_kwargs=policy_kwargs, target_update_interval=1, tau=0.0, gradient_steps=0
    )
    with th.no_grad():
        for name, tensor in model.q_net.state_dict().items():
            if "running_" in name:
                tensor += 1
    model.learn(1)
    statistics = [
        {name: tensor for name, tensor in network.state_dict().items() if "running_" in name}
        for network in (model.q_net, model.q_net_target)
    ]
    assert_same(*statistics)


def test_collecting_and_predicting_leave_batch_norm_alone(algorithm):
    policy_kwargs = dict(features_extractor_class=MLPWithBatchNorm, net_arch=[16])
    model = make_model(algorithm, RandomEnv(VECTOR), policy_kwargs=policy_kwargs, gradient_steps=0)
    before = batch_norm_numbers(model.q_net)
    model.learn(60)
    observation = VECTOR.sample()
    # Dropout would draw other features at each call
    q_values = [model.q_values(observation) for _ in range(5)]
    assert all(np.array_equal(q_values[0], other) for other in q_values)
    actions = [model.predict(observation, deterministic=True)[0] for _ in range(5)]
    assert len(set(map(int, actions))) == 1
    assert_same(before, batch_norm_numbers(model.q_net))


def test_dropout_is_active_in_training_only(algorithm):
    policy_kwargs = dict(features_extractor_class=MLPWithBatchNorm, net_arch=[16])
    model = make_model(algorithm, RandomEnv(VECTOR), policy_kwargs=policy_kwargs)
    fill_buffer(model, 50)
    modes = []
    for network in [*networks(model), *getattr(model.q_net_target, "networks", [model.q_net_target])]:
        network.features_extractor.register_forward_hook(lambda module, args, output: modes.append(module.training))
    model.train(gradient_steps=1, batch_size=16)
    n_networks = len(networks(model))
    in_targets = algorithm in (MirrorDescentDQN, SACDiscrete)
    assert modes.count(True) == n_networks + in_targets, "the online networks at the sampled states, an actor at the next too"
    modes.clear()
    model.q_values(VECTOR.sample())
    assert modes == [False] * n_networks


# ---------------------------------------------------------------------- environments


@pytest.mark.parametrize("n_envs", [1, 3, 8])
def test_trains_in_several_environments(algorithm, n_envs):
    model = learn(make_model(algorithm, make_vec_env("CartPole-v1", n_envs=n_envs, seed=0), train_freq=2))
    assert model.replay_buffer.size() * n_envs == model.num_timesteps


def test_trains_in_processes(algorithm):
    env = make_vec_env("CartPole-v1", n_envs=2, seed=0, vec_env_cls=SubprocVecEnv)
    try:
        learn(make_model(algorithm, env))
    finally:
        env.close()


@pytest.mark.parametrize("n_steps", [1, 3])
def test_trains_with_normalisation(algorithm, n_steps):
    env = VecNormalize(make_vec_env("CartPole-v1", n_envs=2, seed=0))
    model = learn(make_model(algorithm, env, n_steps=n_steps))
    # The buffer keeps what the environment gave; what is learned from is normalised
    assert (model.replay_buffer.rewards[: model.replay_buffer.size()] == 1).all()
    before = model.replay_buffer.sample(20, env=None).rewards
    assert n_steps > 1 or (before == 1).all()
    set_random_seed(0)
    env.training = False
    seen, compute_targets = [], model._compute_targets
    model._compute_targets = lambda replay_data: seen.append(replay_data) or compute_targets(replay_data)
    model.train(gradient_steps=1, batch_size=20)
    set_random_seed(0)
    assert_same(seen[0].observations, model.replay_buffer.sample(20, env=env).observations)
    assert not is_same(seen[0].observations, model.replay_buffer.sample(20).observations)


def test_trains_with_normalised_dict(algorithm):
    env = DummyVecEnv([lambda: RandomEnv(spaces.Dict(vector=VECTOR, number=spaces.Discrete(4)))])
    learn(make_model(algorithm, VecNormalize(env, norm_obs_keys=["vector"]), "MultiInputPolicy"))


def test_time_limits_are_no_terminations(algorithm):
    for truncate in (False, True):
        model = make_model(algorithm, RandomEnv(VECTOR, truncate=truncate))
        model.learn(50)
        replay_data = model.replay_buffer._get_samples(np.arange(50))
        assert replay_data.dones.sum() == (0 if truncate else 5)
        assert model.replay_buffer.dones.sum() == 5


class CountingEnv(gym.Env):
    """Observes the number of the step in its episode of five steps."""

    observation_space = spaces.Box(0.0, 10.0, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.n_steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.n_steps += 1
        return np.full(1, self.n_steps, np.float32), float(self.n_steps), self.n_steps == 5, False, {}


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("normalise", [False, True])
def test_transitions_are_stored_as_they_happened(algorithm, n_envs, normalise):
    # The observation after the last step is the terminal one, not the first of the next episode
    env = DummyVecEnv([CountingEnv] * n_envs)
    model = make_model(algorithm, VecNormalize(env) if normalise else env)
    model.learn(30 * n_envs)
    buffer, steps = model.replay_buffer, np.arange(30)
    for i in range(n_envs):
        np.testing.assert_allclose(buffer.observations[:30, i, 0], steps % 5)
        np.testing.assert_allclose(buffer.next_observations[:30, i, 0], steps % 5 + 1, rtol=1e-4)
        np.testing.assert_allclose(buffer.rewards[:30, i], steps % 5 + 1)
        np.testing.assert_allclose(buffer.dones[:30, i], steps % 5 == 4)


def test_another_environment_can_be_set(algorithm):
    model = make_model(algorithm, IdentityEnv(3), train_freq=1)
    learn(model)
    model.set_env(DummyVecEnv([lambda: IdentityEnv(3)]))
    assert model._last_obs is None
    model.learn(50)
    assert model.num_timesteps == 50
    model.learn(50, reset_num_timesteps=False)
    assert model.num_timesteps == 100
    with pytest.raises(AssertionError):
        model.set_env(DummyVecEnv([lambda: IdentityEnv(3)] * 2))
    with pytest.raises(ValueError):
        model.set_env(IdentityEnv(4))


def test_warning_when_shared_observations_are_cut(algorithm, recwarn):
    # SB3's warning: a second learn() breaks the last trajectory, whose next observation is another episode's
    kwargs = dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False))
    model = make_model(algorithm, IdentityEnv(3), buffer_size=100, **kwargs)
    model.learn(150)
    model.learn(150, reset_num_timesteps=False)
    assert len(recwarn) == 0
    model.learn(150)
    assert "last trajectory" in str(recwarn.pop(UserWarning).message)


# ---------------------------------------------------------------------- determinism


@pytest.mark.parametrize(("algorithm", "kwargs"), VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("exploration", ["boltzmann", "eps_greedy"])
def test_a_seed_decides_everything(algorithm, kwargs, exploration):
    def trained(seed, n_envs=2):
        env = make_vec_env("CartPole-v1", n_envs=n_envs)
        model = make_model(algorithm, env, seed=seed, exploration=exploration, gradient_steps=3, **kwargs)
        model.learn(200)
        observations = np.random.default_rng(0).normal(size=(20, 4))
        return snapshot(model), model.predict(observations, deterministic=True)[0], model.predict(observations)[0]

    first, again, other = trained(0), trained(0), trained(1)
    assert_same(first[0], again[0])
    assert (first[1] == again[1]).all() and (first[2] == again[2]).all()
    assert not is_same(first[0], other[0])


# ---------------------------------------------------------------------- callbacks and logs


def test_evaluation_and_checkpoints(algorithm, tmp_path):
    kwargs = dict(best_model_save_path=tmp_path, log_path=tmp_path, verbose=0)
    evaluation = EvalCallback(make_vec_env("CartPole-v1"), eval_freq=50, n_eval_episodes=2, **kwargs)
    checkpoints = CheckpointCallback(50, tmp_path, save_replay_buffer=True)
    learn(make_model(algorithm), 100, callback=[evaluation, checkpoints], progress_bar=False)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"best_model.zip", "evaluations.npz", "rl_model_50_steps.zip", "rl_model_100_steps.zip"}
    assert "rl_model_replay_buffer_100_steps.pkl" in names
    assert algorithm.load(tmp_path / "rl_model_50_steps").num_timesteps == 50


def test_training_stops_at_a_reward(algorithm):
    kwargs = dict(callback_on_new_best=StopTrainingOnRewardThreshold(reward_threshold=1), verbose=0)
    evaluation = EvalCallback(make_vec_env("CartPole-v1"), eval_freq=30, n_eval_episodes=1, **kwargs)
    model = make_model(algorithm)
    model.learn(200, evaluation)
    assert model.num_timesteps == 30


class Records(KVWriter):
    """Keeps what is logged."""

    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append(dict(key_values))

    def close(self):
        pass


LOGGED = {
    "train/loss",
    "train/temperature",
    "train/entropy",
    "train/entropy_fraction",
    "train/action_gap",
    "train/q_value_mean",
    "train/grad_norm",
    "train/n_updates",
    "train/learning_rate",
    "rollout/ep_rew_mean",
    "rollout/ep_len_mean",
    "time/total_timesteps",
    "time/episodes",
}


@pytest.mark.parametrize(("algorithm", "kwargs"), VARIANTS.values(), ids=VARIANTS)
def test_logged_metrics(algorithm, kwargs):
    records = Records()
    model = make_model(algorithm, n_steps=3, gradient_steps=2, exploration="boltzmann_eps", **kwargs)
    model.set_logger(Logger(None, [records]))
    model.learn(150, log_interval=1)
    last = {name: value for row in records.rows for name, value in row.items()}
    expected = LOGGED | {"rollout/exploration_rate"}
    if not algorithm.acts_on_q_values:
        expected = expected - {"train/action_gap", "train/q_value_mean"}
    if issubclass(algorithm, GapIncreasingAlgorithm):
        expected = expected | {"train/munchausen_clip_fraction"}
    assert set(last) >= expected
    assert all(np.isfinite(last[name]) for name in expected)
    assert all(type(last[name]) in (float, int) or np.isscalar(last[name]) for name in expected)
    assert last["train/loss"] > 0 and last["train/grad_norm"] > 0
    assert 0 <= last["train/entropy"] <= math.log(2) + 1e-6
    assert last["train/entropy_fraction"] == pytest.approx(last["train/entropy"] / math.log(2))
    assert last.get("train/action_gap", 0) >= 0
    assert 0 <= last.get("train/munchausen_clip_fraction", 0) <= 1


@pytest.mark.parametrize(("algorithm", "kwargs"), VARIANTS.values(), ids=VARIANTS)
def test_metrics_are_those_of_the_minibatch(algorithm, kwargs):
    kwargs = {"temperature": 0.3, **kwargs}
    model = make_model(algorithm, RandomEnv(VECTOR), learning_rate=0.0, **kwargs)
    fill_buffer(model, 50)
    set_random_seed(0)
    model.train(gradient_steps=1, batch_size=50)
    logged = model.logger.name_to_value
    # Without a learning rate, the model can be asked about the same minibatch afterwards
    set_random_seed(0)
    replay_data = model._sample(50)
    observations = replay_data.observations.numpy()
    q_values, probabilities = model.q_values(observations), model.action_probs(observations)
    ranked = np.sort(q_values, axis=1)
    # Those of quantiles are of the fractions that were drawn, not of those that the agent acts on
    rel = 0.2 if isinstance(model, MunchausenIQN) else 1e-4
    if model.acts_on_q_values:
        assert logged["train/q_value_mean"] == pytest.approx(q_values.mean(), rel=rel, abs=1e-4)
        assert logged["train/action_gap"] == pytest.approx((ranked[:, -1] - ranked[:, -2]).mean(), rel=rel)
    entropy = -(probabilities * np.log(probabilities)).sum(axis=1).mean()
    assert logged["train/entropy"] == pytest.approx(entropy, rel=rel)
    assert logged["train/temperature"] == pytest.approx(float(model.current_temperature))
    with th.no_grad():
        losses, _ = model._compute_loss(replay_data, model._compute_targets(replay_data)[0])
    assert logged["train/loss"] == pytest.approx(float(losses.mean()), rel=1e-4)


def test_tensorboard(algorithm, tmp_path):
    pytest.importorskip("tensorboard")
    model = algorithm("MlpPolicy", "CartPole-v1", tensorboard_log=str(tmp_path), learning_starts=20, device="cpu")
    model.learn(50)
    model.learn(50, tb_log_name="mine")
    assert {path.name for path in tmp_path.iterdir()} == {f"{algorithm.__name__}_1", "mine_1"}


def test_learn_returns_the_model(algorithm):
    model = make_model(algorithm)
    assert model.learn(10) is model


def test_documented_defaults():
    # The constants of the papers and of SB3
    soft, sqn, munchausen = (parameters_of(cls.__init__) for cls in (SoftDQN, SQN, MunchausenDQN))
    assert [munchausen[name].default for name in ("munchausen_alpha", "temperature", "munchausen_clip")] == [0.9, 0.03, -1.0]
    assert soft["double_q"].default is False
    assert sqn["temperature"].default.startswith("auto") and sqn["target_entropy"].default == "auto"
    for name in ("buffer_size", "learning_starts", "batch_size", "train_freq", "gradient_steps", "max_grad_norm"):
        assert soft[name].default == parameters_of(DQN.__init__)[name].default
