"""A small file system of a test's own: its power is cut, or it is full."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from auditing import wait_until

#: EXT4_IOC_SHUTDOWN, and its flag NOLOGFLUSH: nothing that is still in memory reaches the disk any more.
SHUTDOWN = 0x8004587D
NOLOGFLUSH = 2
#: Megabytes, enough for the data of a database server; the file behind it is sparse.
MEGABYTES = 640


class Disk:
    """An ext4 in a file, mounted at `at`."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="expediter-disk-"))
        self._folder.chmod(0o755)  # PostgreSQL runs as somebody else
        self._image = self._folder / "image"
        self.at = self._folder / "disk"
        self.at.mkdir()
        with self._image.open("wb") as image:
            image.truncate(MEGABYTES << 20)
        try:
            self._run("mkfs.ext4", "-q", "-m", "0", str(self._image))
            self._mount()
        except (OSError, subprocess.CalledProcessError) as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            said = getattr(error, "stderr", "") or str(error)
            pytest.skip(f"no file system can be mounted here (it takes root and loop devices): {said.strip()}")

    def _run(self, *words: str) -> None:
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        subprocess.run(words, check=True, capture_output=True, text=True, env={"PATH": path, "LANG": "C.UTF-8"})

    def _mount(self) -> None:
        self._run("mount", "-o", "loop", str(self._image), str(self.at))

    def cut_power(self) -> None:
        """Lose what was not flushed; whoever writes here from now on gets an error."""
        descriptor = os.open(self.at, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", NOLOGFLUSH))
        finally:
            os.close(descriptor)

    def power_on(self) -> None:
        """Mount it again, as it was found after the cut; whoever has a file open in it must be about to end."""
        wait_until(self._is_unmounted)  # a server that crashed may have left children that write its obituary
        self._mount()

    def _is_unmounted(self) -> bool:
        try:
            self._run("umount", str(self.at))
        except subprocess.CalledProcessError as error:
            if "busy" not in error.stderr:
                raise
            return False
        return True

    def flush(self) -> None:
        """Write down what is in memory, as it is long after a server was set up."""
        self._run("sync", "--file-system", str(self.at))

    def fill(self) -> None:
        """Leave no room."""
        with (self.at / "ballast").open("ab", buffering=0) as ballast:
            for size in (1 << 20, 4096, 1):
                try:
                    while True:
                        ballast.write(b"\0" * size)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def make_room(self) -> None:
        """Take away again what filled it."""
        (self.at / "ballast").unlink()

    def remove(self) -> None:
        """Unmount it, and remove the file behind it."""
        self._run("umount", "--lazy", str(self.at))
        shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def small_disk() -> Iterator[Disk]:
    """Mount a disk for as long as it is used; skip where that cannot be done."""
    disk = Disk()
    try:
        yield disk
    finally:
        disk.remove()
