"""Value-based algorithms for discrete actions."""

from sb3_softq.value_based.mdqn import MunchausenDQN
from sb3_softq.value_based.softdqn import SoftDQN
from sb3_softq.value_based.sqn import SQN

__all__ = ["SQN", "MunchausenDQN", "SoftDQN"]
