"""Files from the internet, fetched once."""

from __future__ import annotations

import os
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse

import torch
from filelock import FileLock

from .files import sha256


def download(url: str, digest: str, option: str, folder: str | os.PathLike | None = None) -> Path:
    """Fetch a file unless it is there already, and return where it lies, whole and with the right content.

    Several processes may ask at once: one fetches, the others wait for it.

    Args:
        url: of the file; its last part is the file's name.
        digest: SHA-256 of the content, in hexadecimal.
        option: of the command line, names a copy of the file; for the message when there is no connection.
        folder: to keep the file in. Default: `abdominal_ct_synthesis` in the user's cache folder, `$XDG_CACHE_HOME` or
            `~/.cache`.

    Raises:
        OSError: no connection, another content than expected, or a folder that can't be written; says what to do.
        ValueError: the file that lies there is damaged.
    """
    path = Path(folder or _cache_folder()) / Path(urlparse(url).path).name
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f".{path.name}.lock")):
                if not path.exists():
                    torch.hub.download_url_to_file(url, str(path), hash_prefix=digest)
        except (OSError, HTTPException, RuntimeError) as error:
            raise OSError(
                f"cannot fetch {url} ({error}): get it by other means and put it at {path}, or name a copy with "
                f"--{option}"
            ) from error
    if sha256(path) != digest:
        raise ValueError(f"{path} is damaged: delete it, and it will be fetched again from {url}")
    return path


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "abdominal_ct_synthesis"
