"""Opens a data set by what its folder looks like, or by name."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

from hess.datasets.bundled import bundled_capture
from hess.datasets.co3d import ANNOTATIONS, DEFAULT_SET_LIST, is_co3d, read_co3d
from hess.datasets.colmap import COLMAP
from hess.datasets.dtu import DTU_LAYOUTS
from hess.datasets.frames import Frame, FrameSequence
from hess.datasets.layout import Layout, find_layout
from hess.datasets.middlebury import MIDDLEBURY
from hess.datasets.photo_files import SUFFIXES, find_images
from hess.datasets.procedural import Procedural, ProceduralConfig, Split
from hess.datasets.recordings import FrameDataset
from hess.datasets.rgbd import RGBD_LAYOUTS
from hess.datasets.scene import Dataset
from hess.datasets.transforms import TRANSFORMS
from hess.errors import ConfigError, DatasetError
from hess.geometry.fit_rules import FitRule

PROCEDURAL_SCENES = 40
_PROCEDURAL: dict[str, Split] = {
    "procedural": "calibration",
    **{f"procedural:{split}": split for split in get_args(Split)},
}
# A folder may fit several, such as a COLMAP model beside transforms.json: the first counts.
_LAYOUTS = (TRANSFORMS, *DTU_LAYOUTS, *RGBD_LAYOUTS, COLMAP, MIDDLEBURY)


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
            "bundled" (the office capture of this package), or a path: a CO3Dv2 tree or category
            (with ":test" or ":SET_LIST/SPLIT" behind it for another part than
            fewview_dev/train); an RGB-D, 7-Scenes, Pi3 example, COLMAP, transforms.json or
            Middlebury folder, or a folder of several such; or photos (folder, pattern or one
            file; these have no ground truth). docs/datasets.md shows each.
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
    path, part = _split_part(path)
    layout, sequences, strict = _recognise(path, part)
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


def _split_part(path: Path) -> tuple[Path, str | None]:
    """Folder and part of "folder:part"."""
    head, colon, part = str(path).rpartition(":")
    if colon and not path.exists() and Path(head).is_dir():
        return Path(head), part
    return path, None


def _recognise(path: Path, part: str | None) -> tuple[str, list[FrameSequence], bool]:
    """Layout name, sequences, and whether an unreadable photo is an error."""
    if path.is_dir():
        if is_co3d(path):
            set_list, _, split = (part or "train").rpartition("/")
            return (
                "co3dv2",
                read_co3d(path, set_list=set_list or DEFAULT_SET_LIST, split=split),
                True,
            )
        if part is not None:
            raise DatasetError(
                f"{path}: expected a data set that has parts (CO3Dv2) for the part {part!r}, "
                "found another; leave the part out"
            )
        if found := find_layout(path, _LAYOUTS):
            layout, folders = found
            return layout.name, [s for f in folders for s in _read_below(layout, f, path)], True
    try:
        photos = find_images(path)
    except DatasetError as error:
        raise DatasetError(f"{error}\n{_known_layouts(path)}") from error
    frames = tuple(Frame(image_path=photo) for photo in photos)
    return "photos", [FrameSequence(name=path.resolve().name, frames=frames)], False


def _read_below(layout: Layout, folder: Path, root: Path) -> list[FrameSequence]:
    """Sequences of a folder; names as seen from ``root``, since folders may be called alike."""
    sequences = layout.read(folder)
    if folder == root:
        return sequences
    above = folder.relative_to(root).parent.as_posix().removeprefix(".")
    return [replace(s, name="/".join(filter(None, (above, s.name)))) for s in sequences]


def _known_layouts(path: Path) -> str:
    known = [("co3dv2", f"<category>/{ANNOTATIONS} <category>/set_lists/")]
    known += [(layout.name, layout.files) for layout in _LAYOUTS]
    known += [("photos", " ".join(f"*{suffix}" for suffix in SUFFIXES))]
    lines = "\n".join(f"  {name:<14} {files}" for name, files in known)
    return (
        f"Data sets are recognised by these files in {path}:\n{lines}\n"
        f"or by name: {', '.join([*_PROCEDURAL, 'bundled'])}"
    )
