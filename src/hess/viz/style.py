"""How every picture looks: one colour, marker and label per policy, and the light and dark theme.

Colours are the colour-blind-safe palette of Okabe and Ito; markers differ too, so that no plot
relies on colour alone.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PolicyStyle:
    """Look of one policy: label, colour "#rrggbb", matplotlib marker, and drawing order."""

    label: str
    color: str
    marker: str
    order: int


_POLICIES = {
    "dense": PolicyStyle(label="Dense", color="#7a7a7a", marker="", order=0),
    "uniform": PolicyStyle(label="Uniform", color="#0072b2", marker="s", order=1),
    "hess": PolicyStyle(label="HeSS", color="#d55e00", marker="o", order=2),
    "no_reallocation": PolicyStyle(
        label="HeSS, no reallocation", color="#e69f00", marker="v", order=3
    ),
    "reverse": PolicyStyle(label="Reverse", color="#009e73", marker="^", order=4),
    "random": PolicyStyle(label="Random", color="#cc79a7", marker="D", order=5),
    "hess+": PolicyStyle(label="HeSS+", color="#009e73", marker="P", order=6),
    "joint_ranking": PolicyStyle(label="Joint ranking", color="#56b4e9", marker="X", order=7),
    "layer_budgets": PolicyStyle(label="Layer budgets", color="#cc79a7", marker="h", order=8),
}
_OTHER_COLORS = ("#56b4e9", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#d55e00")
_OTHER_MARKERS = ("P", "X", "*", "h", "<", ">")


def policy_style(name: str) -> PolicyStyle:
    """Style of a policy by its name; a name unknown here gets a stable look of its own."""
    if name in _POLICIES:
        return _POLICIES[name]
    pick = sum(name.encode()) % len(_OTHER_COLORS)
    return PolicyStyle(
        label=name, color=_OTHER_COLORS[pick], marker=_OTHER_MARKERS[pick], order=100 + pick
    )


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours "#rrggbb" around the data: page, text, grid lines, quiet text."""

    background: str
    text: str
    grid: str
    muted: str


LIGHT = Theme(background="#ffffff", text="#1c1f24", grid="#e3e5e9", muted="#5b626d")
DARK = Theme(background="#1b1e24", text="#e8eaee", grid="#353a44", muted="#a3abb8")

METRIC_LABELS = {
    "auc_3": "AUC@3",
    "auc_5": "AUC@5",
    "auc_15": "AUC@15",
    "auc_30": "AUC@30",
    "ate_rmse": "Trajectory error (ATE)",
    "ate_relative": "Trajectory error / path length",
    "accuracy": "Accuracy (prediction to truth)",
    "completeness": "Completeness (truth to prediction)",
    "chamfer_mean": "Chamfer distance",
    "point_error": "Point error",
}


def metric_label(metric: str) -> str:
    """Axis label of a metric with an arrow that says which way is better."""
    label = METRIC_LABELS.get(metric, metric.replace("_", " "))
    return f"{label} {'↑' if higher_is_better(metric) else '↓'}"


def higher_is_better(metric: str) -> bool:
    """AUC grows with quality, every error shrinks."""
    return metric.startswith("auc_")
