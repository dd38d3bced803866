"""Opens a data set by what its folder looks like, or by name."""

from pathlib import Path
from typing import get_args

from hess.datasets.bundled import bundled_capture
from hess.datasets.co3d import ANNOTATIONS, read_co3d
from hess.datasets.frames import Frame, FrameDataset, FrameSequence
from hess.datasets.photo_files import SUFFIXES, find_images
from hess.datasets.procedural import Procedural, ProceduralConfig, Split
from hess.datasets.rgbd import RGBD_LAYOUTS, find_rgbd
from hess.datasets.scene import Dataset
from hess.errors import ConfigError, DatasetError
from hess.geometry.fit_rules import FitRule

PROCEDURAL_SCENES = 40
_PROCEDURAL: dict[str, Split] = {
    "procedural": "calibration",
    **{f"procedural:{split}": split for split in get_args(Split)},
}


def open_dataset(
    source: str | Path,
    *,
    image_fit: FitRule,
    views_per_scene: int = 20,
    seed: int | None = None,
    num_scenes: int | None = None,
) -> Dataset:
    """Scenes of a named data set, or of a folder whose layout is recognised.

    Args:
        source: "procedural" (its calibration split; "procedural:test", "procedural:train"),
            "bundled" (the office capture of this package), or the path of an RGB-D folder, a
            7-Scenes or Pi3 example folder (or a folder of several such), a CO3Dv2 tree, or photos
            (folder, pattern or one file; these have no ground truth).
        image_fit: brings photos, cameras and depth to the model's input size.
        views_per_scene: a longer sequence gives several disjoint scenes of this many views, a
            shorter one a single scene of all it has.
        seed: draws the views of each scene at random; None spreads them evenly. For procedural
            scenes: other scenes of the same split (None: 0).
        num_scenes: at most this many scenes; None is 40 procedural scenes, or all that a path has.

    Raises:
        ConfigError: a number is below 1, or ``image_fit`` makes procedural images not square.
        DatasetError: nothing is there, no layout is recognised, or a file of it is damaged.
    """
    if str(source) in _PROCEDURAL:
        return Procedural(
            num_scenes=PROCEDURAL_SCENES if num_scenes is None else num_scenes,
            num_views=views_per_scene,
            split=_PROCEDURAL[str(source)],
            seed=seed or 0,
            config=ProceduralConfig(image_size=_square_size(image_fit)),
        )
    path = bundled_capture() if str(source) == "bundled" else Path(source).expanduser()
    layout, sequences, strict = _recognise(path)
    return FrameDataset(
        name=f"{layout}:{source}",
        sequences=sequences,
        image_fit=image_fit,
        views_per_scene=views_per_scene,
        seed=seed,
        num_scenes=num_scenes,
        provenance={"layout": layout, "source": str(source)},
        strict=strict,
    )


def _square_size(image_fit: FitRule) -> int:
    """Side of the image that the rule makes of a square photo."""
    (fit,) = image_fit([(1024, 1024)])
    if fit.width != fit.height:
        raise ConfigError(
            f"procedural scenes have square images, {image_fit.name} makes "
            f"{fit.width}x{fit.height} of one; use square_crop"
        )
    return fit.width


def _recognise(path: Path) -> tuple[str, list[FrameSequence], bool]:
    """Layout name, sequences, and whether an unreadable photo is an error."""
    if path.is_dir():
        if found := find_rgbd(path):
            layout, folders = found
            return layout.name, [layout.read(folder) for folder in folders], True
        if (path / ANNOTATIONS).is_file() or any(path.glob(f"*/{ANNOTATIONS}")):
            return "co3dv2", read_co3d(path), True
    try:
        photos = find_images(path)
    except DatasetError as error:
        raise DatasetError(f"{error}\n{_known_layouts(path)}") from error
    frames = tuple(Frame(image_path=photo) for photo in photos)
    return "photos", [FrameSequence(name=path.resolve().name, frames=frames)], False


def _known_layouts(path: Path) -> str:
    known = [(layout.name, layout.files) for layout in RGBD_LAYOUTS]
    known += [
        ("co3dv2", f"<category>/{ANNOTATIONS} <category>/set_lists/"),
        ("photos", " ".join(f"*{suffix}" for suffix in SUFFIXES)),
    ]
    lines = "\n".join(f"  {name:<14} {files}" for name, files in known)
    return (
        f"Data sets are recognised by these files in {path}:\n{lines}\n"
        f"or by name: {', '.join([*_PROCEDURAL, 'bundled'])}"
    )
