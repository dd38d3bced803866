"""What is known of public checkpoints: whose architecture, and what their licences allow."""

from dataclasses import dataclass
from difflib import get_close_matches

BUNDLED = ("nano", "pi3-nano")


@dataclass(frozen=True, kw_only=True)
class PublicCheckpoint:
    """A checkpoint on Hugging Face.

    Args:
        architecture: "VGGT", "Pi3", or a key of :data:`UNSUPPORTED`.
        license: name of the licence of the weights.
        allows: what it allows, in a few words; the licence itself decides.
        license_url: where it is written.
        gated: whether its terms must be accepted on its page before it can be downloaded.
    """

    architecture: str
    license: str
    allows: str
    license_url: str
    gated: bool = False


_CC_BY_NC = "https://creativecommons.org/licenses/by-nc/4.0/"

PUBLIC = {
    "facebook/VGGT-1B": PublicCheckpoint(
        architecture="VGGT",
        license="CC BY-NC 4.0",
        allows="non-commercial use only",
        license_url=_CC_BY_NC,
    ),
    "facebook/VGGT-1B-Commercial": PublicCheckpoint(
        architecture="VGGT",
        license="VGGT License with acceptable use policy",
        allows="commercial use too, but no military use",
        license_url="https://huggingface.co/facebook/VGGT-1B-Commercial",
        gated=True,
    ),
    "yyfz233/Pi3": PublicCheckpoint(
        architecture="Pi3",
        license="CC BY-NC 4.0",
        allows="non-commercial use only",
        license_url=_CC_BY_NC,
    ),
    "yyfz233/Pi3X": PublicCheckpoint(
        architecture="Pi3X",
        license="CC BY-NC 4.0",
        allows="non-commercial use only",
        license_url=_CC_BY_NC,
    ),
    "facebook/VGGT-Omega": PublicCheckpoint(
        architecture="VGGT-Omega",
        license="FAIR Noncommercial Research License",
        allows="non-commercial research only",
        license_url="https://huggingface.co/facebook/VGGT-Omega",
        gated=True,
    ),
}
"""By Hugging Face id. Licences as of November 2026."""

UNSUPPORTED = {
    "Pi3X": "it has convolutional heads, a metric scale and pose conditioning; use yyfz233/Pi3",
    "VGGT-Omega": ("it has another encoder, 16 registers and no point head; use facebook/VGGT-1B"),
}
"""Architectures that are recognised, and why they cannot be loaded."""


def known_models() -> list[str]:
    """Names that ``load_model`` takes, bundled ones first."""
    return [*BUNDLED, *(name for name, c in PUBLIC.items() if c.architecture not in UNSUPPORTED)]


def similar_models(name: str) -> list[str]:
    """Known models whose name, with or without its organisation, is spelled like ``name``."""
    spellings = {s.lower(): full for full in known_models() for s in (full, full.split("/")[-1])}
    matches = get_close_matches(name.lower(), spellings, cutoff=0.5)
    return list(dict.fromkeys(spellings[match] for match in matches))


def license_notice(name: str, architecture: str) -> str:
    """One line on the licence of the weights of ``name``, which have the keys of ``architecture``.

    Of weights that are not in :data:`PUBLIC` it can only say that they have a licence.
    """
    known = PUBLIC.get(name.partition("@")[0])
    if known is None:
        return (
            f"weights of {name}: these have the keys of {architecture}; their licence is that of "
            "where you got them"
        )
    return f"weights of {name}: {known.license}, {known.allows} ({known.license_url})"
