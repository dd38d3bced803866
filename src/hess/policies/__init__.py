"""Rules that say which blocks of each head's attention are computed."""

from hess.policies.base import Policy
from hess.policies.dense import Dense
from hess.policies.hess import HeSS
from hess.policies.hess_plus import HessPlus
from hess.policies.joint_ranking import JointRanking
from hess.policies.layer_budgets import LayerBudgets
from hess.policies.no_reallocation import NoReallocation
from hess.policies.random_scores import RandomScores
from hess.policies.reverse import Reverse
from hess.policies.uniform import Uniform

__all__ = [
    "Dense",
    "HeSS",
    "HessPlus",
    "JointRanking",
    "LayerBudgets",
    "NoReallocation",
    "Policy",
    "RandomScores",
    "Reverse",
    "Uniform",
]
