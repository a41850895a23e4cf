"""Munchausen SAC: what it is without its term, and what the term is."""

import pytest
import torch as th
from continuous import fill_scaled
from helpers import assert_same, is_same, make_model
from stable_baselines3 import SAC
from stable_baselines3.common.utils import set_random_seed
from torch.nn import functional as F

from sb3_softq import MunchausenSAC

OPTIONS = {
    "defaults": {},
    "gSDE": dict(use_sde=True),
    "gSDE at warm-up": dict(use_sde=True, use_sde_at_warmup=True, sde_sample_freq=4),
    "fixed ent_coef": dict(ent_coef=0.2),
    "scaled ent_coef": dict(ent_coef="auto_0.1", target_entropy=-0.5),
    "n-step returns": dict(n_steps=3),
    "rare target updates": dict(gradient_steps=3, train_freq=3, target_update_interval=2),
    "three critics": dict(policy_kwargs=dict(net_arch=[16], n_critics=3)),
    "shared features": dict(policy_kwargs=dict(net_arch=[16], share_features_extractor=True)),
}


def learned_numbers(model):
    """Parameters, and the entropy coefficient, which SB3 saves as a variable."""
    return {**model.get_parameters(), "log_ent_coef": model.log_ent_coef}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_without_its_term_it_is_sac_to_the_last_bit(options):
    models = [make_model(cls, "Pendulum-v1", **options) for cls in (SAC, MunchausenSAC)]
    models[1].munchausen_alpha = 0.0
    for model in models:
        set_random_seed(3)
        model.learn(120)
    assert models[0]._n_updates == models[1]._n_updates > 0
    assert_same(learned_numbers(models[1]), learned_numbers(models[0]))
    # The same keys in the log, and the same means, of which one is taken in float32
    for name, value in models[0].logger.name_to_value.items():
        assert models[1].logger.name_to_value[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("options", [{}, dict(use_sde=True)], ids=["SAC", "gSDE"])
def test_its_term_changes_what_is_learned_and_nothing_random(options):
    models = [make_model(MunchausenSAC, "Pendulum-v1", munchausen_alpha=alpha, **options) for alpha in (0.0, 0.9)]
    states = []
    for model in models:
        fill_scaled(model)
        set_random_seed(3)
        model.train(gradient_steps=2, batch_size=16)
        states.append(th.get_rng_state())
    assert th.equal(*states), "the log-policy of a replayed action draws no random number"
    assert not is_same(models[0].critic.state_dict(), models[1].critic.state_dict())


def test_actor_and_temperature_are_updated_as_in_sac():
    models = [make_model(MunchausenSAC, "Pendulum-v1", munchausen_alpha=alpha) for alpha in (0.0, 0.9)]
    for model in models:
        model.critic.optimizer.step = lambda: None  # so that both actors meet the same critic
        fill_scaled(model)
        set_random_seed(3)
        model.train(gradient_steps=1, batch_size=16)
    assert_same(models[0].actor.state_dict(), models[1].actor.state_dict())
    assert th.equal(models[0].log_ent_coef, models[1].log_ent_coef)


def squashed_gaussian_log_prob(model, observations, actions):
    """By the change of variables, from the network's mean and deviation."""
    mean, log_std, _ = model.actor.get_action_dist_params(observations)
    gaussian_actions = th.atanh(actions)
    log_prob = th.distributions.Normal(mean, log_std.exp()).log_prob(gaussian_actions)
    return (log_prob - th.log1p(-actions.square())).sum(dim=1, keepdim=True)


def record_targets(model):
    """The targets that an update regresses on."""
    found = []

    def compute(*args):
        found.append(type(model)._compute_targets(model, *args))
        return found[-1]

    model._compute_targets = compute
    return found


def make_filled(**kwargs):
    model = make_model(MunchausenSAC, "Pendulum-v1", ent_coef=0.2, **kwargs)
    fill_scaled(model)
    model.replay_buffer.actions *= 0.4
    return model


def test_target_by_hand():
    model = make_filled(munchausen_alpha=0.7, munchausen_clip=(-0.3, 0.1))
    replay_data = model.replay_buffer.sample(50)
    found = record_targets(model)
    set_random_seed(5)
    with th.no_grad():
        log_policy = 0.2 * squashed_gaussian_log_prob(model, replay_data.observations, replay_data.actions)
        model.actor.action_log_prob(replay_data.observations)  # the random numbers of the actor's loss
        next_actions, next_log_prob = model.actor.action_log_prob(replay_data.next_observations)
        next_q_values = th.min(*model.critic_target(replay_data.next_observations, next_actions))
        next_values = next_q_values - 0.2 * next_log_prob.unsqueeze(1)
        expected = replay_data.rewards + 0.7 * log_policy.clamp(-0.3, 0.1) + 0.99 * (1 - replay_data.dones) * next_values
    assert (log_policy < -0.3).any() and (log_policy > -0.3).any(), "the clip is at work, and not everywhere"
    set_random_seed(5)
    model._update(replay_data)
    th.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


def test_the_term_is_of_the_replayed_action_and_not_of_a_fresh_one():
    # Two minibatches that differ in the replayed actions only: the targets differ by their log-policies, in the order of
    # these. A log-policy of a fresh action would be the same in both
    model = make_filled(munchausen_clip=(-float("inf"), float("inf")))
    replay_data = model.replay_buffer.sample(50)
    other = replay_data._replace(actions=replay_data.actions * 0.1)
    with th.no_grad():
        log_probs = [squashed_gaussian_log_prob(model, one.observations, one.actions) for one in (replay_data, other)]
    found = record_targets(model)
    parameters = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    for one in (replay_data, other):
        model.policy.load_state_dict(parameters)
        set_random_seed(5)
        model._update(one)
    th.testing.assert_close(found[1] - found[0], 0.9 * 0.2 * (log_probs[1] - log_probs[0]), rtol=1e-3, atol=1e-4)
    assert (log_probs[1] - log_probs[0]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("clip", "low", "high"), [((-1.0, 1.0), -1, 1), ((-0.5, 0.0), -0.5, 0), (-0.25, -0.25, 0), ((0, 0), 0, 0)]
)
def test_the_term_is_bounded_at_the_ends_of_the_range(clip, low, high):
    model = make_filled(munchausen_clip=clip)
    model.replay_buffer.actions[:25] = 1.0
    replay_data = model.replay_buffer.sample(100)
    with th.no_grad():
        model.actor.action_log_prob(replay_data.observations)
        term = model._scaled_log_policy(replay_data, th.tensor(0.2))
    assert term.shape == (100, 1) and low <= float(term.min()) and float(term.max()) <= high
    at_the_end = replay_data.actions == 1.0
    assert bool((term[at_the_end] == low).any()), "where the density of the squashed policy is next to nothing, or large"


def test_without_room_for_the_term_it_is_sac():
    models = [make_filled(munchausen_clip=(0.0, 0.0)), make_filled(munchausen_alpha=0.0)]
    for model in models:
        set_random_seed(3)
        model.train(gradient_steps=3, batch_size=16)
    assert_same(models[0].get_parameters(), models[1].get_parameters())


def test_what_is_logged():
    model = make_filled(munchausen_clip=(-0.01, 0.01))
    replay_data = model.replay_buffer.sample(50)
    with th.no_grad():
        log_policy = 0.2 * squashed_gaussian_log_prob(model, replay_data.observations, replay_data.actions)
        current = model.critic(replay_data.observations, replay_data.actions)
    found = record_targets(model)
    metrics = model._update(replay_data)
    share = (log_policy.abs() >= 0.01).float().mean()
    assert float(metrics["munchausen_clip_fraction"]) == pytest.approx(float(share))
    assert float(metrics["munchausen_term"]) == pytest.approx(float(log_policy.clamp(-0.01, 0.01).mean()), abs=1e-5)
    loss = sum(0.5 * F.mse_loss(q_values, found[0]) for q_values in current)
    assert float(metrics["critic_loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["ent_coef"]) == pytest.approx(0.2)
    assert "ent_coef_loss" not in metrics
