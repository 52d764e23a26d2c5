"""Races: each side in a process of its own, compiled beside one another, timed in turns and alone.

Sides of later races are prepared while earlier ones wait or run. Of JAX's only one compiles at a
time, since XLA times its kernels on the GPU to choose among them, and none does while a race runs;
PyTorch's are halted then. So the seconds to prepare are those of a busy machine, the times are not.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from experiments.benchmarks import peers

STARTING, LOADED, PREPARING, READY, FAILED = "starting", "loaded", "preparing", "ready", "failed"
AHEAD = 3  # races whose sides get ready while one waits or runs
ANSWER_SECONDS = 60.0  # the longest that a timed call may take


class Worker:
    """A process of `worker`.

    Args:
      spec: what it is to do, see `worker.make`.
      env: its environment.
      log: file that its stderr goes to.
    """

    def __init__(self, spec: Mapping[str, Any], env: Mapping[str, str], log: pathlib.Path):
        self.spec, self.side, self._log = spec, spec["side"], log
        self.state, self.why, self.facts = STARTING, "", {}
        self.began = self._since = time.time()
        self._halted = self._halted_before = 0.0  # in all, and before it was told to prepare
        words = [sys.executable, "-m", "experiments.benchmarks.worker", json.dumps(spec)]
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=env,
                text=True, start_new_session=True,
            )  # fmt: skip
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        for line in self._process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put(None)

    @property
    def ours(self) -> bool:
        """Whether JAX computes."""
        return peers.is_ours(self.side)

    def look(self) -> None:
        """Takes note of what the process has said."""
        while self.state not in (READY, FAILED):
            try:
                answer = self._answers.get_nowait()
            except queue.Empty:
                return
            if answer is None:
                self.fail(self._last_words())
                return
            self.facts |= answer
            self.state = LOADED if self.state == STARTING else READY

    def prepare(self) -> None:
        """Tells it to compile."""
        self._tell("prepare")
        self.state, self._since, self._halted_before = PREPARING, time.time(), self._halted

    def waited(self) -> float:
        """Seconds since it was told to start or to prepare, without those that it was halted."""
        return time.time() - self._since - (self._halted - self._halted_before)

    def ask(self, word: str, seconds: float) -> dict[str, Any] | None:
        """Its answer; None, and it has failed, if none comes in time."""
        seconds = seconds if self.spec.get("figures") else min(seconds, ANSWER_SECONDS)
        self._tell(word)
        try:
            answer = self._answers.get(timeout=max(seconds, 1.0))
            why = "" if answer else self._last_words()
        except queue.Empty:
            answer, why = None, f"no answer in {seconds:.0f} s"
        if answer is None:
            self.fail(why)
        return answer

    def fail(self, why: str) -> None:
        """Ends it, with the reason."""
        self.state, self.why = FAILED, why
        self.kill()

    def kill(self) -> None:
        """And what it started."""
        if self._process.stdin.closed:
            return  # done before
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._listener.join(1)  # what the process started may hold the pipe for a moment
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        if not self._listener.is_alive():
            self._process.stdout.close()

    @contextmanager
    def halted(self) -> Iterator[None]:
        """It does nothing meanwhile."""
        running = self._process.poll() is None
        since = time.time()
        if running:
            os.killpg(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            if running and self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGCONT)
            self._halted += time.time() - since

    def prepared(self) -> dict[str, float]:
        """Seconds from the process's start to its first result, and to compile and give it."""
        if "first" not in self.facts:
            return {"prepare_seconds": self.facts.get("prepare_seconds", float("nan"))}
        return {
            "first_seconds": self.facts["first"] - self.began - self._halted,
            "prepare_seconds": self.facts["prepare_seconds"] - self._halted + self._halted_before,
        }

    def _tell(self, word: str) -> None:
        with suppress(BrokenPipeError):  # the answer will be none
            if not self._process.stdin.closed:
                self._process.stdin.write(word + "\n")
                self._process.stdin.flush()

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1].strip()[:200] if lines else "it ended without a word"


@dataclasses.dataclass
class Race:
    """Sides of one piece of work, and what came of it."""

    title: str
    specs: Sequence[Mapping[str, Any]]
    env: Mapping[str, Mapping[str, str]]  # side → environment
    rounds: int
    workers: list[Worker] = dataclasses.field(default_factory=list)

    def settled(self) -> bool:
        """Whether all are ready or never will be."""
        return len(self.workers) == len(self.specs) and all(
            w.state in (READY, FAILED) for w in self.workers
        )


class Course:
    """The races in order, and the processes that get ready for them.

    Args:
      races: as they are to be run.
      folder: for logs and outputs.
      limit: processes at most that get ready at a time.
      patience: seconds that a race waits for a side.
    """

    def __init__(self, races: Sequence[Race], folder: pathlib.Path, limit: int, patience: float):
        self._races, self._folder, self._limit, self._patience = races, folder, limit, patience
        self._count = 0

    def workers(self) -> list[Worker]:
        """Of all races, in their order."""
        return [w for race in self._races for w in race.workers]

    def tend(self, *, hold: bool = False) -> None:
        """Starts and prepares what may be; with `hold`, nothing more of JAX's."""
        for worker in self.workers():
            worker.look()
            if worker.state in (STARTING, PREPARING) and worker.waited() > self._patience:
                worker.fail(f"not ready in {self._patience:.0f} s")
        for race in self._races[: 1 + AHEAD]:
            while len(race.workers) < len(race.specs) and self._busy() < self._limit:
                spec = dict(race.specs[len(race.workers)])
                self._count += 1
                spec["output"] = str(self._folder / f"{self._count}.npy")
                log = self._folder / f"{self._count}.log"
                race.workers.append(Worker(spec, race.env[spec["side"]], log))
        for worker in self.workers():
            if worker.state == LOADED and not (worker.ours and (hold or self.compiling())):
                worker.prepare()

    def _busy(self) -> int:
        return sum(w.state in (STARTING, LOADED, PREPARING) for w in self.workers())

    def compiling(self) -> bool:
        """Whether one of JAX's does."""
        return any(w.ours and w.state == PREPARING for w in self.workers())

    def run(self, race: Race, deadline: float) -> dict[str, Any]:
        """Waits for the sides of a race, and runs it: see `result`."""
        while not race.settled() and time.time() < deadline - 10:
            self.tend()
            time.sleep(0.05)
        while self.compiling() and time.time() < deadline:
            self.tend(hold=True)
            time.sleep(0.05)
        late = [w for w in race.workers if w.state not in (READY, FAILED)]
        for worker in late:
            worker.fail("not ready when the time was over")
        ready = [w for w in race.workers if w.state == READY]
        busy = [w for w in self.workers() if w.state in (STARTING, PREPARING)]
        answers: list[dict[str, Any]] = []
        with ExitStack() as stack:
            for worker in busy:
                stack.enter_context(worker.halted())
            for _ in range(race.rounds):
                running = [w for w in ready if w.state == READY]
                answer = {w.side: w.ask("go", deadline - time.time()) for w in running}
                answers.append({side: a for side, a in answer.items() if a})
                if time.time() > deadline:
                    break
            found = self._result(race, answers)
        for worker in race.workers:
            worker.kill()
        self._races = [r for r in self._races if r is not race]
        return found

    def _result(self, race: Race, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """{"sides": side → answers, memory, facts, …, "not run": side → why}."""
        sides, absent = {}, {}
        for spec in race.specs[len(race.workers) :]:
            absent[spec["side"]] = "no time was left"
        for worker in race.workers:
            said = [a[worker.side] for a in answers if worker.side in a]
            if worker.state == FAILED or not said:
                absent[worker.side] = worker.why or "no time was left"
                continue
            memory = worker.ask("end", ANSWER_SECONDS) or {}
            facts = {k: v for k, v in worker.facts.items() if k not in ("first", "prepare_seconds")}
            sides[worker.side] = {"answers": said, "output": worker.spec["output"], "facts": facts,
                                  **worker.prepared(), **memory}  # fmt: skip
        return {"sides": sides, "not run": absent}

    def close(self) -> None:
        """Ends all that still runs."""
        for worker in self.workers():
            worker.kill()
