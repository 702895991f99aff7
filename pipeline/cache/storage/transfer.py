"""Network requests with timeouts and retries; errors are one line."""

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

#: Seconds between attempts: outages of up to half a minute are bridged.
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
#: Timeout of one request in seconds. The largest request is a row group or part of a file, a few
#: megabytes.
TIMEOUT = 120.0

#: Schemes of object stores, which have no directories to create.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "r2", "hf"}

#: Errors that another attempt would not solve. Some are listed by name, since the package that
#: raises them may not be installed.
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, NotImplementedError, TypeError, ValueError)
_FINAL_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "OfflineModeIsEnabled"}


def patiently(where: str, request: Callable[[], Result], *, timeout: float | None = None) -> Result:
    """Return the request's result, with retries and growing waits if the network fails or stalls.

    Args:
        where: what is read or written, without credentials, for messages.
        timeout: seconds for one attempt; None: `TIMEOUT`.

    Raises:
        FileNotFoundError, FileExistsError: raised by the file system; not retried.
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
    """Read the bytes [start, stop) of a file, without the read-ahead of the hub's file system.

    Raises:
        OSError: fewer bytes were received.
    """
    settings = {"cache_type": "none"} if "hf" in protocols(filesystem) else {}
    data = bytes(filesystem.cat_file(path, start=start, end=stop, **settings))
    if len(data) != stop - start:
        raise OSError(f"expected {stop - start} bytes from {start} on, found {len(data)}")
    return data


def create_file(filesystem: AbstractFileSystem, path: str, data: bytes) -> bool:
    """Write a file if it does not exist, by a conditional put where the store has one.

    Returns:
        Whether this call created the file; of two racing writers, one gets True.
    """
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
        if error.errno == errno.EINVAL:  # S3: the condition of the put failed
            return False
        raise
    return True


def make_parent(filesystem: AbstractFileSystem, path: str) -> None:
    """Create the parent directory of a file.

    Object stores are skipped: they have no directories, and s3fs would create a bucket.
    """
    if not _OBJECT_STORES & set(protocols(filesystem)):
        filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)


def is_local(filesystem: AbstractFileSystem) -> bool:
    """Whether a file system is the local one, opened by a `file://` URL."""
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(filesystem, LocalFileSystem)


def protocols(filesystem: AbstractFileSystem) -> tuple[str, ...]:
    """Return the URL schemes of a file system."""
    return (filesystem.protocol,) if isinstance(filesystem.protocol, str) else tuple(filesystem.protocol)


def is_final(error: BaseException | None) -> bool:
    """Whether the same request would fail again: no such file, access denied, or a bad request."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
        refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
        if refused or isinstance(error, _FINAL) or type(error).__name__ in _FINAL_NAMES:
            return True
        error = error.__cause__
    return False


def _within(seconds: float, request: Callable[[], Result]) -> Result:
    """Return the result, or raise TimeoutError.

    The thread of a stalled request keeps running until the process ends.
    """
    done: queue.Queue[tuple[Result | None, BaseException | None]] = queue.Queue(1)

    def work() -> None:
        try:
            done.put((request(), None))
        except BaseException as error:  # raised again in the calling thread
            done.put((None, error))

    threading.Thread(target=work, name="transfer", daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # no error, so there is a result
