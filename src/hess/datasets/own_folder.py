"""A folder of files that this package wrote by itself, so that it may replace them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from hess.errors import DatasetError
from hess.files import write_atomically

RECORD = "made_by_hess.json"
"""Lists the files of the folder, so that nobody else's are ever taken for ours."""


def renew_folder(
    folder: Path, files: Sequence[str], *, made_from: Mapping[str, object] | None = None
) -> None:
    """Make ``folder`` ready for these files: whatever an earlier call announced there is removed.

    Hidden files are left alone and do not count.

    Args:
        folder: made if missing; empty, or with files of earlier calls only.
        files: paths below ``folder``, with forward slashes, that will be written there.
        made_from: what else to note in the record (JSON values).

    Raises:
        DatasetError: something else is there; then nothing is changed.
        OSError: the place cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ours = {RECORD, *_recorded(folder)}
    present = [
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    ]
    visible = [path for path in present if not any(part.startswith(".") for part in path.parts)]
    strangers = [path for path in visible if path.as_posix() not in ours]
    if strangers:
        raise DatasetError(
            f"{folder}: expected an empty folder or what hess wrote there, found "
            f"{min(strangers)}, which is not from hess; choose another folder"
        )
    for path in visible:
        if path.name != RECORD:
            (folder / path).unlink()
    record = {**(made_from or {}), "files": list(files)}
    write_atomically(folder / RECORD, json.dumps(record, indent=1).encode())


def _recorded(folder: Path) -> list[str]:
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return []
    files = record.get("files") if isinstance(record, dict) else None
    return [str(file) for file in files] if isinstance(files, list) else []
