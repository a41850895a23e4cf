"""The plain training loop of the textbook: what every faster way to train has to reproduce."""

import torch as th
from helpers import assert_same, is_same, snapshot
from stable_baselines3.common.utils import set_random_seed, update_learning_rate
from torch import nn
from torch.utils._pytree import tree_map

from sb3_softq import DivergenceError, operators

BATCH_SIZE = 16


def plain_updates(model, minibatches):
    """What an update is: nothing but PyTorch's own operations, one after the other."""
    optimizer, temperature = model.policy.optimizer, model.temperature_module
    learning_rate = model.lr_schedule(model._current_progress_remaining)
    update_learning_rate(optimizer, learning_rate)
    for replay_data in minibatches:
        with th.no_grad():
            targets, _ = model._compute_targets(replay_data)
        losses, q_values = model._compute_loss(replay_data, targets)
        optimizer.zero_grad()
        losses.mean().backward()
        nn.utils.clip_grad_norm_(model.q_net.parameters(), model.max_grad_norm)
        optimizer.step()
        if temperature.learned:
            mask = model._mask_rows(replay_data)
            entropies = operators.entropy(q_values.detach(), model._acting_temperature, mask)
            temperature.learn(temperature.excess_entropy(entropies, mask), learning_rate)


def plain_target_update(model):
    with th.no_grad():
        for parameter, target in zip(model.q_net.parameters(), model.q_net_target.parameters(), strict=True):
            target.mul_(1 - model.tau).add_(model.tau * parameter)


def record_minibatches(model):
    """The minibatches that are sampled, in their order, however many are sampled at once."""
    minibatches, sample = [], model._sample

    def recorded(n_samples):
        samples = sample(n_samples)
        for rows in th.arange(n_samples).split(BATCH_SIZE):
            minibatches.append(tree_map(lambda field: None if field is None else field[rows], samples))  # noqa: B023
        return samples

    model._sample = recorded
    return minibatches


def learned_numbers(model, oracle):
    """A snapshot, less what an optimiser keeps of parameters that have no gradient."""
    numbers = snapshot(model)
    state, used = numbers["policy.optimizer"]["state"], oracle.policy.optimizer.state_dict()["state"]
    numbers["policy.optimizer"]["state"] = {i: state[i] for i in used}
    return numbers


def change_settings(model):
    """What schedules change between two calls of train()."""
    model.temperature_module.update(0.5)
    model.lr_schedule = lambda progress: 0.005


def train_until_it_breaks(model):
    """Calls of ten updates, until one draws a broken row."""
    for i in range(100):
        set_random_seed(i)
        try:
            model.train(gradient_steps=10, batch_size=4)
        except DivergenceError as error:
            return str(error)
    raise AssertionError("nothing broke")


def assert_trains_as_the_plain_loop(model, oracle, intervene=lambda model: None, rtol=1e-9, atol=1e-11):
    """
    A model's ``train()`` and target updates give what the plain loop gives on the same minibatches.

    :param model: the model, its replay buffer filled
    :param oracle: another one, which is trained by the plain loop
    :param intervene: something that is done to both between two calls of ``train()``
    :param rtol: relative tolerance of each number
    :param atol: absolute tolerance of each number
    """
    oracle.set_parameters(snapshot(model))
    minibatches = record_minibatches(model)
    before = snapshot(model)
    for i in range(4):
        model.train(gradient_steps=3, batch_size=BATCH_SIZE)
        drawn = minibatches[-3:]
        assert not is_same(drawn[0], drawn[1])
        plain_updates(oracle, drawn)
        if i % 2:
            model._on_step()
            plain_target_update(oracle)
        assert_same(learned_numbers(model, oracle), learned_numbers(oracle, oracle), rtol=rtol, atol=atol)
        for one in (model, oracle):
            intervene(one)
    assert not is_same(before["policy"], snapshot(model)["policy"])
