"""
Fixed points: a linear network on one-hot states, trained on a finite MDP, reaches the exact values of ``tabular``.

The replay buffer holds every transition (s, a, s') in proportion to its probability, and a minibatch is the whole buffer:
no sampling noise is left, so gradient descent on the targets of the algorithm converges to their fixed point.
"""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import has_parameter, make_model

from sb3_softq import SQN, MunchausenDQN, SoftDQN
from sb3_softq.replay import GrowingReplayBuffer
from sb3_softq.tabular import TabularMDP, random_mdp, value_iteration

N_STATES, N_ACTIONS, GAMMA, TEMPERATURE = 4, 3, 0.7, 0.3
# Draws that make up a transition probability of the stochastic MDP
N_DRAWS = 4


class WholeBuffer(GrowingReplayBuffer):
    """A minibatch is all rows in their order, as often as they fit."""

    def sample(self, batch_size, env=None):
        return self._get_samples(np.arange(batch_size) % self.size(), env=env)


class MDPEnv(gym.Env):
    """A finite MDP with its states as observations, one-hot or as numbers; starts in a random state."""

    def __init__(self, mdp, one_hot=False, max_steps=50):
        self.mdp, self.one_hot, self.max_steps = mdp, one_hot, max_steps
        self.observation_space = (
            spaces.Box(0.0, 1.0, (mdp.n_states,), np.float32) if one_hot else spaces.Discrete(mdp.n_states)
        )
        self.action_space = spaces.Discrete(mdp.n_actions)

    def observe(self, states):
        return np.eye(self.mdp.n_states, dtype=np.float32)[states] if self.one_hot else np.asarray(states)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.n_steps = int(self.np_random.integers(self.mdp.n_states)), 0
        return self.observe(self.state), {}

    def step(self, action):
        state, self.n_steps = self.state, self.n_steps + 1
        self.state = int(self.np_random.choice(self.mdp.n_states, p=self.mdp.transitions[state, action]))
        terminated = bool(self.np_random.random() < self.mdp.terminations[state, action, self.state])
        reward = float(self.mdp.rewards[state, action])
        return self.observe(self.state), reward, terminated, self.n_steps >= self.max_steps, {}


def deterministic_mdp(n_terminal=1):
    return random_mdp(N_STATES, N_ACTIONS, branching=1, n_terminal=n_terminal, discount=GAMMA, seed=1)


def stochastic_mdp():
    # Rewards so small that the errors at the fixed point stay in the Huber loss's quadratic part: its mean is the target's
    rng = np.random.default_rng(5)
    next_states = rng.integers(N_STATES, size=(N_STATES, N_ACTIONS, N_DRAWS))
    transitions = np.eye(N_STATES)[next_states].mean(axis=2)
    rewards = 0.3 * rng.standard_normal((N_STATES, N_ACTIONS))
    terminations = np.arange(N_STATES) == N_STATES - 1
    return TabularMDP(transitions, rewards, GAMMA, terminations)


MDPS = {
    "deterministic": deterministic_mdp(),
    "without an end": deterministic_mdp(n_terminal=0),
    "stochastic": stochastic_mdp(),
}


def fill(buffer, env):
    """Every transition as often as its probability has draws."""
    mdp = env.mdp
    for state, action, next_state in np.ndindex(mdp.transitions.shape):
        for _ in range(round(N_DRAWS * mdp.transitions[state, action, next_state])):
            buffer.add(
                env.observe([state]),
                env.observe([next_state]),
                np.array([action]),
                np.array([mdp.rewards[state, action]]),
                np.array([mdp.terminations[state, action, next_state] == 1.0]),
                [{}],
            )
    assert buffer.size() == N_DRAWS * N_STATES * N_ACTIONS


def make_linear(algorithm, env, **kwargs):
    """A linear network on one-hot states, and the step size at which gradient descent on it converges fastest."""
    # The mean over the pairs of state and action divides gradients by their number; the bias adds up those of all states.
    # SQN's squared error has twice the gradient of the Huber loss
    learning_rate = N_STATES * N_ACTIONS / (1 + N_STATES) / (2 if algorithm is SQN else 1)
    return make_model(
        algorithm,
        env,
        policy_kwargs=dict(net_arch=[], optimizer_class=th.optim.SGD),
        learning_rate=learning_rate,
        gamma=GAMMA,
        **kwargs,
    )


def solve(algorithm, mdp, n_iterations=60, one_hot=False, **kwargs):
    """Train on the whole MDP, with hard updates of the target network; the action values and policies of all states."""
    env = MDPEnv(mdp, one_hot)
    kwargs.setdefault("exploration", "eps_greedy")
    model = make_linear(algorithm, env, replay_buffer_class=WholeBuffer, **kwargs)
    fill(model.replay_buffer, env)
    for _ in range(n_iterations):
        model.train(gradient_steps=20, batch_size=model.replay_buffer.size())
        model.q_net_target.load_state_dict(model.q_net.state_dict())
    states = env.observe(np.arange(N_STATES))
    return model.q_values(states), model.action_probs(states), model.soft_value(states)


def assert_solved(result, solution, percent=1.0):
    q_values, policy, values = result
    scale = np.abs(solution.q_values).max()
    np.testing.assert_allclose(q_values, solution.q_values, rtol=0, atol=percent / 100 * scale)
    np.testing.assert_allclose(values, solution.values, rtol=0, atol=percent / 100 * scale)
    np.testing.assert_allclose(policy, solution.policy, rtol=0, atol=percent / 100)


def gaps(q_values):
    return q_values.max(axis=1, keepdims=True) - q_values


@pytest.fixture(params=MDPS.values(), ids=MDPS)
def mdp(request):
    return request.param


@pytest.mark.parametrize("double_q", [False, True])
@pytest.mark.parametrize("temperature", [TEMPERATURE, 0.0])
def test_softdqn_solves_soft_value_iteration(mdp, temperature, double_q):
    result = solve(SoftDQN, mdp, temperature=temperature, double_q=double_q)
    assert_solved(result, value_iteration(mdp, temperature))


def test_sqn_solves_soft_value_iteration(mdp):
    assert_solved(solve(SQN, mdp, temperature=TEMPERATURE), value_iteration(mdp, TEMPERATURE))


@pytest.mark.parametrize(
    ("temperature", "alpha", "clip"),
    [(TEMPERATURE, 0.5, -np.inf), (TEMPERATURE, 0.8, -np.inf), (TEMPERATURE, 0.8, -0.2), (0.0, 0.8, -np.inf)],
)
def test_munchausen_solves_munchausen_value_iteration(mdp, temperature, alpha, clip):
    result = solve(MunchausenDQN, mdp, temperature=temperature, munchausen_alpha=alpha, munchausen_clip=clip)
    assert_solved(result, value_iteration(mdp, temperature, alpha, clip))


def test_munchausen_widens_the_action_gaps_and_keeps_the_policy():
    # Temperature t and alpha solve the problem of temperature (1 - alpha) * t, with gaps 1 / (1 - alpha) times as large
    mdp, alpha = MDPS["deterministic"], 0.8
    q_values, policy, _ = solve(MunchausenDQN, mdp, temperature=TEMPERATURE, munchausen_alpha=alpha, munchausen_clip=-np.inf)
    soft = value_iteration(mdp, (1 - alpha) * TEMPERATURE)
    np.testing.assert_allclose(policy, soft.policy, atol=0.01)
    widest = gaps(soft.q_values).max()
    np.testing.assert_allclose(gaps(q_values) * (1 - alpha), gaps(soft.q_values), rtol=0, atol=0.01 * widest)


def test_one_hot_vectors_are_the_same_as_numbers():
    mdp = MDPS["deterministic"]
    assert_solved(solve(SoftDQN, mdp, one_hot=True, temperature=TEMPERATURE), value_iteration(mdp, TEMPERATURE))


def test_terminations_matter():
    # The same MDP without its ends has other values: the tests above can tell
    mdp = MDPS["deterministic"]
    endless = TabularMDP(mdp.transitions, mdp.rewards, mdp.discount)
    difference = value_iteration(mdp, TEMPERATURE).q_values - value_iteration(endless, TEMPERATURE).q_values
    assert np.abs(difference).max() > 0.1


@pytest.mark.parametrize("algorithm", [SoftDQN, SQN, MunchausenDQN])
def test_learn_reaches_the_fixed_point_from_its_own_experience(algorithm):
    # Nothing is set up here but the environment: exploration, sampling and target updates are those of learn()
    mdp = MDPS["deterministic"]
    kwargs, alpha = dict(temperature=TEMPERATURE), 0.0
    if has_parameter(algorithm, "munchausen_alpha"):
        alpha = 0.5
        kwargs.update(munchausen_alpha=alpha, munchausen_clip=-np.inf)
    model = make_linear(
        algorithm,
        MDPEnv(mdp, max_steps=10),
        exploration="eps_greedy",
        exploration_final_eps=1.0,
        buffer_size=1000,
        learning_starts=300,
        batch_size=128,
        train_freq=20,
        gradient_steps=20,
        tau=1.0,
        target_update_interval=20,
        **kwargs,
    )
    model.learn(1300)
    states = np.arange(N_STATES)
    result = model.q_values(states), model.action_probs(states), model.soft_value(states)
    assert_solved(result, value_iteration(mdp, TEMPERATURE, alpha))
