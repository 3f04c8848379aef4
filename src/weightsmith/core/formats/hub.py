"""Repositories of the Hugging Face hub, fetched into its cache; folders on this machine always come first."""

from fnmatch import fnmatchcase
from pathlib import Path

from weightsmith.core.errors import InputError
from weightsmith.core.formats.files import ASSETS
from weightsmith.core.weights import Weights

PATTERNS = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", *ASSETS)
"""What is fetched: never code, never pickles."""


def open_hub(name: str, revision: str | None = None) -> Weights:
    """Weights in a hub repository `owner/name`, at a branch, tag or commit.

    Raises:
        InputError: there is no such repository, no network, or no huggingface-hub.
    """
    from weightsmith.core.formats import open_path

    missing = f"no folder `{name}` here, and"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise InputError(f"{missing} no package to fetch it", hint="pip install weightsmith[hf]") from None
    try:
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS), ignore_patterns=["*.py"])
        )
    except HFValidationError as error:
        raise InputError(f"`{name}` is no hub repository: {error}") from None
    except LocalEntryNotFoundError:
        raise InputError(f"{missing} the hub cannot be reached", hint="check the path, or the network") from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{missing} the hub says: {reason}", hint="check name, revision and `hf auth`") from None
    held = [file.name for file in folder.iterdir()]
    if not any(fnmatchcase(file, "*.safetensors") for file in held):
        raise InputError(f"`{name}` has no safetensors files", hint="fetch its files yourself and give their folder")
    return open_path(folder)
