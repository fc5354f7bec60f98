import errno
import fcntl
import json
import os
import socket
import subprocess
import sys

import pytest

from hashattn.core.files import keep, kept, locked, private_folder, replacing, replacing_folder


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    with replacing(path) as scratch:
        scratch.write_text("first")
        assert scratch.suffix == ".json" and not path.exists()
    assert path.read_text() == "first"
    with pytest.raises(KeyError), replacing(str(path)) as scratch:
        scratch.write_text("half")
        raise KeyError
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "results"
    with replacing_folder(path) as scratch:
        (scratch / "first").write_text("1")
        assert not path.exists()
    with pytest.raises(KeyError), replacing_folder(path) as scratch:
        (scratch / "half").write_text("2")
        raise KeyError
    assert [p.name for p in path.iterdir()] == ["first"]
    with replacing_folder(path) as scratch:
        (scratch / "second").write_text("2")
    assert [p.name for p in path.iterdir()] == ["second"]
    assert [p.name for p in path.parent.iterdir()] == ["results"]


def test_two_that_replace_one_folder_at_once_leave_the_last_one(tmp_path, monkeypatch):
    path, replace = tmp_path / "results", os.replace
    path.mkdir()

    def meanwhile(source, target):
        replace(source, target)
        if source == path:  # another process is quicker
            path.mkdir()
            (path / "theirs").write_text("")
            monkeypatch.setattr(os, "replace", replace)

    monkeypatch.setattr(os, "replace", meanwhile)
    with replacing_folder(path) as scratch:
        (scratch / "ours").write_text("")
    assert [p.name for p in path.iterdir()] == ["ours"]
    assert [p.name for p in tmp_path.iterdir()] == ["results"]


def test_names_to_write_to_are_never_the_same(tmp_path, monkeypatch):
    """Containers share process ids, and a folder."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path = tmp_path / ("long" * 60 + ".json")
    with replacing(path) as one, replacing(path) as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one"  # the last to end
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_links_are_followed_and_what_is_no_file_is_written_through(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real/a.json")
    with replacing(tmp_path / "link.json") as scratch:
        scratch.write_text("new")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real" / "a.json").read_text() == "new"
    read, write = os.pipe()
    with replacing(f"/dev/fd/{write}") as scratch:
        scratch.write_text("through")
    assert os.read(read, 100) == b"through"
    os.close(read)
    os.close(write)
    with pytest.raises(IsADirectoryError, match="real"), replacing(tmp_path / "real"):
        pass


LOCK = """
import os, sys
from hashattn.core.files import locked
with locked(sys.argv[1], "writing"):
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


def test_a_lock_says_who_holds_it_and_ends_with_its_process(tmp_path):
    path = tmp_path / ".lock"
    with subprocess.Popen([sys.executable, "-c", LOCK, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        pid = int(other.stdout.readline())
        said = rf"writing: process {pid} on {socket.gethostname()} is at it"
        with pytest.raises(ValueError, match=said), locked(path, "writing"):
            pass
        other.kill()
    own = f"process {os.getpid()}"
    with locked(path, "writing"), pytest.raises(ValueError, match=own), locked(path, "writing"):  # no kill leaves one
        pass
    assert not path.exists()
    with pytest.raises(KeyError), locked(path, "writing"):
        raise KeyError
    assert not path.exists()


def test_a_private_folder_is_made_so_and_those_of_others_are_refused(tmp_path, monkeypatch):
    folder = private_folder(tmp_path / "deep" / "own")
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert private_folder(folder).stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        with pytest.raises(OSError, match=name):
            private_folder(tmp_path / name)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(PermissionError, match=f"user {os.getuid()}, not to 12345"):
        private_folder(folder)


def test_what_is_kept_is_whole_or_not_there(tmp_path):
    folder = private_folder(tmp_path / "own")
    path = keep(folder, "a", ".bin", b"content")
    assert path.stat().st_mode & 0o777 == 0o600
    assert kept(folder, "a", ".bin") == path and kept(folder, "b", ".bin") is None
    for damage in (b"", b"conten", b"contenu", b"content" + bytes(3)):
        path.write_bytes(damage)
        assert kept(folder, "a", ".bin") is None
        assert not any(folder.iterdir())
        keep(folder, "a", ".bin", b"content")
    path.chmod(0o666)  # others could have written it
    assert kept(folder, "a", ".bin") is None


def test_where_there_are_no_locks_it_says_so_and_goes_on(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(UserWarning, match="one process at a time"), locked(tmp_path / ".lock", "writing"):
        pass
    assert not any(tmp_path.iterdir())


def test_a_lock_that_is_let_go_in_between_is_taken_anew(tmp_path, monkeypatch):
    path, flock = tmp_path / ".lock", fcntl.flock

    def meanwhile(held, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()  # its holder ends after it was opened here
        flock(held, how)

    monkeypatch.setattr(fcntl, "flock", meanwhile)
    with locked(path, "writing"):
        assert json.loads(path.read_text())["process"] == os.getpid()
