"""Lets the processes of a launch exchange everything but gradients: the run's folder, when the data is ready, failures.

They use the key-value store of torchrun and accelerate (`torch.distributed.TCPStore`), which exists before any process
group. So one process may prepare data for hours while the others wait without a timeout, and a process that fails can
still report why.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from finetune.errors import EXIT_FAILURE, EXIT_INTERRUPTED, FinetuneError, Interrupted, RankFailed
from finetune.launch.heartbeat import (
    ACKNOWLEDGED,
    BEAT_SECONDS,
    EXIT_WAIT_SECONDS,
    FAILURE,
    Heartbeat,
    first_line,
    is_lost_connection,
)

if TYPE_CHECKING:
    from torch.distributed import Store

CONNECT_TIMEOUT = timedelta(minutes=5)
POLL_SECONDS = 0.2
GROUP_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""What sums tensors on each device: NCCL has nothing for a CPU, where counts and flags are."""

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""How a launcher passes a process its place in the launch."""


class Ranks:
    """The processes of one launch, seen from one of them; also used when there is only one.

    Attributes:
        rank: Index of this process; process 0 prepares data, prints, writes, and continues alone after training.
        count: Number of processes.
        local: Index of this process on its machine.
        local_count: Number of processes on its machine.
        shards: Whether each holds only a shard of the base, so that all must compute at the same time.
        offload: Whether shards that are not in use are kept in host memory.
        failure: Why another process ended; None while all run.
    """

    def __init__(
        self,
        environment: dict[str, str] | None = None,
        *,
        heartbeat_timeout_seconds: int = 30,
        shards: bool = False,
        offload: bool = False,
    ) -> None:
        variables = os.environ if environment is None else environment
        self.shards, self.offload = shards, offload
        self.rank, self.count = int(variables.get("RANK", "0")), int(variables.get("WORLD_SIZE", "1"))
        self.local = int(variables.get("LOCAL_RANK", "0"))
        self.local_count = int(variables.get("LOCAL_WORLD_SIZE", "1"))
        self.failure: RankFailed | None = None
        self.calls = 0
        self.failing = False
        self.leaving = threading.Event()
        self.store: Store | None = None
        if self.count > 1:
            self.store = self._connect()
            own_connection = self._connect()  # a waiting request blocks the other one
            Heartbeat(self, own_connection, timeout_seconds=heartbeat_timeout_seconds).start()

    @property
    def is_main(self) -> bool:
        """Returns whether this process prints, writes and tracks."""
        return self.rank == 0

    def put(self, key: str, value: Any) -> None:
        """Stores a JSON value for the others."""
        if self.store is not None:
            self.store.set(key, json.dumps(value))

    def get(self, key: str) -> Any:
        """Waits for a value that another process stores, without a timeout.

        Raises:
            RankFailed: Another process ended meanwhile.
        """
        assert self.store is not None, "a single process has nothing to wait for"
        while not self.store.check([key]):
            if self.failure:
                raise self.failure
            time.sleep(POLL_SECONDS)
        return json.loads(self.store.get(key))

    def broadcast(self, value: Any = None) -> Any:
        """Returns the first process's JSON value in every process. Every process must call it."""
        if self.count == 1:
            return value
        self.calls += 1
        if self.is_main:
            self.put(f"share/{self.calls}", value)
            return value
        return self.get(f"share/{self.calls}")

    def all_gather(self, value: Any) -> list[Any]:
        """Returns the JSON values of all processes in every process, in rank order. Every process must call it."""
        if self.count == 1:
            return [value]
        self.calls += 1
        self.put(f"collect/{self.calls}/{self.rank}", value)
        return [self.get(f"collect/{self.calls}/{rank}") for rank in range(self.count)]

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Hides the launch from libraries: a trainer that one process runs alone must not wait for the others."""
        if self.store is None:
            yield
            return
        from accelerate.state import AcceleratorState

        variables = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
        try:
            yield
        finally:
            os.environ.update(variables)
            AcceleratorState._reset_state(reset_partial_state=True)

    def barrier(self) -> None:
        """Waits until every process has reached this call."""
        self.all_gather(None)

    def init_process_group(self, device: str) -> None:
        """Creates the process group, which sums gradients.

        Args:
            device: ``cpu`` or ``cuda``.
        """
        if self.store is None:
            return
        import torch
        from torch import distributed

        if device == "cuda":
            torch.cuda.set_device(0)  # the only one that this process sees
        if self.count > self.local_count and "GLOO_SOCKET_IFNAME" not in os.environ:
            interface = interface_to(os.environ["MASTER_ADDR"])
            if interface:  # gloo's own choice is the one that this machine's name resolves to, often the loopback
                os.environ["GLOO_SOCKET_IFNAME"] = interface
        store = distributed.PrefixStore("group", self.store)
        distributed.init_process_group(GROUP_BACKENDS[device], store=store, rank=self.rank, world_size=self.count)

    def shutdown(self) -> None:
        """Ends the launch for this process, which continues alone: no library may take it for one of several."""
        if self.store is None:
            return
        from accelerate.state import AcceleratorState
        from torch import distributed

        self._wait_for_others()
        self.leaving.set()
        if distributed.is_initialized():
            distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        for name in VARIABLES:
            os.environ.pop(name, None)
        self.rank, self.count, self.local, self.local_count = 0, 1, 0, 1

    def _wait_for_others(self) -> None:
        """Lets process 0 leave last, because the store may be part of it."""
        if not self.is_main:
            self.put(f"bye/{self.rank}", True)
            return
        assert self.store is not None
        deadline = time.monotonic() + EXIT_WAIT_SECONDS
        others = [f"bye/{rank}" for rank in range(1, self.count)]
        while not self.store.check(others) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def final_error(self, error: BaseException) -> BaseException:
        """Returns the error that this process ends with: its own, which is reported, or the failure that caused it.

        Args:
            error: What reached the command line.
        """
        if self.store is None or self.leaving.is_set() or isinstance(error, (RankFailed, Interrupted)):
            return self.failure or error if isinstance(error, RankFailed) else error
        if self.failure:
            return self.failure
        if is_lost_connection(error):
            return self._lost_rank(error)
        if isinstance(error, FinetuneError):
            self.report_failure(str(error), error.exit_code)
        else:
            code = EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_FAILURE
            self.report_failure(f"{type(error).__name__}: {first_line(error)}", code)
        return error

    def _lost_rank(self, error: BaseException) -> RankFailed:
        """Returns which process broke the connection: one that reported a failure, or one without heartbeat."""
        assert self.store is not None
        try:
            before = self._beats()
            time.sleep(3 * BEAT_SECONDS)
            silent = [str(rank) for rank, beat in self._beats().items() if beat == before.get(rank)]
        except RuntimeError:
            silent = ["0"]
        if self.failure:
            return self.failure
        who = f"process {', '.join(silent)}" if silent else "another process"
        return RankFailed(
            f"{who} of this launch ended without a report ({first_line(error)}): it was killed, or its machine went "
            f"down; see logs/rank-{silent[0] if silent else '<n>'}.log, and continue from the last checkpoint with "
            "run.if_exists=resume",
            exit_code=EXIT_FAILURE,
        )

    def _beats(self) -> dict[int, bytes]:
        assert self.store is not None
        others = (rank for rank in range(self.count) if rank != self.rank)
        return {rank: self.store.get(f"alive/{rank}") for rank in others if self.store.check([f"alive/{rank}"])}

    def report_failure(self, message: str, code: int) -> None:
        """Reports that this process fails; the others end with it.

        Args:
            message: For the user, printed by the first process.
            code: Exit code of all.
        """
        if self.store is None or self.leaving.is_set():
            return
        self.failing = True
        report = {"rank": self.rank, "host": socket.gethostname(), "message": message, "code": code}
        try:
            self.store.set(FAILURE, json.dumps(report))
            deadline = time.monotonic() + EXIT_WAIT_SECONDS
            while not self.store.check([ACKNOWLEDGED]) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        except RuntimeError:  # the store is gone with its machine
            return

    def any_rank(self, flag: bool) -> bool:
        """Returns whether the flag is set on any process. Every process must call it, after `init_process_group`."""
        if self.count == 1:
            return flag
        from finetune.launch.gradients import all_reduce_gradients

        return bool(all_reduce_gradients([], [float(flag)])[0])

    def _connect(self) -> Store:
        from torch.distributed import DistNetworkError, DistStoreError, PrefixStore
        from torch.distributed.rendezvous import rendezvous

        try:
            store, _, _ = next(rendezvous("env://", timeout=CONNECT_TIMEOUT))
        except (DistNetworkError, DistStoreError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            message = f"the first process of this launch does not answer at {where} ({first_line(error)})"
            raise RankFailed(message, exit_code=EXIT_FAILURE) from error
        return PrefixStore("finetune", store)


def interface_to(host: str) -> str | None:
    """Returns the network interface over which this machine reaches another; None where it cannot be found."""
    import psutil

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect((host, 9))  # sends nothing, only consults the routing table
        address = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(entry.address == address for entry in addresses):
                return name
    return None
