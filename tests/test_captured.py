"""Updates as a CUDA graph, as far as they can be tested without one: a graph that is replayed by running it again."""

import math
from types import SimpleNamespace

import pytest
import torch as th
from helpers import SCALAR_VARIANTS, VARIANTS, assert_same, is_same, make_learner, snapshot
from plain_loop import assert_trains_as_the_plain_loop, change_settings, train_until_it_breaks
from stable_baselines3.common.utils import set_random_seed

from sb3_softq import SoftDQN, compiled

ROUNDING = dict(rtol=2e-4, atol=2e-6)


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """The graphs that are captured; each knows the tensors that it was captured with, and no others."""
    captured = []

    def capture(run, state):
        graph = SimpleNamespace(replay=lambda: run(state))
        captured.append(graph)
        return graph

    monkeypatch.setattr(compiled, "capturable", lambda device: True)
    monkeypatch.setattr(compiled.CapturedFunction, "_capture", staticmethod(capture))
    return captured


def make_pair(algorithm, **kwargs):
    """One whose updates are captured, and one that is never asked."""
    model, oracle = make_learner(algorithm, **kwargs), make_learner(algorithm, **kwargs)
    oracle._compiled.given_up = True
    return model, oracle


@pytest.mark.parametrize(("algorithm", "kwargs"), VARIANTS.values(), ids=VARIANTS)
def test_captured_training_is_the_plain_loop(algorithm, kwargs, graphs):
    model, oracle = make_pair(algorithm, **kwargs)
    assert_trains_as_the_plain_loop(model, oracle, **ROUNDING)
    assert len(graphs) == 1 and not model._compiled.given_up


@pytest.mark.parametrize("name", SCALAR_VARIANTS)
def test_captured_training_follows_schedules(name, graphs):
    algorithm, kwargs = SCALAR_VARIANTS[name]
    if "temperature" in kwargs:
        pytest.skip("a fixed temperature")
    model, oracle = make_pair(algorithm, **kwargs, temperature=lambda progress: 0.1 + progress)
    assert_trains_as_the_plain_loop(model, oracle, change_settings, **ROUNDING)
    assert len(graphs) == 1 and not model._compiled.given_up


@pytest.mark.parametrize("kwargs", [dict(n_steps=3), dict(max_grad_norm=0.01), dict(n_steps=3, tree_backup=True)])
def test_captured_training_with_options(kwargs, graphs):
    model, oracle = make_pair(SoftDQN, **kwargs)
    assert_trains_as_the_plain_loop(model, oracle, **ROUNDING)
    assert len(graphs) == 1


def test_settings_that_change_are_captured_anew(graphs):
    def change_settings(model):
        model.gamma = 0.5

    model, oracle = make_pair(SoftDQN)
    assert_trains_as_the_plain_loop(model, oracle, change_settings, **ROUNDING)
    assert len(graphs) == 2


def test_captured_training_goes_on_from_what_is_loaded(graphs):
    other = make_learner(SoftDQN, seed=1)
    other._compiled.given_up = True
    other.train(gradient_steps=3, batch_size=16)
    model, oracle = make_pair(SoftDQN)
    assert_trains_as_the_plain_loop(model, oracle, lambda one: one.set_parameters(snapshot(other)), **ROUNDING)
    assert len(graphs) > 1


def test_captured_training_stops_at_what_is_not_finite():
    models = make_pair(SoftDQN)
    messages = []
    for model in models:
        model.replay_buffer.rewards[11] = math.nan
        messages.append(train_until_it_breaks(model))
    assert messages[0] == messages[1] and "rewards of update" in messages[0]
    assert_same(snapshot(models[0])["policy"], snapshot(models[1])["policy"], **ROUNDING)
    assert models[0]._n_updates == models[1]._n_updates > 0


@pytest.mark.parametrize("broken", ["other numbers", "an error"])
def test_a_graph_that_fails_gives_way(broken, monkeypatch):
    def capture(run, state):
        if broken == "an error":
            raise RuntimeError("operation not permitted when stream is capturing")
        return SimpleNamespace(replay=lambda: (run(state), state[0].add_(1.0)))

    monkeypatch.setattr(compiled.CapturedFunction, "_capture", staticmethod(capture))
    model, oracle = make_pair(SoftDQN)
    before = snapshot(model)
    with pytest.warns(UserWarning, match="not captured as a CUDA graph") as record:
        for i in range(3):
            for one in (model, oracle):
                set_random_seed(i)
                one.train(2, 16)
    assert len(record) == 1
    assert_same(snapshot(model), snapshot(oracle))
    assert not is_same(before["policy"], snapshot(model)["policy"])


def test_other_optimisers_are_left_alone(recwarn, graphs):
    model = make_learner(SoftDQN, policy_kwargs=dict(net_arch=[16], optimizer_class=th.optim.SGD))
    model.train(2, 16)
    assert not graphs and not [warning for warning in recwarn if "CUDA" in str(warning.message)]
