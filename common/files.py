"""Files that are either whole or not there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`; what is written there takes the place of `path` when the block ends well.

    The temporary name keeps the suffixes (`.nii.gz`), because writers choose the format by them. A block that raises
    leaves `path` as it was and nothing beside it. Missing parent folders are made.

    Raises:
        OSError: one line naming `path` and the remedy, when the folder can't be written or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        message = f"cannot write {path}: {error.strerror or error}; free the disk or choose another folder"
        raise (OSError(error.errno, message) if error.errno else OSError(message)) from error
    finally:
        with suppress(OSError):  # what hinders here has hindered before, and was said
            temporary.unlink()


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
