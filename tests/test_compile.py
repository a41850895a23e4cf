"""Compiled training is the plain loop too, stops where that stops, and gives way to it where it cannot be had."""

import math

import pytest
import torch as th
from helpers import VARIANTS, assert_same, is_same, make_learner, needs_compiler, snapshot
from plain_loop import assert_trains_as_the_plain_loop, change_settings, train_until_it_breaks
from stable_baselines3.common.utils import set_random_seed

from sb3_softq import MunchausenDQN, SoftDQN

# Float32 and another order of the operations
ROUNDING = dict(rtol=2e-4, atol=2e-6)


@pytest.fixture(autouse=True)
def forget_compiled():
    yield
    th.compiler.reset()


def make(algorithm, torch_compile=True, **kwargs):
    return make_learner(algorithm, torch_compile=torch_compile, **kwargs)


def train_alike(*models, gradient_steps=3, n_calls=3):
    for i in range(n_calls):
        for model in models:
            set_random_seed(i)
            model.train(gradient_steps, batch_size=16)


# One algorithm always, the others with the expensive tests: compiling takes its time
EACH = [
    pytest.param(algorithm, kwargs, id=name, marks=[] if algorithm is MunchausenDQN else pytest.mark.expensive)
    for name, (algorithm, kwargs) in VARIANTS.items()
]


@needs_compiler
@pytest.mark.parametrize(("algorithm", "kwargs"), EACH)
def test_compiled_training_is_the_plain_loop(algorithm, kwargs, recwarn):
    model, oracle = make(algorithm, **kwargs), make(algorithm, torch_compile=False, **kwargs)
    assert_trains_as_the_plain_loop(model, oracle, **ROUNDING)
    assert model.logger.name_to_value["time/compile_seconds"] > 0
    assert not any("torch_compile" in str(warning.message) for warning in recwarn)


@needs_compiler
@pytest.mark.expensive
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(n_steps=3),
        dict(max_grad_norm=0.01),
        dict(temperature=0.0, exploration="eps_greedy"),
        dict(policy_kwargs=dict(net_arch=[16, 16], dueling=True)),
        dict(policy_kwargs=dict(optimizer_class=th.optim.AdamW, optimizer_kwargs=dict(weight_decay=0.1, eps=1e-4))),
        dict(policy_kwargs=dict(optimizer_kwargs=dict(weight_decay=0.1, betas=(0.8, 0.9)))),
    ],
    ids=["n-step", "clipped", "hard", "dueling", "AdamW", "Adam with decay"],
)
def test_compiled_training_with_options(kwargs):
    model, oracle = make(SoftDQN, **kwargs), make(SoftDQN, torch_compile=False, **kwargs)
    assert_trains_as_the_plain_loop(model, oracle, **ROUNDING)


@needs_compiler
@pytest.mark.expensive
def test_compiled_training_follows_schedules(algorithm):
    kwargs = dict(temperature=lambda progress: 0.1 + progress)
    model, oracle = make(algorithm, **kwargs), make(algorithm, torch_compile=False, **kwargs)
    assert_trains_as_the_plain_loop(model, oracle, change_settings, **ROUNDING)


@needs_compiler
@pytest.mark.expensive
def test_compiled_training_goes_on_from_what_is_loaded():
    def load(model):
        model.set_parameters(snapshot(other))

    other = make(SoftDQN, torch_compile=False, seed=1)
    other.train(gradient_steps=3, batch_size=16)
    model, oracle = make(SoftDQN), make(SoftDQN, torch_compile=False)
    assert_trains_as_the_plain_loop(model, oracle, load, **ROUNDING)


@needs_compiler
@pytest.mark.expensive
@pytest.mark.parametrize("gradient_steps", [1, 2, 5, 7])
def test_calls_of_other_lengths(gradient_steps):
    # The first call decides what is compiled; five updates are three and two single ones
    models = [make(SoftDQN, torch_compile) for torch_compile in (True, False)]
    train_alike(*models, gradient_steps=3, n_calls=1)
    train_alike(*models, gradient_steps=gradient_steps, n_calls=2)
    assert_same(snapshot(models[0]), snapshot(models[1]), **ROUNDING)
    assert models[0]._n_updates == models[1]._n_updates == 3 + 2 * gradient_steps


@needs_compiler
def test_compiled_training_stops_where_the_other_path_stops():
    # One broken row: the updates before the one that draws it are made and counted, neither it nor those after it are
    models = [make(MunchausenDQN, torch_compile) for torch_compile in (True, False)]
    messages = []
    for model in models:
        model.replay_buffer.rewards[11] = math.nan
        messages.append(train_until_it_breaks(model))
    assert messages[0] == messages[1] and "rewards of update" in messages[0]
    assert_same(snapshot(models[0])["policy"], snapshot(models[1])["policy"], **ROUNDING)
    assert models[0]._n_updates == models[1]._n_updates > 0
    assert_same(snapshot(models[0])["policy.optimizer"], snapshot(models[1])["policy.optimizer"], **ROUNDING)


@needs_compiler
@pytest.mark.expensive
def test_compiler_that_fails_half_way_through_a_call(monkeypatch):
    # Three updates are compiled, the single ones that are left over cannot be: the other path makes those, and no more
    models = [make(SoftDQN, torch_compile) for torch_compile in (True, False)]
    train_alike(*models, gradient_steps=3, n_calls=1)

    def no_compiler(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(th, "compile", no_compiler)
    with pytest.warns(UserWarning, match="updates are not compiled"):
        train_alike(*models, gradient_steps=5, n_calls=1)
    assert models[0]._n_updates == models[1]._n_updates == 8


@needs_compiler
@pytest.mark.expensive
def test_compiled_models_are_saved_and_loaded(algorithm, tmp_path):
    model = make(algorithm)
    model.train(gradient_steps=3, batch_size=16)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", device="cpu")
    assert loaded.torch_compile
    loaded.set_logger(model.logger)
    loaded.replay_buffer = model.replay_buffer
    train_alike(model, loaded)
    assert_same(snapshot(model), snapshot(loaded), **ROUNDING)


@pytest.mark.parametrize("why", ["optimiser", "error"])
def test_without_compiler_it_is_the_other_path(algorithm, why, monkeypatch):
    policy_kwargs = dict(net_arch=[16])
    if why == "optimiser":
        policy_kwargs.update(optimizer_class=th.optim.SGD)

    def no_compiler(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(th, "compile", no_compiler)
    model, other = (make(algorithm, torch_compile, policy_kwargs=policy_kwargs) for torch_compile in (True, False))
    before = snapshot(model)
    with pytest.warns(UserWarning, match="torch_compile=True, but updates are not compiled") as record:
        train_alike(model, other)
    assert len(record) == 1, "it says so once"
    assert_same(snapshot(model), snapshot(other))
    assert not is_same(before["policy"], snapshot(model)["policy"])
