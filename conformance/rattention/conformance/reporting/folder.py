"""A folder that a run writes: tried before the run, emptied of the last run's files, written in whole files.

`rattention-files.json` lists what the run wrote, with checksums. The next run into the folder removes these files, and
no others: a file that somebody put there, or changed, stays.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from rattention.conformance import jsontext, tensorfile
from rattention.conformance.backends import CannotRun

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LEDGER = "rattention-files.json"
ABOUT = "written by one run of rattention; the next run into this folder removes these files and no others"
TRIAL = 4096
"""Bytes written to find out whether a folder can be written."""


class CannotWrite(Exception):
    """A file of the report could not be written; the text names it and says why."""


def try_folder(folder: Path, files: Iterable[str] = (), folders: Iterable[str] = (), what: str = "") -> None:
    """Write a trial file into the folder and remove it again, with every folder that had to be made for it.

    Args:
        folder: where a run will write; it need not exist.
        files: names that the run will write there, which must not be folders.
        folders: names of folders that the run will make there, or find.
        what: the option or argument that named the folder, for the message.

    Raises:
        CannotRun: the run would not be able to write.
    """
    shown = f"{what} {folder}".strip()
    made: list[Path] = []
    try:
        for part in (*reversed(folder.parents), folder):
            if os.path.lexists(part) and not part.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, f"{part} is not a folder")
            if not part.is_dir():
                part.mkdir()
                made.append(part)
        for place in (folder, *(folder / name for name in folders if os.path.lexists(folder / name))):
            with tempfile.NamedTemporaryFile(prefix=".rattention-trial-", dir=place) as trial:
                trial.write(bytes(TRIAL))
                trial.flush()
        for name in files:
            if (folder / name).is_dir():
                raise CannotRun(f"{shown} cannot be written: {name} is a folder there")
    except (OSError, ValueError) as error:
        raise CannotRun(f"{shown} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        for part in reversed(made):
            with contextlib.suppress(OSError):
                part.rmdir()


class Folder:
    """The files of one run in one folder.

    `shown` is the folder as the user named it. Files are written where that was when the run began, wherever a backend
    changes the working directory to. `keep`: files that the last run may have written and that this run reads.
    """

    def __init__(self, folder: str | Path, keep: Iterable[Path] = ()):
        self.shown = Path(folder)
        self.path = Path(folder).absolute()
        self.keep = {Path(file).resolve() for file in keep}
        self.begun = False
        self.claimed: int | None = None
        self.made: list[Path] = []

    def claim(self) -> bool:
        """Keep other runs out of the folder until `release`; False where one is in it.

        The folder is made for that, where it is not there yet. One that cannot be made or locked is not claimed: this
        is found out when something is to be written.
        """
        if fcntl is None:
            return True
        try:
            while True:
                self._make()
                handle = os.open(self.path, os.O_RDONLY)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.path.samestat(os.fstat(handle), os.stat(self.path)):
                        self.claimed = handle
                        return True
                except FileNotFoundError:
                    pass  # another run ended in between, and has removed it: once more
                finally:
                    if self.claimed is None:
                        os.close(handle)
        except BlockingIOError:
            return False
        except OSError:
            self.release()
            return True

    def release(self) -> None:
        """Let other runs in; a folder that was made for nothing goes."""
        for part in reversed(self.made):
            with contextlib.suppress(OSError):
                part.rmdir()
        self.made = []
        if self.claimed is not None:
            os.close(self.claimed)
            self.claimed = None

    def _make(self) -> None:
        for part in (*reversed(self.path.parents), self.path):
            if not part.is_dir():
                part.mkdir(exist_ok=True)
                self.made.append(part)

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write files, their names relative to the folder; the first call removes what the last run left.

        Raises:
            CannotWrite: a file could not be written. Those before it are there, and it is not there in part.
        """
        place = ""
        try:
            if files:
                self.path.mkdir(parents=True, exist_ok=True)
            elif not self.path.is_dir():
                return
            with self._alone():
                sums = self._ledger() if self.begun else self._clear(whole=not files)
                self.begun = True
                if not files:
                    return
                # The ledger first: a run that is killed while it writes leaves no file that the next run does not know.
                place = LEDGER
                self._note(sums | {name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
                for place, data in files.items():
                    tensorfile.write_bytes(self.path / place, data)
        except OSError as error:
            raise CannotWrite(f"{self.shown / place} could not be written: {error.strerror or error}") from None

    def has(self, name: str) -> bool:
        """Whether the run has written this file."""
        return (self.path / name).is_file()

    def foreign(self, name: str) -> bool:
        """Whether there is such a file that no earlier run wrote as it is."""
        return self.has(name) and not _unchanged(self.path / name, self._ledger().get(name, ""))

    def _clear(self, *, whole: bool) -> dict[str, str]:
        """Remove what the last run wrote and nobody changed, and folders that this leaves empty; what is kept.

        whole: the folder itself goes too, if it is empty then.
        """
        kept: dict[str, str] = {}
        places: set[Path] = set()
        for name, checksum in self._ledger().items():
            file = self.path / name
            if not file.resolve().is_relative_to(self.path.resolve()) or not _unchanged(file, checksum):
                continue
            if file.resolve() in self.keep:
                kept[name] = checksum
                continue
            file.unlink()
            places |= {self.path / parent for parent in Path(name).parents}
        if kept:
            self._note(kept)
        elif places:
            (self.path / LEDGER).unlink()
        for place in sorted(places, key=lambda p: -len(p.parts)):
            with contextlib.suppress(OSError):  # not empty: somebody else's files are there
                if whole or place != self.path:
                    place.rmdir()
        return kept

    def _note(self, sums: Mapping[str, str]) -> None:
        text = json.dumps({"about": ABOUT, "files": dict(sums)}, indent=1) + "\n"
        tensorfile.write_bytes(self.path / LEDGER, text.encode("ascii"))

    def _ledger(self) -> dict[str, str]:
        """Name to checksum of the last run's files; none where the ledger is missing or was changed into nonsense."""
        try:
            files = jsontext.parse((self.path / LEDGER).read_text(encoding="utf-8"))["files"]
            return {str(name): str(checksum) for name, checksum in files.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Two runs that write one folder at the same time take turns, where neither has claimed it."""
        handle = None
        with contextlib.suppress(OSError):  # a folder that may not be listed, or a file system without locks
            if fcntl is not None and self.claimed is None:
                handle = os.open(self.path, os.O_RDONLY)
                fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if handle is not None:
                os.close(handle)


def _unchanged(file: Path, checksum: str) -> bool:
    try:
        return not file.is_symlink() and hashlib.sha256(file.read_bytes()).hexdigest() == checksum
    except (OSError, ValueError):
        return False
