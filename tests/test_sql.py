"""Soft Q-learning: the value, the Stein direction and the sampler, against what they have to be."""

import math
from functools import partial

import numpy as np
import pytest
import torch as th
from continuous import BoxEnv, box_actions, fill_scaled, make_filled
from helpers import VECTOR, is_same, make_model
from stable_baselines3.common.utils import set_random_seed
from torch import nn

from sb3_softq import SoftQLearning, losses
from sb3_softq.actor_critic.sql import PROPOSALS


@pytest.fixture(autouse=True)
def random_numbers():
    th.manual_seed(0)


# ---------------------------------------------------------------------- the soft value


def uniform_samples(n_samples, action_dim, batch_size=1):
    actions = th.empty(batch_size, n_samples, action_dim, dtype=th.float64).uniform_(-1, 1)
    return actions, th.full((batch_size, n_samples), -action_dim * math.log(2), dtype=th.float64)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("action_dim", [1, 3])
def test_value_of_a_constant_is_exact(temperature, action_dim):
    _, log_densities = uniform_samples(4, action_dim)
    value = losses.sampled_soft_value(th.full((1, 4), 7.0, dtype=th.float64), log_densities, temperature)
    assert float(value) == pytest.approx(7.0 + temperature * action_dim * math.log(2), abs=1e-12)


@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0])
def test_value_of_a_quadratic(temperature):
    # T log of the integral of exp(-(a - m)^2 / (2 T s^2)) over [-1, 1]
    center, scale = 0.3, 0.7
    std = scale * math.sqrt(temperature)
    normal = th.distributions.Normal(0.0, 1.0)
    mass = normal.cdf(th.tensor((1 - center) / std)) - normal.cdf(th.tensor((-1 - center) / std))
    expected = temperature * (math.log(std * math.sqrt(2 * math.pi)) + math.log(mass))
    actions, log_densities = uniform_samples(400_000, 1)
    q_values = -(actions[..., 0] - center).square() / (2 * scale**2)
    value = losses.sampled_soft_value(q_values, log_densities, temperature)
    assert float(value) == pytest.approx(expected, abs=5e-3)


def test_value_without_temperature_is_the_maximum():
    actions, log_densities = uniform_samples(1000, 2)
    q_values = -actions.square().sum(dim=2)
    value = losses.sampled_soft_value(q_values, log_densities, 1e-6)
    assert float(value) == pytest.approx(float(q_values.max()), abs=1e-4)
    shifted = losses.sampled_soft_value(q_values + 3, log_densities, 0.2)
    assert float(shifted) == pytest.approx(float(losses.sampled_soft_value(q_values, log_densities, 0.2)) + 3)


class QuadraticCritic(nn.Module):
    """In the place of a critic's network: ``-|a - center|^2 / (2 scale^2)``, or the softer of two such."""

    def __init__(self, centers, scale, n_features):
        super().__init__()
        weight = th.zeros(1, n_features + len(centers[0]))
        self.linear = nn.Linear(weight.shape[1], weight.shape[1], bias=False)
        self.linear.weight.data = th.eye(weight.shape[1])
        self.density = _Density(centers, scale, n_features)

    def forward(self, inputs):
        return self.density(self.linear(inputs))


class _Density(nn.Module):
    def __init__(self, centers, scale, n_features):
        super().__init__()
        self.centers, self.scale, self.n_features = th.as_tensor(centers), scale, n_features

    def forward(self, inputs):
        actions = inputs[..., None, self.n_features :]
        exponents = -(actions - self.centers).square().sum(dim=-1) / (2 * self.scale**2)
        return th.logsumexp(exponents, dim=-1, keepdim=True) - math.log(len(self.centers))


def with_density(model, centers, scale):
    """Give a model critics whose ``exp(q)`` is a mixture of Gaussians of the actions, cut at the range's ends."""
    for critic in (model.policy.critic, model.policy.critic_target):
        networks = [QuadraticCritic(centers, scale, 4) for _ in critic.q_networks]
        for i, network in enumerate(networks):
            setattr(critic, f"qf{i}", network)
        critic.q_networks = networks
    return model


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_both_proposals_estimate_the_same_value(proposal):
    model = make_model(SoftQLearning, BoxEnv(), temperature=1.0, value_proposal=proposal, n_value_particles=3000)
    with_density(model, [[0.3, -0.2]], 0.4)
    observations = th.as_tensor(np.stack([VECTOR.sample() for _ in range(4)]))
    with th.no_grad():
        values, metrics = model._soft_values(observations)
    normal = th.distributions.Normal(0.0, 1.0)
    masses = [normal.cdf(th.tensor((1 - c) / 0.4)) - normal.cdf(th.tensor((-1 - c) / 0.4)) for c in (0.3, -0.2)]
    expected = sum(math.log(0.4 * math.sqrt(2 * math.pi) * mass) for mass in masses)
    th.testing.assert_close(values, th.full((4, 1), expected), atol=0.15, rtol=0)
    assert 1 <= float(metrics["effective_samples"]) <= 3000


def test_density_of_the_proposal_is_a_density():
    # The mean of 1 / density over draws from it is the volume that these can reach
    model = make_model(SoftQLearning, BoxEnv(action_space=box_actions(1)), value_proposal="policy", n_value_particles=20_000)
    with th.no_grad():
        model.n_value_particles = 2000
        actions, log_densities = model._propose(th.zeros(20, 4))
    inside = actions[..., 0].abs() < 0.5
    volume = ((-log_densities).exp() * inside).mean()
    assert float(volume) == pytest.approx(1.0, abs=0.05)


# ---------------------------------------------------------------------- the Stein direction


DENSITIES = {
    "quadratic": lambda a: -0.5 * (((a - 0.2) / 0.7) ** 2).sum(-1),
    "two modes": lambda a: np.logaddexp(-0.5 * (((a - 0.5) / 0.3) ** 2).sum(-1), -0.5 * (((a + 0.5) / 0.3) ** 2).sum(-1)),
}


def gaussian_kernel(center, bandwidth, x):
    return np.exp(-((x - center) ** 2).sum(-1) / bandwidth)


@pytest.mark.parametrize("log_density", DENSITIES.values(), ids=DENSITIES)
def test_stein_direction_against_finite_differences(log_density):
    rng = np.random.default_rng(0)
    # An odd number of distances, of which the median is one
    particles, updated = rng.normal(size=(3, 5, 2)), rng.normal(size=(3, 3, 2))
    distances = ((particles[:, :, None] - updated[:, None]) ** 2).sum(-1)
    bandwidths = np.median(distances.reshape(3, -1), axis=1) / math.log(5)
    step = 1e-5

    def derivative(function, x):
        """Of a function of points ``(..., 2)``, by central differences."""
        columns = []
        for d in range(2):
            offset = np.zeros(2)
            offset[d] = step
            columns.append((function(x + offset) - function(x - offset)) / (2 * step))
        return np.stack(columns, axis=-1)

    expected = np.zeros_like(updated)
    for b in range(3):
        for i in range(3):
            for j in range(5):
                kernel = partial(gaussian_kernel, updated[b, i], bandwidths[b])
                expected[b, i] += kernel(particles[b, j]) * derivative(log_density, particles[b, j])
                expected[b, i] += derivative(kernel, particles[b, j])
    scores = derivative(log_density, particles)
    direction = losses.stein_direction(th.tensor(particles), th.tensor(scores), th.tensor(updated))
    np.testing.assert_allclose(direction, expected / 5, atol=1e-8)


def test_stein_direction_pushes_apart_and_a_lone_kernel_is_gradient_ascent():
    particles = th.tensor([[[0.0], [0.5]]], dtype=th.float64)
    direction = losses.stein_direction(particles, th.zeros_like(particles), particles)
    assert float(direction[0, 0]) < 0 < float(direction[0, 1])
    # Particles that are all where the updated one is: the kernel is 1 and flat, and the mean score is left
    same = th.zeros(1, 4, 1, dtype=th.float64)
    scores = th.tensor([[[1.0], [2.0], [3.0], [6.0]]], dtype=th.float64)
    assert float(losses.stein_direction(same, scores, same[:, :1])) == pytest.approx(3.0)


def test_squash_correction():
    u = th.linspace(-3, 3, 13, dtype=th.float64).unsqueeze(1).requires_grad_()
    th.testing.assert_close(losses.squash_log_det(u), (1 - th.tanh(u) ** 2).log().sum(dim=1))
    (gradient,) = th.autograd.grad(losses.squash_log_det(u).sum(), u)
    th.testing.assert_close(gradient, -2 * th.tanh(u))
    far = th.tensor([[500.0, -500.0]])
    assert float(losses.squash_log_det(far)) == pytest.approx(-4 * 500 + 4 * math.log(2), rel=1e-6)


# ---------------------------------------------------------------------- the sampler


def kolmogorov_smirnov(samples, log_density):
    """Largest distance between the distribution of samples and that of a density on [-1, 1]."""
    grid = np.linspace(-1, 1, 4001)
    density = np.exp(log_density(grid[:, None]))
    cdf = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    cdf /= cdf[-1]
    samples = np.sort(samples)
    at_samples = np.interp(samples, grid, cdf)
    n = np.arange(len(samples) + 1) / len(samples)
    return max(np.abs(at_samples - n[1:]).max(), np.abs(at_samples - n[:-1]).max())


ONE_DIMENSION = {
    "one mode": ([[0.3]], 0.3),
    "at the edge": ([[1.0]], 0.4),
    "nearly uniform": ([[0.0]], 2.0),
    "two modes": ([[-0.5], [0.5]], 0.2),
}


@pytest.mark.parametrize(("centers", "scale"), ONE_DIMENSION.values(), ids=ONE_DIMENSION)
def test_sampler_recovers_a_density(centers, scale, record_property):
    env = BoxEnv(action_space=box_actions(1))
    particles = dict(n_fixed_particles=32, n_updated_particles=32)
    model = make_model(
        SoftQLearning, env, temperature=1.0, learning_rate=3e-3, policy_kwargs=dict(net_arch=[64, 64]), **particles
    )
    with_density(model, centers, scale)
    observations = th.zeros(8, 4)
    for _ in range(600):
        updated, directions = model._stein(observations)
        loss = -(directions * updated).sum(dim=2).mean()
        model.policy.actor.optimizer.zero_grad()
        loss.backward()
        model.policy.actor.optimizer.step()
    with th.no_grad():
        samples = model.policy.actor(th.zeros(1, 4), model.policy.actor.draw_noise(1, 5000)).tanh().flatten().numpy()
    density = _Density(centers, scale, 0)
    distance = kolmogorov_smirnov(samples, lambda a: density(th.as_tensor(a, dtype=th.float32))[:, 0].numpy())
    record_property("Kolmogorov-Smirnov distance", float(distance))
    print(f"Kolmogorov-Smirnov distance: {distance:.3f}")
    assert distance < 0.1
    if len(centers) == 2:
        assert 0.35 < (samples > 0).mean() < 0.65, "both modes are kept"


# ---------------------------------------------------------------------- agents

AGENTS = {
    "defaults": {},
    "policy proposal": dict(value_proposal="policy"),
    "one critic": dict(policy_kwargs=dict(net_arch=[16], n_critics=1)),
    "n-step": dict(n_steps=3),
    "few particles": dict(n_fixed_particles=2, n_updated_particles=1, n_value_particles=1),
    "schedule": dict(temperature="lin_0.5"),
    "hard target updates": dict(tau=1.0, target_update_interval=10),
}


@pytest.mark.parametrize("options", AGENTS.values(), ids=AGENTS)
def test_everything_learns(options):
    model = make_model(SoftQLearning, BoxEnv(), **options)
    before = {name: value.clone() for name, value in model.policy.state_dict().items() if "candidate" not in name}
    model.learn(60)
    after = model.policy.state_dict()
    assert not any(th.equal(before[name], after[name]) for name in before)
    assert all(bool(th.isfinite(value).all()) for value in after.values())


def test_targets_by_hand():
    model = make_filled(SoftQLearning, BoxEnv(action_space=box_actions(1)), temperature=0.5, n_value_particles=20_000)
    replay_data = model.replay_buffer.sample(6)
    grid = th.linspace(-1, 1, 2001).unsqueeze(1)
    with th.no_grad():
        values, _ = model._soft_values(replay_data.next_observations)
        for i in range(6):
            q_values = th.min(*model.policy.critic_target(replay_data.next_observations[i].expand(2001, -1), grid))
            expected = 0.5 * (th.trapezoid((q_values[:, 0] / 0.5).exp(), grid[:, 0])).log()
            assert float(values[i]) == pytest.approx(float(expected), abs=0.01)
    found = []
    compute = model._bellman_target
    model._bellman_target = lambda data, next_values: found.append((next_values, compute(data, next_values))) or found[-1][1]
    model._update(replay_data)
    expected = replay_data.rewards + 0.99 * (1 - replay_data.dones) * found[0][0]
    th.testing.assert_close(found[0][1], expected)


def test_deterministic_action_is_the_particle_of_the_highest_value():
    model = make_filled(SoftQLearning)
    observations = np.stack([VECTOR.sample() for _ in range(10)])
    actions, _ = model.predict(observations, deterministic=True)
    again, _ = model.predict(observations, deterministic=True)
    np.testing.assert_array_equal(actions, again)
    with th.no_grad():
        inputs = th.as_tensor(observations)
        particles = model.policy.actor(inputs, model.policy.candidate_noise.expand(10, -1, -1)).tanh()
        for i in range(10):
            q_values = th.min(*model.policy.critic(inputs[i].expand(32, -1), particles[i]))
            np.testing.assert_allclose(actions[i], particles[i, q_values.argmax()], atol=1e-5)
    stochastic = [model.predict(observations)[0] for _ in range(2)]
    assert not np.array_equal(*stochastic)


def test_the_actors_update_leaves_the_critics_alone():
    model = make_filled(SoftQLearning)
    model.policy.critic.optimizer.step = lambda: None
    before = {name: value.clone() for name, value in model.policy.critic.state_dict().items()}
    model.train(2, batch_size=16)
    assert is_same(model.policy.critic.state_dict(), before)


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_finds_both_best_actions(proposal):
    # Rewards of single steps with two equally good actions: the policy takes both
    env = BoxEnv(action_space=box_actions(1))
    kwargs = dict(learning_rate=3e-3, policy_kwargs=dict(net_arch=[64, 64]), buffer_size=2000, tau=1.0)
    model = make_model(SoftQLearning, env, temperature=0.1, value_proposal=proposal, **kwargs)
    fill_scaled(model, 1000)
    buffer = model.replay_buffer
    buffer.dones[:], buffer.timeouts[:] = 1, 0
    buffer.rewards[: buffer.pos, 0] = -4 * (np.abs(buffer.actions[: buffer.pos, 0, 0]) - 0.6) ** 2
    set_random_seed(0)
    model.train(400, batch_size=64)
    actions, _ = model.predict(np.zeros((2000, 4), np.float32))
    assert 0.25 < (actions > 0).mean() < 0.75
    assert np.abs(np.abs(actions) - 0.6).mean() < 0.25
    best, _ = model.predict(np.zeros((1, 4), np.float32), deterministic=True)
    assert abs(abs(best.item()) - 0.6) < 0.2
