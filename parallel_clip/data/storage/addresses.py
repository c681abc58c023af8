"""Files at addresses such as https:// and s3://, through fsspec: which there are, and requests for
parts of them, tried again where a store fails for a while."""

from __future__ import annotations

import hashlib
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar

from parallel_clip.errors import InputError

_EXTRAS = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs",
           "az": "adlfs", "abfs": "adlfs"}  # fmt: skip
# What signs an address, in its query: the signature, and all that belongs to it, of S3, Google,
# CloudFront and Azure. What else a query has names the file.
_SIGNED = re.compile(r"(^|&)(X-Amz-Signature|X-Goog-Signature|Signature|sig)=", re.IGNORECASE)
_OF_SIGNATURE = re.compile(
    r"((X-Amz|X-Goog)-[-\w]+|Signature|Expires|Policy|Key-Pair-Id|"
    r"AWSAccessKeyId|GoogleAccessId|sig|se|sp|sv|sr|ss|srt|st|spr|sip|sk\w+)=.*",
    re.IGNORECASE,
)
_AGAIN = (408, 409, 425, 429)  # of the answers below 500, those that pass
_SECONDS_BETWEEN_BEATS = 5

Value = TypeVar("Value")


@dataclass(frozen=True)
class StorageSettings:
    """How stores are asked. options: fsspec's storage options, by kind of address (`{"s3": ...}`)
    or for all; retries: of a request that fails; timeout: seconds without a byte after which it
    has failed; cache: bytes of pages that a machine keeps."""

    options: Mapping[str, Any] = field(default_factory=dict)
    retries: int = 5
    timeout: float = 30.0
    cache: int = 32 * 10**9

    def __post_init__(self) -> None:
        """InputError: options by kind that are no mapping."""
        for kind, options in self.options.items() if self._is_by_kind else ():
            if not isinstance(options, Mapping):
                raise InputError(
                    f"data.storage_options.{kind} is {options!r}; expected a mapping of fsspec's "
                    "options, such as {anon: true}"
                )

    @property
    def _is_by_kind(self) -> bool:
        return bool(self.options) and set(self.options) <= set(_EXTRAS)

    def of_kind(self, kind: str) -> dict[str, Any]:
        """The options for addresses of a kind such as `s3`."""
        return dict(self.options.get(kind, {}) if self._is_by_kind else self.options)


# Of this process and those that it forks. A command sets it once, before it reads; the alternative
# is an argument of each of the functions between a command and a request.
_settings = StorageSettings()
_beat: Callable[[], None] | None = None  # of `beat_while_waiting`


def configure_storage(settings: StorageSettings) -> None:
    """Set how this process, and those that it forks, ask stores."""
    global _settings
    _settings = settings


def storage_settings() -> StorageSettings:
    """What `configure_storage` has set."""
    return _settings


def beat_while_waiting(beat: Callable[[], None]) -> None:
    """Have `beat` called every few seconds while a request of this process is under way: it ends
    by its own time-out, so whoever waits for it is not stuck."""
    global _beat
    _beat = beat


def is_remote(path: str) -> bool:
    return "://" in path


def without_signature(address: str) -> str:
    """The address without what signs it in its query: the same file tomorrow, and its name in an
    index."""
    path, _, query = address.partition("?")
    if not is_remote(address) or not _SIGNED.search(query):
        return address
    kept = [part for part in query.split("&") if not _OF_SIGNATURE.fullmatch(part)]
    return f"{path}?{'&'.join(kept)}" if kept else path


class RemoteStat(NamedTuple):
    """A file at an address. changed: a negative number made of its ETag, checksum or time, 0 where
    the store gives none (files of this machine have positive ones); modified: seconds since 1970,
    None where it does not say."""

    size: int
    changed: int
    modified: float | None


def remote_stat(address: str) -> RemoteStat:
    """Look at a file. FileNotFoundError where there is none, PermissionError, other OSErrors."""
    system, path = file_system(address)
    return stat_of_info(address, request(address, lambda: system.info(path)))


def stat_of_info(address: str, info: Mapping[str, Any]) -> RemoteStat:
    """From what fsspec says of a file. OSError where that is not how large it is."""
    if info.get("size") is None:
        raise OSError(f"{address}: its server does not say how large it is")
    # By kind of store; the first that says most.
    names = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "Last-Modified",
             "LastModified", "last_modified", "updated", "mtime", "created")  # fmt: skip
    mark = next((str(info[name]) for name in names if info.get(name)), None)
    changed = 0
    if mark is not None:
        digest = hashlib.sha256(f"{mark} {info['size']}".encode()).digest()
        changed = -int.from_bytes(digest[:7], "big") - 1
    return RemoteStat(int(info["size"]), changed, _modified(info))


def _modified(info: Mapping[str, Any]) -> float | None:
    for name in ("LastModified", "last_modified", "Last-Modified", "updated", "mtime"):
        value = info.get(name)
        try:
            if isinstance(value, datetime):
                return value.timestamp()
            if isinstance(value, str):
                parse = parsedate_to_datetime if "," in value else datetime.fromisoformat
                return parse(value).timestamp()
        except ValueError:
            continue
        if isinstance(value, (int, float)):
            return float(value)
    return None


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path in it.

    Raises:
        InputError: fsspec, or what it needs for this kind of address, is not installed; or it does
            not take `data.storage_options`.
    """
    kind = address.partition("://")[0]
    options, timeout = _settings.of_kind(kind), _settings.timeout
    try:
        import fsspec

        if kind in ("http", "https"):
            import aiohttp

            limit = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
            options["client_kwargs"] = {"timeout": limit, **options.get("client_kwargs", {})}
        elif kind == "s3":
            limits = {"connect_timeout": timeout, "read_timeout": timeout}
            options["config_kwargs"] = {**limits, **options.get("config_kwargs", {})}
        return fsspec.core.url_to_fs(address, **options)
    except ImportError as error:
        need = _EXTRAS.get(kind)
        how = f": pip install {need}" if need else ""
        raise InputError(
            f"{address}: reading {kind}:// needs a package that is missing ({error}){how}"
        ) from None
    except TypeError as error:  # of the constructor of a file system
        raise _wrong_options(address, error) from None
    except ValueError as error:  # a kind that fsspec does not know
        raise InputError(f"{address} cannot be read: {error}") from None


def fetch_part(address: str, start: int, end: int) -> bytes:
    """The bytes [start, end) of a file; OSError where others come."""
    system, path = file_system(address)
    began = time.monotonic()

    def ask() -> bytes:
        data = system.cat_file(path, start=start, end=end)
        if len(data) != end - start:
            words = f"bytes {start:,} to {end:,} were asked for, {len(data):,} came"
            raise (_TooLongError if len(data) > end - start else OSError)(words)
        return data

    data = request(address, ask)
    _speed.note(len(data), time.monotonic() - began)
    return data


class _TooLongError(OSError):
    """More came than was asked for, which the server will do again."""


def request(address: str, ask: Callable[[], Value]) -> Value:
    """The result of `ask()`, called again, after waits that double, where a store fails for a time.

    Raises:
        FileNotFoundError: there is no such file; at once.
        PermissionError: it may not be read; at once.
        OSError: all tries have failed.
        InputError: the storage options are wrong; at once.
    """
    tries = _settings.retries + 1
    with _beating():
        for attempt in range(1, tries + 1):
            try:
                return ask()
            except Exception as error:  # each kind of file system has its own
                if (wrong := _type_error_in(error)) is not None:
                    raise _wrong_options(address, wrong) from None
                reason = _final_error(address, error)
                if reason is not None:
                    raise reason from error
                if attempt == tries:
                    raise OSError(
                        f"{address}: {_words(error)} (tried {tries} time{'s' * (tries > 1)}, as "
                        f"data.retries says{_speed})"
                    ) from error
            time.sleep(min(60, 2 ** (attempt - 1)) * random.uniform(0.5, 1))
    raise AssertionError("unreachable")


def _wrong_options(address: str, error: TypeError) -> InputError:
    kind = address.partition("://")[0]
    return InputError(f"data.storage_options are not those of {kind}://: {error}")


def _type_error_in(error: BaseException | None) -> TypeError | None:
    """Of a constructor behind fsspec's, which options reach at the first request; fsspec may have
    made another error of it."""
    while error is not None and not isinstance(error, TypeError):
        error = error.__cause__ or error.__context__
    return error


def _final_error(address: str, error: Exception) -> OSError | None:
    """What to raise at once; None for what may pass."""
    # fsspec makes "not found" of whatever it meets when it looks at a file by HTTP.
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    status = _status_of(error if cause is None else cause)
    name = type(error).__name__
    if status in (401, 403) or isinstance(error, PermissionError) or "Credentials" in name:
        code = f" ({status})" if status else ""
        return PermissionError(
            f"{address}: access is denied{code}: {_words(error)}. Give the store's credentials in "
            "the environment (AWS_ACCESS_KEY_ID and the like), data.storage_options={anon: true} "
            "for a public bucket, or a new address where a signed one has expired"
        )
    if status == 404 or isinstance(error, FileNotFoundError) and cause is None:
        return FileNotFoundError(f"{address}: there is no such file (404)")
    if isinstance(error, _TooLongError):
        return OSError(
            f"{address}: {error}: it has changed, or its server does not serve parts of files"
        )
    if status is not None and 400 <= status < 500 and status not in _AGAIN:
        return OSError(f"{address}: the server refuses ({status}): {_words(error)}")
    return None


def _status_of(error: BaseException) -> int | None:
    """The HTTP status that a store answered with: of aiohttp, of gcsfs, of botocore."""
    answer = getattr(error, "response", None)
    metadata = answer.get("ResponseMetadata", {}) if isinstance(answer, Mapping) else {}
    if "HTTPStatusCode" in metadata:
        return int(metadata["HTTPStatusCode"])
    status = getattr(error, "status" if hasattr(error, "status") else "code", None)
    return int(status) if str(status).isdecimal() else None


def _words(error: Exception) -> str:
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception):
        error = cause
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return f"no byte came for {_settings.timeout:g} s, which is data.timeout"
    return f"{type(error).__name__}: {error}"


class _Speed:
    """How quickly parts of files have come so far, in words behind an error."""

    def __init__(self) -> None:
        self._bytes, self._seconds = 0, 0.0

    def note(self, size: int, seconds: float) -> None:
        self._bytes += size
        self._seconds += seconds

    def __str__(self) -> str:
        if not self._bytes:
            return "; nothing had come before"
        rate = self._bytes / max(self._seconds, 1e-6)
        return f"; {self._bytes / 1e6:,.1f} MB had come before, at {rate / 1e6:,.2f} MB/s"


_speed = _Speed()


@contextmanager
def _beating():
    """Call what `beat_while_waiting` has set, now and every few seconds, until the block ends."""
    if _beat is None:
        yield
        return
    _beat()
    done = threading.Event()

    def run() -> None:
        while not done.wait(_SECONDS_BETWEEN_BEATS):
            _beat()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
