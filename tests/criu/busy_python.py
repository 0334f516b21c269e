"""A Python program that works in many threads, to be checkpointed in the middle of it.

Every worker changes memory of another kind in a thread of its own, step by step, and knows after each step what has to
be there. Told ``check`` on standard input, it verifies everything between two steps and prints ``good``, or what is
wrong; told ``steps``, it prints how many every thread has made; told ``quit``, it ends.
"""

from __future__ import annotations

import array
import collections
import ctypes
import gc
import hashlib
import mmap
import os
import random
import sqlite3
import sys
import threading
import weakref
import zlib

PAGE = 4096


class Worker(threading.Thread):
    """Changes its own memory for ever.

    :ivar steps: how many it has made.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(daemon=True)
        self.lock = threading.Lock()
        self.random = random.Random(seed)
        self.steps = 0
        self.set_up()

    def run(self) -> None:
        """Step after step."""
        while True:
            with self.lock:
                self.step()
                self.steps += 1

    def set_up(self) -> None:
        """Make the memory."""

    def step(self) -> None:
        """Change something."""

    def nearby(self, count: int) -> int:
        """A place among so many, not far from the last ones: nobody's memory is written to everywhere at once."""
        return (self.steps // 10 + self.random.randrange(count // 20)) % count

    def verify(self) -> bool:
        """Whether everything is as it has to be."""
        raise NotImplementedError


class Blocks(Worker):
    """A bytearray of pages, each with a checksum that is kept elsewhere."""

    SIZE = 32 << 20

    def set_up(self) -> None:
        self.memory = bytearray(self.random.randbytes(1 << 20) * (self.SIZE >> 20))
        view = memoryview(self.memory)
        self.sums = [zlib.crc32(view[at : at + PAGE]) for at in range(0, self.SIZE, PAGE)]

    def step(self) -> None:
        number = self.nearby(len(self.sums))
        block = self.random.randbytes(PAGE)
        self.memory[number * PAGE : (number + 1) * PAGE] = block
        self.sums[number] = zlib.crc32(block)

    def verify(self) -> bool:
        view = memoryview(self.memory)
        return self.sums == [zlib.crc32(view[at : at + PAGE]) for at in range(0, self.SIZE, PAGE)]


class Numbers(Worker):
    """An array of machine words, whose sum is known."""

    COUNT = 2 << 20

    def set_up(self) -> None:
        self.memory = array.array("Q", range(self.COUNT))
        self.sum = sum(self.memory)

    def step(self) -> None:
        index, new = self.nearby(self.COUNT), self.random.getrandbits(63)
        self.sum += new - self.memory[index]
        self.memory[index] = new

    def verify(self) -> bool:
        return sum(self.memory) == self.sum


class Objects(Worker):
    """A dictionary of small objects, whose keys and values go together, and which come and go."""

    COUNT = 100_000

    def set_up(self) -> None:
        self.objects = {number: self.make(number) for number in range(self.COUNT)}
        self.next = self.COUNT

    @staticmethod
    def make(number: int) -> tuple[str, list[int], bytes]:
        """What belongs to a number."""
        return f"object {number}", [number, number * 3 + 1], hashlib.blake2b(b"%d" % number).digest()

    def step(self) -> None:
        del self.objects[self.next - self.COUNT]
        self.objects[self.next] = self.make(self.next)
        self.next += 1

    def verify(self) -> bool:
        wanted = range(self.next - self.COUNT, self.next)
        return list(self.objects) == list(wanted) and all(self.objects[n] == self.make(n) for n in wanted)


class Node:
    """One of a ring, which only the garbage collector can free."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.after: Node = self


class Rings(Worker):
    """Rings of nodes: the newest live, the others are garbage."""

    def set_up(self) -> None:
        self.live: collections.deque[Node] = collections.deque(maxlen=500)
        self.alive: weakref.WeakSet[Node] = weakref.WeakSet()

    def step(self) -> None:
        first = last = Node(self.steps)
        for number in range(1, 20):
            last.after = Node(self.steps + number)
            last = last.after
        last.after = first
        self.live.append(first)
        self.alive.add(first)

    def verify(self) -> bool:
        gc.collect()
        return set(self.alive) == set(self.live) and all(self.length(first) == 20 for first in self.live)

    @staticmethod
    def length(first: Node) -> int:
        """Of a ring, whose nodes are numbered."""
        count, node = 1, first.after
        while node is not first:
            if node.number != first.number + count:
                return -1
            count, node = count + 1, node.after
        return count


class Database(Worker):
    """SQLite's memory: money goes from account to account, and the whole of it stays the same."""

    ACCOUNTS, MONEY = 20_000, 1000

    def set_up(self) -> None:
        self.database = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        self.database.execute("CREATE TABLE account (id INTEGER PRIMARY KEY, money INTEGER, filler BLOB)")
        rows = ((number, self.MONEY, self.random.randbytes(500)) for number in range(self.ACCOUNTS))
        self.database.executemany("INSERT INTO account VALUES (?, ?, ?)", rows)
        self.database.execute("CREATE TABLE transfer (amount INTEGER)")

    def step(self) -> None:
        giver, taker = self.random.sample(range(self.ACCOUNTS), 2)
        self.database.execute("BEGIN")
        self.database.execute("UPDATE account SET money = money - 1 WHERE id = ?", (giver,))
        self.database.execute("UPDATE account SET money = money + 1 WHERE id = ?", (taker,))
        self.database.execute("INSERT INTO transfer VALUES (1)")
        self.database.execute("COMMIT")

    def verify(self) -> bool:
        (whole,) = self.database.execute("PRAGMA integrity_check").fetchone()
        (money,) = self.database.execute("SELECT sum(money) FROM account").fetchone()
        (transfers,) = self.database.execute("SELECT count(*) FROM transfer").fetchone()
        return bool(whole == "ok" and money == self.ACCOUNTS * self.MONEY and transfers == self.steps)


class Stream(Worker):
    """A pipe that is never empty, with what zlib makes of numbered lines, and zlib's own memory at both of its ends."""

    def set_up(self) -> None:
        self.reading, self.writing = os.pipe()
        self.packer, self.unpacker = zlib.compressobj(), zlib.decompressobj()
        self.written, self.read, self.text = 0, 0, b""
        self.good = True
        self.put()

    @staticmethod
    def line(number: int) -> bytes:
        """A line of a number."""
        return b"line %d\n" % number

    def put(self) -> None:
        """A line more, into the pipe."""
        packed = self.packer.compress(self.line(self.written)) + self.packer.flush(zlib.Z_SYNC_FLUSH)
        os.write(self.writing, packed)
        self.written += 1

    def step(self) -> None:
        self.put()
        self.text += self.unpacker.decompress(os.read(self.reading, 8))
        while b"\n" in self.text:
            line, self.text = self.text.split(b"\n", 1)
            self.good = self.good and line + b"\n" == self.line(self.read)
            self.read += 1
        if self.written - self.read > 1000:
            self.empty()

    def empty(self) -> None:
        """Take everything out, but for a line."""
        self.put()
        os.set_blocking(self.reading, False)
        try:
            while some := os.read(self.reading, 65536):
                self.text += self.unpacker.decompress(some)
        except BlockingIOError:
            pass
        os.set_blocking(self.reading, True)
        lines = self.text.split(b"\n")[:-1]
        self.good = self.good and lines == [self.line(self.read + n)[:-1] for n in range(len(lines))]
        self.good = self.good and self.read + len(lines) == self.written
        self.read, self.text = self.written, b""
        self.put()

    def verify(self) -> bool:
        self.empty()
        return self.good


class Files(Worker):
    """A file that is written to by one descriptor, read by another, and mapped; and one that has no name any more."""

    SIZE = 4 << 20

    def set_up(self) -> None:
        self.log, self.reader = open("numbers", "wb", buffering=0), open("numbers", "rb", buffering=0)  # noqa: SIM115
        self.good = True
        with open("mapped", "w+b") as file:
            file.truncate(self.SIZE)
            self.mapped = mmap.mmap(file.fileno(), self.SIZE)
        self.pages = [0] * (self.SIZE // PAGE)

    def step(self) -> None:
        self.log.write(b"%12d" % self.steps)
        if self.steps % 100 == 99:
            wanted = b"".join(b"%12d" % number for number in range(self.steps - 99, self.steps + 1))
            self.good = self.good and self.reader.read(1200) == wanted
        number = self.nearby(len(self.pages))
        self.pages[number] = self.random.getrandbits(60)
        self.mapped[number * PAGE : number * PAGE + 8] = self.pages[number].to_bytes(8)

    def verify(self) -> bool:
        held = [int.from_bytes(self.mapped[at : at + 8]) for at in range(0, self.SIZE, PAGE)]
        return self.good and self.log.tell() == 12 * self.steps and held == self.pages


class Foreign(Worker):
    """Memory of the C library's, which Python knows by its addresses only."""

    def set_up(self) -> None:
        self.library = ctypes.CDLL(None)
        self.library.malloc.restype = ctypes.c_void_p
        self.library.malloc.argtypes = [ctypes.c_size_t]
        self.library.free.argtypes = [ctypes.c_void_p]
        self.blocks: dict[int, bytes] = {}

    def step(self) -> None:
        if len(self.blocks) > 200:
            address = self.random.choice(list(self.blocks))
            del self.blocks[address]
            self.library.free(address)
        content = self.random.randbytes(self.random.choice((40, 3000, 70_000, 300_000)))
        address = self.library.malloc(len(content))
        ctypes.memmove(address, content, len(content))
        self.blocks[address] = content

    def verify(self) -> bool:
        return all(ctypes.string_at(address, len(content)) == content for address, content in self.blocks.items())


def verify(workers: list[Worker]) -> str:
    """Every worker, between two of its steps."""
    wrong = []
    for worker in workers:
        with worker.lock:
            if not worker.is_alive() or not worker.verify():
                wrong.append(type(worker).__name__)
    return f"bad {wrong}" if wrong else "good"


def main() -> None:
    """See the module's text."""
    sys.setswitchinterval(0.0005)
    kinds = (Blocks, Numbers, Objects, Rings, Database, Stream, Files, Foreign)
    workers = [kind(seed) for seed, kind in enumerate(kinds)]
    for worker in workers:
        worker.start()
    print("ready", flush=True)
    for line in sys.stdin:
        if line == "quit\n":
            break
        print(verify(workers) if line == "check\n" else min(worker.steps for worker in workers), flush=True)
    print("ended", flush=True)
    os._exit(0)  # the workers never end


if __name__ == "__main__":
    main()
