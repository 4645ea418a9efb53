"""Writing checkpoints: any part of any tensor, from any thread, published at once.

`open_writer` lays out the files, reserves their space on the disk and writes everything but the tensors; `write` puts
entries where they belong; `finish` makes all of it durable and gives the output its name. Until then nothing exists
under that name, and after an error nothing is left over.

What a killed writer left is cleared, unless the caller knows what is in it and goes on with it (`resume`).

An output behind a URL is built in a temporary folder, with the same guarantees, and uploaded by `finish`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Shaped

from jaxmerge.checkpoints import npz, orbax, safetensors
from jaxmerge.checkpoints.layout import DTYPES, Layout, PlannedFile, TensorSpec
from jaxmerge.checkpoints.publish import JoinedStaging, Staging, as_checkpoint_error, remove, sync
from jaxmerge.checkpoints.stores import local_path
from jaxmerge.checkpoints.upload import MAX_OBJECT_BYTES, SHARD_BYTES, Place
from jaxmerge.errors import CheckpointError, MergeError, StructureError
from jaxmerge.trees.lazy import LazyTensor
from jaxmerge.trees.paths import named_leaves

if TYPE_CHECKING:
    import tensorstore as ts

JOURNAL = ".jaxmerge-journal"
"""A file in the hidden folder in which the caller may note how far it has come; it is no part of the checkpoint."""

_PIECE_BYTES = 8 << 20  # lazy tensors are copied through a buffer of this size


class CheckpointWriter:
    """A checkpoint that is being written. `open_writer` makes one.

    As a context manager it finishes at the end of the block, or aborts when an exception leaves it.

    Attributes:
        path: where the checkpoint will stand; text where that is a URL.
        folder: the hidden folder in which it is built.
        specs: the tensors by name.
        bytes_written: bytes of tensor entries written so far.
        resumed: whether it goes on with the files of a writer that was killed.
        joined: whether the files are those of a writer in another process, which finishes them.
        display: is told how an upload goes, by `begin(what, bytes)` and `advance(bytes)`; None for nobody.
    """

    display: Any = None

    def __init__(
        self,
        staging: Staging | JoinedStaging,
        layout: Layout,
        specs: Mapping[str, TensorSpec],
        resumed: bool = False,
    ):
        self.path: Path | Any = staging.target
        self.folder, self.specs = staging.folder, specs
        self._staging, self._layout, self.resumed = staging, layout, resumed
        self._lock = threading.Lock()
        self._entries_written = dict.fromkeys(specs, 0)
        self.joined = isinstance(staging, JoinedStaging)
        if self.joined:
            return
        for name, planned in layout.files.items():
            _create(self.folder / name, planned, anew=not resumed)
        for link, name in layout.links.items():
            (self.folder / link).parent.mkdir(parents=True, exist_ok=True)
            if resumed:
                (self.folder / link).unlink(missing_ok=True)
            os.link(self.folder / name, self.folder / link)

    @property
    def places(self) -> Mapping[str, tuple[str, int]]:
        """The file of each tensor, and the offset of its first entry there."""
        return self._layout.places

    @property
    def file_sizes(self) -> dict[str, int]:
        """The files of the checkpoint and their sizes."""
        return {name: planned.size for name, planned in self._layout.files.items()}

    @property
    def bytes_written(self) -> int:
        return sum(n * self.specs[name].dtype.itemsize for name, n in self._entries_written.items())

    def write(self, name: str, start: int, values: Shaped[np.ndarray, "..."]) -> bool:
        """Writes the entries `start ... start + n` of the row-major flattened tensor. Thread-safe.

        Args:
            name: the tensor.
            start: flat position of the first entry.
            values: entries in the tensor's dtype; the memory may be reused when the call returns.

        Returns:
            Whether this was the last that was missing of the tensor.

        Raises:
            CheckpointError: the entries do not fit the tensor, or the disk is full.
        """
        spec = self.specs[name]
        if values.dtype != spec.dtype or values.ndim != 1 or not 0 <= start <= start + values.size <= spec.size:
            raise CheckpointError(
                f"{self.path}: cannot write {values.dtype.name}{list(values.shape)} at entry {start} of {name}, "
                f"which is {spec.dtype.name}{list(spec.shape)}"
            )
        file, offset = self._layout.places[name]
        data = np.ascontiguousarray(values).view(np.uint8)
        with as_checkpoint_error(f"write {name} to {self.path}"), self._opened(file, os.O_WRONLY) as fd:
            _pwrite(fd, data, offset + start * spec.dtype.itemsize)
        with self._lock:
            self._entries_written[name] += values.size
            return self._entries_written[name] == spec.size

    def read_back(self, name: str, start: int, out: Shaped[np.ndarray, " n"]) -> None:
        """Fills `out` with what stands in the files for the entries from `start` on, whoever wrote it.

        Raises:
            CheckpointError: it cannot be read.
        """
        file, offset = self._layout.places[name]
        with as_checkpoint_error(f"read {name} from {self.folder}"), self._opened(file, os.O_RDONLY) as fd:
            _pread(fd, out.view(np.uint8), offset + start * self.specs[name].dtype.itemsize, file)

    def take_over(self, name: str) -> None:
        """Counts a tensor as written, because a killed writer has written it."""
        with self._lock:
            self._entries_written[name] = self.specs[name].size

    @property
    def entries_written(self) -> dict[str, int]:
        """How many entries of each tensor have been written, of those that have any."""
        return {name: n for name, n in self._entries_written.items() if n}

    def count(self, entries: Mapping[str, int]) -> None:
        """Counts entries as written that joined writers have written."""
        with self._lock:
            for name, n in entries.items():
                self._entries_written[name] += n

    def discard(self, name: str) -> None:
        """Counts a tensor as not written, so that it can be written again."""
        with self._lock:
            self._entries_written[name] = 0

    def sync(self, names: Iterable[str]) -> None:
        """Makes durable what was written of some tensors so far.

        Raises:
            CheckpointError: the disk is full or broken.
        """
        with as_checkpoint_error(f"write {self.path}"):
            for file in {self._layout.places[name][0] for name in names}:
                with self._opened(file, os.O_RDONLY) as fd:
                    os.fsync(fd)

    def finish(self) -> Path | Any:
        """Makes everything durable and publishes it. Returns the path.

        Raises:
            CheckpointError: a tensor was not written completely, the disk is full, or an upload failed.
            ConflictError: something has come into being at the path meanwhile.
        """
        for name, spec in self.specs.items():
            if self._entries_written[name] != spec.size:
                raise CheckpointError(
                    f"{self.path}: {self._entries_written[name]} entries of {name} were written, of {spec.size}; "
                    "write each entry once before finish()"
                )
        with as_checkpoint_error(f"write {self.path}"):
            if self._layout.seal is not None:
                self._layout.seal(self.folder)
            for name in self._layout.files:
                sync(self.folder / name)
            (self.folder / JOURNAL).unlink(missing_ok=True)
        self._staging.commit()
        return self.path

    def abort(self) -> None:
        """Removes everything that was written, unless it is finished already."""
        self._staging.abort()

    @contextlib.contextmanager
    def _opened(self, file: str, flags: int) -> Iterator[int]:
        """One of the files, as a file descriptor."""
        if isinstance(self._staging, JoinedStaging):
            fd = os.open(file, flags, dir_fd=self._staging.opened)
        else:
            fd = os.open(self.folder / file, flags)
        try:
            yield fd
        finally:
            os.close(fd)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.finish()
        except BaseException:
            self.abort()
            raise


class _UploadingWriter(CheckpointWriter):
    """A checkpoint that is built in a temporary folder and uploaded when it is finished."""

    def __init__(self, local: CheckpointWriter, place: Place):
        self.__dict__.update(local.__dict__)  # the files are laid out already
        self.path, self._place, self._local = place.url, place, local.path

    def finish(self) -> Path | Any:
        super().finish()
        try:
            self._place.upload(self._local, self.display)
        except MergeError as error:
            raise type(error)(f"{error}. What was to be uploaded is complete, and kept in {self._local}") from error
        except BaseException:
            remove(self._local.parent)
            raise
        remove(self._local.parent)
        return self.path

    def abort(self) -> None:
        super().abort()
        if not os.path.lexists(self._local):  # kept after an upload that failed
            remove(self._local.parent)


def place_of(path: str | Path, format: str | None, overwrite: bool, context: ts.Context | None = None) -> Place | None:
    """Where in an object store an output is to appear; None for local paths.

    Raises:
        CheckpointError: TensorStore cannot write there.
    """
    if "://" not in str(local_path(path)):
        return None
    is_file = str(path).endswith((".safetensors", ".npz")) and format != "orbax"
    return Place(str(path), is_folder=not is_file and format != "npz", overwrite=overwrite, context=context)


def open_writer(
    path: str | Path,
    specs: Sequence[TensorSpec],
    *,
    format: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    aliases: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
    side_files: Mapping[str, Path | bytes] | None = None,
    overwrite: bool = False,
    resume: Callable[[Path, Layout], bool] | None = None,
    join: bool = False,
    context: ts.Context | None = None,
) -> CheckpointWriter:
    """Starts a checkpoint: lays out its files, reserves their space and writes all but the tensors.

    Args:
        path: a local file (suffix `.safetensors` or `.npz`) or else a folder. Missing parent folders are made. Or a URL
            of TensorStore (`s3://`, `gs://`): then it is built in a temporary folder and uploaded when it is finished.
        specs: the tensors, in the order in which they are best written.
        format: "safetensors", "npz" or "orbax"; by default what the suffix of `path` says, and safetensors for folders.
        metadata: text to store with the tensors; what is no text is stored as JSON.
        aliases: tied tensors, `{further name: name in specs}`: one copy is stored, readers see both names.
        max_shard_bytes: safetensors folders are split into files of at most this many bytes of tensors
            (a larger tensor gets a file of its own), with an index. Behind a URL `SHARD_BYTES`, if it is not given.
        side_files: further files of a folder: `{name: content or file to copy}`.
        overwrite: replace what stands at `path`, when finished.
        resume: is asked whether what a killed writer of the same path left shall be gone on with, given the hidden
            folder and the layout of what is to be written. Then every file of the layout must be there with its size.
            Nothing of an output behind a URL is left.
        join: write to the files that a writer in another process has laid out, given the same arguments. That one
            finishes them; it must `count` what this one has written and made durable (`sync`). Not for URLs.
        context: TensorStore's context for a URL: credentials, or the contents of `memory://`.

    Returns:
        A writer; it must be finished or aborted.

    Raises:
        ConflictError: the path exists, or somebody else is writing it.
        CheckpointError: the format cannot hold these tensors, the disk is full, or permission is denied.
        StructureError: two tensors have the same name.
    """
    place = place_of(path, format, overwrite, context)
    if place is None:
        return _open_local(
            Path(local_path(path)),
            specs,
            format,
            metadata,
            aliases,
            max_shard_bytes,
            side_files,
            overwrite,
            resume,
            join,
        )
    place.check()
    if max_shard_bytes is None and place.is_folder and format in (None, "safetensors"):
        max_shard_bytes = SHARD_BYTES
    needed, free = sum(spec.nbytes for spec in specs), shutil.disk_usage(tempfile.gettempdir()).free
    if needed > free:
        raise CheckpointError(
            f"{path}: the checkpoint is built in {tempfile.gettempdir()} before it is uploaded, which needs {needed} "
            f"bytes, and {free} are free; free some space, or name a folder on a larger disk in TMPDIR"
        )
    with as_checkpoint_error(f"write {path}"):
        temporary = Path(tempfile.mkdtemp(prefix="jaxmerge-"))
    try:
        local = temporary / place.name
        writer = _open_local(local, specs, format, metadata, aliases, max_shard_bytes, side_files, False, None)
        for name, size in writer.file_sizes.items():
            if size > MAX_OBJECT_BYTES:
                raise CheckpointError(
                    f"{path}: {name} would be {size} bytes long, and one upload has at most {MAX_OBJECT_BYTES}; write "
                    "a safetensors folder with smaller shards, or write locally and upload it by other means"
                )
    except BaseException:
        remove(temporary)
        raise
    return _UploadingWriter(writer, place)


def _open_local(
    path: Path,
    specs: Sequence[TensorSpec],
    format: str | None,
    metadata: Mapping[str, Any] | None,
    aliases: Mapping[str, str] | None,
    max_shard_bytes: int | None,
    side_files: Mapping[str, Path | bytes] | None,
    overwrite: bool,
    resume: Callable[[Path, Layout], bool] | None,
    join: bool = False,
) -> CheckpointWriter:
    metadata, aliases, side_files = metadata or {}, aliases or {}, side_files or {}
    by_name = {spec.name: spec for spec in specs}
    if len({*by_name, *aliases}) != len(specs) + len(aliases):
        raise StructureError(f"{path}: two tensors have the same name")
    for name, kept in aliases.items():
        if kept not in by_name:
            raise StructureError(f"{path}: {name} is tied to {kept}, which is not written")
    for spec in specs:
        if DTYPES.get(spec.dtype.name) != spec.dtype:
            raise CheckpointError(f"{path}: {spec.name} has the dtype {spec.dtype}, which cannot be stored; cast it")
    format = format or {".safetensors": "safetensors", ".npz": "npz"}.get(path.suffix, "safetensors")
    is_folder = True
    if format == "safetensors" and path.suffix == ".safetensors":
        is_folder = False
        layout = safetensors.file_layout(path.name, specs, metadata, aliases)
    elif format == "safetensors":
        layout = safetensors.folder_layout(specs, metadata, aliases, max_shard_bytes)
    elif format == "npz":
        is_folder = False
        layout = npz.layout(path.name, specs, metadata, aliases)
    elif format == "orbax":
        layout = orbax.layout(specs, metadata, aliases)
    else:
        raise CheckpointError(f"{path}: unknown format {format!r}; choose safetensors, npz or orbax")
    if max_shard_bytes is not None and not (format == "safetensors" and is_folder):
        raise CheckpointError(f"{path}: only a safetensors folder has shards; give a path without suffix")
    if side_files and not is_folder:
        raise CheckpointError(f"{path}: a single file has no place for {', '.join(side_files)}; write to a folder")
    files = dict(layout.files)
    for name, content in side_files.items():
        if Path(name).name != name or name in files:
            raise CheckpointError(f"{path}: {name!r} cannot be the name of a side file of this checkpoint")
        with as_checkpoint_error(f"copy {name} to {path}"):
            files[name] = PlannedFile.of(content if isinstance(content, bytes) else content.read_bytes())
    layout, resumed = dataclasses.replace(layout, files=files), False
    if join:
        return CheckpointWriter(JoinedStaging(path), layout, by_name)

    def keep(folder: Path) -> bool:
        nonlocal resumed
        resumed = resume is not None and resume(folder, layout)
        return resumed

    staging = Staging(path, is_folder=is_folder, overwrite=overwrite, keep=keep)
    try:
        with as_checkpoint_error(f"write {path}"):
            return CheckpointWriter(staging, layout, by_name, resumed)
    except BaseException:
        staging.abort()
        raise


def save_checkpoint(
    path: str | Path,
    params: Any,
    *,
    format: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    max_shard_bytes: int | None = None,
    side_files: Mapping[str, Path | bytes] | None = None,
    overwrite: bool = False,
    context: ts.Context | None = None,
) -> Path | Any:
    """Saves parameters. The checkpoint appears complete or not at all.

    Args:
        path: a local file (suffix `.safetensors` or `.npz`) or else a folder. Missing parent folders are made. Or a URL
            of TensorStore (`s3://`, `gs://`): then it is built in a temporary folder (see `tempfile`; TMPDIR), which
            needs that much disk, and uploaded.
        params: any tree of arrays or lazy tensors. The stored names are those of `named_leaves`: a flat dict keeps its
            own, nested keys are joined by `/` (Orbax stores the nesting, with positions in sequences as keys). An array
            or lazy tensor that stands under several names is stored once, and opens as one tensor again. Arrays that
            lie on the devices of several processes are written by Orbax (`format="orbax"`), each process its own part;
            all processes must call this, with one path on a file system that they share.
        format: "safetensors", "npz" or "orbax"; by default what the suffix of `path` says, and safetensors for folders.
        metadata: text to store with the tensors; what is no text is stored as JSON.
        max_shard_bytes: safetensors folders are split into files of at most this many bytes of tensors
            (a larger tensor gets a file of its own), with an index. Behind a URL 256 MiB, if it is not given.
        side_files: further files of a folder, such as `Checkpoint.side_files`: `{name: content or file to copy}`.
        overwrite: replace what stands at `path`.
        context: TensorStore's context for a URL: credentials, or the contents of `memory://`.

    Returns:
        The absolute path, or the URL as text.

    Raises:
        ConflictError: the path exists, or somebody else is writing it.
        CheckpointError: the format cannot hold these tensors, the disk is full, or permission is denied.
        StructureError: two tensors have the same name.
    """
    kept: dict[int, str] = {}
    aliases: dict[str, str] = {}
    tensors: dict[str, Any] = {}
    for name, leaf in named_leaves(params).items():
        if not hasattr(leaf, "dtype"):
            tensors[name] = np.asarray(leaf)  # Python numbers; equal ones may be one object without being tied
        elif id(leaf) in kept:
            aliases[name] = kept[id(leaf)]
        elif not isinstance(leaf.dtype, np.dtype):
            raise CheckpointError(f"{path}: {name} is an array of {leaf.dtype}, no numbers; store jax.random.key_data")
        else:
            kept[id(leaf)], tensors[name] = name, leaf
    elsewhere = [name for name, leaf in tensors.items() if not getattr(leaf, "is_fully_addressable", True)]
    if elsewhere:
        if format != "orbax" or side_files or max_shard_bytes is not None or "://" in str(path):
            raise CheckpointError(
                f"{path}: {elsewhere[0]} lies on the devices of several processes, which can only write a local folder "
                'together, with format="orbax" and without side files'
            )
        target = Path(local_path(path)).absolute()
        tensors = {name: np.asarray(x) if isinstance(x, LazyTensor) else x for name, x in tensors.items()}
        orbax.save_sharded(target, tensors, metadata or {}, aliases, overwrite)
        return target
    specs = [TensorSpec(name, leaf.dtype, tuple(leaf.shape)) for name, leaf in tensors.items()]
    with open_writer(
        path,
        specs,
        format=format,
        metadata=metadata,
        aliases=aliases,
        max_shard_bytes=max_shard_bytes,
        side_files=side_files,
        overwrite=overwrite,
        context=context,
    ) as writer:
        buffer = np.empty(_PIECE_BYTES, np.uint8)
        for spec in specs:
            leaf = tensors[spec.name]
            if not isinstance(leaf, LazyTensor):
                writer.write(spec.name, 0, np.asarray(leaf).reshape(-1))
                continue
            step = _PIECE_BYTES // spec.dtype.itemsize
            for start in range(0, spec.size, step):
                piece = buffer[: min(step, spec.size - start) * spec.dtype.itemsize].view(spec.dtype)
                leaf.read_flat(start, piece)
                writer.write(spec.name, start, piece)
    return writer.path


def _create(path: Path, planned: PlannedFile, anew: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exclusive = os.O_EXCL if anew else 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | exclusive, 0o666)  # less what the umask takes away
    try:
        if planned.size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, planned.size)  # a full disk shows here, not after an hour of merging
        else:
            os.ftruncate(fd, planned.size)
        for offset, content in planned.fixed:
            _pwrite(fd, np.frombuffer(content, np.uint8), offset)
    finally:
        os.close(fd)


def _pwrite(fd: int, data: np.ndarray, offset: int) -> None:
    done = 0
    while done < data.size:
        done += os.pwrite(fd, data[done:].data, offset + done)


def _pread(fd: int, out: np.ndarray, offset: int, name: str) -> None:
    done = 0
    while done < out.size:
        n = os.preadv(fd, [out[done:].data], offset + done)
        if n == 0:
            raise OSError(f"{name} ends at byte {offset + done}")
        done += n
