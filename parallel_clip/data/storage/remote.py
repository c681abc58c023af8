"""Read shards at addresses such as https:// and s3:// through fsspec, with a cache on disk.

A file is read in pages of `PAGE` bytes; the order reads neighbouring samples near one another, so a
page serves many of them. All processes of a machine share the cache folder; where it grows beyond
its limit the pages used longest ago go first.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from parallel_clip.errors import InputError

PAGE = 4 * 2**20
MAX_REQUESTS = 6  # of a request; the waits between them add up to about 30 s
TIMEOUT = 15.0  # seconds of one request
_PAGES_BETWEEN_CLEANINGS = 16
_KEPT_AFTER_CLEANING = 0.9
_EXTRAS = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs",
           "az": "adlfs", "abfs": "adlfs"}  # fmt: skip

Value = TypeVar("Value")


def is_remote(path: str) -> bool:
    return "://" in path


def cache_folder() -> Path:
    """`$PARALLEL_CLIP_CACHE`, else `~/.cache/parallel_clip`."""
    chosen = os.environ.get("PARALLEL_CLIP_CACHE")
    return Path(chosen) if chosen else Path(os.path.expanduser("~")) / ".cache" / "parallel_clip"


class RemoteCache:
    """Pages of remote files, kept in a folder that all processes of a machine share.

    limit: bytes that it may hold; each process that writes may exceed it by a few pages.
    folder: None for `pages` in `cache_folder()`. `on_try` is called before each request."""

    def __init__(self, limit: int = 32 * 2**30, folder: Path | None = None):
        self.limit = limit
        self.folder = folder
        self.on_try: Callable[[], None] = lambda: None
        self._written = 0

    def page(self, name: str, fetch: Callable[[], bytes]) -> bytes:
        """The bytes of the page of this name: cached, else what `fetch()` returns."""
        file = (self.folder or cache_folder() / "pages") / name[:2] / name
        with suppress(OSError):
            data = file.read_bytes()
            os.utime(file)  # used now
            return data
        data = fetch()
        self._keep(file, data)
        return data

    def _keep(self, file: Path, data: bytes) -> None:
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if self._written % _PAGES_BETWEEN_CLEANINGS == 0:
                self._clean(file.parent.parent)
            self._written += 1
            temporary.write_bytes(data)
            temporary.replace(file)
        except OSError:  # full, or not writable: it is a cache, and reading goes on without
            with suppress(OSError):
                temporary.unlink()

    def _clean(self, folder: Path) -> None:
        pages = []
        for page in folder.glob("*/*"):
            with suppress(OSError):  # another process was quicker
                status = page.stat()
                pages.append((status.st_mtime_ns, status.st_size, page))
        held = sum(size for _, size, _ in pages)
        if held <= self.limit:
            return
        for _, size, page in sorted(pages):
            if held <= _KEPT_AFTER_CLEANING * self.limit:
                return
            page.unlink(missing_ok=True)
            held -= size


class RemoteFile:
    """A file at an address, read page by page through the cache."""

    def __init__(self, address: str, cache: RemoteCache, size: int | None = None):
        self._address = address
        self._cache = cache
        self.size = remote_size(address) if size is None else size
        self._name = hashlib.sha256(f"{address} {self.size}".encode()).hexdigest()[:32]
        self._last: tuple[int, bytes] | None = None

    def read(self, size: int, offset: int) -> bytes:
        end = min(offset + size, self.size)
        parts = []
        for number in range(offset // PAGE, -(-end // PAGE)):
            start = number * PAGE
            parts.append(self._page(number)[max(offset - start, 0) : end - start])
        return b"".join(parts)

    def close(self) -> None:
        self._last = None

    def _page(self, number: int) -> bytes:
        if self._last is None or self._last[0] != number:
            fetched = self._cache.page(f"{self._name}.{number}", lambda: self._fetch(number))
            self._last = number, fetched
        return self._last[1]

    def _fetch(self, number: int) -> bytes:
        start, end = number * PAGE, min((number + 1) * PAGE, self.size)
        system, path = file_system(self._address)
        data = with_retries(
            self._address,
            lambda: system.cat_file(path, start=start, end=end),
            self._cache.on_try,
        )
        if len(data) != end - start:
            raise OSError(
                f"{self._address}: bytes {start:,} to {end:,} were asked for, {len(data):,} came: "
                "it has changed, or its server does not serve parts of files"
            )
        return data


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path in it.

    Raises:
        InputError: fsspec, or what it needs for this kind of address, is not installed.
    """
    kind = address.partition("://")[0]
    try:
        import fsspec

        options: dict[str, Any] = {}
        if kind in ("http", "https"):
            import aiohttp

            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=TIMEOUT)}
        return fsspec.core.url_to_fs(address, **options)
    except ImportError as error:
        need = _EXTRAS.get(kind)
        how = f": pip install {need}" if need else ""
        raise InputError(
            f"{address}: reading {kind}:// needs a package that is missing ({error}){how}"
        ) from None
    except ValueError as error:  # a kind that fsspec does not know
        raise InputError(f"{address} cannot be read: {error}") from None


def remote_size(address: str) -> int:
    """Bytes of the file at an address; FileNotFoundError where there is none, other OSErrors."""
    system, path = file_system(address)
    size = with_retries(address, lambda: system.info(path))["size"]
    if size is None:
        raise OSError(f"{address}: its server does not say how large it is")
    return int(size)


def with_retries(
    address: str, request: Callable[[], Value], on_try: Callable[[], None] = lambda: None
) -> Value:
    """The result of `request()`, called up to MAX_REQUESTS times with exponential waits between.

    Raises OSError where all fail; FileNotFoundError and PermissionError at once."""
    for attempt in range(1, MAX_REQUESTS + 1):
        on_try()
        try:
            return request()
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # each kind of file system has its own
            if attempt == MAX_REQUESTS:
                raise OSError(
                    f"{address}: {type(error).__name__}: {error} (tried {MAX_REQUESTS} times)"
                ) from error
            time.sleep(2 ** (attempt - 1) * random.uniform(0.5, 1))
    raise AssertionError("unreachable")
