"""Who is late: where every rank stands, when one of them does not come.

On each rank a thread tells torchrun's store, 60 times in a timeout, at which line of this program
the main thread is, and thereby that the process lives. Of the ranks that stay at one line for a
tenth of the timeout the first prints where all of them are, and again after each further tenth:

    no progress for 6.0 s:
        rank 0, 1: in step or batch 49 at parallel.py:351 wait
        rank 2: NO ANSWER from process 16227 of node1, which was in step or batch 49 at model.py:88

A collective that waits for the whole timeout ends the job: gloo raises in the ranks that wait,
NCCL's watchdog aborts them, and both print their stacks. By the time of the abort nothing of Python
runs any more, so the names are told before. What has no watchdog, a copy between GPUs that waits
for the other one, is ended here, a tenth of the timeout later.
"""

import atexit
import faulthandler
import os
import platform
import sys
import threading
import traceback
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch.distributed as dist

HERE = Path(__file__).parent


class Watch(threading.Thread):
    """Starts to watch this rank. stop: the StopSignal, whose `polls` counts steps and batches;
    timeout: seconds, None: 600, after which nothing is ended; stream: of the device's work."""

    def __init__(self, stop, timeout: float | None, stream=None):
        super().__init__(daemon=True)
        self.stop, self.interval, self.end = stop, (timeout or 600.0) / 60, threading.Event()
        self.stream = stream if timeout else None
        self.before, self.me = [], f"process {os.getpid()} of {platform.node()}"
        self.prefix = f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        self.store = dist.TCPStore(  # a connection of its own: the group's may be waiting
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        atexit.register(lambda: (self.end.set(), self.join()))
        self.start()

    def run(self) -> None:
        asker, asked = ThreadPoolExecutor(1), None  # the store's own calls know no timeout
        place, still, beat = "", 0, 0  # still: for how many intervals this rank has been there
        while not self.end.wait(self.interval):
            last, place, beat = place, self.place(), beat + 1
            still = still + 1 if place == last else 0
            if asked is None or asked.done():
                asked = asker.submit(self.tell, f"{place}|{self.me}|{beat}", still)
            wait([asked], self.interval)
            if still and still % 6 == 0 and (not asked.done() or asked.exception()):
                print(f"\nrank {self.stop.grid.world.rank} is {place}; no answer from the store, "
                      "which rank 0 or its torchrun keeps", file=sys.stderr, flush=True)
            if still >= 66 and self.stream is not None and not self.stream.query():
                print(f"\nrank {self.stop.grid.world.rank} ends: its GPU has not finished a step "
                      "within --collective-timeout", file=sys.stderr, flush=True)
                faulthandler.dump_traceback()
                os._exit(1)

    def place(self) -> str:
        """Where the main thread is: the innermost line of this program."""
        frame = sys._current_frames()[threading.main_thread().ident]
        here = [f for f in traceback.extract_stack(frame) if Path(f.filename).parent == HERE]
        line = f"{Path(here[-1].filename).name}:{here[-1].lineno} {here[-1].name}" if here else "?"
        return f"in step or batch {self.stop.polls} at {line}"

    def tell(self, mine: str, still: int) -> None:
        """Writes what this rank has to say; while it is still, reads twice what all ranks say, and
        reports: what has not changed between is of a process that does not answer."""
        world = self.stop.grid.world
        keys = [f"{self.prefix}/{rank}" for rank in range(world.size)]
        self.store.set(keys[world.rank], mine)
        if still < 4 or still % 6 not in (4, 0):
            return
        now = [self.store.get(key).decode() if self.store.check([key]) else "not begun|no process|"
               for key in keys]
        told = f"{self.prefix}/{self.stop.polls}/{still}"
        if still % 6 == 0 and self.store.add(told, 1) == 1:  # the first rank to say it
            self.report(now, still * self.interval)
        self.before = now

    def report(self, now: list[str], seconds: float) -> None:
        places = defaultdict(list)
        for rank, (old, new) in enumerate(zip(self.before, now, strict=True)):
            place, process, _ = new.split("|")
            silent = f"NO ANSWER from {process}, which was " if old == new else ""
            places[silent + place].append(str(rank))
        print(f"\nno progress for {seconds:.1f} s:",
              *(f"rank {', '.join(ranks)}: {place}" for place, ranks in places.items()),
              sep="\n    ", file=sys.stderr, flush=True)
