"""Places to write that belong to one process: a locked folder, and temporary folders next to what they will replace.

Both rest on a file lock of the operating system (flock). It ends with the process that holds it, in whatever way that
ends, and NFS makes it known to other machines. On a file system without locks (some mounts of Lustre) the host and
process number in the file decide instead, so that processes on other machines go unnoticed there.
"""

import errno
import os
import re
import secrets
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".linvideo.lock"
TEMPORARY = ".tmp-"  # the beginning of a workspace's name
_NAME = re.compile(re.escape(TEMPORARY) + r"[0-9a-f]{16}-(.+)")
_OLD = "old"  # in a workspace: the folder that stood in the place of its target
_HOST = socket.gethostname()
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
_NO_LOCKS += (errno.EBADF,)  # NFS, for a folder


@contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Be the only process that writes into `folder`. A missing folder is created, and removed again if it stays empty.

    Raises:
        ValueError: Another process, or another call in this process, is writing there (the message has its host and
            process number), or `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"expected a folder, but {folder} is a file")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINKS, 0o666)
        held = _lock(file)
        if held is None:
            what = f"{folder} is on a file system without locks: make sure that no other machine writes there"
            warnings.warn(what, stacklevel=3)
            held, hint = not _holder_lives(file), f"; if it is not, delete {path}"
        else:
            hint = ""
        if not held:
            holder = _holder(file)
            os.close(file)
            who = "process {1} on {0}".format(*holder) if holder else "another process"
            raise ValueError(f"{folder} is in use: {who} is writing there; wait for it, or stop it{hint}")
        if _is(file, path):
            break
        os.close(file)  # the previous holder has just finished and deleted it
    _sign(file)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before others can lock it
            if is_new:
                folder.rmdir()  # fails, as it should, if the folder is not empty
        os.close(file)


@contextmanager
def workspace(target: str | os.PathLike) -> Iterator[Path]:
    """Make a new folder next to `target`, in which to prepare it, and delete the folder at the end of the context.

    After a kill, `remove_dead` deletes it. Nobody can guess its name, so that nothing is written to an existing link or
    file, and processes with the same target do not disturb each other: the last one to move its result there wins.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    while True:
        space = target.with_name(f"{TEMPORARY}{secrets.token_hex(8)}-{target.name}")
        space.mkdir(mode=0o700)
        try:
            file = os.open(space / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileNotFoundError:  # remove_dead mistook the empty folder for a dead one
            continue
        _sign(file)
        if _lock(file) is not False and _is(file, space / LOCK):
            break
        os.close(file)
    try:
        yield space
    finally:
        _clear(space, target)
        os.close(file)


def move_into_place(new: Path, target: Path, space: Path) -> None:
    """Move `new`, a file or folder in the workspace `space`, to `target`.

    A folder that stands there moves into the workspace and is deleted with it. If a kill comes in between,
    `remove_dead` puts it back.
    """
    if target.is_dir():
        os.rename(target, space / _OLD)
    os.replace(new, target)


def remove_dead(folder: str | os.PathLike) -> None:
    """Delete the workspaces in `folder` whose processes are gone. A folder that was moved into one of them and not
    replaced is put back first."""
    for space in Path(folder).glob(TEMPORARY + "*"):
        name = _NAME.fullmatch(space.name)
        if name is None or space.is_symlink() or not space.is_dir():
            continue
        try:
            file = os.open(space / LOCK, os.O_RDWR | _NO_LINKS)
        except FileNotFoundError:
            with suppress(OSError):
                space.rmdir()  # the process was killed just after making it; a folder that is not empty is not ours
            continue
        except OSError:
            continue  # another user's
        try:
            held = _lock(file)
            if held is None:
                held = _holder(file)[:1] == [_HOST] and not _holder_lives(file)
            if held and _is(file, space / LOCK):
                _clear(space, space.with_name(name[1]))
        finally:
            os.close(file)


def use_umask(folder: Path) -> None:
    """Give the safetensors files in `folder` the permissions that the umask gives to new files; safetensors makes them
    readable only for their owner."""
    probe = folder / secrets.token_hex(8)
    probe.touch(exist_ok=False)
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*.safetensors"):
        if path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)


@contextmanager
def in_turn(path: str | os.PathLike) -> Iterator[None]:
    """Wait for the lock of an existing file or folder, which stays there, and hold it; without file locks, do not
    wait."""
    file = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
        yield
    finally:
        os.close(file)


def discard(folder: Path) -> None:
    """Delete a folder in one step: a kill leaves either all of it, or only a workspace that `remove_dead` deletes."""
    with workspace(folder) as space:
        os.rename(folder, space / "discarded")


def _clear(space: Path, target: Path) -> None:
    """Delete a workspace, its lock file last, so that whatever a kill leaves still names its process."""
    old = space / _OLD
    with suppress(OSError):
        if old.exists() and not os.path.lexists(target):
            os.rename(old, target)
    with suppress(OSError):
        for path in space.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                path.unlink()
        if [path.name for path in space.iterdir()] == [LOCK]:
            (space / LOCK).unlink()
            space.rmdir()


def _lock(file: int) -> bool | None:
    """Take the lock of an open file. Return False if another process has it, None if there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def _is(file: int, path: Path) -> bool:
    """Return whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _sign(file: int) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, f"{_HOST} {os.getpid()}\n".encode(), 0)


def _holder(file: int) -> list[str]:
    """Return [host, process number] as `_sign` has written them, or []."""
    words = os.pread(file, 300, 0).decode(errors="replace").split()
    return words if len(words) == 2 and words[1].isdecimal() else []


def _holder_lives(file: int) -> bool:
    """Return whether the process that the file names runs on this machine."""
    host, process = _holder(file) or ("", "0")
    if host != _HOST:
        return False
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
