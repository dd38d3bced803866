"""``hess inspect``: what a profile says."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from hess.cli.console import Json, ProfileName, console, prepare_file, print_json, print_table

if TYPE_CHECKING:
    from hess.sensitivity.profile import HessProfile


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show the head sensitivities in a profile, where they come from, and how sure they are.

    Example: hess inspect nano --output heatmap.png
    """

    profile: Annotated[tyro.conf.Positional[ProfileName], tyro.conf.arg(name="profile")]
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="PNG")] = None
    """Write the heat map as a PNG."""
    json: Json = False

    def run(self) -> None:
        from hess.sensitivity.profile import load_profile

        profile = load_profile(self.profile)
        if self.output is not None:
            write_heatmap(profile, prepare_file(self.output))
        if self.json:
            print_json(profile_summary(profile))
        else:
            print_profile(profile)


def write_heatmap(profile: "HessProfile", path: Path) -> None:
    """The heat map of Fig. 4 as a PNG."""
    from hess.files import write_atomically
    from hess.viz.figure import figure_png
    from hess.viz.heatmap import head_heatmap

    camera, point = score_pair(profile)
    write_atomically(path, figure_png(head_heatmap(camera, point)))


def score_pair(profile: "HessProfile") -> tuple[Any, Any]:
    """Camera and point score [layers, heads] as arrays; None for a point score without depth."""
    camera = profile.scores(camera_weight=1.0).numpy()
    if profile.concentration("point") is None:
        return camera, None
    return camera, profile.scores(camera_weight=0.0).numpy()


def profile_summary(profile: "HessProfile") -> dict[str, Any]:
    """The main facts of a profile as JSON values."""
    camera, point = score_pair(profile)
    summary: dict[str, Any] = {
        "model": profile.provenance["model_name"],
        "kind": profile.kind,
        "dataset": profile.provenance["dataset"],
        "num_scenes": len(profile.scenes),
        "failed_scenes": [list(pair) for pair in profile.failed],
        "camera_score": camera.tolist(),
        "point_score": None if point is None else point.tolist(),
    }
    for error in ("camera", "point"):
        found = profile.concentration(error)
        if found is not None:
            summary[f"{error}_effective_scenes"] = round(found.effective_scenes, 2)
            summary[f"{error}_largest_scene_share"] = round(found.largest_share, 4)
            summary[f"{error}_largest_scene"] = profile.scenes[found.largest_scene].name
    return summary


def print_profile(profile: "HessProfile") -> None:
    """Heads of each layer in order of their score, and how many scenes the scores rest on."""
    summary = profile_summary(profile)
    scores = profile.scores(camera_weight=None if summary["point_score"] else 1.0)
    heads = profile.num_heads
    rows = [["layer", *(f"H{h + 1}" for h in range(heads)), "largest share", "equal share"]]
    for layer_idx, row in enumerate(scores.tolist()):
        cells = [_shade(share, heads) for share in row]
        rows.append([f"GA {layer_idx + 1}", *cells, f"{max(row):.0%}", f"{1 / heads:.0%}"])
    print_table(rows, f"Head Sensitivity Score of {summary['model']} (percent of the layer)")
    if profile.kind == "label-free":
        console.print("Calibrated without ground truth: on noise instead of errors.")
    for error in ("camera", "point"):
        if f"{error}_effective_scenes" in summary:
            console.print(
                f"The {error} trace rests on {summary[f'{error}_effective_scenes']:.1f} "
                f"effective scenes of {summary['num_scenes']}; "
                f"{summary[f'{error}_largest_scene']} alone is "
                f"{summary[f'{error}_largest_scene_share']:.0%} of it.",
                highlight=False,
            )
    for name, reason in profile.failed:
        console.print(f"[yellow]left out:[/] {name}: {reason}", highlight=False)


def _shade(share: float, heads: int) -> str:
    """Percent, in bold from twice the equal share on."""
    text = f"{100 * share:.0f}"
    return f"[bold]{text}[/]" if share >= 2 / heads else text
