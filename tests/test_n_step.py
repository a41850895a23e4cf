"""
n-step returns that carry their regularisation, against a slow loop over what the environments did.

Networks are in float64, so that equal means equal to rounding.
"""

import itertools
import math
import shutil

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import (
    SCALAR_VARIANTS,
    VECTOR,
    Float64Extractor,
    MaskedEnv,
    RecordedEnv,
    assert_same,
    fill_buffer,
    has_parameter,
    is_same,
    make_model,
    snapshot,
)
from plain_loop import assert_trains_as_the_plain_loop
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.torch_layers import CombinedExtractor
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_softq import DPP, SQN, MirrorDescentDQN, MomentumDQN, MunchausenDQN, MunchausenIQN, SACDiscrete, SoftDQN
from sb3_softq.actions import TerminalActionMasks
from sb3_softq.replay import Samples

GAMMA, TEMPERATURE, ALPHA, CLIP = 0.9, 0.3, 0.7, -0.2
ROUNDING = dict(rtol=1e-10, atol=1e-10)
DICT = spaces.Dict(vector=VECTOR, number=spaces.Discrete(4))
HEADS = spaces.MultiDiscrete([2, 5, 3])

pytestmark = pytest.mark.usefixtures("float64")
each_variant = pytest.mark.parametrize(("algorithm", "kwargs"), SCALAR_VARIANTS.values(), ids=SCALAR_VARIANTS)
# DPP has exact values only where its gaps are bounded: otherwise its preferences fall for ever
CONTRACTIONS = {name: variant for name, variant in SCALAR_VARIANTS.items() if variant[0] is not DPP}
for operator in ("boltzmann", "logsumexp"):
    CONTRACTIONS[f"dpp-{operator}"] = (DPP, dict(operator=operator, gap_clip=-1.0))
    CONTRACTIONS[f"dpp-{operator}-q"] = (DPP, dict(operator=operator, gap_clip=-1.0, parametrisation="q"))
# Whether a class with the other form of its greedy step, of its critics or of its parametrisation has other targets
FORMS = {
    **SCALAR_VARIANTS,
    "dpp-logsumexp": (DPP, dict(operator="logsumexp", gap_clip=-0.2)),
    "dpp-q": (DPP, dict(parametrisation="q")),
    "mddqn-dual": (MirrorDescentDQN, dict(greedy_step="dual_averaging")),
    "mddqn-without": (MirrorDescentDQN, dict(regularised_evaluation=False)),
    "sacd-average": (SACDiscrete, dict(average_q=True, ent_coef=0.1)),
}
each_form = pytest.mark.parametrize(("algorithm", "kwargs"), FORMS.values(), ids=FORMS)
each_contraction = pytest.mark.parametrize(("algorithm", "kwargs"), CONTRACTIONS.values(), ids=CONTRACTIONS)


class Float64Combined(CombinedExtractor):
    """Float64 from the observations on."""

    def forward(self, observations):
        return super().forward({key: value.double() for key, value in observations.items()})


def make(algorithm, env, n_steps=3, steps=0, seed=1, **kwargs):
    """A model whose networks differ, with that many transitions of random actions, and no update."""
    is_dict = isinstance(env.observation_space, spaces.Dict)
    options = dict(temperature=TEMPERATURE, exploration="eps_greedy", learning_starts=10**6, gamma=GAMMA)
    if has_parameter(algorithm, "munchausen_clip"):
        options.update(munchausen_alpha=ALPHA, munchausen_clip=CLIP)
    policy_kwargs = dict(net_arch=[16], features_extractor_class=Float64Combined if is_dict else Float64Extractor)
    options.update(policy_kwargs=policy_kwargs, n_steps=n_steps)
    model = make_model(algorithm, env, "MultiInputPolicy" if is_dict else "MlpPolicy", **{**options, **kwargs})
    generator = th.Generator().manual_seed(seed)
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter += 0.3 * th.randn(parameter.shape, generator=generator)
    if steps:
        model.learn(steps)
    return model


def make_env(action_space=None, n_envs=1, masked=False, normalise=False, **kwargs):
    env_class = MaskedEnv if masked else RecordedEnv

    def make_one():
        env = env_class(action_space or spaces.Discrete(3), **kwargs)
        return TerminalActionMasks(env) if masked else env

    env = DummyVecEnv([make_one] * n_envs)
    return VecNormalize(env, gamma=GAMMA) if normalise else env


# ---------------------------------------------------------------------- the slow loop


def key_of(obs):
    vector = obs["vector"] if isinstance(obs, dict) else obs
    return np.asarray(vector, dtype=np.float32).tobytes()


class SlowLoop:
    """
    Targets of segments, step by step, from the histories of the environments and the hooks of the model.

    :param model: the model
    :param env: its environments, which kept their histories
    """

    def __init__(self, model, env):
        self.model, self.numbers = model, {}
        self.normalise = env if isinstance(env, VecNormalize) else None
        self.steps = {}  # first observation -> (history, position), of what is still in the buffer
        for history in env.get_attr("history"):
            history = history[-model.replay_buffer.size() :]
            self.steps |= {key_of(step["obs"]): (history, i) for i, step in enumerate(history)}

    def segment(self, obs):
        """The steps that a segment consists of."""
        history, i = self.steps[key_of(obs)]
        steps = []
        for step in history[i : i + self.model.n_steps]:
            steps.append(step)
            if step["terminated"] or step["truncated"]:
                break
        return steps

    def of_state(self, obs, mask, action=None):
        """Value, regularisation, bonus, and of the action its probability and value, each as a list over the targets."""
        model, layout = self.model, self.model.layout
        if self.normalise is not None:
            obs = self.normalise.normalize_obs(obs)
        tensor = model.policy.obs_to_tensor(obs)[0]
        rows, start = [], 0
        for size in layout.sizes:  # the mask of each head, filled up to the widest
            valid = [True] * size if mask is None else [bool(value) for value in mask[start : start + size]]
            rows.append(valid + [False] * (layout.width - size))
            start += size
        mask_rows = th.tensor(rows)
        with th.no_grad():
            estimates = model._estimates(tensor)
            policy, q_values = model._policy_and_q_values(estimates, mask_rows)
            numbers = dict(value=model._value(estimates, mask_rows), omega=model._regularisation(estimates, mask_rows))
            if action is not None:
                actions = th.as_tensor(action).long().reshape(-1, 1)
                numbers.update(log_probability=policy.gather(1, actions).log(), q_value=q_values.gather(1, actions))
            numbers = {name: self.fold(tensor.squeeze(1).tolist()) for name, tensor in numbers.items()}
            if action is not None:
                numbers["bonus"] = self.targets(0.0)
                if model._has_bonus:
                    numbers["bonus"] = model._bonus(estimates, actions, mask_rows)[0].squeeze(1).tolist()
        return {name: np.array(values) for name, values in numbers.items()}

    def fold(self, heads):
        return [sum(heads)] if self.model.factorisation == "sum" else heads

    def targets(self, number):
        return np.full(1 if self.model.factorisation == "sum" else self.model.layout.n_heads, number)

    def target(self, obs):
        steps = self.segment(obs)
        last = steps[-1]
        bootstrap = self.targets(0.0)
        if not last["terminated"]:
            bootstrap = self.of_state(last["next_obs"], last["next_mask"])["value"]
        states = [self.of_state(step["obs"], step["mask"], step["action"]) for step in steps]
        rewards = [step["reward"] for step in steps]
        if self.normalise is not None:
            rewards = [float(np.float32(self.normalise.normalize_reward(np.float32(reward)))) for reward in rewards]
        if self.model.tree_backup:
            return self.tree_backup(rewards, states, bootstrap)
        # sum_k gamma^k (r_k + bonus_k), the regularisation of every state but the first, and the bootstrap
        total = self.targets(0.0)
        for k, (reward, state) in enumerate(zip(rewards, states, strict=True)):
            total = total + GAMMA**k * (reward + state["bonus"] + (state["omega"] if k > 0 else 0.0))
        return total + GAMMA ** len(steps) * bootstrap

    def tree_backup(self, rewards, states, bootstrap):
        # Precup, Sutton and Singh 2000, from the first step on: what was expected and not taken counts with its estimate
        first, *others = zip(rewards, states, strict=True)
        total = first[0] + first[1]["bonus"]
        weight = self.targets(GAMMA)
        for reward, state in others:
            probability = np.exp(state["log_probability"])
            total = total + weight * (state["value"] - probability * state["q_value"])
            weight = weight * probability
            total = total + weight * (reward + state["bonus"])
            weight = weight * GAMMA
        return total + weight * bootstrap


CASES = {
    "plain": ({}, {}, 60),
    "full buffer": ({}, dict(buffer_size=40), 110),
    "several environments": (dict(n_envs=3), dict(buffer_size=90), 150),
    "one long episode": (dict(end=0.0), dict(buffer_size=20), 33),
    "two steps": ({}, dict(n_steps=2), 60),
    "more steps than transitions": (dict(end=0.0), dict(n_steps=8), 6),
    "dict": (dict(observation_space=DICT), {}, 60),
    "normalised": (dict(normalise=True, n_envs=2), {}, 60),
    "masks": (dict(masked=True, n_envs=2), dict(buffer_size=60), 100),
    "heads": (dict(action_space=HEADS), {}, 60),
    "independent heads": (dict(action_space=HEADS, n_envs=2), dict(factorisation="independent"), 60),
    "bits": (dict(action_space=spaces.MultiBinary(3)), {}, 60),
    "masked heads": (dict(action_space=HEADS, masked=True), {}, 60),
    "masked independent heads and dict": (
        dict(action_space=HEADS, masked=True, observation_space=DICT, n_envs=2),
        dict(factorisation="independent", buffer_size=50),
        80,
    ),
}


def rows_of(observations):
    """A list of single observations from a batch."""
    if isinstance(observations, dict):
        rows = [rows_of(value) for value in observations.values()]
        return [dict(zip(observations, row, strict=True)) for row in zip(*rows, strict=True)]
    return list(observations.numpy())


def check_against_slow_loop(model, env, n=40):
    vec_normalize = env if isinstance(env, VecNormalize) else None
    set_random_seed(3)
    observations = rows_of(model.replay_buffer.sample(n).observations)
    set_random_seed(3)
    replay_data = model._extend(model.replay_buffer.sample(n, env=vec_normalize))
    loop = SlowLoop(model, env)
    expected = np.concatenate([loop.target(obs) for obs in observations])
    # SB3 normalises the last observation of an episode and takes that back, in float32
    tolerance = ROUNDING if vec_normalize is None else dict(rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(targets_of(model, replay_data), expected, **tolerance)
    assert len({len(loop.segment(obs)) for obs in observations}) > 1, "some segments are cut"


def targets_of(model, replay_data):
    with th.no_grad():
        return model._compute_targets(replay_data)[0].squeeze(1).numpy()


@each_form
@pytest.mark.parametrize("tree_backup", [False, True], ids=["plain", "tree"])
@pytest.mark.parametrize(("env_kwargs", "options", "steps"), CASES.values(), ids=CASES)
def test_targets_are_those_of_a_slow_loop(algorithm, kwargs, env_kwargs, options, steps, tree_backup):
    env = make_env(**env_kwargs)
    model = make(algorithm, env, steps=steps, tree_backup=tree_backup, **{**options, **kwargs})
    check_against_slow_loop(model, env)


# ---------------------------------------------------------------------- plain numbers, without the model's hooks


def log_sum_exp(values):
    return TEMPERATURE * math.log(sum(math.exp(value / TEMPERATURE) for value in values))


def slow_numbers(model, algorithm, double_q, obs, action=0):
    """Value, regularisation, bonus, and of the action its probability and value: in plain Python, of Discrete actions."""

    def rows(network):
        return [row.tolist() for row in network(th.as_tensor(obs)[None]).detach().reshape(-1, 3)]

    (values,) = (
        [[min(pair) for pair in zip(*rows(model.q_net_target), strict=True)]] if algorithm is SQN else rows(model.q_net_target)
    )
    preferences = rows(model.q_net)[0] if double_q else values
    probabilities = [math.exp((value - log_sum_exp(preferences)) / TEMPERATURE) for value in preferences]
    entropy = -sum(probability * math.log(probability) for probability in probabilities)
    average = sum(probability * value for probability, value in zip(probabilities, values, strict=True))
    bonus = 0.0
    if algorithm is MunchausenDQN:
        bonus = ALPHA * max(values[action] - log_sum_exp(values), CLIP)
    omega = TEMPERATURE * entropy
    return dict(
        value=average + omega,
        omega=omega,
        bonus=bonus,
        log_probability=math.log(probabilities[action]),
        q_value=values[action],
    )


@pytest.mark.parametrize("tree_backup", [False, True], ids=["plain", "tree"])
@pytest.mark.parametrize(
    ("algorithm", "kwargs"), [(SoftDQN, {}), (SoftDQN, dict(double_q=True)), (SQN, {}), (MunchausenDQN, {})]
)
def test_targets_in_plain_python(algorithm, kwargs, tree_backup, monkeypatch):
    env = make_env()
    model = make(algorithm, env, steps=60, tree_backup=tree_backup, **kwargs)

    def of_state(self, obs, mask, action=0):
        return {
            name: np.array([number])
            for name, number in slow_numbers(model, algorithm, "double_q" in kwargs, obs, int(np.squeeze(action))).items()
        }

    monkeypatch.setattr(SlowLoop, "of_state", of_state)
    check_against_slow_loop(model, env)


# ---------------------------------------------------------------------- the other forms


@each_variant
@pytest.mark.parametrize("n_envs", [1, 2])
def test_without_bonus_it_is_sb3s_form(algorithm, kwargs, n_envs):
    env = make_env(n_envs=n_envs)
    model = make(algorithm, env, n_step_bonus=False, **kwargs)
    sb3 = NStepReplayBuffer(50, env.observation_space, env.action_space, "cpu", n_envs, n_steps=3, gamma=GAMMA)
    model.replay_buffer.buffer_size = sb3.buffer_size
    add = model.replay_buffer.add

    def add_to_both(*args):
        add(*args)
        sb3.add(*args)

    model.replay_buffer.add = add_to_both
    model.learn(80)
    set_random_seed(3)
    replay_data = model._sample(40)
    assert replay_data.steps is None
    set_random_seed(3)
    theirs = sb3.sample(40)
    th.testing.assert_close(theirs.rewards, replay_data.rewards.to(theirs.rewards), rtol=1e-6, atol=1e-6)
    # r(0) + gamma r(1) + ... + gamma^m (1 - done) V(s_m), with the first step's bonus
    with th.no_grad():
        value = model._value(model._estimates(theirs.next_observations), None)
        expected = theirs.rewards + theirs.discounts * (1 - theirs.dones) * value
        if model._has_bonus:
            expected = expected + model._bonus(model._estimates(theirs.observations), theirs.actions, None)[0]
    np.testing.assert_allclose(targets_of(model, replay_data), expected.squeeze(1), rtol=1e-6, atol=1e-6)
    with_bonus = make(algorithm, make_env(n_envs=n_envs), steps=80, buffer_size=50, **kwargs)
    set_random_seed(3)
    segments = with_bonus._sample(40)
    # A greedy policy without a bonus is not regularised
    regularised = algorithm is not MomentumDQN
    assert (np.abs(targets_of(with_bonus, segments) - targets_of(model, replay_data)).max() > 0.05) == regularised


@pytest.mark.parametrize("options", [dict(n_step_bonus=False), dict(tree_backup=True)])
def test_one_step_is_one_step_whatever_its_form(algorithm, options):
    if not all(has_parameter(algorithm, name) for name in options):
        return
    learned = []
    for form in ({}, options):
        model = make(algorithm, make_env(), n_steps=1, learning_starts=20, train_freq=1, **form)
        before = snapshot(model)
        learned.append(snapshot(model.learn(60)))
        assert model._sample(2).steps is None
    assert_same(*learned)
    assert not is_same(before["policy"], learned[0]["policy"])


@each_variant
@pytest.mark.parametrize("tree_backup", [False, True], ids=["plain", "tree"])
def test_segments_of_one_step_are_one_step_targets(algorithm, kwargs, tree_backup):
    one, many = (make(algorithm, make_env(), n_steps=n, tree_backup=tree_backup, **kwargs) for n in (1, 4))
    many.set_parameters(snapshot(one))
    many.q_net_target.load_state_dict(one.q_net_target.state_dict())
    for model in (one, many):
        fill_buffer(model, 100)
        model.replay_buffer.dones[:] = 1.0
        model.replay_buffer.timeouts[::2] = 1.0  # half of them bootstrap
    targets = []
    for model in (one, many):
        set_random_seed(3)
        targets.append(targets_of(model, model._sample(40)))
    np.testing.assert_allclose(*targets, rtol=1e-6, atol=1e-7)  # one step's discount is in the float32 of the buffer


def test_segments_are_those_of_each_environment(algorithm):
    # A done of one environment cuts nothing of another's
    env = make_env(n_envs=2)
    model = make(algorithm, env, steps=60)
    buffer = model.replay_buffer
    buffer.dones[:, 0], buffer.dones[:, 1], buffer.timeouts[:] = 1.0, 0.0, 0.0
    _, first = buffer._segments(2 * th.arange(20))
    _, second = buffer._segments(2 * th.arange(20) + 1)
    assert (first.sum(axis=1) == 1).all() and (second.sum(axis=1) == 3).all()


@pytest.mark.parametrize("masked", [False, True])
def test_a_new_call_of_learn_ends_the_segment(algorithm, masked):
    if algorithm is MunchausenIQN:
        return  # the same buffer; its targets are no single numbers
    # The environments are reset between the calls, in the middle of their episodes
    env = make_env(n_envs=2, masked=masked, end=0.0)
    model = make(algorithm, env, n_steps=4, train_freq=1)
    for _ in range(2):
        model.learn(10)
    _, valid = model.replay_buffer._segments(2 * th.arange(10) + 1)
    assert valid.sum(axis=1).tolist() == [4, 4, 3, 2, 1, 4, 4, 3, 2, 1]
    replay_data = model.replay_buffer._get_samples(np.array([3]))
    assert not replay_data.dones.any(), "the value of the last state counts"
    for envs_history in env.get_attr("history"):
        envs_history[4]["truncated"] = True
    model.replay_buffer.sample = sample_rows(model.replay_buffer, np.arange(10))
    check_against_slow_loop(model, env, n=10)


@pytest.mark.parametrize("handle_timeouts", [True, False])
def test_a_terminated_episode_stays_terminated_in_the_next_call(handle_timeouts):
    env = make_env(n_envs=2, end=0.0)
    options = dict(replay_buffer_kwargs=dict(handle_timeout_termination=handle_timeouts))
    model = make(SoftDQN, env, n_steps=4, train_freq=1, **options)
    model.learn(10)
    model.replay_buffer.dones[4, 0] = 1.0
    model.learn(10)
    lengths = [model.replay_buffer._segments(th.tensor([2 * 3 + i]))[1].sum() for i in range(2)]
    assert lengths == [2, 2]
    dones = {float(model.replay_buffer._get_samples(np.array([3])).dones) for _ in range(50)}
    # Without a mark for time limits, what is cut counts as terminated, as in SB3
    assert dones == ({0.0, 1.0} if handle_timeouts else {1.0})


def sample_rows(buffer, rows):
    return lambda n_samples, env=None: buffer._get_samples(rows, env)


def test_episodes_that_go_on_in_the_next_call_of_learn(algorithm):
    env = make_env(end=0.0)
    model = make(algorithm, env, n_steps=4, train_freq=1)
    model.learn(5)
    model.learn(5, reset_num_timesteps=False)
    _, valid = model.replay_buffer._segments(th.arange(10))
    assert valid.sum(axis=1).tolist() == [4] * 7 + [3, 2, 1]


def test_a_loaded_buffer_samples_the_segments_of_the_model(algorithm, tmp_path):
    if not has_parameter(algorithm, "tree_backup"):
        return
    make(algorithm, make_env(), steps=40, n_steps=1).save_replay_buffer(tmp_path / "buffer")
    model = make(algorithm, make_env(), n_steps=3, tree_backup=True)
    model.load_replay_buffer(tmp_path / "buffer")
    steps = model._sample(5).steps
    assert steps is not None and steps["rewards"].shape == (5, 3)


@each_variant
def test_training_is_the_plain_loop(algorithm, kwargs):
    models = [
        make(
            algorithm,
            make_env(masked=True, n_envs=2),
            steps=100,
            learning_rate=0.01,
            tau=0.3,
            target_update_interval=1,
            **kwargs,
        )
        for _ in range(2)
    ]
    assert_trains_as_the_plain_loop(*models)


# ---------------------------------------------------------------------- where the action values are exact

N_STATES, N_ACTIONS = 4, 3
RNG = np.random.default_rng(0)
NEXT_STATES = RNG.integers(N_STATES, size=(N_STATES, N_ACTIONS))
REWARDS = RNG.integers(-16, 17, size=(N_STATES, N_ACTIONS)) / 16
ENDS = RNG.random((N_STATES, N_ACTIONS)) < 0.15
ONE_HOT = np.eye(N_STATES, dtype=np.float32)


def segments(states, actions):
    """Segments from ``(n, n_steps)`` actions that start in ``(n,)`` states, as a buffer gives them."""
    state, over = states, np.zeros(len(states), dtype=bool)
    obs, rewards, valid, last, done = [], [], [], ONE_HOT[states], np.zeros(len(states))
    for action in actions.T:
        obs.append(ONE_HOT[state])
        rewards.append(REWARDS[state, action])
        valid.append(~over)
        last = np.where(over[:, None], last, ONE_HOT[NEXT_STATES[state, action]])
        done = np.where(over, done, ENDS[state, action])
        over = over | ENDS[state, action]
        state = NEXT_STATES[state, action]
    obs, rewards, valid = (th.as_tensor(np.stack(columns, axis=1)) for columns in (obs, rewards, valid))
    steps = dict(rewards=rewards, valid=valid, observations=obs[:, 1:], actions=th.as_tensor(actions[:, 1:, None]))
    unused = th.full((len(states), 1), math.nan)
    return Samples(
        obs[:, 0], th.as_tensor(actions[:, :1]), th.as_tensor(last), th.as_tensor(done)[:, None], unused, unused, steps=steps
    )


def exact_model(algorithm, n_steps, tree_backup, **kwargs):
    """A model whose networks are a table: the fixed point of its one-step targets."""
    env = RecordedEnv(spaces.Discrete(N_ACTIONS), spaces.Box(0.0, 1.0, (N_STATES,), np.float32))
    policy_kwargs = dict(net_arch=[], features_extractor_class=Float64Extractor)
    model = make(algorithm, env, n_steps, tree_backup=tree_backup, policy_kwargs=policy_kwargs, **kwargs)
    states, actions = (grid.reshape(-1) for grid in np.meshgrid(range(N_STATES), range(N_ACTIONS), indexing="ij"))
    every = segments(states, actions[:, None])._replace(discounts=None, steps=None)
    every = every._replace(rewards=th.as_tensor(REWARDS.reshape(-1, 1)))
    table = np.zeros((N_STATES, N_ACTIONS))
    model.policy.requires_grad_(False)
    gaps = np.zeros_like(table)
    for _ in range(400):
        for parameter in model.policy.parameters():
            parameter.copy_(th.as_tensor(table.T) if parameter.ndim == 2 else th.zeros(N_ACTIONS))
        if kwargs.get("parametrisation") == "q":  # the gaps have a network of their own
            for network in (model.q_net.networks[1], model.q_net_target.networks[1]):
                next(p for p in network.parameters() if p.ndim == 2).copy_(th.as_tensor(gaps.T))
            preferences = th.as_tensor(table + gaps)
            gaps = (preferences - model._operator(preferences, TEMPERATURE, None)).clamp(min=kwargs["gap_clip"]).numpy()
        previous, table = table, targets_of(model, every).reshape(N_STATES, N_ACTIONS)
    np.testing.assert_allclose(table, previous, atol=1e-13)
    return model, table


@each_contraction
def test_tree_backup_of_exact_values_is_exact_along_any_actions(algorithm, kwargs):
    model, table = exact_model(algorithm, 4, tree_backup=True, **kwargs)
    sequences = np.array(list(itertools.product(range(N_STATES), *[range(N_ACTIONS)] * 4)))
    replay_data = segments(sequences[:, 0], sequences[:, 1:])
    assert 0 < replay_data.dones.sum() < len(sequences)
    np.testing.assert_allclose(targets_of(model, replay_data), table[sequences[:, 0], sequences[:, 1]], **ROUNDING)


@each_contraction
@pytest.mark.parametrize("n_steps", [2, 3])
def test_returns_of_exact_values_are_exact_on_average_over_the_policy(algorithm, kwargs, n_steps):
    model, table = exact_model(algorithm, n_steps, tree_backup=False, **kwargs)
    with th.no_grad():
        policy = model._policy_and_q_values(model._estimates(th.as_tensor(ONE_HOT)), None)[0].numpy()
    sequences = np.array(list(itertools.product(range(N_STATES), *[range(N_ACTIONS)] * n_steps)))
    targets = targets_of(model, segments(sequences[:, 0], sequences[:, 1:]))
    averages = np.zeros_like(table)
    for (state, action, *others), target in zip(sequences, targets, strict=True):
        weight, current = 1.0, NEXT_STATES[state, action]
        for other in others:
            weight *= policy[current, other]
            current = NEXT_STATES[current, other]
        averages[state, action] += weight * target
    np.testing.assert_allclose(averages, table, **ROUNDING)
    assert np.abs(targets - table[sequences[:, 0], sequences[:, 1]]).max() > 0.05


# ---------------------------------------------------------------------- quantiles


@pytest.mark.parametrize(("env_kwargs", "options", "steps"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("n_steps", [1, 3])
def test_quantiles_that_are_constant_have_the_targets_of_munchausen_dqn(env_kwargs, options, steps, n_steps):
    env = make_env(**env_kwargs)
    options = {**options, "n_steps": n_steps}
    iqn = make(MunchausenIQN, env, steps=steps, n_target_quantiles=3, n_policy_quantiles=2, n_quantiles=4, **options)
    dqn = make(MunchausenDQN, env, **options)
    with th.no_grad():
        for ours, theirs in ((iqn.q_net, dqn.q_net), (iqn.q_net_target, dqn.q_net_target)):
            ours.embedding[0].weight.zero_()
            ours.embedding[0].bias.fill_(1.0)  # every quantile is trunk and head alone
            theirs.q_net[0].load_state_dict(ours.trunk[0].state_dict())
            theirs.q_net[2].load_state_dict(ours.head[0].state_dict())
        replay_data = iqn._sample(40)
        assert (replay_data.steps is None) == (n_steps == 1)
        quantiles, expected = (model._compute_targets(replay_data)[0] for model in (iqn, dqn))
        th.testing.assert_close(quantiles, expected.expand(-1, 3), **ROUNDING)
        # The loss sees each sample's own action, of each head or of all together
        losses, values = iqn._compute_loss(replay_data, quantiles)
        taken = dqn._taken(dqn.layout.rows(dqn.q_net(replay_data.observations)), replay_data.actions)
        huber = th.nn.functional.huber_loss(taken, expected, reduction="none")
        fractions = iqn._per_target(replay_data.extras["fractions"])
        weights = (fractions - (expected < taken).double()).abs().sum(1, keepdim=True)
        th.testing.assert_close(losses, weights * huber, rtol=1e-6, atol=1e-7)  # the fractions are in float32
        th.testing.assert_close(values, dqn.layout.rows(dqn.q_net(replay_data.observations)), **ROUNDING)


# ---------------------------------------------------------------------- compiled

COMPILED = {
    "n-step": ({}, {}),
    "tree backup": ({}, dict(tree_backup=True)),
    "masks": (dict(masked=True), dict(n_steps=1)),
    "masked heads": (dict(masked=True, action_space=HEADS), {}),
    "masked independent heads": (dict(masked=True, action_space=HEADS), dict(factorisation="independent", tree_backup=True)),
}
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++")), reason="needs a C++ compiler"
)


@needs_compiler
@pytest.mark.expensive
@each_variant
@pytest.mark.parametrize(("env_kwargs", "options"), COMPILED.values(), ids=COMPILED)
def test_compiled_training_is_the_plain_loop(algorithm, kwargs, env_kwargs, options, recwarn):
    th.set_default_dtype(th.float32)
    options = dict(learning_rate=0.01, tau=0.3, target_update_interval=1, policy_kwargs=dict(net_arch=[16])) | options | kwargs
    model, oracle = (
        make(algorithm, make_env(**env_kwargs), steps=100, torch_compile=compiled, **options) for compiled in (True, False)
    )
    assert_trains_as_the_plain_loop(model, oracle, rtol=5e-4, atol=5e-6)
    assert not any("torch_compile" in str(warning.message) for warning in recwarn)
    th.compiler.reset()
