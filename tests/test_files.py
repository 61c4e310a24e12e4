"""Files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import replacing, sha256


def test_content_appears_when_the_block_ends_and_not_before(tmp_path):
    path = tmp_path / "new" / "folder" / "ct.nii.gz"
    with replacing(path) as temporary:
        temporary.write_bytes(b"half")
        assert not path.exists()
        assert temporary.parent == path.parent  # on the same file system, where a rename is atomic
        assert temporary.name.endswith(".nii.gz")  # writers choose the format by it
        temporary.write_bytes(b"half and the rest")
    assert path.read_bytes() == b"half and the rest"
    assert [p.name for p in path.parent.iterdir()] == ["ct.nii.gz"]


def test_the_old_file_is_readable_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with open(path) as reader:
        with replacing(path) as temporary:
            temporary.write_text("new")
            assert path.read_text() == "old"
        assert path.read_text() == "new"
        assert reader.read() == "old"  # who reads on reads the old file, not a mixture


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, ValueError])
def test_an_exception_leaves_the_old_file_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(error, match=r"^in between$"), replacing(path) as temporary:
        temporary.write_text("half")
        raise error("in between")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_text("old")
    code = (
        "import os, sys\nfrom common.files import replacing\n"
        "with replacing(sys.argv[1]) as temporary:\n    temporary.write_text('half')\n    os._exit(9)"
    )
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=root, timeout=60).returncode == 9
    assert path.read_text() == "old"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_full_disk_is_one_line_with_path_and_remedy(tmp_path, code):
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(OSError) as caught, replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError(code, os.strerror(code))
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and os.strerror(code) in message
    assert "free the disk or choose another folder" in message
    assert caught.value.errno == code
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_in_the_place_of_the_folder_is_one_line_with_the_path(tmp_path):
    (tmp_path / "output").write_text("not a folder")
    path = tmp_path / "output" / "report.json"
    with pytest.raises(OSError) as caught, replacing(path) as temporary:
        temporary.write_text("never")
    message = str(caught.value)
    assert "\n" not in message and f"cannot write {path}" in message and "choose another folder" in message


def test_sha256_is_that_of_the_bytes(tmp_path):
    content = bytes(range(256)) * 4096 * 3  # more than one read
    (tmp_path / "model.pt").write_bytes(content)
    assert sha256(tmp_path / "model.pt") == hashlib.sha256(content).hexdigest()
    (tmp_path / "empty").touch()
    assert sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
