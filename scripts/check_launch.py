"""Checks on one machine that several processes compute what one does, and that two machines handle failures.

    python scripts/check_launch.py [steps=12] [nodes=2] [folder=outputs]

One process with one thread trains the quickstart's model, then two processes do. With ``nodes=2``, two network
namespaces (root on Linux) simulate two machines: they train together; one is killed, then disconnected, and the other
must end within seconds; a restart must continue from the last checkpoint. The last line is JSON.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
QUICK = [
    "lora.dropout=0",
    "train.tokens_per_step=2048",
    "train.evaluations=0",
    "train.checkpoints=0",
    "preflight=off",
    "tracking=[]",
]
HOSTS = ("10.77.0.1", "10.77.0.2")
HEARTBEAT_TIMEOUT_SECONDS = 10
SOON_SECONDS = 30


def finetune(*overrides: str, root: Path, name: str, prefix: Sequence[str] = ()) -> "subprocess.Popen[str]":
    """Starts ``finetune`` up to the end of training."""
    settings = ["+experiment=quickstart", f"run.root={root}", f"run.name={name}", "run.until=train", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*prefix, sys.executable, "-m", "finetune", *settings]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: "subprocess.Popen[str]", *, code: int = 0) -> str:
    """Waits for the end and returns the output; ends this program if the exit code differs."""
    output, _ = process.communicate()
    if process.returncode != code:
        sys.exit(f"exit code {process.returncode} instead of {code}:\n{output[-4000:]}")
    return " ".join(output.split())


def lines(root: Path, name: str) -> list[dict[str, float]]:
    """Reads the logged steps."""
    texts = (root / name / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, texts) if "train/loss" in line]


def compare(root: Path, *, steps: int) -> dict[str, Any]:
    """Compares one process with two, one thread each."""
    overrides = [*QUICK, f"train.steps={steps}", "run.if_exists=overwrite"]
    finish(finetune(*overrides, "hardware.threads=1", root=root, name="launch-1"))
    finish(finetune(*overrides, "hardware.threads=2", "launch=ddp", "launch.processes=2", root=root, name="launch-2"))
    one, two = lines(root, "launch-1"), lines(root, "launch-2")
    speeds = [(steps - 2) / (run[-1]["time"] - run[1]["time"]) for run in (one, two)]
    for a, b in zip(one, two, strict=True):
        print(f"step {int(a['step']):3}  {a['train/loss']:.6f}  {b['train/loss']:.6f}")
    print(f"steps per second: {speeds[0]:.3f} in one process, {speeds[1]:.3f} in two, one thread each")
    difference = max(abs(a["train/loss"] - b["train/loss"]) for a, b in zip(one, two, strict=True))
    return {"ddp_loss_difference": difference, "speedup_two_processes": round(speeds[1] / speeds[0], 3)}


class Nodes:
    """Two network namespaces with a cable between them."""

    def __enter__(self) -> "Nodes":
        self.__exit__()
        for name in ("finetune0", "finetune1"):
            ip("netns", "add", name)
        ip("link", "add", "ft0", "netns", "finetune0", "type", "veth", "peer", "name", "ft1", "netns", "finetune1")
        for number, host in enumerate(HOSTS):
            ip("-n", f"finetune{number}", "addr", "add", f"{host}/24", "dev", f"ft{number}")
            self.switch(number, "up")
            ip("-n", f"finetune{number}", "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("finetune0", "finetune1"):
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)

    def switch(self, number: int, state: str) -> None:
        """Sets the link of a node ``down`` or ``up``."""
        ip("-n", f"finetune{number}", "link", "set", f"ft{number}", state)

    def kill(self, number: int) -> None:
        """Kills all processes of a node."""
        for pid in ip("netns", "pids", f"finetune{number}").split():
            os.kill(int(pid), 9)

    def start(self, number: int, *overrides: str, root: Path) -> "subprocess.Popen[str]":
        settings = [
            "launch=multinode",
            f"launch.host={HOSTS[0]}",
            f"launch.node={number}",
            f"launch.heartbeat_timeout_seconds={HEARTBEAT_TIMEOUT_SECONDS}",
        ]
        inside = ["ip", "netns", "exec", f"finetune{number}"]
        return finetune(*settings, *overrides, root=root, name="launch-nodes", prefix=inside)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, text=True, capture_output=True).stdout


def message(output: str) -> str:
    """Returns the last message of the program and what follows it."""
    return output[output.rindex("finetune: ") :]


def until_step(root: Path, step: int, running: "list[subprocess.Popen[str]]") -> None:
    """Waits until a checkpoint of at least this step is sealed."""
    folder = root / "launch-nodes" / "train" / "checkpoints"
    while not any(int(seal.parent.name.rpartition("-")[2]) >= step for seal in folder.glob("checkpoint-*/seal.json")):
        if any(process.poll() is not None for process in running):
            sys.exit("".join(process.communicate()[0][-2000:] for process in running))
        time.sleep(0.2)


def two_machines(root: Path, overrides: Sequence[str], *, troubles: Sequence[tuple[int, str, int]], steps: int) -> bool:
    """Trains on two nodes through all troubles to the end.

    Args:
        root: Folder of the run, which is called launch-nodes.
        overrides: Settings of both nodes.
        troubles: Step of a checkpoint, what happens after it (``killed`` or ``cut off``), and to which node.
        steps: Of the whole training.

    Returns:
        Whether the other node always ended soon, and the last restart continued from the last checkpoint to the
        last step.
    """
    overrides = [*overrides, f"train.steps={steps}", "hardware.threads=1"]
    shutil.rmtree(root / "launch-nodes", ignore_errors=True)
    with Nodes() as nodes:
        for step, trouble, number in troubles:
            running = [nodes.start(node, *overrides, "run.if_exists=resume", root=root) for node in range(2)]
            until_step(root, step, running)
            if trouble == "killed":
                nodes.kill(number)
            else:
                nodes.switch(number, "down")
            since = time.monotonic()
            output = finish(running[1 - number], code=1)
            seconds = time.monotonic() - since
            print(f"node {number} {trouble}: the other ended after {seconds:.1f} s: {message(output)[:300]}")
            if trouble == "cut off":
                output = finish(running[number], code=1)
                print(f"and itself after {time.monotonic() - since:.1f} s: {message(output)[:200]}")
                nodes.switch(number, "up")
            if seconds > SOON_SECONDS:
                return False
        running = [nodes.start(node, *overrides, "run.if_exists=resume", root=root) for node in range(2)]
        output = finish(running[0])
        finish(running[1])
        product = json.loads((root / "launch-nodes" / "train" / "manifest.json").read_text())["product"]
        print(f"{product['steps']} steps, the last time resumed from {product['resumed_from']}")
        return product["steps"] == steps and product["resumed_from"] >= troubles[-1][0]


def main() -> None:
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
    root = Path(settings.get("folder", "outputs")).resolve()
    result: dict[str, Any] = {"ddp_loss_difference": None, "speedup_two_processes": None, "nodes_ok": None}
    if settings.get("steps") != "0":
        result |= compare(root, steps=int(settings.get("steps", "12")))
    if settings.get("nodes") == "2":
        if os.geteuid() or shutil.which("ip") is None:
            sys.exit("nodes=2 creates network namespaces, which requires root and the program ip (package iproute2)")
        overrides = [*QUICK, "data.pack_tokens=256", "train.tokens_per_step=512", "train.checkpoints=10"]
        troubles = [(4, "killed", 1), (12, "cut off", 1), (20, "killed", 0)]
        result["nodes_ok"] = two_machines(root, overrides, troubles=troubles, steps=40)
    print(json.dumps(result))
    sys.exit(result["nodes_ok"] is False)


if __name__ == "__main__":
    main()
