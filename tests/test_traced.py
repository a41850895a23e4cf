"""Interpreted hooks give the hooks' numbers to the last bit, follow what changes, and give way where they cannot serve."""

import itertools
import math

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import (
    QUICK,
    VARIANTS,
    VECTOR,
    MaskedEnv,
    RandomEnv,
    assert_same,
    is_same,
    make_learner,
    sample_batch,
    snapshot,
)
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import set_random_seed

from sb3_softq import DivergenceError, MunchausenDQN, SoftDQN, traced

each_variant = pytest.mark.parametrize(("algorithm", "kwargs"), VARIANTS.values(), ids=VARIANTS)
NEVER = 10**9


def make(algorithm, make_env=lambda: RandomEnv(VECTOR), calls_before_tracing=0, **kwargs):
    model = make_learner(algorithm, make_env(), **kwargs)
    model._traced.calls_before_tracing = calls_before_tracing
    return model


def make_pair(algorithm, make_env=lambda: RandomEnv(VECTOR), **kwargs):
    """One that traces from the first call on, and one that never does."""
    return [make(algorithm, make_env, calls_before_tracing, **kwargs) for calls_before_tracing in (0, NEVER)]


def train(model, seed, gradient_steps=2, batch_size=16):
    set_random_seed(seed)
    model.train(gradient_steps, batch_size)
    model._on_step()


def graphs(model):
    return {key[0]: graph for key, graph in model._traced._graphs.items()}


def assert_train_alike(first, second, intervene=lambda model: None, n_calls=6):
    before = snapshot(first)
    for i in range(n_calls):
        for model in (first, second):
            train(model, seed=i)
            if i == n_calls // 2:
                intervene(model)
        assert_same(snapshot(first), snapshot(second))
    assert_same(first.logger.name_to_value, second.logger.name_to_value)
    assert not is_same(before["policy"], snapshot(first)["policy"])
    assert not second._traced._graphs


def assert_interpreted(model):
    assert set(graphs(model)) == ({"targets", "update"} if model._targets_frozen() else {"update"})
    assert all(graph is not None and graph.verified for graph in graphs(model).values())


@each_variant
def test_the_same_numbers(algorithm, kwargs):
    model, plain = make_pair(algorithm, **kwargs)
    assert_train_alike(model, plain)
    assert_interpreted(model)


@each_variant
@pytest.mark.parametrize("factorisation", ["sum", "independent"])
def test_the_same_numbers_with_heads_masks_and_segments(algorithm, kwargs, factorisation):
    models = make_pair(
        algorithm, lambda: MaskedEnv(spaces.MultiDiscrete([2, 4, 3])), factorisation=factorisation, n_steps=3, **kwargs
    )
    for model in models:
        set_random_seed(0)
        model.learn(QUICK["learning_starts"])  # masks that are random
    assert_train_alike(*models)
    assert_interpreted(models[0])


def test_the_same_numbers_with_a_schedule_of_the_temperature(algorithm):
    def change(model):
        model.temperature_module.update(0.25)

    model, plain = make_pair(algorithm, temperature=lambda progress: 0.1 + progress)
    assert_train_alike(model, plain, change)
    assert_interpreted(model)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(optimizer_class=th.optim.SGD),
        dict(optimizer_kwargs=dict(weight_decay=0.1)),
        dict(dueling=True),
        dict(activation_fn=th.nn.Tanh),
    ],
    ids=["SGD", "weight decay", "dueling", "Tanh"],
)
def test_the_same_numbers_with_other_policies(kwargs):
    model, plain = make_pair(SoftDQN, policy_kwargs=dict(net_arch=[16, 16], **kwargs))
    assert_train_alike(model, plain)


@pytest.mark.parametrize(("name", "value"), [("gamma", 0.5), ("max_grad_norm", 0.01), ("munchausen_alpha", 0.0)])
def test_settings_that_change_are_followed(name, value):
    # What was traced has them as constants
    model, plain = make_pair(MunchausenDQN)
    unchanged = make(MunchausenDQN)
    for i in range(8):
        train(unchanged, seed=i)
    assert_train_alike(model, plain, lambda model: setattr(model, name, value), n_calls=8)
    assert_interpreted(model)
    assert not is_same(snapshot(model), snapshot(unchanged))


def test_settings_that_change_all_the_time_are_not_traced_for_ever():
    model, plain = make_pair(MunchausenDQN)
    for i in range(3 * traced.MAX_CHANGES):
        for one in (model, plain):
            one.gamma = 0.5 + i / 1000
            train(one, seed=i)
    assert_same(snapshot(model), snapshot(plain))
    assert None in graphs(model).values()


class ReadingDQN(MunchausenDQN):
    """A loss that reads a number, so that it cannot be traced."""

    def _compute_loss(self, replay_data, targets):
        losses, q_values = super()._compute_loss(replay_data, targets)
        return losses * (2.0 if losses.max().item() > 0.1 else 1.0), q_values


class NumpyDQN(MunchausenDQN):
    """A loss that depends on its inputs behind torch's back."""

    def _compute_loss(self, replay_data, targets):
        losses, q_values = super()._compute_loss(replay_data, targets)
        return losses * (1 + float(np.abs(targets.detach().numpy()).max())), q_values


@pytest.mark.parametrize("algorithm", [ReadingDQN, NumpyDQN])
def test_hooks_that_cannot_be_traced_go_on_as_they_are(algorithm):
    model, plain = make_pair(algorithm)
    assert_train_alike(model, plain)
    assert graphs(model)["update"] is None and graphs(model)["targets"].verified


def test_hooks_that_depend_on_more_than_their_inputs_go_on_as_they_are():
    class CountingDQN(MunchausenDQN):
        def _compute_loss(self, replay_data, targets):
            losses, q_values = super()._compute_loss(replay_data, targets)
            return losses * next(numbers), q_values

    numbers = itertools.count(1)
    model = make(CountingDQN)
    train(model, seed=0, gradient_steps=3)
    assert graphs(model)["update"] is None and graphs(model)["targets"] is not None


def test_a_short_training_traces_nothing():
    model = make(MunchausenDQN, calls_before_tracing=traced.CALLS_BEFORE_TRACING)
    for _ in range(traced.CALLS_BEFORE_TRACING // 2):
        model.train(2, 16)
    assert not graphs(model)
    for _ in range(traced.CALLS_BEFORE_TRACING):
        model.train(2, 16)
    assert_interpreted(model)


def test_batches_of_many_sizes_leave_few_graphs():
    model, plain = make_pair(MunchausenDQN)
    for i in range(3):
        for batch_size in range(2, 2 + traced.MAX_GRAPHS):
            for one in (model, plain):
                train(one, seed=i, batch_size=batch_size)
    assert len(model._traced._graphs) == traced.MAX_GRAPHS
    assert_same(snapshot(model), snapshot(plain))


def test_another_network_is_traced_anew(tmp_path):
    model, plain = make_pair(SoftDQN)
    assert_train_alike(model, plain)
    for one in (model, plain):
        for module in (one.q_net, one.q_net_target):
            for parameter in module.parameters():  # as moving it to another device does
                parameter.data, parameter.grad = parameter.data.clone(), None
    assert_train_alike(model, plain)
    assert_interpreted(model)
    loaded = SoftDQN.load(model.save(tmp_path / "model") or tmp_path / "model", device="cpu")
    assert_same(snapshot(loaded), snapshot(plain))


def test_what_is_not_finite_stops_it():
    models = make_pair(MunchausenDQN)
    messages = []
    for model in models:
        for i in range(3):
            train(model, seed=i)
        model.replay_buffer.rewards[11] = math.nan
        with pytest.raises(DivergenceError, match="rewards of update") as error:
            for i in range(100):
                train(model, seed=i, batch_size=16)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert_same(snapshot(models[0]), snapshot(models[1]))
    assert_interpreted(models[0])


def test_batch_norm_is_not_traced():
    class BatchNorm(BaseFeaturesExtractor):
        def __init__(self, observation_space):
            super().__init__(observation_space, 4)
            self.norm = th.nn.BatchNorm1d(4)

        def forward(self, observations):
            return self.norm(observations)

    model, plain = make_pair(SoftDQN, policy_kwargs=dict(net_arch=[16], features_extractor_class=BatchNorm))
    assert_train_alike(model, plain)
    assert not graphs(model)


def act(model, observations, **kwargs):
    set_random_seed(5)
    return np.array([model.predict(observations, **kwargs)[0] for _ in range(20)])


@each_variant
@pytest.mark.parametrize("exploration", ["boltzmann", "eps_greedy"])
def test_the_same_actions(algorithm, kwargs, exploration):
    model, plain = make_pair(algorithm, exploration=exploration, **kwargs)
    assert_train_alike(model, plain)
    observations = sample_batch(VECTOR, 40)
    for deterministic in (True, False):
        for values in (observations, observations[0]):
            actions = [act(one, values, deterministic=deterministic) for one in (model, plain)]
            np.testing.assert_array_equal(*actions)
    acting = [graph for key, graph in model._traced._graphs.items() if key[0] == "actions"]
    assert len(acting) == (2 if exploration == "eps_greedy" else 4)
    assert all(graph is not None and graph.verified for graph in acting)
    assert not plain._traced._graphs


def test_actions_follow_the_network():
    model, plain = make_pair(MunchausenDQN)
    assert_train_alike(model, plain)
    observations = sample_batch(VECTOR, 40)
    before = act(model, observations, deterministic=True)
    for one in (model, plain):
        for parameter in one.q_net.parameters():
            parameter.data = -parameter.data  # in another place
    after = [act(one, observations, deterministic=True) for one in (model, plain)]
    np.testing.assert_array_equal(*after)
    assert (before != after[0]).any()
