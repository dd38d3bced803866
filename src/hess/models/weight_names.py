"""Which of the files of a folder or repository holds the weights."""

import re
from collections.abc import Collection

from hess.errors import CheckpointError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")

_PREFERRED = ("model.safetensors", "model.pt")


def pieces(name: str) -> list[str]:
    """All files over which the weights are spread that ``name`` holds a part of, in order.

    Large models are often saved as "model-00001-of-00002.safetensors" and so on. Any other file
    stands alone.
    """
    match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)", name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return [name]
    start, _, count, suffix = match.groups()
    return [f"{start}-{i:05d}-of-{count}{suffix}" for i in range(1, int(count) + 1)]


def choose_weights(names: Collection[str], source: str) -> str:
    """The weight file among ``names``, or the first of its pieces.

    It is model.safetensors, else model.pt, else the only one that can be meant.

    Raises:
        CheckpointError: there is none, or several.
    """
    for name in _PREFERRED:
        if name in names:
            return name
    weights = [name for name in sorted(names) if name.endswith(SUFFIXES)]
    found = list(dict.fromkeys(pieces(name)[0] for name in weights))
    if len(found) != 1:
        raise CheckpointError(
            f"{source} must hold {' or '.join(_PREFERRED)} or exactly one other weight file "
            f"({', '.join(SUFFIXES)}), found {', '.join(found) or 'none'}; give the path of the "
            "file that you mean, from a repository download it first"
        )
    return found[0]
