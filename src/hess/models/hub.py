"""Fetch a weight file from Hugging Face, or from its cache on this machine."""

import re
from pathlib import Path

from hess.errors import CheckpointError
from hess.models.catalog import PUBLIC, UNSUPPORTED, similar_models

WEIGHT_NAMES = ("model.safetensors", "model.pt")
"""What a repository is asked for, in this order."""


def is_hub_id(name: str) -> bool:
    """Whether ``name`` is written like "organisation/name" or "organisation/name@revision"."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", name) is not None


def fetch_weights(name: str) -> Path:
    """The weight file of repository ``name``, downloaded if the cache does not hold it.

    Without a network, or with ``HF_HUB_OFFLINE=1``, a cached file is taken as it is.

    Raises:
        CheckpointError: no such repository, no weight file in it, its terms are not accepted, it
            can neither be reached nor is it cached, or its architecture is not supported.
        OSError: the cache cannot be written.
    """
    import huggingface_hub
    from huggingface_hub import errors

    repository, _, revision = name.partition("@")
    page = f"https://huggingface.co/{repository}"
    known = PUBLIC.get(repository)
    if known is not None and known.architecture in UNSUPPORTED:
        raise CheckpointError(f"{name} is not supported: {UNSUPPORTED[known.architecture]}")
    unreachable: Exception | None = None
    for filename in WEIGHT_NAMES:
        try:
            file = huggingface_hub.hf_hub_download(
                repository,
                filename,
                revision=revision or None,
                local_files_only=unreachable is not None,
            )
            return Path(file)
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
            unreachable = error  # what is asked for next may still be in the cache
        except errors.EntryNotFoundError:
            continue
        except errors.GatedRepoError as error:
            raise CheckpointError(
                f"{repository} is gated and you have no access yet: accept its terms at {page}, "
                "then run `hf auth login` (or set HF_TOKEN)"
            ) from error
        except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
            similar = " or ".join(similar_models(repository))
            raise CheckpointError(
                f"no file or folder {name!r} here, and no repository {page} that you can see; "
                + (f"did you mean {similar}? " if similar else "check the spelling; ")
                + "if it is private, run `hf auth login`"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise CheckpointError(
                f"{repository} has no revision {revision!r}; its revisions are at {page}/commits"
            ) from error
        except errors.HTTPError as error:
            raise CheckpointError(
                f"{filename} of {repository} could not be fetched ({error}); try again"
            ) from error
    if unreachable is None:
        raise CheckpointError(
            f"{repository} holds no {' or '.join(WEIGHT_NAMES)}; download the weight file that it "
            "has and give its path"
        )
    raise CheckpointError(
        f"no file or folder {name!r} here, its weights are not in the cache of Hugging Face, and "
        "huggingface.co cannot be reached (or HF_HUB_OFFLINE forbids it); on a machine with "
        f"network run `hf download {repository} {WEIGHT_NAMES[0]} --local-dir weights` and give "
        "the path of that folder, or copy its cache and point HF_HOME to it"
    ) from unreachable
