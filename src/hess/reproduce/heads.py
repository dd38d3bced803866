"""How unevenly sensitivity is spread over the heads of a model (paper, Fig. 4)."""

import numpy as np

from hess.reproduce.sweep import Row
from hess.sensitivity.profile import HessProfile

PREFERENCE = 2.0
"""A head prefers an error in whose score its share is this many times that in the other."""


def head_rows(profile: HessProfile) -> list[Row]:
    """A row per head of a global layer, both counted from 1: its share in each error's score."""
    scores = head_scores_of(profile)
    return [
        {"layer": layer + 1, "head": head + 1}
        | {f"{name}_score": float(table[layer, head]) for name, table in scores.items()}
        for layer in range(profile.num_layers)
        for head in range(profile.num_heads)
    ]


def head_findings(profile: HessProfile) -> list[str]:
    """What the heat map says, in numbers."""
    scores, heads = head_scores_of(profile), profile.num_heads
    sentences = []
    for name, table in scores.items():
        largest = table.max(-1)
        most = int(largest.argmax())
        needed = [int((np.cumsum(np.sort(row)[::-1]) < 0.5).sum()) + 1 for row in table]
        sentences.append(
            f"HeSS of the {name} error: the strongest head of a layer has {largest.mean():.0%} "
            f"of its sensitivity on average (an even share is {100 / heads:.3g}%), at most "
            f"{largest[most]:.0%} (H{int(table[most].argmax()) + 1} in GA {most + 1}); half of "
            f"it is held by {np.mean(needed):.1f} of {heads} heads on average."
        )
    if len(scores) == 2:
        camera, point = scores["camera"], scores["point"]
        relevant = np.maximum(camera, point) > 1 / heads
        for name, ours, theirs in (("camera", camera, point), ("point", point, camera)):
            prefers = relevant & (ours > PREFERENCE * theirs)
            layer, head = divmod(int(np.where(prefers, ours, -1).argmax()), heads)
            example = f", such as H{head + 1} in GA {layer + 1}" if prefers.any() else ""
            sentences.append(
                f"{int(prefers.sum())} of the {int(relevant.sum())} heads with more than an even "
                f"share in either error have more than twice the share in the {name} error"
                f"{example}."
            )
    return sentences


def head_scores_of(profile: HessProfile) -> dict[str, np.ndarray]:
    """Shares [layers, heads] by error, of the errors that were measured."""
    weights = {"camera": 1.0, "point": 0.0}
    return {
        name: profile.scores(weight).numpy()
        for name, weight in weights.items()
        if profile.concentration(name) is not None
    }
