"""A bundle of the repository as a zip that stands alone: `python -m common.package NAME --out dist`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from .bundle_check import LARGE_FILES, MODEL, WEIGHTS, check_bundle
from .files import replacing, sha256

BUNDLES = Path(__file__).absolute().parents[1] / "bundles"

PARTS = ("LICENSE", LARGE_FILES, "configs", "docs", "scripts", *WEIGHTS)
"""What a zip takes from a bundle's folder. All else there is its user's: label maps, results, trainings."""

TEXT_LINK = 256
"""Bytes up to which a file may be a link that Git wrote as text."""


def follow(path: Path) -> Path:
    """What a link leads to; other paths as they are.

    Where links aren't to be had (on Windows, as a rule) Git writes a text file with the link's target instead.

    Raises:
        FileNotFoundError: a link to nowhere.
    """
    target = path
    if path.is_file() and path.stat().st_size <= TEXT_LINK and (text := path.read_bytes()).startswith(b"../"):
        target = path.parent / text.decode()
    if not target.exists() and (path.is_symlink() or target != path):
        raise FileNotFoundError(f"{path} is a link to something that isn't there: restore both with git checkout")
    return target


def bundle_files(bundle: Path) -> dict[str, Path]:
    """The files of a bundle by their names in it, in alphabetical order, links followed.

    Raises:
        FileNotFoundError: a link to nowhere.
    """
    return dict(sorted(file for part in PARTS for file in _files(part, bundle / part)))


def _files(name: str, path: Path) -> Iterator[tuple[str, Path]]:
    path = follow(path)
    if path.is_dir():
        for child in path.iterdir():
            if not child.name.startswith((".", "__pycache__")):
                yield from _files(f"{name}/{child.name}", child)
    elif path.exists():
        yield name, path


def check_tracked(root: Path, files: dict[str, Path]) -> None:
    """Refuse files that Git doesn't know in a repository, but weights: a note, a backup, a module nobody else has.

    Where the repository is no checkout, or Git doesn't answer, nobody knows, and nothing is refused.
    """
    if not (root / ".git").exists() or shutil.which("git") is None:
        return
    listed = subprocess.run(["git", "-C", root, "ls-files", "-z"], capture_output=True)
    if listed.returncode:  # Git won't say, in another user's folder for example
        return
    known = {(root / os.fsdecode(name)).resolve() for name in listed.stdout.split(b"\0")}
    for name, path in files.items():
        if name not in WEIGHTS and name != LARGE_FILES and path.resolve() not in known:
            raise ValueError(f"{path} would go into the zip, but isn't in Git: add it there or move it away")


def gather(bundle: Path, weights: bool = True) -> dict[str, Path]:
    """The files of a bundle as `bundle_files` gives them, checked by `check_tracked` and `check_bundle`.

    Args:
        bundle: its folder.
        weights: whether `models/model.pt` goes in, which must then be there or be named by `large_files.yml`.
    """
    files = bundle_files(bundle)
    if not weights:
        files.pop(MODEL, None)
    check_tracked(bundle.parents[1], files)
    check_bundle(bundle, files, weights)
    return files


def write_zip(files: dict[str, Path], bundle: str, out: Path) -> Path:
    """Write `OUT/BUNDLE_vVERSION.zip`, which unpacks into a folder of the bundle's name.

    The same files make the same bytes on any machine. That is why nothing is compressed: zlib's versions differ in what
    they make of a file. The library is small, and weights hardly shrink.

    Raises:
        OSError: the folder can't be written, or the disk is full.
    """
    version = json.loads(files["configs/metadata.json"].read_text(encoding="utf-8"))["version"]
    path = out / f"{bundle}_v{version}.zip"
    with replacing(path) as temporary, ZipFile(temporary, "w", ZIP_STORED) as archive:
        for name, source in files.items():
            entry = ZipInfo(str(PurePosixPath(bundle, name)), date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # as Unix writes it, with permissions
            entry.external_attr = 0o100644 << 16
            entry.file_size = source.stat().st_size  # above 2 GiB the header must know
            with source.open("rb") as content, archive.open(entry, "w") as stored:
                shutil.copyfileobj(content, stored, 1 << 20)
    return path


def main(arguments: list[str] | None = None) -> None:
    """Write a bundle, or all, as zips that stand alone, after checking that they would run."""
    parser = argparse.ArgumentParser(prog="python -m common.package", description=main.__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("name", nargs="?", metavar="NAME", help="a folder in bundles/")
    which.add_argument("--all", action="store_true", help="every bundle there")
    parser.add_argument("--out", type=Path, default=Path("dist"), help="folder for the zips (dist)")
    parser.add_argument(
        "--without-weights",
        action="store_true",
        help=f"leave {MODEL} out: for bundles that are yet to be trained, or whose large_files.yml says where it is",
    )
    options = parser.parse_args(arguments)
    known = sorted(path.parents[1].name for path in BUNDLES.glob("*/configs/metadata.json"))
    names = known if options.all else [options.name]
    if not set(names) <= set(known):
        parser.error(f"no bundle {options.name} in {BUNDLES}: there are {', '.join(known) or 'none'}")
    try:
        contents = {name: gather(BUNDLES / name, weights=not options.without_weights) for name in names}
        for name, files in contents.items():
            path = write_zip(files, name, options.out)
            for file, source in files.items():
                print(f"{source.stat().st_size:>13,}  {name}/{file}")
            print(f"{path}: {len(files)} files, {path.stat().st_size:,} bytes, sha256 {sha256(path)}")
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
