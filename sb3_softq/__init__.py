"""Entropy- and KL-regularised reinforcement learning for Stable-Baselines3."""

from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_softq.actor_critic import MPO, RERPI, MunchausenSAC, SoftQLearning
from sb3_softq.diagnostics import DivergenceError
from sb3_softq.value_based import (
    CVI,
    DPP,
    SQN,
    MirrorDescentDQN,
    MomentumDQN,
    MunchausenDQN,
    MunchausenIQN,
    SACDiscrete,
    SoftDQN,
)
from sb3_softq.version import __version__

# rl-zoo3 key -> class
ALGOS: dict[str, type[BaseAlgorithm]] = {
    "softdqn": SoftDQN,
    "sqn": SQN,
    "mdqn": MunchausenDQN,
    "miqn": MunchausenIQN,
    "dpp": DPP,
    "cvi": CVI,
    "modqn": MomentumDQN,
    "mddqn": MirrorDescentDQN,
    "sacd": SACDiscrete,
    "msac": MunchausenSAC,
    "sql": SoftQLearning,
    "mpo": MPO,
    "rerpi": RERPI,
}

__all__ = [
    "ALGOS",
    "CVI",
    "DPP",
    "MPO",
    "RERPI",
    "SQN",
    "DivergenceError",
    "MirrorDescentDQN",
    "MomentumDQN",
    "MunchausenDQN",
    "MunchausenIQN",
    "MunchausenSAC",
    "SACDiscrete",
    "SoftDQN",
    "SoftQLearning",
    "__version__",
]
