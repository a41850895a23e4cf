"""What the tests of the actor-critic family share."""

import numpy as np
from gymnasium import spaces
from helpers import VECTOR, RandomEnv, make_model, random_transitions

from sb3_softq import ALGOS
from sb3_softq.actor_critic.base import ActorCriticAlgorithm

# zoo key -> class; an algorithm joins the tests of the family when it joins ALGOS
ACTOR_CRITIC = {key: cls for key, cls in ALGOS.items() if issubclass(cls, ActorCriticAlgorithm)}


def box_actions(*shape):
    """Actions between -1 and 1."""
    return spaces.Box(-1.0, 1.0, shape, np.float32)


class BoxEnv(RandomEnv):
    """
    Random observations and rewards, with continuous actions.

    :param observation_space: the space to sample
    :param action_space: a Box, by default of two numbers
    """

    def __init__(self, observation_space=VECTOR, action_space=None, truncate=False):
        super().__init__(observation_space, truncate=truncate)
        self.action_space = box_actions(2) if action_space is None else action_space


def fill_scaled(model, n_rows=50):
    """Random transitions, whose actions are scaled to [-1, 1] as SB3 stores them (Discrete ones stay)."""
    actions = model.action_space
    if isinstance(actions, spaces.Box):
        actions = box_actions(*actions.shape)
    for transition in random_transitions(model.observation_space, actions, model.n_envs, n_rows):
        model.replay_buffer.add(*transition)


def make_filled(algorithm, env=None, **kwargs):
    """A model that can ``train()`` at once."""
    model = make_model(algorithm, BoxEnv() if env is None else env, **kwargs)
    fill_scaled(model)
    return model
