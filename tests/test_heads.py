"""
MultiDiscrete and MultiBinary actions as heads: what is the same as one Discrete space, and what is so for every joint action.

Networks are in float64, so that equal means equal to rounding.
"""

import itertools
import math
import re

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import (
    SCALAR_VARIANTS,
    VALUE_BASED,
    VARIANTS,
    VECTOR,
    Float64Extractor,
    RecordedEnv,
    assert_same,
    fill_buffer,
    has_parameter,
    head_sizes,
    is_same,
    make_model,
    snapshot,
)
from plain_loop import assert_trains_as_the_plain_loop
from stable_baselines3.common.envs import IdentityEnvMultiBinary, IdentityEnvMultiDiscrete
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv
from torch.nn import functional as F

from sb3_softq import CVI, DPP, SQN, MomentumDQN, MunchausenDQN, MunchausenIQN, SoftDQN, operators
from sb3_softq.actions import ActionLayout

GAMMA, TEMPERATURE, ALPHA, CLIP = 0.9, 0.3, 0.7, -0.4
ROUNDING = dict(rtol=1e-10, atol=1e-10)
HEADS = spaces.MultiDiscrete([2, 5, 3])
SPACES = {"heads": HEADS, "bits": spaces.MultiBinary(3), "with one action": spaces.MultiDiscrete([1, 3])}
UNUSED = th.tensor([[False] * 2 + [True] * 3, [False] * 5, [False] * 3 + [True] * 2]).view(-1)  # of HEADS

pytestmark = pytest.mark.usefixtures("float64")
# Also those with quantiles, whose targets are several numbers for each sample
each_of_all = pytest.mark.parametrize(("algorithm", "kwargs"), VARIANTS.values(), ids=VARIANTS)
each_variant = pytest.mark.parametrize(("algorithm", "kwargs"), SCALAR_VARIANTS.values(), ids=SCALAR_VARIANTS)
each_factorisation = pytest.mark.parametrize("factorisation", ["sum", "independent"])
each_space = pytest.mark.parametrize("action_space", SPACES.values(), ids=SPACES)


def make_plain(algorithm, env, **kwargs):
    """A model as it begins."""
    return make_model(algorithm, env, policy_kwargs=dict(net_arch=[16], features_extractor_class=Float64Extractor), **kwargs)


def make(algorithm, action_space=HEADS, rows=60, policy_kwargs=None, env=None, **kwargs):
    """A model with random transitions, whose networks differ."""
    policy_kwargs = dict(net_arch=[16], features_extractor_class=Float64Extractor) | (policy_kwargs or {})
    options = dict(temperature=TEMPERATURE, gamma=GAMMA, exploration="eps_greedy", policy_kwargs=policy_kwargs)
    if has_parameter(algorithm, "munchausen_clip"):
        options.update(munchausen_alpha=ALPHA, munchausen_clip=CLIP)
    model = make_model(algorithm, env or RecordedEnv(action_space), **{**options, **kwargs})
    generator = th.Generator().manual_seed(1)
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter += 0.3 * th.randn(parameter.shape, generator=generator)
    fill_buffer(model, rows)
    return model


def sample(model, n=40):
    set_random_seed(3)
    return model._sample(n)


def targets_and_losses(model, replay_data):
    with th.no_grad():
        targets, _ = model._compute_targets(replay_data)
        return targets, model._compute_loss(replay_data, targets)[0]


# ---------------------------------------------------------------------- one head is a Discrete space


@each_of_all
@each_factorisation
@pytest.mark.parametrize("exploration", ["boltzmann", "boltzmann_eps"])
def test_one_head_is_a_discrete_space(algorithm, kwargs, factorisation, exploration):
    kwargs = dict(kwargs, exploration=exploration, factorisation=factorisation, n_steps=2, learning_starts=0, train_freq=2)
    learned = []
    for space in (spaces.Discrete(4), spaces.MultiDiscrete([4])):
        model = make_plain(algorithm, RecordedEnv(space), **{"temperature": TEMPERATURE, **kwargs})
        # A space samples its actions in its own way: those of epsilon are taken from the other space
        draws = spaces.Discrete(4, seed=0)
        model.action_space.sample = lambda draws=draws, shape=space.shape: np.full(shape, draws.sample())
        model.learn(80)
        learned.append((snapshot(model), model.replay_buffer.actions[:80].squeeze()))
    assert_same(learned[0][0], learned[1][0])
    assert learned[0][1].tolist() == learned[1][1].tolist() and len(set(learned[0][1].tolist())) == 4


@each_factorisation
def test_one_head_answers_as_a_discrete_space(algorithm, factorisation):
    one, discrete = (
        make(algorithm, space, factorisation=factorisation) for space in (spaces.MultiDiscrete([4]), spaces.Discrete(4))
    )
    observations = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    for name in ("q_values", "action_probs", "soft_value"):
        np.testing.assert_array_equal(getattr(one, name)(observations), getattr(discrete, name)(observations))
    ours, theirs = (model.predict(observations, deterministic=True)[0] for model in (one, discrete))
    assert ours.shape == (6, 1) and theirs.shape == (6,) and ours[:, 0].tolist() == theirs.tolist()


@each_of_all
@each_factorisation
def test_bits_are_heads_of_two(algorithm, kwargs, factorisation):
    learned = []
    for space in (spaces.MultiBinary(3), spaces.MultiDiscrete([2, 2, 2])):
        model = make(algorithm, space, factorisation=factorisation, n_steps=2, **kwargs)
        for name in ("actions", "observations", "next_observations"):  # of the one as of the other
            rng = np.random.default_rng(0)
            array = getattr(model.replay_buffer, name)
            array[:] = rng.integers(2, size=array.shape) if name == "actions" else rng.normal(size=array.shape)
        set_random_seed(0)
        model.train(gradient_steps=5, batch_size=16)
        learned.append(snapshot(model))
    assert_same(*learned)


# ---------------------------------------------------------------------- heads against a table of all joint actions


def tables(model, estimates, valid, actions):
    """
    One state as Discrete problems: of all valid joint actions, or of each independent head's.

    :param estimates: rows of the state's heads
    :param valid: valid actions of each head
    :param actions: the taken ones
    :return: for each problem the estimates of its single row, and the index of the taken action
    """
    if model.factorisation == "independent":
        for head, (columns, action) in enumerate(zip(valid, actions, strict=True)):
            yield tuple(rows[head, columns][None] for rows in estimates), columns.index(action)
        return
    joint = list(itertools.product(*valid))
    yield (
        tuple(
            th.stack([sum(rows[head, column] for head, column in enumerate(one)) for one in joint])[None] for rows in estimates
        ),
        joint.index(tuple(actions)),
    )


class AsDiscrete:
    """A model of Discrete actions for as long as it is asked about a table."""

    def __init__(self, model, n_actions):
        self.model, self.layout, self.n_actions = model, model.layout, n_actions

    def __enter__(self):
        self.model.layout = ActionLayout(spaces.Discrete(self.n_actions))

    def __exit__(self, *_):
        self.model.layout = self.layout


def brute_force(model, replay_data, masks, next_masks):
    """One-step targets, and what the hooks say at s: of every state's tables, without a mask."""
    targets, numbers = [], []
    layout = model.layout

    def columns(mask):
        if mask is None:
            return [list(range(size)) for size in layout.sizes]
        return [
            [a for a in range(size) if row[a]] for size, row in zip(layout.sizes, mask.view(-1, layout.width), strict=True)
        ]

    def of_state(obs, mask, actions):
        valid = columns(mask)
        actions = [head[0] for head in valid] if actions is None else actions
        found = []
        for rows, action in tables(model, model._estimates(obs[None]), valid, actions):
            with AsDiscrete(model, rows[0].shape[1]):
                index = th.tensor([[action]])
                policy, q_values = model._policy_and_q_values(rows, None)
                bonus = model._bonus(rows, index, None)[0].item() if model._has_bonus else 0.0
                entropy = operators.entropy(rows[0], model.current_temperature, None).item()
                found.append(
                    dict(
                        value=model._value(rows, None).item(),
                        regularisation=model._regularisation(rows, None).item(),
                        log_probability=policy[0, action].log().item(),
                        q_value=q_values[0, action].item(),
                        bonus=bonus,
                        entropy=entropy,
                    )
                )
        return found

    for i in range(len(replay_data.actions)):
        now = of_state(replay_data.observations[i], masks and masks[i], replay_data.actions[i].tolist())
        then = of_state(replay_data.next_observations[i], next_masks and next_masks[i], None)
        for state, next_state in zip(now, then, strict=True):
            reward, done = replay_data.rewards[i].item(), replay_data.dones[i].item()
            targets.append(reward + state["bonus"] + GAMMA * (1 - done) * next_state["value"])
            numbers.append(state)
    return targets, {name: [state[name] for state in numbers] for name in numbers[0]}


def random_masks(model, replay_data, seed):
    """Masks under which the taken actions are valid."""
    layout, rng = model.layout, np.random.default_rng(seed)
    masks = rng.random((len(replay_data.actions), layout.n_heads, layout.width)) < 0.5
    for i, actions in enumerate(replay_data.actions.tolist()):
        masks[i, np.arange(layout.n_heads), actions] = True
    if layout.used is not None:
        masks &= layout.used.numpy()
    return th.as_tensor(masks).flatten(start_dim=1)


@each_variant
@each_factorisation
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@each_space
def test_heads_are_a_table_of_the_joint_actions(algorithm, kwargs, factorisation, masked, action_space):
    model = make(algorithm, action_space, factorisation=factorisation, **kwargs)
    replay_data = sample(model, 12)
    masks = next_masks = None
    if masked:
        masks, next_masks = (random_masks(model, replay_data, seed) for seed in (0, 1))
        replay_data = model._extend(replay_data._replace(extras=dict(action_masks=masks, next_action_masks=next_masks)))
    with th.no_grad():
        expected, numbers = brute_force(model, replay_data, *(None if m is None else list(m) for m in (masks, next_masks)))
        targets = model._compute_targets(replay_data)[0].squeeze(1)
        estimates, mask = model._estimates(replay_data.observations), model._mask_rows(replay_data)
        policy, q_values = model._policy_and_q_values(estimates, mask)
        actions = model.layout.action_rows(replay_data.actions)
        found = dict(
            value=model._joint(model._value(estimates, mask)),
            regularisation=model._joint(model._regularisation(estimates, mask)),
            log_probability=model._joint(policy.gather(1, actions).log()),
            q_value=model._joint(q_values.gather(1, actions)),
            entropy=model._joint(operators.entropy(estimates[0], model.current_temperature, mask)),
        )
        if model._has_bonus:
            found["bonus"] = model._bonus(estimates, actions, mask)[0]
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor.squeeze(1), numbers[name], err_msg=name, **ROUNDING)
    # Discounts and dones are in the float32 of the buffer
    np.testing.assert_allclose(targets, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.05, 3.0])
def test_operators_of_the_sum_are_sums_over_heads(temperature):
    # By hand, over all 30 joint actions
    rng = np.random.default_rng(0)
    heads = [rng.normal(size=size) for size in HEADS.nvec]
    layout = ActionLayout(HEADS)
    flat = th.full((1, 15), 1e6)
    flat[0, layout.columns] = th.as_tensor(np.concatenate(heads))
    rows, mask = layout.rows(flat), layout.mask_rows(None, 1)
    joint = [sum(values) for values in itertools.product(*heads)]
    assert len(joint) == 30
    best = max(joint)
    weights = [math.exp((q - best) / temperature) if temperature else float(q == best) for q in joint]
    soft = best + temperature * math.log(sum(weights))
    policy = [weight / sum(weights) for weight in weights]
    average = sum(probability * q for probability, q in zip(policy, joint, strict=True))
    entropy = -sum(probability * math.log(probability) for probability in policy if probability > 0)
    expected = {
        operators.soft_value: soft,
        operators.mellowmax: soft - temperature * math.log(30),
        operators.boltzmann_value: average,
        operators.entropy: entropy,
    }
    for operator, number in expected.items():
        assert operator(rows, temperature, mask).sum().item() == pytest.approx(number, rel=1e-10, abs=1e-12), operator
    # The log-policy of a joint action, taken by taken
    log_policy = operators.scaled_log_policy(rows, temperature, mask)
    for action, q in zip(itertools.product(*(range(size) for size in HEADS.nvec)), joint, strict=True):
        found = sum(log_policy[head, a].item() for head, a in enumerate(action))
        assert found == pytest.approx(q - soft, rel=1e-10, abs=1e-12)


@each_variant
def test_loss_of_the_sum_is_that_of_the_joint_value(algorithm, kwargs):
    model = make(algorithm, **kwargs)
    replay_data = sample(model)
    wanted = th.randn(40, 1)
    losses, values = model._compute_loss(replay_data, wanted)
    assert losses.shape == (40, 1) and values.shape == (120, 5) and losses.requires_grad and not values.requires_grad
    if algorithm in (SoftDQN, MunchausenDQN, SQN):
        networks = getattr(model.q_net, "networks", [model.q_net])
        heads = range(3)
        expected = th.zeros(40)
        for network in networks:
            q_values = network(replay_data.observations).view(40, 3, 5)
            taken = sum(q_values[th.arange(40), head, replay_data.actions[:, head]] for head in heads)
            expected = expected + (F.mse_loss if algorithm is SQN else F.smooth_l1_loss)(taken, wanted[:, 0], reduction="none")
        np.testing.assert_allclose(losses.detach().squeeze(1), expected.detach(), **ROUNDING)


@each_variant
@pytest.mark.parametrize("n_steps", [1, 3])
def test_independent_heads_are_agents_of_their_own(algorithm, kwargs, n_steps):
    # Each head alone, as the Discrete model of its columns of the last layer: its targets, its losses; their mean is the loss
    model = make(algorithm, factorisation="independent", n_steps=n_steps, **kwargs)
    replay_data = sample(model)
    targets, losses = targets_and_losses(model, replay_data)
    assert targets.shape == losses.shape == (120, 1)
    for head, size in enumerate(HEADS.nvec):
        alone = make(algorithm, spaces.Discrete(int(size)), n_steps=n_steps, **kwargs)
        rows = slice(5 * head, 5 * head + int(size))
        with th.no_grad():
            for ours, theirs in zip(alone.policy.parameters(), model.policy.parameters(), strict=True):
                ours.copy_(theirs if ours.shape == theirs.shape else theirs[rows])
        data = replay_data._replace(actions=replay_data.actions[:, head : head + 1])
        if n_steps > 1:
            data = data._replace(steps=dict(data.steps, actions=data.steps["actions"][:, :, head : head + 1]))
        own_targets, own_losses = targets_and_losses(alone, data)
        np.testing.assert_allclose(targets.view(40, 3)[:, head], own_targets[:, 0], **ROUNDING)
        np.testing.assert_allclose(losses.view(40, 3)[:, head], own_losses[:, 0], **ROUNDING)


# ---------------------------------------------------------------------- unused values


def last_layers(model):
    """Parameters with a row for each value of HEADS."""
    return [parameter for parameter in model.policy.parameters() if len(parameter) == 15]


@each_variant
@each_factorisation
@pytest.mark.parametrize(
    "options", [{}, dict(n_steps=3), dict(n_steps=3, tree_backup=True), dict(policy_kwargs=dict(dueling=True))]
)
def test_unused_values_change_nothing(algorithm, kwargs, factorisation, options):
    model = make(algorithm, factorisation=factorisation, **options, **kwargs)
    replay_data = sample(model)
    observations = replay_data.observations.numpy()

    def everything():
        set_random_seed(0)
        return dict(
            zip(("targets", "losses"), targets_and_losses(model, replay_data), strict=True),
            q_values=th.as_tensor(model.q_values(observations)),
            action_probs=th.as_tensor(model.action_probs(observations)),
            soft_value=th.as_tensor(model.soft_value(observations)),
            greedy=th.as_tensor(model.predict(observations, deterministic=True)[0]),
            policy=th.as_tensor(model.policy.predict(observations)[0]),
            sampled=model._sample_policy(*model._acting_rows(model.policy.acting_values(replay_data.observations), None)),
        )

    before = everything()
    for value in (1e6, -1e6):
        with th.no_grad():
            for parameter in last_layers(model):
                parameter[UNUSED] = value
        assert len(last_layers(model)) >= 4
        assert_same(everything(), before)


@each_variant
@each_factorisation
@pytest.mark.parametrize("dueling", [False, True])
def test_unused_values_have_no_gradient(algorithm, kwargs, factorisation, dueling):
    model = make(algorithm, factorisation=factorisation, policy_kwargs=dict(dueling=dueling), **kwargs)
    replay_data = sample(model)
    targets, _ = targets_and_losses(model, replay_data)
    model._compute_loss(replay_data, targets)[0].mean().backward()
    layers = [parameter for parameter in last_layers(model) if parameter.grad is not None]
    for parameter in layers:
        assert (parameter.grad[UNUSED] == 0).all() and (parameter.grad[~UNUSED] != 0).any()
    assert len(layers) >= 2


@each_variant
@each_factorisation
def test_unused_values_stay_as_they_are(algorithm, kwargs, factorisation):
    model = make(algorithm, factorisation=factorisation, **kwargs)
    before = [parameter[UNUSED].clone() for parameter in last_layers(model)]
    model.train(gradient_steps=5, batch_size=16)
    assert_same([parameter[UNUSED] for parameter in last_layers(model)], before)


@each_factorisation
def test_dueling_heads_have_streams_of_their_own(algorithm, factorisation):
    model = make(algorithm, factorisation=factorisation, policy_kwargs=dict(dueling=True, net_arch=[8, 8]))
    network = getattr(model.q_net, "networks", [model.q_net])[0]
    observations = th.randn(6, 4).float().double()  # the network is given float32
    if algorithm is MunchausenIQN:
        return  # its streams see features times an embedding; the head is the same module
    head = network.q_net[-1]
    features = network.q_net[:-1](observations)
    values, advantages = head.value(features), head.advantage(features).view(6, 3, 5)
    q_values = network(observations).view(6, 3, 5)
    for i, size in enumerate(HEADS.nvec):
        own = advantages[:, i, :size]
        expected = values[:, i : i + 1] + own - own.mean(dim=1, keepdim=True)
        th.testing.assert_close(q_values[:, i, :size], expected, **ROUNDING)


# ---------------------------------------------------------------------- acting


@each_space
@pytest.mark.parametrize("exploration", ["boltzmann", "eps_greedy", "boltzmann_eps"])
def test_shapes_and_types(algorithm, action_space, exploration):
    model = make(algorithm, action_space, exploration=exploration)
    model.exploration_rate = 0.5
    n_heads, n_flat = len(head_sizes(action_space)), sum(head_sizes(action_space))
    observations = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    for deterministic in (True, False):
        actions, _ = model.predict(observations, deterministic=deterministic)
        assert actions.shape == (7, n_heads) and actions.dtype == action_space.dtype
        single, _ = model.predict(observations[0], deterministic=deterministic)
        assert single.shape == (n_heads,) and single.dtype == action_space.dtype
        for action in (*actions, single):
            assert action_space.contains(action)
    best = model.policy.predict(observations)[0]
    assert best.shape == (7, n_heads) and best.tolist() == model.predict(observations, deterministic=True)[0].tolist()
    for name in ("q_values", "action_probs"):
        function = getattr(model, name)
        assert function(observations).shape == (7, n_flat) and function(observations[0]).shape == (n_flat,)
        np.testing.assert_allclose(function(observations)[0], function(observations[0]), rtol=1e-9)
    assert model.soft_value(observations).shape == (7,) and model.soft_value(observations[0]).shape == ()
    splits = np.cumsum(head_sizes(action_space))[:-1]
    for head in np.split(model.action_probs(observations), splits, axis=1):
        np.testing.assert_allclose(head.sum(axis=1), 1.0)


@each_factorisation
def test_greedy_action_is_the_best_joint_action(algorithm, factorisation):
    model = make(algorithm, factorisation=factorisation)
    observations = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    with th.no_grad():
        values = model.layout.flat(model.policy.acting_values(th.as_tensor(observations))).numpy()
    for value, action in zip(values, model.predict(observations, deterministic=True)[0], strict=True):
        heads = np.split(value, [2, 7])
        joint = {
            one: sum(head[a] for head, a in zip(heads, one, strict=True)) for one in itertools.product(*map(range, HEADS.nvec))
        }
        assert max(joint, key=joint.get) == tuple(action)


def test_boltzmann_draws_by_the_probabilities(algorithm):
    model = make(algorithm, exploration="boltzmann", temperature=0.5)
    observation, n = np.full(4, 0.3, np.float32), 4000
    actions, _ = model.predict(np.tile(observation, (n, 1)))
    for head, expected in enumerate(np.split(model.action_probs(observation), [2, 7])):
        np.testing.assert_allclose(np.bincount(actions[:, head], minlength=len(expected)) / n, expected, atol=0.04)
    # Heads are drawn one by one: the joint probability is the product
    both = ((actions[:, 0] == 1) & (actions[:, 2] == 2)).mean()
    assert both == pytest.approx((actions[:, 0] == 1).mean() * (actions[:, 2] == 2).mean(), abs=0.03)


def test_epsilon_is_thrown_for_each_environment(algorithm):
    model = make(algorithm)
    model.exploration_rate = 0.5
    observations = np.tile(np.full(4, 0.3, np.float32), (4000, 1))
    best = model.predict(observations[:1], deterministic=True)[0]
    actions, _ = model.predict(observations)
    # Half of the joint actions are the best one, and one of thirty of the others
    assert (actions == best).all(axis=1).mean() == pytest.approx(0.5 + 0.5 / 30, abs=0.04)


# ---------------------------------------------------------------------- training


class Records(KVWriter):
    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append(dict(key_values))

    def close(self):
        pass


@each_variant
@each_factorisation
@each_space
def test_trains_and_logs(algorithm, kwargs, factorisation, action_space):
    env = DummyVecEnv([lambda: RecordedEnv(action_space)] * 2)
    records = Records()
    model = make_plain(algorithm, env, factorisation=factorisation, n_steps=2, train_freq=2, **kwargs)
    model.set_logger(Logger(None, [records]))
    before = snapshot(model)
    model.learn(120, log_interval=1)
    assert not is_same(before["policy"], snapshot(model)["policy"])
    logged = {name: value for row in records.rows for name, value in row.items() if name.startswith("train/")}
    assert len(logged) >= 7 and all(np.isfinite(value) for value in logged.values()), logged
    assert 0 <= logged["train/entropy_fraction"] <= 1 + 1e-6 and logged.get("train/action_gap", 0) >= 0
    taken = np.array([step["action"] for history in env.get_attr("history") for step in history])
    assert all(action_space.contains(action.astype(action_space.dtype)) for action in taken)


@each_variant
@each_factorisation
def test_training_is_the_plain_loop(algorithm, kwargs, factorisation):
    options = dict(learning_rate=0.01, tau=0.3, target_update_interval=1, factorisation=factorisation)
    assert_trains_as_the_plain_loop(*(make(algorithm, **options, **kwargs) for _ in range(2)))


@each_variant
def test_metrics_are_means_over_heads(algorithm, kwargs):
    if algorithm is MomentumDQN:
        kwargs = dict(temperature=0.3, **kwargs)  # without one it has no entropy
    model = make(algorithm, learning_rate=0.0, **kwargs)
    set_random_seed(0)
    model.train(gradient_steps=1, batch_size=50)
    logged = model.logger.name_to_value
    set_random_seed(0)
    observations = model._sample(50).observations
    with th.no_grad():
        values = np.split(model.layout.flat(model.policy.acting_values(observations)).numpy(), [2, 7], axis=1)
    probabilities = np.split(model.action_probs(observations.numpy()), [2, 7], axis=1)
    entropy = np.mean([-(p * np.log(p)).sum(axis=1).mean() for p in probabilities])
    gaps = [np.diff(np.sort(v, axis=1)[:, -2:], axis=1).mean() for v in values]
    assert logged["train/entropy"] == pytest.approx(entropy, rel=1e-6)
    assert logged["train/entropy_fraction"] == pytest.approx(entropy / np.log([2, 5, 3]).mean(), rel=1e-6)
    assert ("train/action_gap" in logged) == model.acts_on_q_values
    if not model.acts_on_q_values:
        return
    assert logged["train/action_gap"] == pytest.approx(np.mean(gaps), rel=1e-6)
    assert logged["train/q_value_mean"] == pytest.approx(np.concatenate(values, axis=1).mean(), rel=1e-6)


LEARNED = [algorithm for algorithm in VALUE_BASED.values() if algorithm.learns_temperature]


@pytest.mark.parametrize("algorithm", LEARNED)
def test_target_entropy_is_a_fraction_of_the_heads(algorithm):
    mean_log = (math.log(2) + math.log(5) + math.log(3)) / 3
    for fraction, expected in (("auto", 0.5), ("auto_0.3", 0.3)):
        model = make(algorithm, temperature="auto", target_entropy=fraction)
        assert model.temperature_module.target_entropy == pytest.approx(expected * mean_log)
    make(algorithm, temperature="auto", target_entropy=1.0)
    with pytest.raises(ValueError, match=r"at most the mean of the logs of \[2, 5, 3\] = 1.134 nats"):
        make(algorithm, temperature="auto", target_entropy=1.2)
    # The direction in which it moves
    for fraction, rises in (("auto_0.0", False), ("auto_1.0", True)):
        model = make(algorithm, temperature="auto_0.5", target_entropy=fraction)
        model.train(gradient_steps=3, batch_size=16)
        assert (float(model.current_temperature) > 0.5) == rises


@pytest.mark.parametrize("factorisation", ["sum", "independent"])
@each_space
def test_saved_and_loaded(algorithm, factorisation, action_space, tmp_path):
    model = make_plain(algorithm, RecordedEnv(action_space), factorisation=factorisation).learn(60)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = algorithm.load(tmp_path / "model", env=RecordedEnv(action_space), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded.factorisation == factorisation
    assert_same(snapshot(model), snapshot(loaded))
    observations = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    for name in ("q_values", "action_probs", "soft_value"):
        np.testing.assert_allclose(getattr(loaded, name)(observations), getattr(model, name)(observations), rtol=1e-12)
    model.policy.save(tmp_path / "policy")
    policy = type(model.policy).load(tmp_path / "policy", device="cpu")
    assert policy.predict(observations)[0].tolist() == model.predict(observations, deterministic=True)[0].tolist()
    loaded.learn(40, reset_num_timesteps=False)


LEARNING = dict(
    learning_rate=0.02,
    learning_starts=64,
    batch_size=64,
    buffer_size=2000,
    gamma=0.0,
    train_freq=4,
    temperature=0.05,
    target_update_interval=50,
    exploration="boltzmann_eps",
    exploration_fraction=0.5,
    policy_kwargs=dict(net_arch=[]),
)


@each_factorisation
@pytest.mark.parametrize("env_class", [IdentityEnvMultiDiscrete, IdentityEnvMultiBinary])
def test_identity_is_learned(algorithm, env_class, factorisation):
    th.set_default_dtype(th.float32)
    env = env_class(2, ep_length=20)
    env.action_space.seed(0)
    # The values of gap-increasing algorithms, and quantiles, take longer to grow
    slow = has_parameter(algorithm, "n_quantiles") or algorithm in (DPP, CVI)
    few = dict(n_quantiles=4, n_target_quantiles=4, n_policy_quantiles=4) if has_parameter(algorithm, "n_quantiles") else {}
    model = make_model(algorithm, env, factorisation=factorisation, **LEARNING, **few).learn(4000 if slow else 800)
    reward, _ = evaluate_policy(model, env_class(2, ep_length=20), n_eval_episodes=5, warn=False)
    assert reward == 20


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("action_space", "message"),
    [
        (spaces.MultiDiscrete([[2, 3], [4, 2]]), "Actions must be vectors.*to flatten them"),
        (spaces.MultiBinary((3, 2)), "Actions must be vectors.*to flatten them"),
        (spaces.MultiDiscrete([2, 3], start=[0, 1]), "Actions must start at 0"),
        (spaces.Discrete(3, start=1), "Actions must start at 0"),
        (spaces.Box(-1.0, 1.0, (2,)), "takes Discrete, MultiDiscrete or MultiBinary actions"),
        (spaces.Tuple([spaces.Discrete(2)]), "takes Discrete, MultiDiscrete or MultiBinary actions|not supported"),
    ],
)
def test_action_spaces_that_are_refused(algorithm, action_space, message):
    class Env(RecordedEnv):
        pass

    with pytest.raises((ValueError, AssertionError), match=re.compile(message, re.DOTALL)):
        make_model(algorithm, Env(action_space))


def test_heads_of_a_registered_environment_pass_gymnasiums_checks(algorithm):
    class Checked(gym.Wrapper):
        def step(self, action):
            assert self.action_space.contains(action), (action, action.dtype)
            return self.env.step(action)

    for action_space in SPACES.values():
        make_plain(algorithm, Checked(RecordedEnv(action_space, VECTOR))).learn(40)
