"""Policies of implicit quantile networks."""

import math
from typing import Any

import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_softq.actions import ActionLayout
from sb3_softq.replay import n_states
from sb3_softq.value_based.policies import CnnQPolicy, DuelingHead, MultiInputQPolicy, QPolicy


class QuantileNetwork(BasePolicy):
    """
    Implicit quantile network: the features of a state, multiplied by an embedding of a fraction, give that quantile of each
    action's return.

    The embedding is a linear layer with ReLU of ``cos(pi * i * fraction)``, i = 0 ... ``n_cosines`` - 1. Dabney et al. 2018
    (arXiv:1806.06923), equation 4.

    :param observation_space: observation space
    :param action_space: action space
    :param features_extractor: the extractor
    :param features_dim: number of its features
    :param layout: the heads of actions
    :param net_arch: hidden layers, of which the first comes before the multiplication
    :param activation_fn: their activation
    :param normalize_images: whether to divide images by 255
    :param dueling: whether the last hidden layer after the multiplication, and the output, are split in two streams
    :param n_cosines: size of the embedding
    """

    def __init__(
        self,
        observation_space: Any,
        action_space: Any,
        features_extractor: Any,
        features_dim: int,
        layout: ActionLayout,
        net_arch: list[int],
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        dueling: bool = False,
        n_cosines: int = 64,
    ) -> None:
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.net_arch = net_arch
        trunk, head = net_arch[:1], net_arch[1:]
        width = trunk[0] if trunk else features_dim
        self.trunk = nn.Sequential(*create_mlp(features_dim, -1, trunk, activation_fn))
        self.embedding = nn.Sequential(nn.Linear(n_cosines, width), nn.ReLU())
        self.head = nn.Sequential(*create_mlp(width, layout.n_values, head, activation_fn))
        if dueling:
            self.head = nn.Sequential(
                *create_mlp(width, -1, head[:-1], activation_fn),
                DuelingHead([width, *head[:-1]][-1], head[-1:], layout, activation_fn),
            )
        self.frequencies: th.Tensor
        self.register_buffer("frequencies", math.pi * th.arange(n_cosines), persistent=False)

    def forward(self, obs: PyTorchObs, fractions: th.Tensor) -> th.Tensor:  # type: ignore[override]
        """
        Quantiles of the return.

        :param obs: observations
        :param fractions: which quantiles, ``(batch_size, n_quantiles)``
        :return: ``(batch_size, n_quantiles, n_actions)``; of all heads, ``n_heads * width`` actions
        """
        features = self.trunk(self.extract_features(obs, self.features_extractor))
        dtype = features.dtype
        embedded = self.embedding(th.cos(fractions.to(dtype).unsqueeze(2) * self.frequencies.to(dtype)))
        return self.head(features.unsqueeze(1) * embedded)

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        raise NotImplementedError("the network needs fractions: use the policy")


class QuantilePolicy(QPolicy):
    """
    :class:`~sb3_softq.value_based.policies.QPolicy` with an implicit quantile network. It acts on the
    mean of the quantiles at evenly spaced fractions, so that it acts alike in the same state.

    :param n_cosines: size of the embedding of a fraction
    """

    q_net: QuantileNetwork  # type: ignore[assignment]
    q_net_target: QuantileNetwork  # type: ignore[assignment]
    #: Number of quantiles that it acts on
    n_policy_quantiles: int = 32

    def __init__(self, *args: Any, n_cosines: int = 64, **kwargs: Any) -> None:
        self.n_cosines = n_cosines
        super().__init__(*args, **kwargs)

    def make_q_net(self) -> QuantileNetwork:  # type: ignore[override]
        net_args = self._update_features_extractor(self.net_args, features_extractor=None)
        return QuantileNetwork(**net_args, layout=self.layout, dueling=self.dueling, n_cosines=self.n_cosines).to(self.device)

    def acting_fractions(self, obs: PyTorchObs) -> th.Tensor:
        """
        The fractions that the agent acts on, the midpoints of equal intervals.

        :param obs: observations
        :return: ``(batch_size, n_policy_quantiles)``
        """
        fractions = (th.arange(self.n_policy_quantiles, device=self.device) + 0.5) / self.n_policy_quantiles
        return fractions.expand(n_states(obs), -1)

    def q_values(self, obs: PyTorchObs) -> th.Tensor:
        return self.q_net(obs, self.acting_fractions(obs)).mean(dim=1)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "n_cosines": self.n_cosines}


class CnnQuantilePolicy(QuantilePolicy, CnnQPolicy):
    """:class:`QuantilePolicy` for images."""


class MultiInputQuantilePolicy(QuantilePolicy, MultiInputQPolicy):
    """:class:`QuantilePolicy` for Dict observations."""
