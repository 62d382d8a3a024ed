"""A folder has one writer at a time, and temporary folders are removed by their own process or after its death."""

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from linvideo import workspace as under_test
from linvideo.trajectories.atomic_files import write_json, write_text
from linvideo.workspace import LOCK, discard, locked, move_into_place, remove_dead, workspace

HOST = socket.gethostname()
ROOT = Path(__file__).parents[1]


def start(code: str) -> subprocess.Popen:
    """Start a process and wait until it has reached its first print, or the end of `code`."""
    code = f"import os, signal, time\nfrom linvideo.workspace import *\n{code}\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    process.stdout.readline()
    return process


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


WAIT = "print('there', flush=True); time.sleep(600)"


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    folder = tmp_path / "run"
    other = start(f"with locked({str(folder)!r}):\n    {WAIT}")
    with (
        pytest.raises(ValueError, match=f"run is in use: process {other.pid} on {HOST} is writing there"),
        locked(folder),
    ):
        pass
    kill(other)
    with locked(folder):  # the other process's death has released the lock
        with pytest.raises(ValueError, match=f"process {os.getpid()} on {HOST}"), locked(folder):
            pass
        with locked(tmp_path):
            pass
    assert list(folder.iterdir()) == []


def test_the_lock_file_is_no_link_to_a_victim(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / LOCK).symlink_to(victim)
    with pytest.raises(OSError), locked(tmp_path):
        pass
    assert victim.read_text() == "mine"


@pytest.fixture
def no_locks(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(under_test.fcntl, "flock", flock)


@pytest.mark.filterwarnings("ignore:.*without locks")
def test_without_locks_the_process_number_decides(tmp_path, no_locks):
    alive = start(WAIT)
    (tmp_path / LOCK).write_text(f"{HOST} {alive.pid}\n")
    with pytest.raises(ValueError, match=f"process {alive.pid} on {HOST} .*; if it is not, delete"), locked(tmp_path):
        pass
    kill(alive)
    with pytest.warns(UserWarning, match="on a file system without locks"), locked(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"{HOST} {os.getpid()}\n"
    (tmp_path / LOCK).write_text("another-host 1\n")
    with locked(tmp_path):
        pass

    with workspace(tmp_path / "a") as mine:
        for host in (HOST, "another-host"):
            space = tmp_path / f".tmp-{len(host):016x}-b"
            space.mkdir()
            (space / LOCK).write_text(f"{host} {alive.pid}\n")
        remove_dead(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {mine.name, f".tmp-{len('another-host'):016x}-b"}
        write_text(tmp_path / "c", "text")


@pytest.mark.parametrize("moment", ["filled", "moved aside", "empty"])
def test_a_killed_workspace_is_tidied_up(moment, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").write_text("old")
    inside = {
        "filled": "(space / 'new').mkdir(); (space / 'new' / 'half').touch()",
        "moved aside": "(space / 'new').mkdir(); os.rename(target, space / 'old')",
        "empty": "(space / LOCK).unlink()",
    }
    other = start(f"target = Path({str(target)!r})\nwith workspace(target) as space:\n    {inside[moment]}; {WAIT}")
    if moment != "empty":
        before = sorted(tmp_path.rglob("*"))
        remove_dead(tmp_path)
        assert sorted(tmp_path.rglob("*")) == before  # the other process is alive
    kill(other)
    remove_dead(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (target / "file").read_text() == "old"


def test_only_workspaces_are_tidied_up(tmp_path):
    for name in (".tmp-mycheckpoint-notes", f".tmp-{HOST}-4194305-notes", ".tmp-0123456789abcdef-target", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").write_text("mine")
    (tmp_path / f".tmp-{HOST}-4194305-notes.txt").write_text("mine")
    (tmp_path / "elsewhere" / LOCK).touch()
    (tmp_path / ".tmp-0123456789abcdee-target").symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    remove_dead(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_is_replaced_and_put_back(tmp_path, monkeypatch):
    target = tmp_path / "target"
    for text in ("first", "second"):
        with workspace(target) as space:
            (space / "new").mkdir()
            (space / "new" / text).touch()
            move_into_place(space / "new", target, space)
    assert [path.name for path in target.iterdir()] == ["second"]
    monkeypatch.setattr(under_test.os, "replace", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), workspace(target) as space:
        move_into_place(space, target, space)
    assert [path.name for path in target.iterdir()] == ["second"]
    discard(target)
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_name_follows_no_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f".tmp-{HOST}-{os.getpid()}-file.json").symlink_to(victim)
    (tmp_path / "file.json").symlink_to(victim)
    write_json(tmp_path / "file.json", 1)
    assert victim.read_text() == "mine"
    assert (tmp_path / "file.json").read_text() == "1\n"
    write_json(tmp_path / "file.json", 2, replace=False)
    assert (tmp_path / "file.json").read_text() == "1\n"
