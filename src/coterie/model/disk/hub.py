"""Models on the Hugging Face hub: what of them is fetched, and headers of weights without the weights.

The hub's own client does the talking, so its settings hold: ``HF_ENDPOINT``, ``HF_HOME``, ``HF_TOKEN``,
``HF_HUB_OFFLINE`` and proxies. What the local cache has is not fetched again. No torch here.
"""

from __future__ import annotations

import errno
import glob
import logging
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import httpx
import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, though not marked as such
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    hf_raise_for_status,
    http_stream_backoff,
)

from coterie.amounts import format_bytes
from coterie.errors import NotACheckpoint, OutOfSpace
from coterie.model.disk.beside import belongs, is_small
from coterie.model.disk.files import HubId, sample_file, take_samples
from coterie.model.disk.header import parse_header, read_header
from coterie.model.disk.tensors import TensorInfo
from coterie.model.disk.weights import find_weights
from coterie.progress import are_bars_drawn, track

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

#: Bytes from the beginning of a weight file that are asked for at once: most headers are shorter.
_FIRST_BYTES = 2**17
#: Weight files up to this size are read whole where samples of them are asked for.
_SMALL_FILE = 2**18
_CONNECTIONS = 8
_TIMEOUT = 30.0  # seconds without an answer


@dataclass(frozen=True, kw_only=True, slots=True)
class HubFiles:
    """A model of the hub whose small files are in the local cache; see `coterie.model.disk.files.Files`.

    Attributes:
        folder: its folder there.
        hub_id: which model.
        elsewhere: names of files that are on the hub and not in the folder.
    """

    folder: Path
    hub_id: HubId
    elsewhere: Collection[str] = ()
    _remote_files: dict[str, RemoteFile] = field(default_factory=dict)

    def headers(self, names: Sequence[str]) -> list[dict[str, TensorInfo]]:
        """Return what headers say, of files that are not there by ranges of their bytes.

        Raises:
            CorruptCheckpoint: a header contradicts its file.
            NotACheckpoint: the hub does not answer, or serves no ranges.
        """

        def read(name: str) -> dict[str, TensorInfo]:
            if (self.folder / name).exists():
                return read_header(self.folder / name)
            file = self._remote(name)
            return parse_header(f"{self.hub_id}: {name}", name, file.size, file.read)

        return self._each(read, names, "reading headers")

    def samples(self, names: Sequence[str]) -> list[tuple[int, bytes]]:
        """Return sizes and samples, of files that are not there by ranges of their bytes; see `headers` for errors."""

        def sample(name: str) -> tuple[int, bytes]:
            if (self.folder / name).exists():
                return sample_file(self.folder / name)
            file = self._remote(name)
            if file.size <= _SMALL_FILE:
                file.read(0, file.size)
            return file.size, take_samples(file.size, file.read)

        return self._each(sample, names, "reading samples")

    def _each(self, read: Callable[[str], Answer], names: Sequence[str], what: str) -> list[Answer]:
        with _explained(self.hub_id), ThreadPoolExecutor(_CONNECTIONS) as pool:
            try:
                return list(track(pool.map(read, names), what, total=len(names)))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _remote(self, name: str) -> RemoteFile:
        if name not in self._remote_files:  # samples are asked for after headers
            url = huggingface_hub.hf_hub_url(
                self.hub_id.name, name, revision=self.folder.name, endpoint=constants.ENDPOINT
            )
            self._remote_files[name] = RemoteFile(url)
        return self._remote_files[name]


class RemoteFile:
    """A file of the hub, read by ranges of its bytes.

    Attributes:
        size: its bytes.
    """

    def __init__(self, url: str) -> None:
        """Ask for the first bytes; the place that the hub sends us on to is where all others are asked for."""
        self._url = self._place = url
        self._first = b""
        self.size = 0
        self._first = self._fetch(0, _FIRST_BYTES)

    def read(self, begin: int, length: int) -> bytes:
        """Return bytes from a position on; fewer at the end."""
        length = min(length, self.size - begin)
        if begin + length <= len(self._first):
            return self._first[begin : begin + length]
        if length <= 0:
            return b""
        content = self._fetch(begin, length)
        if begin == 0:
            self._first = content
        return content

    def _fetch(self, begin: int, length: int) -> bytes:
        try:
            return self._fetch_from(self._place, begin, length)
        except HfHubHTTPError:
            if self._place == self._url:
                raise
            self._place = self._url  # links to where files really lie hold for a while only
            return self._fetch_from(self._url, begin, length)

    def _fetch_from(self, url: str, begin: int, length: int) -> bytes:
        # The token is for the hub; where it sends us on to, the link itself is the permission.
        headers = build_hf_headers(token=None if url == self._url else False)
        headers |= {"Range": f"bytes={begin}-{begin + length - 1}", "Accept-Encoding": "identity"}
        with http_stream_backoff("GET", url, headers=headers, timeout=_TIMEOUT) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            self._place = str(response.url)
            if response.status_code == 206:
                self.size = int(response.headers["Content-Range"].rpartition("/")[2])
            elif int(response.headers.get("Content-Length", length + 1)) <= length and begin == 0:
                self.size = int(response.headers["Content-Length"])  # smaller than what was asked for
            else:
                raise NotACheckpoint(
                    f"{url.partition('?')[0]} cannot be read in parts: this server answers with the whole file; fetch "
                    "the model with hf download ID --local-dir DIR, and pass DIR"
                )
            return response.read()


def fetch_model(hub_id: HubId, *, weights: bool, allow_pickle: bool = False) -> HubFiles:
    """Fetch a model into the local cache of the hub's client: what is small, and perhaps the weights.

    Of the weights only those are fetched that are read here: no second copies in other formats. How many bytes that is
    is logged before. Where the hub cannot be reached, what the cache has is taken.

    Args:
        hub_id: which model.
        weights: fetch them, and all that a result carries along; else only config, tokenizer and index.
        allow_pickle: whether weights may be pickles.

    Raises:
        NotACheckpoint: there is no such model or revision, it may not be seen, or not be reached; says what to do.
        CorruptCheckpoint: its index is damaged.
        OutOfSpace: the disk cannot hold the weights.
    """
    with _explained(hub_id):
        try:
            sizes = _sizes(hub_id)
        except (httpx.TransportError, OfflineModeIsEnabled, HfHubHTTPError) as error:
            folder = _cached(hub_id)
            if folder is None or isinstance(error, RevisionNotFoundError):
                raise
            if weights:
                _check_cached(hub_id, folder, allow_pickle=allow_pickle, error=error)
            if not isinstance(error, OfflineModeIsEnabled):
                log.info("%s: the hub does not answer (%s); what the local cache has is taken", hub_id, _reason(error))
            return HubFiles(folder=folder, hub_id=hub_id)
        small = [name for name in sizes if is_small(name)]
        folder = _fetch(hub_id, hub_id.revision, small or ["config.json"])
        files = HubFiles(folder=folder, hub_id=hub_id, elsewhere=_elsewhere(folder, sizes))
        if not weights:
            return files
        shards = find_weights(folder, allow_pickle=allow_pickle, elsewhere=files.elsewhere).shards
        missing = [name for name in shards if name not in sizes and not (folder / name).exists()]
        if missing:
            raise NotACheckpoint(f"{hub_id}: its index names {missing[0]}, which is not on the hub; ask who made it")
        _tell(hub_id, folder, {name: sizes.get(name, 0) for name in shards})
        _fetch(hub_id, folder.name, [*shards, *belongs(sizes)])
        return HubFiles(folder=folder, hub_id=hub_id, elsewhere=_elsewhere(folder, sizes))


def _sizes(hub_id: HubId) -> dict[str, int]:
    """Return the bytes of every file of a model by name; raises what the hub's client raises."""
    info = huggingface_hub.HfApi().model_info(
        hub_id.name, revision=hub_id.revision, files_metadata=True, timeout=_TIMEOUT
    )
    return {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _elsewhere(folder: Path, names: Collection[str]) -> frozenset[str]:
    return frozenset(name for name in names if not (folder / name).exists())


def _fetch(hub_id: HubId, revision: str | None, names: Sequence[str]) -> Path:
    patterns = [glob.escape(name) for name in names]
    silent = not are_bars_drawn() and not are_progress_bars_disabled()
    if silent:
        disable_progress_bars()
    try:
        return Path(huggingface_hub.snapshot_download(hub_id.name, revision=revision, allow_patterns=patterns))
    finally:
        if silent:
            enable_progress_bars()


def _cached(hub_id: HubId) -> Path | None:
    """Return the folder of a model in the local cache; None where it is not there."""
    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id.name, revision=hub_id.revision, allow_patterns=["config.json"], local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        return None


def _check_cached(hub_id: HubId, folder: Path, *, allow_pickle: bool, error: Exception) -> None:
    """Raise NotACheckpoint where the cache has a model without its weights."""
    try:
        shards = find_weights(folder, allow_pickle=allow_pickle).shards
    except NotACheckpoint:
        shards = []
    absent = [name for name in shards if not (folder / name).exists()]
    if absent or not shards:
        without = f"{absent[0]} and {len(absent) - 1} others" if len(absent) > 1 else "its weights"
        raise NotACheckpoint(
            f"{hub_id} is in the local cache without {without}, and {_reason(error)}; {_way_out(error, hub_id)}"
        )


def _tell(hub_id: HubId, folder: Path, sizes: Mapping[str, int]) -> None:
    """Say how much is to be fetched; raises OutOfSpace where the disk cannot hold it."""
    absent = [name for name in sizes if not (folder / name).exists()]
    to_fetch = sum(sizes[name] for name in absent)
    if not absent:
        return
    there = f", {format_bytes(sum(sizes.values()) - to_fetch)} are there" if len(absent) < len(sizes) else ""
    what = f"{format_bytes(to_fetch)} in {len(absent)} files" if len(absent) > 1 else format_bytes(to_fetch)
    log.info("%s: fetching %s of weights%s; they go to %s", hub_id, what, there, constants.HF_HUB_CACHE)
    free = shutil.disk_usage(folder).free
    if free < to_fetch:
        raise OutOfSpace(
            errno.ENOSPC,
            f"{hub_id} has {format_bytes(to_fetch)} of weights to fetch, {constants.HF_HUB_CACHE} has "
            f"{format_bytes(free)} free; free some space, or let HF_HUB_CACHE name another place",
        )


@contextmanager
def _explained(hub_id: HubId) -> Iterator[None]:
    """Say in one line what is wrong with a model of the hub, and what to do."""
    try:
        yield
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        if isinstance(error, OutOfSpace):
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OutOfSpace(
                errno.ENOSPC,
                f"the disk filled up while {hub_id} was fetched into {constants.HF_HUB_CACHE}: free some space and "
                "give the same command again, which goes on, or let HF_HUB_CACHE name another place",
            ) from error
        raise NotACheckpoint(
            f"{hub_id} is no local folder and could not be fetched as a hub id: {_reason(error)}; "
            f"{_way_out(error, hub_id)}"
        ) from None


def _cause(error: Exception) -> BaseException:
    """Return what is behind an error that only says that the cache has nothing either."""
    return error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None else error


def _reason(error: Exception) -> str:
    endpoint, cause = constants.ENDPOINT, _cause(error)
    match cause:
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set, so that only the local cache is looked into"
        case GatedRepoError():
            return "it is gated, and you have no access with the token that there is, or there is none"
        case RevisionNotFoundError():
            return "it has no such revision"
        case RepositoryNotFoundError():
            return f"{endpoint} knows no model of that name, or it is private"
        case RemoteEntryNotFoundError():
            return "a file of it is not on the hub"
        case httpx.TimeoutException():
            return f"{endpoint} does not answer"
        case httpx.TransportError():
            return f"{endpoint} cannot be reached"
        case HfHubHTTPError():
            return f"{endpoint} answers {cause.response.status_code}"
        case _:
            return f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0][:200]}"


def _way_out(error: Exception, hub_id: HubId) -> str:
    match _cause(error):
        case OfflineModeIsEnabled():
            return "unset it, or pass a folder"
        case GatedRepoError():
            return f"ask for it at {constants.ENDPOINT}/{hub_id.name} and log in with hf auth login"
        case RevisionNotFoundError():
            return f"its branches and tags are at {constants.ENDPOINT}/{hub_id.name}/tree/main"
        case RepositoryNotFoundError():
            return "correct the name, or log in with hf auth login"
        case _:
            return "try again later, or pass a folder that it was fetched into (hf download ID --local-dir DIR)"
