"""Two nodes on one machine: two network namespaces, joined by a cable, each with its own elastic torchrun.

    python tools/two_nodes.py --rounds 10 --seed 0

Every round trains, kills (SIGKILL) one of the nodes at a random moment, either its worker or all of it, waits for the
elastic restart and compares the final merged weights with those of an uninterrupted run: they must be equal to the
bit. Needs root and iproute2; says so and exits with 77 where it cannot run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests" / "distributed"
sys.path.insert(0, str(TESTS))
CANNOT_RUN = 77
PREFIX = "oft2n"
PORT = 29600
ROUND_LIMIT = 600
"""Seconds after which a round has failed: two cold starts are 25 on two free cores, and were 200 on busy ones."""
MAX_STARTS = 4
"""How often the node's scheduler, which is us, starts torchrun again on a node that died."""


class CannotRun(RuntimeError):
    """This machine gives us no namespaces; why."""


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotRun(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


class Network:
    """Two namespaces and the cable between them; gone when the context ends, and so are those of runs that were killed."""

    def __init__(self) -> None:
        self.names = [f"{PREFIX}-{os.getpid()}-{node}" for node in (0, 1)]
        self.cards = [f"o{os.getpid() % 10**7}n{node}" for node in (0, 1)]  # an interface's name has 15 characters
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    def __enter__(self) -> Network:
        if os.geteuid() != 0:
            raise CannotRun("network namespaces need root")
        if shutil.which("ip") is None:
            raise CannotRun("no `ip` command (iproute2)")
        self._remove_left_behind()
        try:
            for name in self.names:
                ip("netns", "add", name)
            (first, second), (card, other) = self.names, self.cards
            ip("link", "add", card, "netns", first, "type", "veth", "peer", "name", other, "netns", second)
            for name, card, address in zip(self.names, self.cards, self.addresses, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", card)
                ip("-n", name, "link", "set", card, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except CannotRun:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def processes(self, node: int) -> list[int]:
        """What runs on a node, and nowhere else."""
        return [int(pid) for pid in ip("netns", "pids", self.names[node]).split()]

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def _remove_left_behind(self) -> None:
        for line in ip("netns", "list").splitlines():
            name = line.split()[0]
            owner = name.split("-")[1] if name.startswith(f"{PREFIX}-") else ""
            if owner.isdigit() and not Path(f"/proc/{owner}").exists():
                ip("netns", "del", name)


@dataclass
class Progress:
    """What a worker wrote last: its process, how often its agent has restarted it, and its step."""

    pid: int
    restarts: int
    step: int

    @classmethod
    def read(cls, file: Path) -> Progress | None:
        text = file.read_text() if file.exists() else ""
        # A file without its last space is still being written.
        return cls(*map(int, text.split())) if text.endswith(" ") else None


class Node:
    """One node: a torchrun agent in its namespace, started again when it dies, as a cluster's scheduler would."""

    def __init__(self, number: int, network: Network, directory: Path) -> None:
        self.number, self.network, self.directory = number, network, directory
        self.starts = 0
        self.log: IO[str] = (directory / f"node{number}.log").open("a")
        self.agent: subprocess.Popen[str] | None = None

    def start(self) -> None:
        card, address = self.network.cards[self.number], self.network.addresses[self.number]
        # is_host: an agent finds out by its host name whether the rendezvous is its own to hold, and both have the same.
        settings = f"is_host={int(self.number == 0)},join_timeout=120,keep_alive_interval=1,keep_alive_max_attempt=5"
        torchrun = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"),
            *("--rdzv_backend", "c10d", "--rdzv_endpoint", f"{self.network.addresses[0]}:{PORT}", "--rdzv_id", "oft"),
            *("--rdzv_conf", settings, "--local_addr", address, "--max_restarts", "3", "--monitor_interval", "0.1"),
            *(str(HERE / "elastic_fit.py"), str(self.directory), str(self.number)),
        ]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]).rstrip(
                os.pathsep
            ),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": card,
            "TP_SOCKET_IFNAME": card,
            # Sharing it, the first agent never tells a node that comes back where it is: a minute until both fail.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        self.agent = subprocess.Popen(
            ["ip", "netns", "exec", self.network.names[self.number], *torchrun],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=environment,
            text=True,
        )
        self.starts += 1

    @property
    def progress(self) -> Progress | None:
        return Progress.read(self.directory / f"progress-{self.number}")

    def kill_worker(self) -> None:
        """SIGKILL of the training process: the agent restarts it."""
        progress = self.progress
        if progress is not None and progress.pid in self.network.processes(self.number):
            os.kill(progress.pid, signal.SIGKILL)

    def kill(self) -> None:
        """SIGKILL of all that runs on the node: the agent first, so that it can restart nothing."""
        if self.agent is not None and self.agent.poll() is None:
            self.agent.kill()
            self.agent.wait()
        for pid in self.network.processes(self.number):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def tend(self) -> bool:
        """Whether the node is done. An agent that died is started again."""
        assert self.agent is not None
        code = self.agent.poll()
        if code is not None and code != 0:
            if self.starts >= MAX_STARTS:
                raise RuntimeError(f"node {self.number}: torchrun failed {self.starts} times, last with {code}")
            self.start()
        return code == 0

    def close(self) -> None:
        self.kill()
        self.log.close()


@dataclass
class Kill:
    """Which node is killed, all of it or its worker, after which step, and how many seconds later."""

    node: int
    whole: bool
    step: int
    delay: float

    def __str__(self) -> str:
        return f"{'all of' if self.whole else 'the worker of'} node {self.node} killed {self.delay:.3f} s into step {self.step}"


def run(network: Network, directory: Path, kill: Kill | None) -> list[dict[str, Any]]:
    """One run on both nodes; returns what each rank ended with."""
    import torch

    nodes = [Node(number, network, directory) for number in (0, 1)]
    deadline = time.monotonic() + ROUND_LIMIT
    pending = kill
    try:
        for node in nodes:
            node.start()
        while True:
            done = [node.tend() for node in nodes]
            if all(done):
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"not done after {ROUND_LIMIT} s")
            if pending is not None:
                progress = nodes[pending.node].progress
                if progress is not None and progress.step >= pending.step:
                    time.sleep(pending.delay)
                    nodes[pending.node].kill() if pending.whole else nodes[pending.node].kill_worker()
                    pending = None
            time.sleep(0.002 if pending is not None else 0.1)
        if pending is not None:
            raise RuntimeError("the run ended before the kill")
    except BaseException:
        for node in nodes:
            node.log.flush()
            print(f"--- node {node.number}\n" + "".join((directory / f"node{node.number}.log").read_text()[-3000:]))
        raise
    finally:
        for node in nodes:
            node.close()
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def difference(ends: list[dict[str, Any]], reference: dict[str, Any]) -> str:
    """What differs from the uninterrupted run; nothing where every rank has its weights, to the bit."""
    import torch

    for rank, end in enumerate(ends):
        if end["step"] != reference["step"]:
            return f"rank {rank} ended at step {end['step']}, not {reference['step']}"
        if end["state"].keys() != reference["state"].keys():
            return f"rank {rank} has other weights: {sorted(end['state'].keys() ^ reference['state'].keys())}"
        for name, value in reference["state"].items():
            if not torch.equal(value, end["state"][name]):
                return f"rank {rank}: {name} is off by {(value - end['state'][name]).abs().max():.1e}"
    return ""


def rounds(network: Network, root: Path, count: int, seed: int) -> int:
    """Run them, print a line each; returns how many failed."""
    from elastic_fit import EPOCHS, STEPS_PER_EPOCH

    draw = random.Random(seed)
    begun = time.monotonic()
    (root / "reference").mkdir()
    reference, other = run(network, root / "reference", None)
    wrong = difference([other], reference)
    seconds = time.monotonic() - begun
    print(f"uninterrupted: {reference['step']} steps, {wrong or 'both nodes equal'} ({seconds:.0f} s)", flush=True)
    failed = 1 if wrong else 0
    for number in range(1, count + 1):
        step = draw.randrange(EPOCHS * STEPS_PER_EPOCH - 4)
        kill = Kill(draw.randrange(2), draw.random() < 0.5, step, draw.uniform(0, 0.08))
        directory, start = root / f"round{number}", time.monotonic()
        directory.mkdir()
        try:
            ends = run(network, directory, kill)
            result = difference(ends, reference) or f"resumed at step {ends[0]['resumed_at']}, identical"
        except RuntimeError as error:
            result = f"FAILED: {error}"
        good = result.endswith("identical")
        failed += not good
        print(f"round {number}: {kill}; {result} ({time.monotonic() - start:.0f} s)", flush=True)
        if good:
            shutil.rmtree(directory)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # A terminated run cleans up like any other.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    root = Path(tempfile.mkdtemp(prefix="oft-two-nodes-"))
    begun = time.monotonic()
    try:
        with Network() as network:
            failed = rounds(network, root, options.rounds, options.seed)
    except CannotRun as reason:
        print(f"cannot run here: {reason}")
        shutil.rmtree(root)
        return CANNOT_RUN
    where = f"; logs in {root}" if failed else ""
    print(f"{options.rounds - failed} of {options.rounds} rounds identical in {time.monotonic() - begun:.0f} s{where}")
    if not failed:
        shutil.rmtree(root)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
