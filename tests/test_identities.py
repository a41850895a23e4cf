"""
What the algorithms have in common: their limits and special cases, and that training is the plain loop of the textbook.

Networks are in float64, so that equal means equal to rounding.
"""

import math

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import (
    SCALAR_VARIANTS,
    VARIANTS,
    VECTOR,
    Float64Extractor,
    RandomEnv,
    assert_same,
    fill_buffer,
    is_same,
    make_model,
    snapshot,
)
from plain_loop import assert_trains_as_the_plain_loop, record_minibatches
from stable_baselines3 import DQN
from stable_baselines3.common.utils import set_random_seed
from torch import nn

from sb3_softq import SQN, MunchausenDQN, SoftDQN, operators

GAMMA, TEMPERATURE, ALPHA, CLIP = 0.9, 0.2, 0.7, -0.15
ROUNDING = dict(rtol=1e-11, atol=1e-11)

pytestmark = pytest.mark.usefixtures("float64")


def make(algorithm, n_steps=1, policy_kwargs=None, **kwargs):
    """A model with a filled replay buffer, whose target network differs from the online one."""
    policy_kwargs = dict(net_arch=[16], features_extractor_class=Float64Extractor) | (policy_kwargs or {})
    model = make_model(algorithm, RandomEnv(VECTOR), policy_kwargs=policy_kwargs, gamma=GAMMA, n_steps=n_steps, **kwargs)
    fill_buffer(model, 200)
    move_target(model)
    return model


def make_soft(algorithm, temperature=TEMPERATURE, **kwargs):
    """With SB3's n-step returns, if any; those that carry their bonuses have a file of their own."""
    return make(algorithm, temperature=temperature, exploration="eps_greedy", n_step_bonus=False, **kwargs)


def move_target(model, seed=1):
    generator = th.Generator().manual_seed(seed)
    with th.no_grad():
        for parameter in model.q_net_target.parameters():
            parameter += 0.3 * th.randn(parameter.shape, generator=generator)


def copy_networks(source, model):
    model.policy.load_state_dict(source.policy.state_dict())


def sample(model, n=64):
    """The same minibatch from every buffer that holds the same transitions."""
    set_random_seed(3)
    replay_data = model.replay_buffer.sample(n)
    assert 0 < replay_data.dones.sum() < n
    return replay_data


def targets(model, replay_data=None):
    with th.no_grad():
        return model._compute_targets(sample(model) if replay_data is None else replay_data)[0]


def train_alike(*models, n_updates=5):
    for i in range(n_updates):
        for model in models:
            set_random_seed(i)
            model.train(gradient_steps=1, batch_size=16)


# ---------------------------------------------------------------------- targets, sample by sample


def soft_value(values, temperature):
    return temperature * math.log(sum(math.exp(value / temperature) for value in values))


def slow_target(model, algorithm, double_q, i, replay_data):
    """One target in plain Python, from lists of action values."""

    def rows(network, observations):
        return [row.tolist() for row in network(observations[i : i + 1]).detach().reshape(-1, 3)]

    reward, done = float(replay_data.rewards[i]), float(replay_data.dones[i])
    discount = GAMMA if replay_data.discounts is None else float(replay_data.discounts[i])
    next_values = rows(model.q_net_target, replay_data.next_observations)
    if algorithm is SQN:
        next_values = [[min(pair) for pair in zip(*next_values, strict=True)]]
    value = soft_value(next_values[0], TEMPERATURE)
    if double_q:
        online = rows(model.q_net, replay_data.next_observations)[0]
        probabilities = [math.exp((q - soft_value(online, TEMPERATURE)) / TEMPERATURE) for q in online]
        value = sum(p * (q - TEMPERATURE * math.log(p)) for p, q in zip(probabilities, next_values[0], strict=True))
    bonus = 0.0
    if algorithm is MunchausenDQN:
        values = rows(model.q_net_target, replay_data.observations)[0]
        taken = values[int(replay_data.actions[i])]
        bonus = ALPHA * max(taken - soft_value(values, TEMPERATURE), CLIP)
    return reward + bonus + discount * (1 - done) * value


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize(
    ("algorithm", "kwargs"),
    [
        (SoftDQN, {}),
        (SoftDQN, dict(double_q=True)),
        (SQN, {}),
        (MunchausenDQN, dict(munchausen_alpha=ALPHA, munchausen_clip=CLIP)),
    ],
)
def test_targets_are_those_of_a_slow_loop(algorithm, kwargs, n_steps):
    model = make_soft(algorithm, n_steps=n_steps, **kwargs)
    replay_data = sample(model)
    expected = [slow_target(model, algorithm, "double_q" in kwargs, i, replay_data) for i in range(64)]
    np.testing.assert_allclose(targets(model, replay_data).squeeze(1), expected, rtol=1e-6)


def test_loss_is_huber_and_for_twins_the_sum_of_squares():
    for algorithm in (SoftDQN, MunchausenDQN, SQN):
        model = make_soft(algorithm)
        replay_data = sample(model)
        wanted = 3 * th.randn(64, 1)
        losses, q_values = model._compute_loss(replay_data, wanted)
        taken = model.q_net(replay_data.observations).gather(-1, replay_data.actions.expand(*[2] * (algorithm is SQN), 64, 1))
        errors = (taken - wanted).detach().abs()
        expected = (errors**2).sum(dim=0) if algorithm is SQN else th.where(errors < 1, errors**2 / 2, errors - 0.5)
        th.testing.assert_close(losses.detach(), expected, **ROUNDING)
        th.testing.assert_close(q_values, model.policy.q_values(replay_data.observations).detach())
        assert losses.requires_grad and not q_values.requires_grad


# ---------------------------------------------------------------------- one algorithm as a case of another


@pytest.mark.parametrize("kwargs", [dict(munchausen_alpha=0.0), dict(munchausen_clip=0.0)])
def test_munchausen_without_its_term_is_softdqn(kwargs):
    munchausen, soft = make_soft(MunchausenDQN, **kwargs), make_soft(SoftDQN)
    assert_same(targets(munchausen), targets(soft))
    train_alike(munchausen, soft)
    assert_same(snapshot(munchausen), snapshot(soft))
    assert not is_same(snapshot(munchausen), snapshot(make_soft(SoftDQN)))


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize(("algorithm", "kwargs"), [(SoftDQN, {}), (MunchausenDQN, dict(munchausen_alpha=0.0))])
def test_without_temperature_it_is_dqn(algorithm, kwargs, n_steps):
    soft, dqn = make_soft(algorithm, 0.0, n_steps=n_steps, **kwargs), make(DQN, n_steps=n_steps)
    copy_networks(dqn, soft)
    before = snapshot(dqn)
    train_alike(soft, dqn)
    assert_same(soft.policy.state_dict(), dqn.policy.state_dict(), **ROUNDING)
    assert_same(soft.policy.optimizer.state_dict()["state"], dqn.policy.optimizer.state_dict()["state"], **ROUNDING)
    assert not is_same(before, snapshot(dqn))


@pytest.mark.parametrize("temperature", [1e-3, 1e-5])
def test_target_tends_to_that_of_dqn(temperature):
    soft, hard = make_soft(SoftDQN, temperature), make_soft(SoftDQN, 0.0)
    difference = targets(soft) - targets(hard)
    assert difference.min() >= -1e-12 and difference.max() <= temperature * math.log(3) * GAMMA


def test_double_without_temperature_is_double_dqn():
    model = make_soft(SoftDQN, 0.0, double_q=True)
    replay_data = sample(model)
    with th.no_grad():
        best = model.q_net(replay_data.next_observations).argmax(dim=1, keepdim=True)
        next_values = model.q_net_target(replay_data.next_observations).gather(1, best)
    expected = replay_data.rewards + (1 - replay_data.dones) * GAMMA * next_values
    th.testing.assert_close(targets(model, replay_data), expected, **ROUNDING)
    assert not is_same(targets(model), targets(make_soft(SoftDQN, 0.0)))


@pytest.mark.parametrize("temperature", [0.0, TEMPERATURE])
def test_double_with_equal_networks_is_single(temperature):
    double, single = make_soft(SoftDQN, temperature, double_q=True), make_soft(SoftDQN, temperature)
    assert not is_same(targets(double), targets(single))
    for model in (double, single):
        model.q_net_target.load_state_dict(model.q_net.state_dict())
    assert_same(targets(double), targets(single), **ROUNDING)


def test_identical_twins_are_softdqn():
    twin, single = make_soft(SQN), make_soft(SoftDQN)
    for network in twin.q_net_target.networks:
        network.load_state_dict(single.q_net_target.state_dict())
    assert_same(targets(twin), targets(single), **ROUNDING)


def test_twins_without_temperature_are_clipped_double_dqn():
    model = make_soft(SQN, 0.0)
    replay_data = sample(model)
    first, second = (network(replay_data.next_observations).detach() for network in model.q_net_target.networks)
    assert (first < second).any() and (first > second).any()
    next_values = th.minimum(first, second).amax(dim=1, keepdim=True)
    expected = replay_data.rewards + (1 - replay_data.dones) * GAMMA * next_values
    assert_same(targets(model, replay_data), expected, **ROUNDING)


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_munchausen_without_temperature_is_advantage_learning(temperature):
    model = make_soft(MunchausenDQN, temperature, munchausen_alpha=ALPHA, munchausen_clip=-math.inf)
    replay_data = sample(model)
    with th.no_grad():
        q_values = model.q_net_target(replay_data.observations)
        next_values = model.q_net_target(replay_data.next_observations).amax(dim=1, keepdim=True)
    gaps = q_values.gather(1, replay_data.actions) - q_values.amax(dim=1, keepdim=True)
    expected = replay_data.rewards + ALPHA * gaps + (1 - replay_data.dones) * GAMMA * next_values
    th.testing.assert_close(targets(model, replay_data), expected, rtol=0, atol=5 * temperature + 1e-12)


# ---------------------------------------------------------------------- the Munchausen term


def munchausen_bonus(clip, replay_data=None, **kwargs):
    model = make_soft(MunchausenDQN, munchausen_alpha=ALPHA, munchausen_clip=clip, **kwargs)
    soft = make_soft(SoftDQN, **kwargs)
    return targets(model, replay_data) - targets(soft, replay_data)


def test_bonus_is_between_the_weighted_clip_and_zero():
    bonus, unclipped = munchausen_bonus(CLIP), munchausen_bonus(-math.inf)
    assert unclipped.min() < ALPHA * CLIP
    assert bonus.min() == pytest.approx(ALPHA * CLIP) and bonus.max() < 0
    th.testing.assert_close(bonus, unclipped.clamp(min=ALPHA * CLIP), **ROUNDING)


def test_bonus_stays_on_terminal_transitions():
    model = make_soft(MunchausenDQN, munchausen_alpha=ALPHA, munchausen_clip=-math.inf)
    replay_data = sample(model)
    log_policy = operators.scaled_log_policy(model.q_net_target(replay_data.observations).detach(), TEMPERATURE)
    expected = replay_data.rewards + ALPHA * log_policy.gather(1, replay_data.actions)
    ends = replay_data.dones == 1
    th.testing.assert_close(targets(model, replay_data)[ends], expected[ends], **ROUNDING)


def test_bonus_does_not_change_with_a_constant():
    def shifted(model):
        with th.no_grad():
            model.q_net_target.q_net[-1].bias += 5.0
        return targets(model)

    kwargs = dict(munchausen_alpha=ALPHA, munchausen_clip=CLIP)
    bonus = shifted(make_soft(MunchausenDQN, **kwargs)) - shifted(make_soft(SoftDQN))
    th.testing.assert_close(bonus, munchausen_bonus(CLIP), **ROUNDING)


def test_everything_is_taken_from_the_target_network():
    model = make_soft(MunchausenDQN)
    before = targets(model)
    with th.no_grad():
        for parameter in model.q_net.parameters():
            parameter.mul_(-3.0)
    assert_same(targets(model), before)


@pytest.mark.parametrize("clip", [0.0, CLIP, -1e6, -math.inf])
def test_clip_fraction_counts_the_clipped_terms(clip):
    model = make_soft(MunchausenDQN, munchausen_clip=clip)
    replay_data = sample(model)
    log_policy = operators.scaled_log_policy(model.q_net_target(replay_data.observations).detach(), TEMPERATURE)
    clipped = log_policy.gather(1, replay_data.actions) < clip
    if clip == CLIP:
        assert 0 < clipped.sum() < 64
    _, metrics = model._compute_targets(replay_data)
    assert_same(metrics["munchausen_clip_fraction"], clipped)


# ---------------------------------------------------------------------- n-step returns


@pytest.mark.parametrize(("algorithm", "kwargs"), SCALAR_VARIANTS.values(), ids=SCALAR_VARIANTS)
def test_one_step_returns_are_the_same_with_the_n_step_buffer(algorithm, kwargs):
    # n_steps=3 in a buffer of episodes of one step: nothing follows the first reward
    models = [make(algorithm, n_steps=n_steps, **kwargs) for n_steps in (1, 3)]
    for model in models:
        model.replay_buffer.dones[:] = 1.0
        model.replay_buffer.timeouts[::2] = 1.0  # half of them bootstrap
    assert_same(targets(models[0]), targets(models[1]), **dict(rtol=1e-6, atol=1e-6))


@pytest.mark.parametrize(("algorithm", "kwargs"), SCALAR_VARIANTS.values(), ids=SCALAR_VARIANTS)
def test_n_step_targets_bootstrap_with_their_own_discount(algorithm, kwargs):
    model = make(algorithm, n_steps=3, n_step_bonus=False, **kwargs)
    replay_data = sample(model)
    assert len(replay_data.discounts.unique()) == 3  # gamma, and its second and third power
    without_bootstrap = targets(model, replay_data._replace(discounts=th.zeros_like(replay_data.discounts)))
    unit_discounts = targets(model, replay_data._replace(discounts=th.ones_like(replay_data.discounts)))
    assert ((unit_discounts - without_bootstrap).abs() > 0.01).sum() > 20
    expected = without_bootstrap + replay_data.discounts * (unit_discounts - without_bootstrap)
    assert_same(targets(model, replay_data), expected, **ROUNDING)
    ends = replay_data.dones == 1
    assert_same(targets(model, replay_data)[ends], without_bootstrap[ends], **ROUNDING)


# ---------------------------------------------------------------------- the learned temperature


def bandit(**kwargs):
    """One state, three arms: the action values are the rewards, whatever the temperature does."""
    model = make_model(
        SQN,
        RandomEnv(spaces.Box(0.0, 1.0, (1,), np.float32)),
        policy_kwargs=dict(net_arch=[], features_extractor_class=Float64Extractor),
        gamma=0.0,
        learning_rate=0.02,
        buffer_size=30,
        **kwargs,
    )
    for i in range(30):
        observation = np.ones((1, 1))
        model.replay_buffer.add(observation, observation, np.array([i % 3]), np.array([i % 3]), np.array([False]), [{}])
    return model


@pytest.mark.parametrize("target_entropy", ["auto", "auto_0.9", 0.3])
@pytest.mark.parametrize("temperature", ["auto_0.05", "auto_5"])
def test_entropy_reaches_its_target_on_a_bandit(temperature, target_entropy):
    model = bandit(temperature=temperature, target_entropy=target_entropy)
    first = float(model.current_temperature)
    for _ in range(60):
        model.train(gradient_steps=20, batch_size=30)
    observation = np.ones((1, 1), np.float32)
    np.testing.assert_allclose(model.q_values(observation), [[0, 1, 2]], atol=0.01)
    probabilities = model.action_probs(observation)
    entropy = -(probabilities * np.log(probabilities)).sum()
    assert entropy == pytest.approx(model.temperature_module.target_entropy, rel=0.01)
    assert float(model.current_temperature) != pytest.approx(first, rel=0.1)


@pytest.mark.parametrize(("temperature", "sign"), [("auto_100", -1), ("auto_0.001", 1)])
def test_temperature_moves_towards_its_target(temperature, sign):
    model = bandit(temperature=temperature)
    before = float(model.current_temperature)
    model.train(gradient_steps=1, batch_size=30)
    assert np.sign(float(model.current_temperature) - before) == sign


def test_entropy_is_that_of_the_acting_policy_at_the_sampled_states():
    model = make(SQN, temperature="auto_0.2")
    model.temperature_module.optimizer = th.optim.SGD([model.temperature_module.log_temperature], lr=1.0)
    set_random_seed(3)
    replay_data = model._sample(64)
    probabilities = model.action_probs(replay_data.observations.numpy())
    entropies = -(probabilities * np.log(probabilities)).sum(axis=1)
    before = model.temperature_module.log_temperature.item()
    set_random_seed(3)
    model.train(gradient_steps=1, batch_size=64)
    rate = model.policy.optimizer.param_groups[0]["lr"]
    expected = before - rate * (entropies.mean() - model.temperature_module.target_entropy)
    assert model.temperature_module.log_temperature.item() == pytest.approx(expected, rel=1e-9)


# ---------------------------------------------------------------------- training is the plain loop


class UnusedLayerExtractor(Float64Extractor):
    """Has parameters that no output depends on."""

    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.unused = nn.Linear(3, 3)


LOOP = dict(tau=0.3, target_update_interval=1, learning_rate=0.01)
OPTIMIZERS = {
    "Adam": (th.optim.Adam, {}),
    "Adam with decay": (th.optim.Adam, dict(weight_decay=0.1, eps=1e-4, betas=(0.8, 0.9))),
    "AMSGrad": (th.optim.Adam, dict(amsgrad=True)),
    "AdamW": (th.optim.AdamW, dict(weight_decay=0.1)),
    "RMSprop": (th.optim.RMSprop, dict(momentum=0.5)),
    "SGD": (th.optim.SGD, dict(momentum=0.9, weight_decay=0.1)),
}


@pytest.mark.parametrize(("algorithm", "kwargs"), VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("max_grad_norm", [0.05, math.inf])
def test_training_is_the_plain_loop(algorithm, kwargs, max_grad_norm):
    model, oracle = (make(algorithm, max_grad_norm=max_grad_norm, **LOOP, **kwargs) for _ in range(2))
    assert_trains_as_the_plain_loop(model, oracle)


@pytest.mark.parametrize(("optimizer", "optimizer_kwargs"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_with_another_optimizer_is_the_plain_loop(algorithm, optimizer, optimizer_kwargs):
    policy_kwargs = dict(optimizer_class=optimizer, optimizer_kwargs=optimizer_kwargs)
    model, oracle = (make(algorithm, policy_kwargs=policy_kwargs, **LOOP) for _ in range(2))
    assert_trains_as_the_plain_loop(model, oracle)


@pytest.mark.parametrize(
    "policy_kwargs",
    [
        dict(dueling=True, net_arch=[16, 16]),
        dict(net_arch=[], activation_fn=nn.Tanh),
        dict(features_extractor_class=UnusedLayerExtractor),
        dict(
            features_extractor_class=UnusedLayerExtractor,
            optimizer_class=th.optim.AdamW,
            optimizer_kwargs=dict(weight_decay=0.1),
        ),
    ],
    ids=["dueling", "linear", "unused layer", "unused layer with decay"],
)
def test_training_another_network_is_the_plain_loop(algorithm, policy_kwargs):
    model, oracle = (make(algorithm, policy_kwargs=policy_kwargs, **LOOP) for _ in range(2))
    assert_trains_as_the_plain_loop(model, oracle)


def load_the_same(model):
    model.set_parameters(snapshot(model))


def load_half(model):
    model.policy.load_state_dict({name: tensor / 2 for name, tensor in model.policy.state_dict().items()})


def replace_tensors(model):
    for parameter in model.policy.parameters():
        parameter.data = parameter.data.clone()


def move_there_and_back(model):
    model.policy.to(th.float32)
    model.policy.to(th.float64)


def forget_moments(model):
    model.policy.optimizer = type(model.policy.optimizer)(model.q_net.parameters(), lr=model.learning_rate)


def change_in_place(model):
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.mul_(0.9)


def drop_gradients(model):
    model.policy.optimizer.zero_grad(set_to_none=True)


def freeze_the_first_layer(model):
    next(model.q_net.parameters()).requires_grad_(False)


@pytest.mark.parametrize(
    "intervene",
    [
        load_the_same,
        load_half,
        replace_tensors,
        move_there_and_back,
        forget_moments,
        change_in_place,
        drop_gradients,
        freeze_the_first_layer,
    ],
)
@pytest.mark.parametrize("optimizer", [th.optim.Adam, th.optim.SGD])
def test_training_goes_on_from_what_others_change(algorithm, optimizer, intervene):
    model, oracle = (make(algorithm, policy_kwargs=dict(optimizer_class=optimizer), **LOOP) for _ in range(2))
    assert_trains_as_the_plain_loop(model, oracle, intervene)


@pytest.mark.parametrize("optimizer", [th.optim.Adam, th.optim.SGD])
def test_layers_that_are_frozen_from_the_start(algorithm, optimizer):
    model, oracle = (make(algorithm, policy_kwargs=dict(optimizer_class=optimizer), **LOOP) for _ in range(2))
    for one in (model, oracle):
        freeze_the_first_layer(one)
    before = next(model.q_net.parameters()).detach().clone()
    assert_trains_as_the_plain_loop(model, oracle)
    assert th.equal(next(model.q_net.parameters()), before)


def test_updates_of_one_call_are_those_of_many_calls(algorithm):
    # It does not matter how gradient steps are divided: minibatches are drawn one after the other
    model, other = (make(algorithm, **LOOP) for _ in range(2))
    minibatches = record_minibatches(model)
    model.train(gradient_steps=6, batch_size=16)
    assert len(minibatches) == 6
    other._sample = lambda n_samples: minibatches.pop(0)
    for _ in range(6):
        other.train(gradient_steps=1, batch_size=16)
    assert_same(snapshot(model), snapshot(other), rtol=1e-9, atol=1e-11)
