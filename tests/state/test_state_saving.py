"""A save is all or nothing: kills, other processes, full disks, targets of every kind."""

import contextlib
import errno
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

fcntl = pytest.importorskip("fcntl", reason="this system has no locks of files: what these tests are about")
resource = pytest.importorskip("resource", reason="this system has no limits of processes")
import saving  # noqa: E402 (behind the skips)
from campaign import short_and_long  # noqa: E402
from interrupts import interrupted_at  # noqa: E402
from saving import KINDS, mark_of, marked, temporaries  # noqa: E402

from bnfast import BatchNorm  # noqa: E402
from bnfast.state import files, model  # noqa: E402

of_each_kind = pytest.mark.parametrize("kind", KINDS)


def in_a_process(kind, what, folder, number, limit):
    command = [sys.executable, saving.__file__, kind, what, str(folder), str(number)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    print(what, run.stdout)
    return json.loads(run.stdout)


# --- kills ---------------------------------------------------------------------------------------------------


@of_each_kind
@pytest.mark.parametrize("number", short_and_long(40, 500))
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_file(kind, number, tmp_path):
    found = in_a_process(kind, "kills", tmp_path, number, limit=300 + number)
    assert found["loaded"] == number
    assert found["left_a_temporary"] > 0  # else no kill met a save


@of_each_kind
def test_a_kill_between_the_steps_leaves_the_old_or_the_new_file(kind, tmp_path):
    found = in_a_process(kind, "stages", tmp_path, 0, limit=300)
    old, new = [True, 0, 1, 0], [True, 1, 0, 0]
    # the target's mode is taken first, and the folder listed: nothing is there yet
    assert found["fstat+1"] == found["listdir+1"] == found["listdir-1"] == [True, 0, 0, 0]
    assert found["fstat+2"] == found["fstat-2"] == old  # the temporary file is locked, and empty
    assert found["chmod+1"] == found["chmod-1"] == old
    assert found["fsync+1"] == found["fsync-1"] == old  # it is written
    assert found["replace+1"] == old
    assert found["replace-1"] == new
    assert found["fsync+2"] == found["fsync-2"] == new  # of the folder


@of_each_kind
@pytest.mark.parametrize("number", short_and_long(6, 100))
def test_sigterm_with_a_save_at_exit(kind, number, tmp_path):
    found = in_a_process(kind, "terms", tmp_path, number, limit=300 + number)
    assert found["old"] + found["new"] == number
    assert found["new"] >= number * 2 // 3


# --- others --------------------------------------------------------------------------------------------------


@of_each_kind
@pytest.mark.parametrize("seconds", short_and_long(2, 30))
def test_eight_writers_and_two_readers_of_one_path(kind, seconds, tmp_path):
    found = in_a_process(kind, "writers", tmp_path, seconds, limit=seconds + 300)
    assert found == {"failed": 0, "reads": found["reads"], "readers": 2, "temporaries": 0}
    assert found["reads"] > 0
    assert os.listdir(tmp_path) == ["bn"]


def test_threads_may_save_to_one_path(tmp_path):
    path, errors = tmp_path / "bn", []

    def save(number):
        try:
            for _ in range(10):
                marked(number, channels=100).save(path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert mark_of(BatchNorm.load(path)) in range(1, 5)
    assert os.listdir(tmp_path) == ["bn"]


def test_the_next_save_removes_what_a_dead_one_left_and_nothing_else(tmp_path):
    stale, used, link = (tmp_path / f".tmp-bnfast-{digit * 16}" for digit in "012")
    others = [tmp_path / name for name in (".tmp-bnfast-x", ".tmp-other", ".tmp-bnfast-" + "3" * 17, "file")]
    for path in (stale, used, *others):
        path.write_bytes(b"half a file")
    link.symlink_to(tmp_path / "file")
    with open(used, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as its writer does, as long as it lives
        marked(1, 10).save(tmp_path / "bn")
        assert not stale.exists()
        assert used.exists()
    marked(1, 10).save(tmp_path / "another")
    assert not used.exists()
    assert link.is_symlink()
    assert all(path.read_bytes() == b"half a file" for path in others)


def test_a_temporary_file_that_is_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    removed, lock = [], files._lock

    def late(descriptor, wait):
        if wait and len(removed) < 3:
            (name,) = temporaries(tmp_path)
            files._remove_stale(str(tmp_path))  # by another process
            removed.append(name)
        return lock(descriptor, wait)

    monkeypatch.setattr(files, "_lock", late)
    marked(1, 10).save(tmp_path / "bn")
    assert len(set(removed)) == 3
    assert mark_of(BatchNorm.load(tmp_path / "bn")) == 1
    assert os.listdir(tmp_path) == ["bn"]


# --- the order of things ---------------------------------------------------------------------------------------


@of_each_kind
@pytest.mark.parametrize("channels", [3, 20_000])  # less and more than a buffer
def test_everything_is_written_then_synced_then_renamed_then_the_folder_synced(kind, channels, tmp_path, monkeypatch):
    """The order that a loss of power asks for. At fsync the kernel has all bytes, and the old file is still there."""
    path, steps, kind = tmp_path / "bn", [], KINDS[kind]
    kind(0, channels).save(path)
    new, fsync, replace = kind(1, channels), os.fsync, os.replace
    expected = new.thing()._encoded() if kind is KINDS["layer"] else model._encoded(new.thing())

    def recorded_fsync(descriptor):
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            assert os.path.samestat(found, os.stat(tmp_path))
            assert path.read_bytes() == expected
            steps.append("fsync folder")
        else:
            (name,) = temporaries(tmp_path)
            assert os.path.samestat(found, os.stat(tmp_path / name))
            assert (tmp_path / name).read_bytes() == expected
            assert kind.load(path) == (0, channels)
            steps.append("fsync file")
        fsync(descriptor)

    def recorded_replace(source, target):
        assert os.path.dirname(source) == str(tmp_path)
        assert target == str(path)
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    new.save(path)
    assert steps == ["fsync file", "rename", "fsync folder"]


@of_each_kind
@pytest.mark.parametrize("name", ["chmod", "fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, OSError(errno.EIO, "lost")], ids=repr)
def test_any_exception_removes_the_temporary_file(kind, name, error, tmp_path, monkeypatch):
    path, kind = tmp_path / "bn", KINDS[kind]
    kind(0, 10).save(path)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        kind(1, 10).save(path)
    monkeypatch.undo()
    assert kind.load(path)[0] == 0
    assert os.listdir(tmp_path) == ["bn"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the file, between open and with
@pytest.mark.skipif(sys.gettrace() is not None, reason="needs sys.settrace, which a debugger or coverage is using")
def test_an_interrupt_anywhere_leaves_the_old_or_the_new_file_and_no_other(tmp_path):
    """In what both kinds of file end with."""
    path, seen, point, interrupted = tmp_path / "bn", [], 0, True
    while interrupted:
        point += 1
        path.write_bytes(b"old")
        interrupted = interrupted_at(point, lambda: files.replace(path, b"new"), files.__file__.__eq__)
        assert os.listdir(tmp_path) == ["bn"]
        seen.append(path.read_bytes())
    assert seen == sorted(seen, reverse=True)
    assert seen.count(b"old") > 20
    assert seen.count(b"new") > 1  # once it was too late


# --- no space ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def file_size_limit(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@of_each_kind
@pytest.mark.parametrize("size", [0, 1, 4096, 100_000])
def test_a_limit_of_file_sizes_leaves_the_old_file(kind, size, tmp_path):
    path, kind = tmp_path / "bn", KINDS[kind]
    kind(0).save(path)
    with file_size_limit(size), pytest.raises(OSError, match="too large"):
        kind(1).save(path)
    assert kind.load(path)[0] == 0
    assert os.listdir(tmp_path) == ["bn"]


@of_each_kind
def test_a_full_disk_leaves_the_old_file(kind, tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.decode()}")
    try:
        path, kind = tmp_path / "bn", KINDS[kind]
        kind(0).save(path)
        with pytest.raises(OSError, match="No space"):
            kind(1).save(path)  # 2 x 640 KB or more
        assert kind.load(path)[0] == 0
        assert os.listdir(tmp_path) == ["bn"]
        kind(1, 100).save(path)
        assert kind.load(path)[0] == 1
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# --- targets -------------------------------------------------------------------------------------------------


def test_the_mode_of_the_target_is_kept(tmp_path):
    path = tmp_path / "bn"
    before = os.umask(0o027)
    try:
        marked(0, 10).save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    for mode in (0o600, 0o666, 0o604):
        path.chmod(mode)
        marked(1, 10).save(path)
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert mark_of(BatchNorm.load(path)) == 1


@pytest.fixture
def folder_of_nobody():
    """A folder that everybody may reach; nobody's, if root runs the tests."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own are root's alone
        os.chmod(folder, 0o755)
        if not os.geteuid():
            os.chown(folder, 65534, 65534)
        yield Path(folder)


@contextlib.contextmanager
def as_nobody():
    """As a user who is not root."""
    root = not os.geteuid()
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_file_that_may_not_be_written_is_not_replaced(folder_of_nobody):
    path = folder_of_nobody / "bn"
    with as_nobody():
        marked(0, 10).save(path)
        path.chmod(0o444)
        inode = path.stat().st_ino
        with pytest.raises(PermissionError):
            marked(1, 10).save(path)
    assert path.stat().st_ino == inode
    assert mark_of(BatchNorm.load(path)) == 0
    assert os.listdir(folder_of_nobody) == ["bn"]


def test_a_folder_that_may_not_be_written(folder_of_nobody):
    with as_nobody():
        folder_of_nobody.chmod(0o555)
        with pytest.raises(PermissionError):
            marked(1, 10).save(folder_of_nobody / "bn")
        assert os.listdir(folder_of_nobody) == []
        folder_of_nobody.chmod(0o755)
        marked(1, 10).save(folder_of_nobody / "bn")
    assert mark_of(BatchNorm.load(folder_of_nobody / "bn")) == 1


def test_a_folder_that_may_be_written_but_not_listed(folder_of_nobody):
    with as_nobody():
        folder_of_nobody.chmod(0o300)
        marked(1, 10).save(folder_of_nobody / "bn")
        folder_of_nobody.chmod(0o755)
    assert mark_of(BatchNorm.load(folder_of_nobody / "bn")) == 1


def test_an_error_names_the_path_that_was_given(tmp_path):
    """Not the temporary file's."""
    path = tmp_path / "no such folder" / "bn.npz"
    with pytest.raises(FileNotFoundError) as caught:
        BatchNorm(3).save(path)
    assert caught.value.filename == str(path)


def test_a_target_that_is_no_file_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for target, error in (
        ("folder", IsADirectoryError),
        ("pipe", OSError),
        ("none/bn", FileNotFoundError),
        ("a\0b", ValueError),
    ):
        with pytest.raises(error):
            marked(1, 10).save(tmp_path / target)
    with pytest.raises(OSError, match="regular file"):
        marked(1, 10).save("/dev/null")
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_what_a_symbolic_link_points_to_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    link, target = tmp_path / "latest", tmp_path / "folder" / "bn"
    link.symlink_to("folder/bn")
    for number in (1, 2):  # the first time it points to nothing
        marked(number, 10).save(link)
        assert link.is_symlink()
        assert not target.is_symlink()
        assert mark_of(BatchNorm.load(target)) == mark_of(BatchNorm.load(link)) == number
    assert os.listdir(tmp_path / "folder") == ["bn"]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        marked(1, 10).save(tmp_path / "loop")


def test_a_link_to_another_file_system(tmp_path):
    other = "/dev/shm"
    if not os.path.isdir(other) or os.stat(other).st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system at /dev/shm")
    target = f"{other}/bnfast-test-{os.getpid()}"
    (tmp_path / "bn").symlink_to(target)
    try:
        marked(1, 10).save(tmp_path / "bn")
        assert mark_of(BatchNorm.load(target)) == 1
        assert temporaries(other) == []
    finally:
        os.unlink(target)
    assert os.listdir(tmp_path) == ["bn"]


def test_a_relative_path_and_a_long_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("bn", "n" * 255, "./x"):
        marked(1, 10).save(name)
        assert mark_of(BatchNorm.load(name)) == 1
    with pytest.raises(OSError, match="too long"):
        marked(1, 10).save("n" * 256)
    assert temporaries(tmp_path) == []
