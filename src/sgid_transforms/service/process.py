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
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sgid_transforms.errors import GenerationError, ModelLoadError, ServiceError
from sgid_transforms.service.client import ServiceClient
from sgid_transforms.service.server import HandlerFactory
from sgid_transforms.transforms.state import try_lock

_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from sgid_transforms.service.server import main; main({}, {})"
_LOAD_ERRORS = {"ModelLoadError": ModelLoadError, "GenerationError": GenerationError}


class GenerationService:
    """One process that owns the model and serves every worker and rank of this machine.

    The process is a fresh interpreter (never a fork, so CUDA is safe whatever the start method of the workers), it does
    not import the caller's main script, and it ends with the process that started it, however that one ends.

    Args:
        factory (callable): Picklable, without arguments, from an importable module; called in the service process, it
            returns the handler ``items -> results``.
        max_batch (int): Largest batch that the handler is given.
        max_wait (float): Seconds that the first item of a batch waits for others.
        max_queue (int): Bound on work that nobody waits for.
        rendezvous (path, optional): Ranks that name the same file share one service: the first one starts it, the
            others attach. The service ends when the rank that started it stops it.

    Raises:
        ServiceError: The process cannot be started, or ended while it loaded.
        ModelLoadError: The model cannot be loaded.

    Example::

        with GenerationService(factory) as service:
            results = service.client.generate(items)
    """

    def __init__(
        self,
        factory: HandlerFactory,
        *,
        max_batch: int = 16,
        max_wait: float = 0.05,
        max_queue: int = 256,
        rendezvous: str | os.PathLike[str] | None = None,
    ) -> None:
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
        self._settings: dict[str, Any] = {"factory": pickled, **bounds}
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
        """Whether the service process runs."""
        if self._process is not None:
            return self._process.poll() is None
        if self._client is None:
            return False
        try:
            self._client.stats()
        except ServiceError:
            return False
        return True

    def start(self) -> Self:
        """Start the process, or attach to the one of another rank, and wait until its model is loaded."""
        if self._client is not None:
            raise ServiceError("the generation service runs already; stop it before starting it again")
        if self._rendezvous is None:
            self._launch()
        else:
            self._meet(self._rendezvous)
        return self

    def stop(self, timeout: float = 5.0) -> None:
        """End the process; a batch in work gets ``timeout`` seconds to finish. Stopping twice is harmless."""
        client, process = self._client, self._process
        self._client = self._process = self.pid = None
        if process is not None and process.poll() is None:
            if client is not None:
                with contextlib.suppress(ServiceError):
                    client.stop()
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.terminate()
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
        folder = _private_folder()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            address = os.path.join(folder, "socket")
            listener.bind(address)
            listener.listen(256)
            boot = _BOOT.format(listener.fileno(), os.getpid())
            self._process = process = subprocess.Popen(
                [sys.executable, "-c", boot, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                pass_fds=(listener.fileno(), *inherited),
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            # Only the service keeps the socket open: when it dies, connecting fails at once instead of waiting.
            listener.close()
        self._release = weakref.finalize(self, _reap, process, folder, os.getpid())
        self._client = ServiceClient(address)
        try:
            with process.stdin as stdin, contextlib.suppress(BrokenPipeError):  # type: ignore[union-attr]
                stdin.write(pickle.dumps(self._settings))
            self.pid = self._client.wait_until_ready()
        except ServiceError as error:
            self.stop()
            kind = getattr(error, "__notes__", [None])[0]
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
        address_file = rendezvous.with_name(rendezvous.name + ".address")
        while True:
            lock = try_lock(rendezvous)
            if lock is not None:
                try:
                    address_file.unlink(missing_ok=True)
                    self._launch(lock)  # the service inherits the lock, and so holds it for as long as it lives
                    part = address_file.with_name(f"{address_file.name}.{os.getpid()}")
                    part.write_text(self.client.address)
                    part.replace(address_file)
                finally:
                    os.close(lock)
                return
            with contextlib.suppress(OSError, ServiceError):
                client = ServiceClient(address_file.read_text())
                self.pid = client.wait_until_ready()
                self._client = client
                return
            time.sleep(pause)


def job_identity(*more: str) -> str | None:
    """A name for this distributed job on this machine, the same in all its ranks; None outside of one.

    Ranks of one machine are children of one launcher (``torchrun``, ``mp.spawn``), so the launcher's process id and the
    job's master address and port name the job.
    """
    dist = sys.modules.get("torch.distributed")  # whoever did not import it has not initialised it either
    initialised = dist is not None and dist.is_available() and dist.is_initialized()
    size = dist.get_world_size() if dist is not None and initialised else int(os.environ.get("WORLD_SIZE", "1"))
    if size <= 1:
        return None
    job = (str(os.getppid()), os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", ""), *more)
    return sha256("\0".join(job).encode()).hexdigest()[:24]


def job_rendezvous(*more: str) -> Path | None:
    """The file where the ranks of this distributed job meet, or None outside of one.

    Raises:
        ServiceError: The folder for such files belongs to another user.
    """
    job = job_identity(*more)
    if job is None:
        return None
    folder = Path(tempfile.gettempdir(), f"sgid-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ServiceError(f"{folder} belongs to somebody else; set TMPDIR to a folder of your own")
    return folder / job


def _private_folder() -> str:
    """A new folder that only this user can enter: that is what keeps others from the socket in it."""
    folder = tempfile.mkdtemp(prefix="sgid-")
    if len(folder) > 90:  # socket paths end at about 104 characters
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="sgid-", dir="/tmp")
    return folder


def _reap(process: "subprocess.Popen[bytes]", folder: str, pid: int) -> None:
    if os.getpid() != pid:  # a forked worker that drops its copy of the service
        return
    if process.poll() is None:
        process.kill()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)
