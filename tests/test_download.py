"""Downloads from a server on this machine that counts what it is asked for."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from common.download import download

CONTENT = bytes(range(256)) * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `CONTENT` under every name but `missing.pth`; `torn.pth` breaks off in the middle."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/releases/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = Path(self.path).name
        self.server.asked.append(name)
        if name == "missing.pth":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if name == "torn.pth" else CONTENT)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        served.shutdown()
        thread.join()


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_file_is_fetched_once(server, tmp_path):
    for _ in range(3):
        path = download(server.url("weights-1.pth?raw=true"), DIGEST, "weights", tmp_path / "cache")
        assert path == tmp_path / "cache" / "weights-1.pth" and path.read_bytes() == CONTENT
    assert server.asked == ["weights-1.pth?raw=true"]
    assert visible(tmp_path / "cache") == ["weights-1.pth"]


def test_several_that_ask_at_once_fetch_it_once(server, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: download(server.url("a.pth"), DIGEST, "weights", tmp_path), range(8)))
    assert server.asked == ["a.pth"]
    assert {path.read_bytes() for path in paths} == {CONTENT}


@pytest.mark.parametrize("variable", [True, False])
def test_the_default_folder_is_the_users_cache(server, tmp_path, monkeypatch, variable):
    if variable:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
    cache = tmp_path / ("xdg" if variable else ".cache")
    path = download(server.url("a.pth"), DIGEST, "weights")
    assert path == cache / "abdominal_ct_synthesis" / "a.pth" and path.is_file()


@pytest.mark.parametrize(("name", "reason"), [("missing.pth", "404"), ("torn.pth", "hash"), ("other.pth", "hash")])
def test_what_cannot_be_had_is_said_with_the_way_out_and_leaves_nothing(server, tmp_path, name, reason):
    digest = hashlib.sha256(b"other").hexdigest() if name == "other.pth" else DIGEST
    with pytest.raises(OSError) as caught:
        download(server.url(name), digest, "inception_weights", tmp_path)
    message = str(caught.value)
    for part in (server.url(name), str(tmp_path / name), "--inception_weights", reason):
        assert part in message
    assert "\n" not in message
    assert visible(tmp_path) == []


def test_without_a_connection_the_message_says_where_to_put_the_file(tmp_path):
    with Server() as server:
        url = server.url("a.pth")  # nobody listens there any more
    with pytest.raises(OSError) as caught:
        download(url, DIGEST, "inception_weights", tmp_path)
    assert url in str(caught.value) and f"put it at {tmp_path / 'a.pth'}" in str(caught.value)
    (tmp_path / "a.pth").write_bytes(CONTENT)
    assert download(url, DIGEST, "inception_weights", tmp_path).read_bytes() == CONTENT


def test_a_damaged_file_is_named_and_kept(server, tmp_path):
    (tmp_path / "a.pth").write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match=r"a\.pth is damaged: delete it"):
        download(server.url("a.pth"), DIGEST, "weights", tmp_path)
    assert server.asked == [] and (tmp_path / "a.pth").read_bytes() == CONTENT[:-1]


def test_a_file_that_is_there_needs_no_permission_to_write(server, tmp_path):
    (tmp_path / "a.pth").write_bytes(CONTENT)
    assert download(server.url("a.pth"), DIGEST, "weights", tmp_path).read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [tmp_path / "a.pth"]  # no lock file either
    assert server.asked == []


def test_a_folder_that_cannot_be_made_is_named(server, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=rf"exists: '{tmp_path / 'cache'}'.* or name a copy with --weights$"):
        download(server.url("a.pth"), DIGEST, "weights", tmp_path / "cache")
    assert server.asked == []
