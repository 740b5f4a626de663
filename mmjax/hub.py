"""The local cache of the Hugging Face hub: where a repository is in it, and what to download where something is missing.

Nothing is ever downloaded from here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Sequence

from mmjax.errors import UserError

REPOSITORY = r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?"
"""OWNER/NAME, or OWNER/NAME@REVISION with a branch, a tag or a commit."""


def snapshot(reference: str) -> Path | None:
    """The directory of a repository in the cache (below HF_HUB_CACHE, or HF_HOME); None for what is no repository's name.

    Raises UserError saying what to download where the cache does not have it.
    """
    found = re.fullmatch(REPOSITORY, reference)
    if found is None:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name, revision = found["name"], found["revision"]
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        raise UserError(
            f"{reference} is neither a directory nor in the local Hugging Face cache. Download it where there is a network "
            f"(`{_command(name, revision)}`), or give the path of a directory that has it."
        ) from None


def remedy(directory: Path, files: Sequence[str] = ()) -> str:
    """What to do about a directory that lacks these files (none = it is not known which): for one in the cache, the command."""
    directory = directory.resolve()
    parts = directory.parts
    if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        name = parts[-3].removeprefix("models--").replace("--", "/", 1)
        main = directory.parent.parent / "refs" / "main"
        revision = None if main.is_file() and main.read_text().strip() == parts[-1] else parts[-1]
        return f"Download the rest where there is a network: `{_command(name, revision, files)}`."
    return "Copy or download them again."


def _command(name: str, revision: str | None, files: Sequence[str] = ()) -> str:
    return " ".join(["hf download", name, *files, *(["--revision", revision] if revision else [])])
