"""Starting, stopping and sharing the service process."""

import contextlib
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sgid_transforms.errors import GenerationError, ModelLoadError, ServiceError
from sgid_transforms.files import Waiting, atomic_write, is_alive, job_identity, try_lock
from sgid_transforms.service.client import ServiceClient
from sgid_transforms.service.server import BuilderFactory

_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from sgid_transforms.service.server import main; main({}, {})"
_FOLDERS = "sgid-service-"
_ADDRESS = ".address"
_OLD_SECONDS = 86400.0
_ALIVE_SECONDS = 5.0
_LONGEST_FOLDER = 90  # bytes; socket paths are limited to about 104
_LOAD_ERRORS = {"ModelLoadError": ModelLoadError, "GenerationError": GenerationError}


class GenerationService:
    """One process that owns the model and serves every worker and rank of this machine.

    The process is a fresh interpreter, never a fork, so CUDA is safe with any start method of the workers. It does not import
    the caller's main script, and it ends with the process that started it, however that one ends.

    Args:
        factory: A picklable function without arguments, from an importable module. It is called in the service process and
            returns the `Builder` that makes the variants.
        max_batch: Maximum number of variants that an idle model waits for before it starts. A working model takes as many as it
            has room for.
        max_wait: Seconds that the first variant waits for others.
        max_queue: Maximum number of queued variants that nobody waits for.
        rendezvous: Ranks that name the same file share one service: the first one starts it, the
            others attach. The service ends when the rank that started it stops it.
        recipe: Fingerprint of the recipe; clients that want variants of another one are refused.
        niceness: Added to the process's niceness, 0 to 19; a high one leaves the CPU to others, such as the training.
        timeout: Seconds until the service must be ready.

    Raises:
        ServiceError: The process cannot be started, ended while it loaded, or was not ready in time.
        ModelLoadError: The model cannot be loaded.

    Examples:
        >>> sgid = SGIDAugment(captions="captions.sqlite", variants="variants", p=1.0)
        >>> report = sgid.prepare(ImageFolder("train"), progress=False)
        >>> with sgid.serve(device="cpu") as service:  # a GenerationService
        ...     image, label = ImageFolder("train", sgid)[0]  # made in the service's process
        ...     service.client.stats()["done"]
        1
    """

    def __init__(
        self,
        factory: BuilderFactory,
        *,
        max_batch: int = 16,
        max_wait: float = 0.05,
        max_queue: int = 256,
        rendezvous: str | os.PathLike[str] | None = None,
        recipe: str | None = None,
        niceness: int = 0,
        timeout: float | None = None,
    ) -> None:
        _check_system()
        if max_batch < 1:
            raise ServiceError(f"max_batch is {max_batch}; it must be at least 1")
        if max_wait < 0:
            raise ServiceError(f"max_wait is {max_wait}; it must be 0 or more seconds")
        if max_queue < 0:
            raise ServiceError(f"max_queue is {max_queue}; it must be 0 or more")
        module = getattr(getattr(factory, "func", factory), "__module__", None)
        if module == "__main__":
            raise ServiceError(f"{factory!r} lives in the main script, which the service does not import; move it to a module")
        try:
            pickled = pickle.dumps(factory)
        except Exception as error:
            raise ServiceError(f"the service's factory does not pickle ({error}); use a module-level function") from error
        bounds = {"max_batch": max_batch, "max_wait": max_wait, "max_queue": max_queue}
        self._settings: dict[str, Any] = {"factory": pickled, "recipe": recipe, "niceness": niceness, **bounds}
        self._recipe = recipe
        self._timeout = timeout
        self._rendezvous = Path(rendezvous) if rendezvous is not None else None
        self._process: subprocess.Popen[bytes] | None = None
        self._release: Callable[[], None] = lambda: None
        self._client: ServiceClient | None = None
        self.pid: int | None = None

    @property
    def client(self) -> ServiceClient:
        """The handle to give to workers."""
        if self._client is None:
            raise ServiceError("the generation service is not running; start it first")
        return self._client

    @property
    def owner(self) -> bool:
        """Whether this object started the process (and not another rank)."""
        return self._process is not None

    @property
    def alive(self) -> bool:
        """Whether the service process runs, and answers within 5 s."""
        if self._client is None or (self._process is not None and self._process.poll() is not None):
            return False
        try:
            self._client.stats(timeout=_ALIVE_SECONDS)
        except ServiceError:
            return False
        return True

    def start(self) -> Self:
        """Start the process, or attach to the one of another rank, and wait until its model is loaded."""
        if self._client is not None:
            raise ServiceError("the generation service is already running; stop it before starting it again")
        if self._rendezvous is None:
            self._launch()
        else:
            self._meet(self._rendezvous)
        return self

    def stop(self, timeout: float = 5.0) -> None:
        """End the process; work in progress gets ``timeout`` seconds to finish. Stopping twice is harmless."""
        client, process = self._client, self._process
        self._client = self._process = self.pid = None
        if process is not None and process.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                process.stdin.write(b"stop")  # type: ignore[union-attr]  # workers may keep the pipe open
                process.stdin.close()  # type: ignore[union-attr]
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if client is not None:
            client.close()
        self._release()
        self._release = lambda: None

    def restart(self) -> Self:
        """Stop what is left of the process and start a new one."""
        self.stop()
        return self.start()

    def __enter__(self) -> Self:
        return self if self._client is not None else self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def __reduce__(self) -> Any:
        raise ServiceError("a GenerationService belongs to the process that made it; hand `service.client` to others")

    def _launch(self, *inherited: int) -> None:
        folder = ""
        try:
            _sweep()
            folder = _private_folder()
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise ServiceError(f"no service can be started in {_temporary()}: {error.strerror}; set TMPDIR") from error
        try:
            address = os.path.join(folder, "socket")
            listener.bind(address)
            listener.listen(256)
            paths = json.dumps([os.fspath(entry) for entry in sys.path if isinstance(entry, str | os.PathLike)])
            self._process = process = _spawn(
                [sys.executable, "-c", _BOOT.format(listener.fileno(), os.getpid()), paths],
                stdin=subprocess.PIPE,
                pass_fds=(listener.fileno(), *inherited),
            )
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            reason = error.strerror or error
            raise ServiceError(f"the service process cannot be started in {folder}: {reason}") from error
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            # Only the service keeps the socket open: when it dies, connecting fails at once instead of waiting.
            listener.close()
        self._release = weakref.finalize(self, _reap, process, folder, os.getpid())
        self._client = ServiceClient(address, recipe=self._recipe)
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(pickle.dumps(self._settings))  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
            self.pid = self._client.wait_until_ready(self._timeout)
        except ServiceError as error:
            self.stop()
            kind = getattr(error, "__notes__", [None])[0]
            if isinstance(error.__cause__, TimeoutError):
                raise
            if kind is None:
                code = process.returncode
                raise ServiceError(f"the service process ended with code {code} before its model was loaded") from error
            if kind in _LOAD_ERRORS:
                raise _LOAD_ERRORS[kind](str(error)) from None
            raise ServiceError(f"the service could not load its model: {kind}: {error}") from None
        except BaseException:
            self.stop(timeout=0)
            raise

    def _meet(self, rendezvous: Path, pause: float = 0.05) -> None:
        address_file = rendezvous.with_name(rendezvous.name + _ADDRESS)
        waiting = Waiting(f"the process that holds {rendezvous} to have its service ready", self._timeout)
        while True:
            try:
                lock = try_lock(rendezvous)
            except OSError as error:
                reason = error.strerror
                raise ServiceError(f"the rendezvous {rendezvous} cannot be used ({reason}); give another file") from error
            if lock is not None:
                try:
                    address_file.unlink(missing_ok=True)
                    self._launch(lock)  # the service inherits the lock, and so holds it for as long as it lives
                    atomic_write(address_file, self.client.address)
                finally:
                    os.close(lock)
                return
            with contextlib.suppress(OSError, ServiceError):
                client = ServiceClient(address_file.read_text(), recipe=self._recipe)
                self.pid = client.wait_until_ready(self._timeout)
                self._client = client
                return
            try:
                time.sleep(min(pause, waiting.check()))
            except TimeoutError as error:
                raise ServiceError(f"{error}; stop that process, or give another file") from None


def _check_system() -> None:
    if not hasattr(socket, "AF_UNIX"):
        raise ServiceError(
            "this system's Python has no Unix sockets, which a service needs; make the variants before training with "
            "`sgid generate`, or use on_miss='generate' without serve()"
        )


def job_rendezvous(*more: str) -> Path | None:
    """The rendezvous file for the ranks of this distributed job, or None outside of a job.

    Raises:
        ServiceError: The folder for such files belongs to another user.
    """
    job = job_identity(*more)
    if job is None:
        return None
    _check_system()
    folder = Path(tempfile.gettempdir(), f"sgid-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ServiceError(f"{folder} cannot be created: {error.strerror}; set TMPDIR") from error
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ServiceError(f"{folder} belongs to somebody else; set TMPDIR to a folder of your own")
    _forget_old_jobs(folder)
    return folder / job


def _forget_old_jobs(folder: Path) -> None:
    """Remove the files of jobs that ended more than a day ago; those of running ones are locked."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another rank was faster
            if path.suffix == _ADDRESS or time.time() - path.lstat().st_mtime < _OLD_SECONDS:
                continue
            lock = try_lock(path)
            if lock is not None:
                path.with_name(path.name + _ADDRESS).unlink(missing_ok=True)
                path.unlink()
                os.close(lock)


_spawners: dict[int, ThreadPoolExecutor] = {}


def _spawn(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
    """Start a process from a thread that lives as long as this process: Linux takes its end for the end of the parent."""
    spawner = _spawners.setdefault(os.getpid(), ThreadPoolExecutor(1, "sgid-spawn"))
    return spawner.submit(lambda: subprocess.Popen(command, **options)).result()


def _private_folder() -> str:
    """A new folder that only this user can enter, which protects the socket in it from other users."""
    prefix = f"{_FOLDERS}{os.getpid()}-"
    folder = tempfile.mkdtemp(prefix=prefix)
    if len(os.fsencode(folder)) > _LONGEST_FOLDER:
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix=prefix, dir="/tmp")
    return folder


def _temporary() -> str:
    with contextlib.suppress(OSError):  # there may be no writable folder
        return tempfile.gettempdir()
    return "any temporary folder"


def _sweep() -> None:
    """Remove the folders of services whose starters were killed."""
    roots = {Path(tempfile.gettempdir()), Path("/tmp")}
    for folder in (folder for root in roots for folder in root.glob(f"{_FOLDERS}[0-9]*-*")):
        owner = folder.name.removeprefix(_FOLDERS).partition("-")[0]
        with contextlib.suppress(OSError):
            if owner.isdecimal() and not is_alive(int(owner)) and folder.lstat().st_uid == os.getuid():
                shutil.rmtree(folder, ignore_errors=True)


def _reap(process: "subprocess.Popen[bytes]", folder: str, pid: int) -> None:
    if os.getpid() != pid:  # a forked worker that drops its copy of the service
        return
    if process.poll() is None:
        process.kill()
    process.wait()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        process.stdin.close()  # type: ignore[union-attr]
    shutil.rmtree(folder, ignore_errors=True)
