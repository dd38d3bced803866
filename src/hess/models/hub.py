"""Fetch a weight file from Hugging Face, or from its cache on this machine."""

import re
from pathlib import Path

from hess.errors import CheckpointError
from hess.models.catalog import PUBLIC, UNSUPPORTED, similar_models
from hess.models.weight_names import SUFFIXES, choose_weights, pieces

_PATIENCE = 10.0  # seconds for the list of files, as the library itself waits for a file's head


def is_hub_id(name: str) -> bool:
    """Whether ``name`` is written like "organisation/name" or "organisation/name@revision"."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", name) is not None


def fetch_weights(name: str) -> Path:
    """The weight file of repository ``name``, downloaded if the cache does not hold it.

    Which file that is, is decided by what the repository holds (:func:`choose_weights`). Without
    a network, or with ``HF_HUB_OFFLINE=1``, what is cached is taken as it is.

    Raises:
        CheckpointError: no such repository, not exactly one weight file in it, its terms are not
            accepted, it can neither be reached nor is it cached, or its architecture is not
            supported.
        OSError: the cache cannot be written.
    """
    import huggingface_hub
    from huggingface_hub import errors

    repository, _, revision = name.partition("@")
    known = PUBLIC.get(repository)
    if known is not None and known.architecture in UNSUPPORTED:
        raise CheckpointError(f"{name} is not supported: {UNSUPPORTED[known.architecture]}")
    at = revision or None
    try:
        listing = huggingface_hub.model_info(repository, revision=at, timeout=_PATIENCE)
    # Of the network's errors some are OSErrors, and a proxy's page instead of JSON a ValueError.
    except (errors.HTTPError, OSError, ValueError) as error:
        cached = _cached_weights(repository, revision or "main")
        if not cached:
            raise CheckpointError(_explain(error, name)) from error
        return cached[choose_weights(cached.keys(), f"the cache of {name}")]
    filename = choose_weights(
        [file.rfilename for file in listing.siblings or ()],
        f"{name} on Hugging Face",
    )
    try:
        files = [
            huggingface_hub.hf_hub_download(repository, piece, revision=at)
            for piece in pieces(filename)
        ]
    except (errors.HTTPError, errors.LocalEntryNotFoundError) as error:
        raise CheckpointError(_explain(error, name)) from error
    return Path(files[0])


def _cached_weights(repository: str, revision: str) -> dict[str, Path]:
    """Weight files in the cache, by their names in the repository."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    try:
        repositories = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE).repos
    except errors.CacheNotFound:
        return {}
    return {
        file.file_path.relative_to(state.snapshot_path).as_posix(): file.file_path
        for cached in repositories
        if (cached.repo_type, cached.repo_id) == ("model", repository)
        for state in cached.revisions
        if revision in (state.commit_hash, *state.refs)
        for file in state.files
        if file.file_name.endswith(SUFFIXES)
    }


def _explain(error: Exception, name: str) -> str:
    """What has gone wrong with repository ``name``, and what to do."""
    from huggingface_hub import errors

    repository, _, revision = name.partition("@")
    page = f"https://huggingface.co/{repository}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repository} is gated and you have no access yet: accept its terms at {page}, "
            "then run `hf auth login` (or set HF_TOKEN)"
        )
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        similar = " or ".join(similar_models(repository))
        return (
            f"no file or folder {name!r} here, and no repository {page} that you can see; "
            + (f"did you mean {similar}? " if similar else "check the spelling; ")
            + "if it is private, run `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision {revision!r}; its revisions are at {page}/commits"
    unreachable = isinstance(error, errors.LocalEntryNotFoundError)  # once a HfHubHTTPError too
    if isinstance(error, errors.HfHubHTTPError) and not unreachable:
        return f"the weights of {repository} could not be fetched ({error}); try again"
    return (
        f"no file or folder {name!r} here, its weights are not in the cache of Hugging Face, and "
        "huggingface.co cannot be reached (or HF_HUB_OFFLINE forbids it); on a machine with "
        f"network run `hf download {repository} --local-dir weights` and give the path of that "
        "folder, or copy its cache and point HF_HOME to it"
    )
