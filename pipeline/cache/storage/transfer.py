"""Requests over a network: each within a time, again after a failure, and then one clear line."""

from __future__ import annotations

import errno
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from pipeline.errors import CacheError, PipelineError
from pipeline.sources.files.loading import reason

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

#: Seconds between one attempt and the next: an outage of half a minute is lived through.
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
#: Seconds that one request may take. The largest is a row group or a part of a file, some
#: megabytes.
TIMEOUT = 120.0

#: Stores of objects, which have no directories to make.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "r2", "hf"}

#: What another attempt would not mend. By name: what raises them may not be installed.
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, NotImplementedError, TypeError, ValueError)
_FINAL_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "OfflineModeIsEnabled"}


def patiently(where: str, request: Callable[[], Result], *, timeout: float | None = None) -> Result:
    """The request's result, tried again with growing waits where the network fails or stalls.

    Args:
        where: what is read or written, for messages, without credentials.
        timeout: seconds for one attempt; None: `TIMEOUT`.

    Raises:
        FileNotFoundError, FileExistsError: as the file system raises them, at once.
        CacheError: access is denied, or every attempt failed.
    """
    seconds = TIMEOUT if timeout is None else timeout
    started = time.monotonic()
    for wait in (*WAITS, None):
        try:
            return _within(seconds, request)
        except (FileNotFoundError, FileExistsError, PipelineError):
            raise
        except Exception as error:
            if is_final(error):
                raise CacheError(f"{where}: {reason(error)}") from None
            if wait is None:
                raise CacheError(
                    f"{where}: the network failed {len(WAITS) + 1} times in {time.monotonic() - started:.0f} s ({reason(error)}); "
                    "what was transferred is kept: run the same command again (train-student: with --resume)"
                ) from None
            logger.info("%s: %s; trying again in %g s", where, reason(error), wait)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def read_range(filesystem: AbstractFileSystem, path: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file, and no more of it from the network: the hub's file system would read ahead.

    Raises:
        OSError: fewer came.
    """
    settings = {"cache_type": "none"} if "hf" in protocols(filesystem) else {}
    data = bytes(filesystem.cat_file(path, start=start, end=stop, **settings))
    if len(data) != stop - start:
        raise OSError(f"expected {stop - start} bytes from {start} on, found {len(data)}")
    return data


def create_file(filesystem: AbstractFileSystem, path: str, data: bytes) -> bool:
    """Write a file unless it is there, by the store's own condition where it has one: of two racing writers one gets True."""
    make_parent(filesystem, path)
    try:
        if is_local(filesystem):
            with open(path, "xb") as handle:
                handle.write(data)
        else:
            filesystem.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno == errno.EINVAL:  # S3: the condition of the put was not met
            return False
        raise
    return True


def make_parent(filesystem: AbstractFileSystem, path: str) -> None:
    """Make the directory that a file goes to.

    Object stores have none; s3fs would make a bucket for one.
    """
    if not _OBJECT_STORES & set(protocols(filesystem)):
        filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)


def is_local(filesystem: AbstractFileSystem) -> bool:
    """Whether a `file://` URL led here."""
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(filesystem, LocalFileSystem)


def protocols(filesystem: AbstractFileSystem) -> tuple[str, ...]:
    """The schemes of a file system's URLs."""
    return (filesystem.protocol,) if isinstance(filesystem.protocol, str) else tuple(filesystem.protocol)


def is_final(error: BaseException | None) -> bool:
    """Whether the same request would fail in the same way: the file is not there, access is denied, the request is wrong."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
        refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
        if refused or isinstance(error, _FINAL) or type(error).__name__ in _FINAL_NAMES:
            return True
        error = error.__cause__
    return False


def _within(seconds: float, request: Callable[[], Result]) -> Result:
    """The result, or TimeoutError.

    The thread of a request that stalls is left behind; it ends with the process.
    """
    done: queue.Queue[tuple[Result | None, BaseException | None]] = queue.Queue(1)

    def work() -> None:
        try:
            done.put((request(), None))
        except BaseException as error:  # handed over, whatever it is
            done.put((None, error))

    threading.Thread(target=work, name="transfer", daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # without an error there is a result
