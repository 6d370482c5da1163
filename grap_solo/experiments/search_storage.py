"""Where a search keeps its study: SQLite, a journal file, or a database server.

Workers wait while a storage is locked or cannot be reached, and refuse it after two minutes.
"""

from __future__ import annotations

import contextlib
import functools
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.pruners import BasePruner
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    SQLAlchemyError,
)

from grap_solo.errors import ConfigError
from grap_solo.extras import require
from grap_solo.records.files import expand_path

STUDY_FILE = "study.db"
UNWRITABLE_DATABASE = ("readonly", "unable to open", "is full", "disk I/O error")
"""SQLite's words for a file that is whole but cannot be used."""

STORAGE_ERRORS = (SQLAlchemyError, optuna.exceptions.StorageInternalError)

PATIENCE = 120.0
"""The seconds for which a storage may be locked or out of reach."""

HEARTBEAT, GRACE = 60, 300
"""The seconds between a trial's signs of life in a database, and those after which it is lost. The
second is longer than :data:`PATIENCE`, after which a worker without its database has ended."""

Found = TypeVar("Found")


@dataclass(frozen=True)
class Storage:
    """Where a study is kept.

    Attributes:
        kind: ``sqlite``, ``journal`` or ``server``.
        place: the file, or the server's URL, which may have a password.
        label: the place without a password, for texts and files.
    """

    kind: str
    place: str
    label: str

    def __repr__(self) -> str:
        return f"Storage({self.label})"


def parse_storage(text: str | None, directory: Path) -> Storage:
    """Reads ``--storage``.

    Args:
        text: None for SQLite in the search's folder; ``journal:PATH``, or a path that ends in
            ``.journal`` or ``.log``, for a journal file; or a URL that SQLAlchemy can open.
        directory: the search's folder.

    Raises:
        ConfigError: something else, or a database whose driver is not installed.
    """
    if text is None:
        file = str((directory / STUDY_FILE).absolute())
        return Storage("sqlite", file, str(directory / STUDY_FILE))
    if text.startswith("journal:") or text.endswith((".journal", ".log")):
        return _file_storage("journal", text.removeprefix("journal:"), directory)
    try:
        url = sqlalchemy.make_url(text)
        if url.drivername in ("postgresql", "postgres"):  # SQLAlchemy would take an older driver.
            url = url.set(drivername="postgresql+psycopg")
        if url.get_backend_name() == "postgresql" and url.get_driver_name() == "psycopg":
            require("--storage", "postgres", "psycopg")
        if url.get_backend_name() == "sqlite":
            return _file_storage("sqlite", url.database or "", directory)
        url.get_dialect().import_dbapi()
    except (ArgumentError, NoSuchModuleError):
        raise ConfigError(
            "--storage: expected journal:PATH, or a database's URL such as "
            "postgresql://user@host/name"
        ) from None
    except ImportError as error:
        raise ConfigError(f"--storage: {error.name} is not installed: install it") from None
    # A query can have a password too.
    label = url.set(query={}).render_as_string(hide_password=True)
    return Storage("server", url.render_as_string(hide_password=False), label)


def _file_storage(kind: str, path: str, directory: Path) -> Storage:
    """The storage in a file of a folder that is there, or of the search's folder."""
    try:
        file = Path(expand_path(path)).absolute()
    except ConfigError as error:
        raise ConfigError(f"--storage: {error}") from None
    if file.is_dir() or not (file.parent.is_dir() or file.parent == directory.absolute()):
        wrong = f"{file} is a folder" if file.is_dir() else f"no such folder {file.parent}"
        raise ConfigError(f"--storage: {wrong}: give a file in a folder that is there")
    return Storage(kind, str(file), str(file))


def check_for_slurm(storage: Storage) -> None:
    """Refuses a storage that SLURM's jobs cannot use.

    Raises:
        ConfigError: SQLite, or a password, which the jobs' files would keep.
    """
    if storage.kind == "sqlite":
        raise ConfigError(
            "--storage: SQLite is for one machine: with --launcher slurm give a journal file on "
            "the shared file system (--storage journal:PATH) or a postgresql:// URL"
        )
    if storage.kind == "server":
        url = sqlalchemy.make_url(storage.place)
        if url.password is not None or "password" in url.query:
            raise ConfigError(
                f"--storage: {storage.label} has a password, and SLURM's jobs would keep it in "
                "their files: leave it out, and put it into ~/.pgpass or PGPASSWORD"
            )


@contextlib.contextmanager
def open_study(
    storage: Storage, name: str, pruner: BasePruner | None = None
) -> Iterator[optuna.study.Study]:
    """Opens a study, or makes a new one, and closes its connections in the end."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="optuna")
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    backend = _open_storage(storage)
    try:
        yield optuna.create_study(
            storage=backend,
            study_name=name,
            direction="maximize",
            pruner=pruner,
            load_if_exists=True,
        )
    finally:
        if isinstance(backend, RDBStorage):
            backend.remove_session()
            backend.engine.dispose()


def _open_storage(storage: Storage) -> BaseStorage:
    if storage.kind == "journal":
        # Its lock is a symbolic link: network file systems of any age make one at a time.
        return JournalStorage(JournalFileBackend(storage.place))
    if storage.kind == "sqlite":
        # A URL would take a meaning from some characters of the path.
        connect = functools.partial(sqlite3.connect, storage.place, check_same_thread=False)
        return RDBStorage(f"sqlite:///{STUDY_FILE}", {"creator": connect})
    options: dict[str, Any] = {"pool_pre_ping": True}
    if sqlalchemy.make_url(storage.place).get_driver_name() in ("psycopg", "psycopg2"):
        options["connect_args"] = {"connect_timeout": 10}
    return RDBStorage(storage.place, options, heartbeat_interval=HEARTBEAT, grace_period=GRACE)


@contextlib.contextmanager
def beating(study: optuna.study.Study, trial: optuna.Trial) -> Iterator[None]:
    """Gives signs of life of a trial to a database server, until the block ends.

    Optuna has a thread for this, which ends for good when the server is away for a moment.
    """
    storage: Any = study._storage
    interval = getattr(storage, "get_heartbeat_interval", lambda: None)()
    if interval is None:  # Files have locks instead.
        yield
        return
    ended = threading.Event()

    def beat() -> None:
        while True:
            with contextlib.suppress(*STORAGE_ERRORS):
                storage.record_heartbeat(trial._trial_id)
            if ended.wait(interval):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# ---- failures -------------------------------------------------------------------------------


def patiently(storage: Storage, call: Callable[[], Found]) -> Found:
    """Calls a function of the storage until it can be reached. The function may be called twice.

    Raises:
        ConfigError: it cannot be reached for :data:`PATIENCE` seconds.
    """
    deadline, pause = time.monotonic() + PATIENCE, 0.1
    while True:
        try:
            return call()
        except (*STORAGE_ERRORS, OSError) as error:
            if not _is_passing(error, storage):
                raise
            if time.monotonic() + pause > deadline:
                raise ConfigError(
                    f"{storage.label}: out of reach for {PATIENCE:g} seconds "
                    f"({_say_cause(error)}): nothing is lost, start the search again when it is "
                    "back"
                ) from None
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


def _is_passing(error: BaseException, storage: Storage) -> bool:
    """Whether an error may go away by itself: a lock, or a server that is away."""
    if storage.kind == "journal":
        return isinstance(error, OSError)
    found = _cause(error, DBAPIError)
    if storage.kind == "sqlite":
        return found is not None and "locked" in str(found.orig)
    return isinstance(found, (OperationalError, InterfaceError)) or (
        found is not None and found.connection_invalidated
    )


def _cause(error: BaseException | None, kind: type[Found]) -> Found | None:
    """Finds the first of an error's causes that is of a kind."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__
    return error


def _say_cause(error: BaseException) -> str:
    found = _cause(error, DBAPIError)
    text = str(error if found is None else found.orig)
    return (text.strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def explained_failures(storage: Storage) -> Iterator[None]:
    """Turns the failures of a storage into errors that say what to do.

    Raises:
        ConfigError: another process uses it, it cannot be written or reached, or it is no study.
    """
    try:
        yield
    except (*STORAGE_ERRORS, ValueError, KeyError) as error:
        if not isinstance(error, STORAGE_ERRORS) and not _is_of_journal(error):
            raise
        line = _say_cause(error)
        text = f"not a study, or a damaged one: {line}"
        if storage.kind == "server":
            text = f"cannot be used: {line}"
        elif "locked" in line:  # Python 3.10 has no error codes.
            text = f"another process uses it ({line}): end that process, or wait for it"
        elif any(words in line for words in UNWRITABLE_DATABASE):
            text = f"cannot be read or written ({line}): make room, or let the file be written"
        raise ConfigError(f"{storage.label}: {text}") from None


def _is_of_journal(error: BaseException) -> bool:
    """Whether an error comes from Optuna's reader of journals, which raises Python's own."""
    trace = error.__traceback__
    while trace is not None:
        if "optuna/storages/journal" in trace.tb_frame.f_code.co_filename:
            return True
        trace = trace.tb_next
    return False
