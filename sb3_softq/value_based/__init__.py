"""Value-based algorithms for discrete actions."""

from sb3_softq.value_based.cvi import CVI
from sb3_softq.value_based.dpp import DPP
from sb3_softq.value_based.mddqn import MirrorDescentDQN
from sb3_softq.value_based.mdqn import MunchausenDQN
from sb3_softq.value_based.miqn import MunchausenIQN
from sb3_softq.value_based.modqn import MomentumDQN
from sb3_softq.value_based.sacd import SACDiscrete
from sb3_softq.value_based.softdqn import SoftDQN
from sb3_softq.value_based.sqn import SQN

__all__ = ["CVI", "DPP", "SQN", "MirrorDescentDQN", "MomentumDQN", "MunchausenDQN", "MunchausenIQN", "SACDiscrete", "SoftDQN"]
