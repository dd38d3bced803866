"""The method: budgets in proportion to the Head Sensitivity Score."""

from dataclasses import dataclass
from typing import ClassVar

from hess.policies.scored import ScoredPolicy


@dataclass(frozen=True, eq=False)
class HeSS(ScoredPolicy):
    """HeSS-guided sparsification (Sec. 3.3); arguments as :class:`ScoredPolicy`.

    Example:
        ``HeSS(profile, sparse_ratio=0.8, cdf_threshold=0.4)``
    """

    name: ClassVar[str] = "hess"
