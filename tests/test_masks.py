"""Action masks by MaskablePPO's contract: what is stored, what is taken, what enters the targets, what is refused."""

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
    MaskedEnv,
    RecordedEnv,
    assert_same,
    has_parameter,
    head_sizes,
    make_model,
    snapshot,
)
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_softq import MomentumDQN, SoftDQN
from sb3_softq.actions import TerminalActionMasks

contrib = pytest.importorskip("sb3_contrib")

DISCRETE, HEADS, BITS = spaces.Discrete(4), spaces.MultiDiscrete([2, 5, 3]), spaces.MultiBinary(3)
DICT = spaces.Dict(vector=VECTOR, number=spaces.Discrete(4))
EXPLORATIONS = ("boltzmann", "eps_greedy", "boltzmann_eps")
each_variant = pytest.mark.parametrize(("algorithm", "kwargs"), SCALAR_VARIANTS.values(), ids=SCALAR_VARIANTS)
each_space = pytest.mark.parametrize("action_space", [DISCRETE, HEADS, BITS], ids=["discrete", "heads", "bits"])


def vec_env(action_space=DISCRETE, n_envs=2, terminal=True, vec_env_class=DummyVecEnv, **kwargs):
    def make_one():
        env = MaskedEnv(action_space, **kwargs)
        return TerminalActionMasks(env) if terminal else env

    return vec_env_class([make_one] * n_envs)


def padded(mask, action_space):
    """A mask where every head is as wide as the widest."""
    sizes, rows, start = head_sizes(action_space), [], 0
    for size in sizes:
        rows += [*mask[start : start + size], *[False] * (max(sizes) - size)]
        start += size
    return np.array(rows, dtype=bool)


# ---------------------------------------------------------------------- what is stored


def assert_stored(model, env, terminal=True):
    """The buffer's masks are those of the environments' histories, at s and at s'."""
    buffer, space = model.replay_buffer, model.action_space
    n_cut = 0
    for i, history in enumerate(env.get_attr("history")):
        assert len(history) == buffer.size() > 30
        for row, step in enumerate(history):
            vector = step["obs"]["vector"] if isinstance(step["obs"], dict) else step["obs"]
            stored = buffer.observations["vector"] if isinstance(buffer.observations, dict) else buffer.observations
            np.testing.assert_array_equal(stored[row, i], vector)
            np.testing.assert_array_equal(buffer.extras["action_masks"][row, i], padded(step["mask"], space))
            if step["terminated"]:
                continue  # has no value
            cut = step["truncated"]
            n_cut += cut
            expected = step["next_mask"] if terminal or not cut else step["mask"]
            np.testing.assert_array_equal(buffer.extras["next_action_masks"][row, i], padded(expected, space))
    assert n_cut > 2


@each_space
@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("observation_space", [VECTOR, DICT], ids=["vector", "dict"])
def test_masks_are_stored(algorithm, action_space, terminal, observation_space):
    env = vec_env(action_space, terminal=terminal, observation_space=observation_space)
    policy = "MultiInputPolicy" if observation_space is DICT else "MlpPolicy"
    model = make_model(algorithm, env, policy, train_freq=8).learn(160)
    assert_stored(model, env, terminal)


def test_a_single_environment_is_wrapped_by_the_model(algorithm):
    model = make_model(algorithm, MaskedEnv(DISCRETE)).learn(80)
    assert_stored(model, model.get_env())


def test_masks_of_subprocesses_are_stored():
    env = vec_env(vec_env_class=SubprocVecEnv)
    try:
        assert_stored(make_model(SoftDQN, env).learn(120), env)
    finally:
        env.close()


def test_masks_through_wrappers(algorithm):
    from sb3_contrib.common.wrappers import ActionMasker

    env = ActionMasker(gym.Wrapper(RecordedEnv(DISCRETE)), lambda env: [True, False, True, False])
    model = make_model(algorithm, env, train_freq=1).learn(60)
    assert set(np.unique(model.replay_buffer.actions[:60])) == {0, 2}
    assert (model.replay_buffer.extras["next_action_masks"][:60, 0] == [True, False, True, False]).all()
    normalised = VecNormalize(vec_env())
    model = make_model(algorithm, normalised).learn(80)
    assert_stored(model, normalised)


def test_masks_go_on_in_the_next_call_of_learn(algorithm):
    env = vec_env()
    model = make_model(algorithm, env, train_freq=1)
    model.learn(40)
    model.learn(40, reset_num_timesteps=False)
    model.learn(40)
    assert_stored(model, env)


def test_a_sample_has_the_masks_of_its_transition(algorithm):
    env = vec_env(HEADS)
    model = make_model(algorithm, env).learn(80)
    steps = {step["obs"].tobytes(): step for history in env.get_attr("history") for step in history}
    samples = model._sample(30)
    for obs, mask in zip(samples.observations, samples.extras["action_masks"], strict=True):
        np.testing.assert_array_equal(mask, padded(steps[obs.numpy().tobytes()]["mask"], HEADS))


# ---------------------------------------------------------------------- what is taken


@each_space
@pytest.mark.parametrize("exploration", EXPLORATIONS)
def test_a_masked_action_is_never_taken(algorithm, action_space, exploration):
    # The environment raises for one; in warm-up, with a large and a small epsilon, and at a high temperature
    options = dict(exploration=exploration, exploration_fraction=0.5, exploration_final_eps=0.0, temperature=2.0)
    env = vec_env(action_space)
    model = make_model(algorithm, env, train_freq=1, gradient_steps=0, learning_starts=40, **options)
    model.learn(160)
    # All valid actions are: the masks exclude, they do not choose
    taken = np.concatenate([step["action"][None] for history in env.get_attr("history") for step in history])
    for head, size in enumerate(head_sizes(action_space)):
        assert set(taken[:, head]) == set(range(size))


@each_space
@pytest.mark.parametrize("exploration", EXPLORATIONS)
def test_predict_takes_masks_as_maskable_ppo(algorithm, action_space, exploration):
    model = make_model(algorithm, vec_env(action_space), exploration=exploration, temperature=1.0)
    model.exploration_rate = 0.5
    other = contrib.MaskablePPO("MlpPolicy", vec_env(action_space), n_steps=8, batch_size=16, device="cpu")
    env = MaskedEnv(action_space)
    env.reset(seed=0)
    observations = np.stack([env.observation_space.sample() for _ in range(20)])
    for deterministic in (True, False):
        masks = []
        for observation in observations:
            env._draw()
            masks.append(env.mask)
            action, state = model.predict(observation, deterministic=deterministic, action_masks=env.mask)
            theirs, _ = other.predict(observation, deterministic=deterministic, action_masks=env.mask)
            assert (action.shape, action.dtype, state) == (theirs.shape, model.action_space.dtype, None)
            assert action_space.contains(action if action.shape else int(action))
            env.step(action)  # raises if it is not valid
        actions, _ = model.predict(observations, deterministic=deterministic, action_masks=np.array(masks))
        theirs, _ = other.predict(observations, deterministic=deterministic, action_masks=np.array(masks))
        assert actions.shape == theirs.shape
        for env.mask, action in zip(masks, actions, strict=True):
            env.step(action)


@each_space
def test_predict_takes_the_best_valid_action(algorithm, action_space):
    model = make_model(algorithm, vec_env(action_space))
    env = MaskedEnv(action_space)
    for seed in range(20):
        observation, _ = env.reset(seed=seed)
        values = np.where(env.mask, acting(model, observation), -np.inf)
        best, start = [], 0
        for size in head_sizes(action_space):
            best.append(int(values[start : start + size].argmax()))
            start += size
        action, _ = model.predict(observation, deterministic=True, action_masks=env.mask)
        assert np.array(action).reshape(-1).tolist() == best


def acting(model, observation):
    """Values that the model acts on, without padding."""
    with th.no_grad():
        return model.layout.flat(model.policy.acting_values(th.as_tensor(observation)[None]))[0].numpy()


@each_variant
@each_space
def test_probabilities_are_of_valid_actions(algorithm, kwargs, action_space):
    model = make_model(algorithm, vec_env(action_space), **{"temperature": 0.3, **kwargs})
    env = MaskedEnv(action_space)
    observation, _ = env.reset(seed=0)
    probabilities = model.action_probs(observation, action_masks=env.mask)
    assert probabilities.shape == env.mask.shape and (probabilities[~env.mask] == 0).all()
    free, start = model.action_probs(observation), 0
    for size in head_sizes(action_space):
        head = slice(start, start + size)
        valid = free[head] * env.mask[head]
        np.testing.assert_allclose(probabilities[head], valid / valid.sum(), rtol=1e-5)
        start += size


def test_boltzmann_draws_by_the_masked_probabilities(algorithm):
    model = make_model(algorithm, vec_env(), exploration="boltzmann", temperature=0.1)
    observation, mask = np.full(4, 0.5, np.float32), np.array([True, False, True, True])
    n = 4000
    actions, _ = model.predict(np.tile(observation, (n, 1)), action_masks=np.tile(mask, (n, 1)))
    frequencies = np.bincount(actions, minlength=4) / n
    np.testing.assert_allclose(frequencies, model.action_probs(observation, action_masks=mask), atol=0.04)


def test_epsilon_draws_uniformly_from_the_valid_actions(algorithm):
    model = make_model(algorithm, vec_env(HEADS), exploration="eps_greedy")
    model.exploration_rate = 1.0
    mask = np.array([1, 0, 0, 1, 0, 1, 1, 1, 0, 1], dtype=bool)
    actions, _ = model.predict(np.zeros((3000, 4), np.float32), action_masks=np.tile(mask, (3000, 1)))
    for head, expected in enumerate(([1, 0], [0, 1 / 3, 0, 1 / 3, 1 / 3], [1 / 2, 0, 1 / 2])):
        np.testing.assert_allclose(np.bincount(actions[:, head], minlength=len(expected)) / 3000, expected, atol=0.04)


def test_maskable_evaluation_works_on_our_models(algorithm):
    from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
    from sb3_contrib.common.maskable.evaluation import evaluate_policy

    model = make_model(algorithm, MaskedEnv(HEADS), learning_starts=0)
    for env in (MaskedEnv(HEADS), vec_env(HEADS)):
        rewards, lengths = evaluate_policy(model, env, n_eval_episodes=4, return_episode_rewards=True, warn=False)
        assert len(rewards) == len(lengths) == 4
    model.learn(60, MaskableEvalCallback(MaskedEnv(HEADS), eval_freq=20, n_eval_episodes=2, verbose=0))


# ---------------------------------------------------------------------- what is learned from (test_heads.py has the numbers)


def targets(model, replay_data):
    with th.no_grad():
        return model._compute_targets(replay_data)[0]


@pytest.mark.parametrize(("algorithm", "kwargs"), VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("factorisation", ["sum", "independent"])
def test_invalid_values_change_nothing(algorithm, kwargs, factorisation):
    # Of a state whose mask leaves action 0 alone, no value of another action enters anything
    model = make_model(algorithm, vec_env(HEADS), factorisation=factorisation, **kwargs).learn(60)
    replay_data = model._sample(30)
    first = th.as_tensor(padded(np.array([1, 0, 1, 0, 0, 0, 0, 1, 0, 0]), HEADS)).expand(30, -1).contiguous()
    extras = {**replay_data.extras, "action_masks": first, "next_action_masks": first}
    replay_data = replay_data._replace(actions=replay_data.actions * 0, extras=extras)
    before = targets(model, replay_data)
    losses = model._compute_loss(replay_data, before)[0].detach()
    with th.no_grad():
        last_layer = [parameter for parameter in model.policy.parameters() if len(parameter) == first.shape[1]]
        for parameter in last_layer:
            parameter[~first[0]] = 1e3
    assert len(last_layer) >= 4
    assert_same(targets(model, replay_data), before)
    assert_same(model._compute_loss(replay_data, before)[0].detach(), losses)


class Records(KVWriter):
    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append(dict(key_values))

    def close(self):
        pass


class OneActionEnv(RecordedEnv):
    """A single valid action everywhere."""

    def action_masks(self):
        return np.arange(self.action_space.n) == 1


@each_variant
@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("env", [MaskedEnv(HEADS), OneActionEnv(DISCRETE)], ids=["heads", "one action"])
def test_metrics_are_finite(algorithm, kwargs, n_steps, env):
    records = Records()
    model = make_model(algorithm, env, n_steps=n_steps, **kwargs)
    model.set_logger(Logger(None, [records]))
    model.learn(150, log_interval=1)
    logged = {name: value for row in records.rows for name, value in row.items() if name.startswith("train/")}
    assert len(logged) >= 7 and all(np.isfinite(value) for value in logged.values()), logged
    if isinstance(env, OneActionEnv):
        assert logged["train/entropy"] == logged["train/entropy_fraction"] == logged.get("train/action_gap", 0) == 0
    else:
        assert 0 <= logged["train/entropy_fraction"] <= 1


def test_entropy_metrics_count_valid_actions(algorithm):
    model = make_model(algorithm, vec_env(HEADS), temperature=1e6, exploration="eps_greedy").learn(60)
    # At a huge temperature the policy is uniform over what is valid
    model.train(gradient_steps=model._next_report, batch_size=64)
    # ... but for a network that has yet to learn that
    tolerance = 1e-3 if has_parameter(algorithm, "temperature") else 0.1
    assert model.logger.name_to_value["train/entropy_fraction"] == pytest.approx(1, abs=tolerance)


LEARNED = [algorithm for algorithm in VALUE_BASED.values() if algorithm.learns_temperature]


@pytest.mark.parametrize("algorithm", LEARNED)
@pytest.mark.parametrize("action_space", [DISCRETE, HEADS], ids=["discrete", "heads"])
def test_target_entropy_is_a_fraction_of_that_of_the_valid_actions(algorithm, action_space):
    optimizer = dict(policy_kwargs=dict(net_arch=[16]), learning_rate=1e-3)
    model = make_model(algorithm, vec_env(action_space), target_entropy="auto_0.4", learning_starts=10**6, **optimizer).learn(
        80
    )
    model.temperature_module.optimizer = th.optim.SGD([model.temperature_module.log_temperature], lr=1e-3)
    set_random_seed(3)
    samples = model._sample(64)
    gaps = []
    for obs, mask in zip(samples.observations.numpy(), samples.extras["action_masks"].numpy(), strict=True):
        flat = mask[model.layout.columns]
        probabilities, start = model.action_probs(obs, action_masks=flat), 0
        for size in head_sizes(action_space):
            head = probabilities[start : start + size][flat[start : start + size]]
            gaps.append(-(head * np.log(head)).sum() - 0.4 * math.log(len(head)))
            start += size
    before = model.temperature_module.log_temperature.item()
    set_random_seed(3)
    model.train(gradient_steps=1, batch_size=64)
    step = model.temperature_module.log_temperature.item() - before
    assert step == pytest.approx(-1e-3 * np.mean(gaps), rel=1e-2, abs=2e-7)


# ---------------------------------------------------------------------- what is refused


class WrongEnv(RecordedEnv):
    """Its masks turn wrong after some steps, in the second of two environments."""

    def __init__(self, action_space, wrong, after=0):
        super().__init__(action_space)
        self.wrong, self.after = wrong, after

    def action_masks(self):
        n = sum(head_sizes(self.action_space))
        return self.wrong if len(self.history) >= self.after else np.ones(n, dtype=bool)


WRONG = {
    "too short": ([True, False, True], ValueError, r"The action mask of environment 1 must have the shape \(4,\).*not \(3,\)"),
    "too long": (np.ones(5, dtype=bool), ValueError, r"environment 1 must have the shape \(4,\)"),
    "matrix": (np.ones((1, 4), dtype=bool), ValueError, r"environment 1 must have the shape \(4,\).*not \(1, 4\)"),
    "floats": (np.ones(4), TypeError, "The action mask of environment 1 must hold booleans, not float64"),
    "large numbers": (np.array([0, 1, 2, 1]), TypeError, "environment 1 must hold booleans"),
    "nothing": (None, TypeError, "environment 1 must hold booleans, not object: None"),
    "text": ("1111", TypeError, "environment 1 must hold booleans"),
    "nothing valid": (
        np.zeros(4, dtype=bool),
        ValueError,
        r"No action is valid in a state of environment 1, whose observation is \[",
    ),
}


@pytest.mark.parametrize("after", [0, 7])
@pytest.mark.parametrize(("wrong", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_masks(algorithm, wrong, error, message, after):
    env = DummyVecEnv([lambda: MaskedEnv(DISCRETE), lambda: WrongEnv(DISCRETE, wrong, after)])
    model = make_model(algorithm, env)
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        model.learn(40)
    assert model.replay_buffer.size() == max(after - 1, 0)


def test_whole_numbers_are_masks_too(algorithm):
    env = WrongEnv(DISCRETE, np.array([0, 1, 0, 1]))
    make_model(algorithm, env).learn(40)
    assert {int(step["action"][0]) for step in env.history} == {1, 3}


def test_a_head_without_a_valid_action_is_named(algorithm):
    mask = np.array([1, 1, 0, 0, 0, 0, 0, 1, 1, 1], dtype=bool)
    message = r"No action is valid for head 1 in a state of environment 0, whose observation is \["
    with pytest.raises(ValueError, match=message):
        make_model(algorithm, WrongEnv(HEADS, mask, after=5)).learn(40)
    model = make_model(algorithm, MaskedEnv(HEADS))
    for function in (model.predict, model.action_probs, model.soft_value):
        with pytest.raises(ValueError, match=r"No action is valid for head 1 .*observation 1"):
            function(np.zeros((2, 4), np.float32), action_masks=np.stack([np.ones(10, dtype=bool), mask]))


class EndEnv(MaskedEnv):
    """No action is valid in the last state of an episode, which it says itself."""

    def __init__(self, cut):
        super().__init__(DISCRETE, end=0.0)
        self.cut, self.n_steps = cut, 0

    def step(self, action):
        obs, reward, *_, info = super().step(action)
        self.n_steps += 1
        end = self.n_steps % 5 == 0
        if end:
            self.mask = np.zeros(4, dtype=bool)
            info["terminal_action_masks"] = self.mask
        return obs, reward, end and not self.cut, end and self.cut, info


def test_the_last_state_needs_a_valid_action_if_it_was_cut(algorithm):
    make_model(algorithm, EndEnv(cut=False)).learn(60)
    with pytest.raises(ValueError, match=r"No action is valid in a state of environment 0, whose observation is \["):
        make_model(algorithm, EndEnv(cut=True)).learn(60)


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        (np.ones(3, dtype=bool), ValueError, r"predict\(\) must have the shape \(4,\)"),
        (np.ones(4), TypeError, r"predict\(\) must hold booleans"),
        (np.ones((3, 4), dtype=bool), ValueError, "a mask for each of its 2 observations, not 3"),
        (np.ones(4, dtype=bool), ValueError, "a mask for each of its 2 observations, not 1"),
        (np.zeros((2, 4), dtype=bool), ValueError, "No action is valid"),
    ],
)
def test_wrong_masks_in_predict(algorithm, masks, error, message):
    model = make_model(algorithm, MaskedEnv(DISCRETE))
    with pytest.raises(error, match=message):
        model.predict(np.zeros((2, 4), np.float32), action_masks=masks)


def test_a_buffer_of_the_user_cannot_hold_masks(algorithm):
    model = make_model(algorithm, MaskedEnv(DISCRETE), replay_buffer_class=ReplayBuffer)
    with pytest.raises(ValueError, match="not by ReplayBuffer: leave replay_buffer_class=None"):
        model.learn(40)


@pytest.mark.parametrize("masked", [True, False])
def test_environments_with_and_without_masks_do_not_mix(algorithm, masked):
    first, second = MaskedEnv(DISCRETE), RecordedEnv(DISCRETE)
    first, second = (first, second) if masked else (second, first)
    model = make_model(algorithm, first).learn(40)
    model.set_env(second)
    for reset_num_timesteps in (True, False):
        with pytest.raises(ValueError, match=rf"The environment has {'no ' if masked else ''}action_masks\(\).*replay buffer"):
            model.learn(40, reset_num_timesteps=reset_num_timesteps)
    model.set_env(first)
    model.learn(40)


# ---------------------------------------------------------------------- saving, learning


@pytest.mark.parametrize("when", ["with load", "later"])
def test_saved_and_loaded(algorithm, when, tmp_path):
    model = make_model(algorithm, MaskedEnv(HEADS), n_steps=3).learn(60)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    env = MaskedEnv(HEADS)
    loaded = algorithm.load(tmp_path / "model", env=env if when == "with load" else None, device="cpu")
    if when == "later":
        loaded.set_env(env)
    assert_same(snapshot(model), snapshot(loaded))
    observation, mask = np.zeros(4, np.float32), np.array([0, 1, 0, 0, 0, 1, 0, 1, 0, 0], dtype=bool)
    for one in (model, loaded):
        assert one.predict(observation, deterministic=True, action_masks=mask)[0].tolist() == [1, 3, 0]
    loaded.load_replay_buffer(tmp_path / "buffer")
    masks, loaded_masks = (one.replay_buffer.extras["action_masks"][: one.replay_buffer.size()] for one in (model, loaded))
    np.testing.assert_array_equal(loaded_masks, masks)
    loaded.learn(60)  # the environment raises for invalid actions
    assert loaded.replay_buffer.size() == 120
    assert loaded.replay_buffer.extras["action_masks"][60:120].any(axis=-1).all()


def test_loaded_without_the_buffer_it_fills_a_new_one(algorithm, tmp_path):
    make_model(algorithm, MaskedEnv(DISCRETE)).save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", device="cpu")
    env = MaskedEnv(DISCRETE)
    loaded.set_env(env)
    loaded.set_random_seed(0)
    loaded.learn(80)
    assert_stored(loaded, loaded.get_env())


def test_a_buffer_without_masks_is_not_for_an_environment_with_them(algorithm, tmp_path):
    make_model(algorithm, RecordedEnv(DISCRETE)).learn(40).save_replay_buffer(tmp_path / "buffer")
    model = make_model(algorithm, MaskedEnv(DISCRETE))
    model.load_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ValueError, match="that of the transitions in the replay buffer had none"):
        model.learn(40)


def test_training_is_the_same_with_masks_that_allow_everything(algorithm):
    class AllValid(RecordedEnv):
        def action_masks(self):
            return np.ones(4, dtype=bool)

    # From full epsilon on, random actions are drawn in another way: the greedy ones are the same
    options = dict(exploration="eps_greedy", exploration_initial_eps=0.0, exploration_final_eps=0.0, learning_starts=0)
    models = [make_model(algorithm, env(DISCRETE), **options).learn(80) for env in (AllValid, RecordedEnv)]
    assert_same(snapshot(models[0]), snapshot(models[1]), rtol=1e-5, atol=1e-6)


LEARNING = dict(
    learning_rate=0.02,
    learning_starts=64,
    batch_size=64,
    buffer_size=2000,
    gamma=0.0,
    train_freq=4,
    temperature=0.05,
    tau=1.0,
    target_update_interval=50,
    exploration="boltzmann_eps",
    exploration_fraction=0.5,
    policy_kwargs=dict(net_arch=[]),
)


@pytest.mark.parametrize("name", ["InvalidActionEnvDiscrete", "InvalidActionEnvMultiDiscrete", "InvalidActionEnvMultiBinary"])
def test_contribs_environments_are_learned(algorithm, name):
    from sb3_contrib.common import envs
    from sb3_contrib.common.maskable.evaluation import evaluate_policy

    arguments = {"InvalidActionEnvDiscrete": (8, 20, 4), "InvalidActionEnvMultiDiscrete": ([2, 4], 20, 2)}
    env = getattr(envs, name)(*arguments.get(name, (3, 20, 1)))
    set_random_seed(0)
    env.action_space.seed(0)
    # An average follows its values
    model = make_model(algorithm, env, **LEARNING).learn(1600 if algorithm is MomentumDQN else 800)
    reward, _ = evaluate_policy(model, getattr(envs, name)(*arguments.get(name, (3, 20, 1))), n_eval_episodes=5, warn=False)
    assert reward >= 19
