"""The page of an experiment: what the paper shows, what is found here, the numbers, and why."""

from hess.models.catalog import BUNDLED
from hess.reproduce.findings import rule_text
from hess.reproduce.product import Measured, Product
from hess.reproduce.tables import count_text

_EMBEDDED = (
    "The paper's models are VGGT-1B and π³ on photos of CO3Dv2 and DTU. {model} is a small model "
    "of the same kind that ships with this project: a few million parameters, trained and "
    "measured on procedural scenes of small images. Absolute numbers cannot agree; what can be "
    "compared is the direction of a change and where it sets in."
)


def make_page(measured: Measured, product: Product) -> str:
    """The page as Markdown; pictures lie beside it."""
    experiment, model = measured.experiment, measured.calibrated.model
    parts = [
        f"# {experiment.name}: {experiment.title}",
        f"**{experiment.source}.** {experiment.shows}",
        *(f"![{experiment.title}]({name})\n\n*{_caption(measured)}*" for name in product.pictures),
        "## What is found here",
        "".join(f"- {sentence}\n" for sentence in product.findings),
        *filter(None, [rule_text(measured.comparisons)]),
    ]
    for heading, table in product.tables.items():
        parts += [f"## {heading}", table]
    parts += ["## On what", "".join(f"- {line}\n" for line in _origin(measured, product))]
    reasons = [experiment.differs] if experiment.differs else []
    if model.model_name in BUNDLED:
        reasons.append(_EMBEDDED.format(model=model.model_name))
    if reasons:
        parts += ["## Why it may differ", " ".join(reasons)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _caption(measured: Measured) -> str:
    """Model and data of the pictures."""
    model, dataset = measured.calibrated.model.model_name, measured.dataset
    if not measured.experiment.is_measured:
        return f"{measured.experiment.title}; model {model}."
    scenes = count_text(len(dataset), "scene")
    return f"{measured.experiment.title}; model {model}, data {dataset.name}, {scenes}."


def _origin(measured: Measured, product: Product) -> list[str]:
    experiment, common = measured.experiment, measured.common
    profile = measured.calibrated.profile
    lines = [f"Model: {measured.calibrated.model.model_name}."]
    if experiment.is_measured or experiment.figure == "guard":
        lines += [
            f"Data: {measured.dataset.name}, {count_text(len(measured.dataset), 'scene')}.",
            f"Protocol: {measured.protocol.describe()}.",
        ]
    if profile is not None:
        calibrated_on = profile.provenance.get("dataset", {}).get("name", "unknown data")
        lines.append(
            f"Profile: {count_text(len(profile.scenes), 'scene')} of {calibrated_on}, "
            f"λ = {profile.provenance['camera_weight']:g} unless said otherwise."
        )
    machine = common["machine"]
    lines += [
        f"Commit {common['commit'][:12]}{' with changes' if common['dirty'] else ''}, package "
        f"{machine['package']}, torch {machine['torch']}, {machine['device']}, "
        f"{machine['platform']}.",
        f"Command: `{common['command'] or 'none recorded'}`.",
        f"Rows: [rows.jsonl](rows.jsonl) ({len(product.rows)}).",
    ]
    if any(name.endswith("_se") for row in product.rows for name in row):
        lines.append(
            "± is one standard error over scenes; changes are paired: same scenes, same setting."
        )
    return lines
