"""Workers of mmedge.retrieval.bulk on a Ray cluster, an actor each."""

from __future__ import annotations

import importlib
import os
from contextlib import suppress
from typing import Any

from mmedge.closing import Closing
from mmedge.errors import BackendError, MmedgeError, RetrievalError
from mmedge.retrieval.bulk_pool import Batch, DiedError, Reply, reply_of
from mmedge.retrieval.bulk_worker import FileEmbedder
from mmedge.telemetry import disable_telemetry

__all__ = ["Cluster", "ClusterWorker"]


class Cluster(Closing):
    """A connection to a Ray cluster.

    If this process is connected to one already, that is used, and stays connected.

    Args:
        address: HOST:PORT of its head, "auto" for the one that Ray finds.

    Raises:
        RetrievalError: If Ray is not installed, or there is no such cluster.
    """

    def __init__(self, address: str) -> None:
        disable_telemetry()
        try:
            self.ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise RetrievalError(
                'A cluster needs Ray, which is not installed: pip install "mmedge[ray]"'
            ) from error
        self._connected_here = not self.ray.is_initialized()
        if self._connected_here:
            try:
                self.ray.init(address=address, configure_logging=False, log_to_driver=False)
            except (OSError, RuntimeError, ValueError, self.ray.exceptions.RayError) as error:
                raise RetrievalError(
                    f"No Ray cluster at {address!r} ({error}). Start one with 'ray start --head', "
                    "and pass the address that it prints."
                ) from error

    @property
    def cpus(self) -> int:
        """CPUs of all its nodes."""
        return int(self.ray.cluster_resources().get("CPU", 0))

    def close(self) -> None:
        """Disconnect."""
        if self._connected_here:
            self.ray.shutdown()


class _Embedder:
    """Runs on a node of the cluster."""

    def load(self, task: dict[str, Any]) -> dict[str, Any]:
        """Load the bundle; return FileEmbedder.ready, or the error."""
        try:
            self._embedder = FileEmbedder(task)
        except MmedgeError as error:
            return {"error": str(error)}
        return self._embedder.ready | {"pid": os.getpid()}

    def embed(self, files: list[str], known: list[str | None]) -> tuple[dict[str, Any], bytes]:
        """Return what FileEmbedder.embed does, or the error."""
        try:
            return self._embedder.embed(files, known)
        except MmedgeError as error:
            return {"error": str(error)}, b""


class ClusterWorker:
    """An actor of one CPU on any node; see Worker.

    Args:
        cluster: Where it runs.
        task: As for FileEmbedder.
    """

    def __init__(self, cluster: Cluster, task: dict[str, Any]) -> None:
        self._ray = cluster.ray
        self._bundle = task["bundle"]
        actor = self._ray.remote(_Embedder).options(num_cpus=1, max_restarts=0, max_task_retries=0)
        self._actor = actor.remote()
        self._loading = self._actor.load.remote(task)
        self.ready: dict[str, Any] = {}

    def wait_until_ready(self) -> None:
        """See Worker; waits also for a free CPU."""
        try:
            ready = self._result(self._loading)
        except DiedError as error:
            raise BackendError(
                f"A worker of the cluster {error} while it loaded {self._bundle}. See its log on "
                "the node; mmedge must be installed on every node."
            ) from None
        if "error" in ready:
            raise BackendError(
                f"A worker of the cluster cannot load {self._bundle}: {ready['error']} The bundle "
                "and the files must have the same paths on every node."
            )
        self.ready = ready

    def embed(self, batch: Batch) -> Reply:
        """See Worker."""
        files = [os.path.abspath(name) for _, name in batch.files]  # noqa: PTH100, names stay
        reply, data = self._result(self._actor.embed.remote(files, list(batch.known)))
        if "error" in reply:
            raise BackendError(f"A worker with {self._bundle} failed: {reply['error']}")
        return reply_of(batch, reply, data, self.ready)

    def kill(self) -> None:
        """End the actor."""
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._actor)

    def _result(self, reference: Any) -> Any:  # noqa: ANN401, what the actor returns
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise BackendError(f"A worker with {self._bundle} failed: {error}") from error
        except self._ray.exceptions.RayError as error:
            first = str(error).strip().splitlines()[0]
            raise DiedError(f"ended ({type(error).__name__}: {first})") from error
