"""Proves on one machine that several processes do what one does, and that two machines find and lose each other well.

    python scripts/check_launch.py [steps=12] [nodes=2] [folder=outputs]

One thread trains the quickstart's model in one process, then in two. With ``nodes=2``, two network namespaces (root on Linux)
stand for two machines: they train together; one of them is killed, then cut off, and the other must end within seconds; a
restart must go on from the last checkpoint. Ends with one line of JSON.
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
SILENCE_SECONDS = 10
SOON_SECONDS = 30


def finetune(*overrides: str, root: Path, name: str, prefix: Sequence[str] = ()) -> "subprocess.Popen[str]":
    """Starts ``finetune`` up to the end of training."""
    told = [f"run.root={root}", f"run.name={name}", "run.until=train", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "finetune", *told], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]", *, code: int = 0) -> str:
    """Waits for the end and gives back what was said; ends this program where the exit code is another."""
    output, _ = process.communicate()
    if process.returncode != code:
        sys.exit(f"exit code {process.returncode} instead of {code}:\n{output[-4000:]}")
    return " ".join(output.split())


def lines(root: Path, name: str) -> list[dict[str, float]]:
    """The logged steps."""
    texts = (root / name / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, texts) if "train/loss" in line]


def compare(root: Path, *, steps: int) -> dict[str, Any]:
    """One process against two, one thread each."""
    told = [*QUICK, f"train.steps={steps}", "run.if_exists=overwrite"]
    finish(finetune(*told, "hardware.threads=1", root=root, name="launch-1"))
    finish(finetune(*told, "hardware.threads=2", "launch=ddp", "launch.processes=2", root=root, name="launch-2"))
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
        """Pulls the cable of a node, ``down``, or puts it back, ``up``."""
        ip("-n", f"finetune{number}", "link", "set", f"ft{number}", state)

    def kill(self, number: int) -> None:
        """Takes the power from a node."""
        for pid in ip("netns", "pids", f"finetune{number}").split():
            os.kill(int(pid), 9)

    def start(self, number: int, *overrides: str, root: Path) -> "subprocess.Popen[str]":
        told = [
            "launch=multinode",
            f"launch.host={HOSTS[0]}",
            f"launch.node={number}",
            f"launch.heartbeat_timeout_seconds={SILENCE_SECONDS}",
        ]
        inside = ["ip", "netns", "exec", f"finetune{number}"]
        return finetune(*told, *overrides, root=root, name="launch-nodes", prefix=inside)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, text=True, capture_output=True).stdout


def until_step(root: Path, step: int, running: "list[subprocess.Popen[str]]") -> None:
    """Waits until a checkpoint of at least this step is sealed."""
    folder = root / "launch-nodes" / "train" / "checkpoints"
    while not any(int(seal.parent.name.rpartition("-")[2]) >= step for seal in folder.glob("checkpoint-*/seal.json")):
        if any(one.poll() is not None for one in running):
            sys.exit("".join(one.communicate()[0][-2000:] for one in running))
        time.sleep(0.2)


def two_machines(root: Path, told: Sequence[str], *, troubles: Sequence[tuple[int, str, int]], steps: int) -> bool:
    """Trains on two nodes through all troubles to the end.

    Args:
        root: Folder of the run, which is called launch-nodes.
        told: Overrides.
        troubles: After the checkpoint of which step what happens to which node: it is ``killed`` or ``cut off``.
        steps: Of the whole training.

    Returns:
        Whether the other node always ended soon, and the last restart went on from the last checkpoint to the last step.
    """
    told = [*told, f"train.steps={steps}", "hardware.threads=1"]
    shutil.rmtree(root / "launch-nodes", ignore_errors=True)
    with Nodes() as nodes:
        for step, trouble, number in troubles:
            running = [nodes.start(node, *told, "run.if_exists=resume", root=root) for node in range(2)]
            until_step(root, step, running)
            if trouble == "killed":
                nodes.kill(number)
            else:
                nodes.switch(number, "down")
            since = time.monotonic()
            said = finish(running[1 - number], code=1)
            seconds = time.monotonic() - since
            print(
                f"node {number} {trouble}: the other ended after {seconds:.1f} s: {said[said.rindex('finetune: ') :][:300]}"
            )
            if trouble == "cut off":
                said = finish(running[number], code=1)
                print(f"and itself after {time.monotonic() - since:.1f} s: {said[said.rindex('finetune: ') :][:200]}")
                nodes.switch(number, "up")
            if seconds > SOON_SECONDS:
                return False
        running = [nodes.start(node, *told, "run.if_exists=resume", root=root) for node in range(2)]
        said = finish(running[0])
        finish(running[1])
        found = json.loads((root / "launch-nodes" / "train" / "manifest.json").read_text())["product"]
        print(f"{found['steps']} steps, the last time resumed from {found['resumed_from']}")
        return found["steps"] == steps and found["resumed_from"] >= troubles[-1][0]


def main() -> None:
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
    root = Path(settings.get("folder", "outputs")).resolve()
    result: dict[str, Any] = {"ddp_loss_difference": None, "speedup_two_processes": None, "nodes_ok": None}
    if settings.get("steps") != "0":
        result |= compare(root, steps=int(settings.get("steps", "12")))
    if settings.get("nodes") == "2":
        if os.geteuid() or shutil.which("ip") is None:
            sys.exit("nodes=2 makes network namespaces, which takes root and the program ip (package iproute2)")
        told = [*QUICK, "data.pack_tokens=256", "train.tokens_per_step=512", "train.checkpoints=10"]
        troubles = [(4, "killed", 1), (12, "cut off", 1), (20, "killed", 0)]
        result["nodes_ok"] = two_machines(root, told, troubles=troubles, steps=40)
    print(json.dumps(result))
    sys.exit(result["nodes_ok"] is False)


if __name__ == "__main__":
    main()
