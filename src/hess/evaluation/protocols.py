"""The protocols by name. Sources: VGGT's evaluation/test_co3d.py at commit 4b8be14; pi3's branch
"evaluation" at commit 97ce97b; the paper, sections 4.1 and B.1."""

from hess.errors import ConfigError
from hess.evaluation.dtu import DTU_OFFICIAL, DTU_PAPER
from hess.evaluation.dtu_pi3 import DTU_PI3
from hess.evaluation.frame_choice import FrameChoice, SameFrames
from hess.evaluation.pixel_points import PixelPoints
from hess.evaluation.protocol import PROCEDURAL_8, Protocol

SEEN_CATEGORIES = (
    "apple", "backpack", "banana", "baseballbat", "baseballglove", "bench", "bicycle", "bottle",
    "bowl", "broccoli", "cake", "car", "carrot", "cellphone", "chair", "cup", "donut", "hairdryer",
    "handbag", "hydrant", "keyboard", "laptop", "microwave", "motorcycle", "mouse", "orange",
    "parkingmeter", "pizza", "plant", "stopsign", "teddybear", "toaster", "toilet", "toybus",
    "toyplane", "toytrain", "toytruck", "tv", "umbrella", "vase", "wineglass",
)  # fmt: skip
"""The 41 CO3Dv2 categories that camera estimators are trained on, by name."""

_PROTOCOLS = (
    PROCEDURAL_8,
    Protocol(name="any-views", summary="whatever the data set gives"),
    Protocol(
        name="co3d-vggt",
        summary="VGGT's evaluation on CO3Dv2",
        frames=FrameChoice(views=10, min_frames=50, categories=SEEN_CATEGORIES),
        views=10,
        mean="categories",
        points=None,
        unit="arbitrary",
    ),
    Protocol(
        name="co3d-vggt-fast",
        summary="VGGT's evaluation on CO3Dv2, fast variant",
        frames=FrameChoice(views=10, min_frames=50, per_category=10, categories=SEEN_CATEGORIES),
        views=10,
        mean="categories",
        points=None,
        unit="arbitrary",
    ),
    Protocol(
        name="co3d-pi3",
        summary="pi3's evaluation on CO3Dv2, but its published list of frames is drawn anew",
        frames=FrameChoice(views=10, seed=42),
        views=10,
        pair_order="pi3",
        auc_thresholds=(5, 15, 30),
        mean="pairs",
        points=None,
        unit="arbitrary",
    ),
    Protocol(
        name="paper-co3d",
        summary="our reading of HeSS on CO3Dv2: the paper gives AUC@30 and ATE, 20 views for "
        "calibration, and neither sequences nor frames of its evaluation",
        frames=FrameChoice(views=20, min_frames=50, per_category=10, categories=SEEN_CATEGORIES),
        views=20,
        mean="categories",
        points=None,
        unit="arbitrary",
    ),
    Protocol(
        name="paper-points",
        summary="our reading of HeSS on points: its refinement by ICP, but started by Umeyama "
        "where the paper has RANSAC on features",
        points=PixelPoints(alignment="umeyama+icp", normals=True),
    ),
    Protocol(
        name="dtu-official",
        summary="DTU's official measure",
        frames=SameFrames(),
        points=DTU_OFFICIAL,
        unit="mm",
    ),
    Protocol(
        name="dtu-paper",
        summary="our reading of HeSS on DTU: its RANSAC and ICP, but RANSAC on cameras where the "
        "paper has it on features",
        frames=SameFrames(),
        points=DTU_PAPER,
        unit="mm",
    ),
    Protocol(
        name="dtu-pi3",
        summary="pi3's evaluation on DTU",
        frames=SameFrames(numbers=tuple(range(0, 50, 5))),
        views=10,
        points=DTU_PI3,
        unit="mm",
    ),
)

PROTOCOLS = {protocol.name: protocol for protocol in _PROTOCOLS}
"""Protocols by name."""


def protocol_named(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    if name not in PROTOCOLS:
        width = max(map(len, PROTOCOLS))
        known = "\n".join(f"  {name:<{width}}  {p.summary}" for name, p in PROTOCOLS.items())
        raise ConfigError(f"unknown protocol {name!r}; these are known:\n{known}")
    return PROTOCOLS[name]
