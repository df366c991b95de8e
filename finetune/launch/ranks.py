"""What the processes of a launch tell each other beside gradients: where the run is, when the data are there, who failed.

They speak through the key-value store that torchrun and accelerate bring along (`torch.distributed.TCPStore`), which is
there before any process group and needs none. So one process may prepare data for hours while the others wait for a word,
and a process that fails can still say why.
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

from finetune.errors import FinetuneError, Interrupted, RankFailed
from finetune.launch.heartbeat import BEAT_SECONDS, FAILURE, HEARD, LAST_WORD_SECONDS, Pulse, is_lost_connection, short

if TYPE_CHECKING:
    from torch.distributed import Store

CONNECT = timedelta(minutes=5)
"""Processes of one launch start within it."""

POLL_SECONDS = 0.2


VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""How a launcher tells a process what it is."""


class Ranks:
    """The processes of one launch, seen from one of them; alone where there is no other.

    Attributes:
        rank: This process; 0 is the first, which prepares data, prints, writes and goes on alone after training.
        count: All of them.
        local: This process on its machine.
        local_count: Those on its machine.
        shards: Whether each holds only a part of the base, so that all must compute at the same time.
        offload: Whether parts that are not in use wait in host memory.
        failure: What another process said before it ended, or what this one knows of its end; None as long as all is well.
    """

    def __init__(
        self,
        environment: dict[str, str] | None = None,
        *,
        silence_seconds: int = 30,
        shards: bool = False,
        offload: bool = False,
    ) -> None:
        told = os.environ if environment is None else environment
        self.shards, self.offload = shards, offload
        self.rank, self.count = int(told.get("RANK", "0")), int(told.get("WORLD_SIZE", "1"))
        self.local, self.local_count = int(told.get("LOCAL_RANK", "0")), int(told.get("LOCAL_WORLD_SIZE", "1"))
        self.failure: RankFailed | None = None
        self.said = 0
        self.failing = False
        self.leaving = threading.Event()
        self.store: Store | None = None
        if self.count > 1:
            self.store = self._connect()
            Pulse(
                self, self._connect(), silence_seconds=silence_seconds
            ).start()  # on a line of its own: waiting holds the other one

    @property
    def is_main(self) -> bool:
        """Whether this process prints, writes and tracks."""
        return self.rank == 0

    def put(self, key: str, value: Any) -> None:
        """Leaves word for the others."""
        if self.store is not None:
            self.store.set(key, json.dumps(value))

    def get(self, key: str) -> Any:
        """Waits for another's word, as long as it takes.

        Raises:
            RankFailed: Another process ended meanwhile.
        """
        assert self.store is not None, "alone, there is nobody to hear"
        while not self.store.check([key]):
            if self.failure:
                raise self.failure
            time.sleep(POLL_SECONDS)
        return json.loads(self.store.get(key))

    def broadcast(self, value: Any = None) -> Any:
        """The first process's value, in all of them. What JSON can hold; every process must call it."""
        if self.count == 1:
            return value
        self.said += 1
        if self.is_main:
            self.put(f"share/{self.said}", value)
            return value
        return self.get(f"share/{self.said}")

    def all_gather(self, value: Any) -> list[Any]:
        """Every process's value, in all of them, in their order. What JSON can hold; every process must call it."""
        if self.count == 1:
            return [value]
        self.said += 1
        self.put(f"collect/{self.said}/{self.rank}", value)
        return [self.get(f"collect/{self.said}/{rank}") for rank in range(self.count)]

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Hides the launch for a while: what one process does alone must not look for the others, as a trainer would."""
        if self.store is None:
            yield
            return
        from accelerate.state import AcceleratorState

        told = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
        try:
            yield
        finally:
            os.environ.update(told)
            AcceleratorState._reset_state(reset_partial_state=True)

    def barrier(self) -> None:
        """Waits until every process is here."""
        self.all_gather(None)

    def join(self, device: str) -> None:
        """Makes the process group: from here on gradients can be added up.

        Args:
            device: ``cpu`` or ``cuda``.
        """
        if self.store is None:
            return
        import torch
        from torch import distributed

        if device == "cuda":
            torch.cuda.set_device(self.local)
        if self.count > self.local_count and "GLOO_SOCKET_IFNAME" not in os.environ:
            interface = interface_to(os.environ["MASTER_ADDR"])
            if interface:  # by itself, gloo takes the one that this machine's name stands for, often the loopback
                os.environ["GLOO_SOCKET_IFNAME"] = interface
        distributed.init_process_group(
            "nccl" if device == "cuda" else "gloo", store=distributed.PrefixStore("group", self.store), rank=self.rank,
            world_size=self.count,
        )  # fmt: skip

    def shutdown(self) -> None:
        """Ends the launch for this process, which is alone from here on: nothing may take it for one of many."""
        if self.store is None:
            return
        from accelerate.state import AcceleratorState
        from torch import distributed

        self._say_goodbye()
        self.leaving.set()
        if distributed.is_initialized():
            distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        for name in VARIABLES:
            os.environ.pop(name, None)
        self.rank, self.count, self.local, self.local_count = 0, 1, 0, 1

    def _say_goodbye(self) -> None:
        """The first process goes last: the store may live in it."""
        if not self.is_main:
            self.put(f"bye/{self.rank}", True)
            return
        assert self.store is not None
        deadline = time.monotonic() + LAST_WORD_SECONDS
        others = [f"bye/{rank}" for rank in range(1, self.count)]
        while not self.store.check(others) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def explain(self, error: BaseException) -> BaseException:
        """What this process should end with: its own error, told to the others, or the one that made it fail.

        Args:
            error: What came up to the command line.
        """
        if self.store is None or self.leaving.is_set() or isinstance(error, (RankFailed, Interrupted)):
            return self.failure or error if isinstance(error, RankFailed) else error
        if self.failure:
            return self.failure
        if is_lost_connection(error):
            return self._missing(error)
        code = 2 if isinstance(error, FinetuneError) else 75 if isinstance(error, KeyboardInterrupt) else 1
        self.fail(str(error) if code == 2 else f"{type(error).__name__}: {short(error)}", code)
        return error

    def _missing(self, error: BaseException) -> RankFailed:
        """Who broke the connection: another's last word, or whose heart has stopped."""
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
            f"{who} of this launch ended without a word ({short(error)}): it was killed, or its machine went down; its log is "
            f"logs/rank-{silent[0] if silent else '<n>'}.log, and run.if_exists=resume goes on from the last checkpoint",
            code=1,
        )

    def _beats(self) -> dict[int, bytes]:
        assert self.store is not None
        others = (rank for rank in range(self.count) if rank != self.rank)
        return {rank: self.store.get(f"alive/{rank}") for rank in others if self.store.check([f"alive/{rank}"])}

    def fail(self, message: str, code: int) -> None:
        """The last word of a process that ends: the others end with it.

        Args:
            message: For the user, on the first process's console.
            code: Exit code of all.
        """
        if self.store is None or self.leaving.is_set():
            return
        self.failing = True
        who = {"rank": self.rank, "host": socket.gethostname(), "message": message, "code": code}
        try:
            self.store.set(FAILURE, json.dumps(who))
            deadline = time.monotonic() + LAST_WORD_SECONDS
            while not self.store.check([HEARD]) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        except RuntimeError:  # the store is gone with its machine: there is nobody left to tell
            return

    def any_rank(self, flag: bool) -> bool:
        """Whether any process says so. A message of the process group, to be called by all."""
        if self.count == 1:
            return flag
        from finetune.launch.gradients import all_reduce_gradients

        return bool(all_reduce_gradients([], [float(flag)])[0])

    def _connect(self) -> Store:
        from torch.distributed import DistNetworkError, DistStoreError, PrefixStore
        from torch.distributed.rendezvous import rendezvous

        try:
            store, _, _ = next(rendezvous("env://", timeout=CONNECT))
        except (DistNetworkError, DistStoreError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise RankFailed(
                f"the first process of this launch does not answer at {where} ({short(error)})", code=1
            ) from error
        return PrefixStore("finetune", store)


def interface_to(host: str) -> str | None:
    """Name of the network interface over which this machine reaches another; None where it cannot be told."""
    import psutil

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one, suppress(OSError):
        one.connect((host, 9))  # sends nothing: it only asks the routing table
        own = one.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(address.address == own for address in addresses):
                return name
    return None
