"""A target whose mappings have flags that madvise(2) and mlock(2) give them; a restored one finds its memory as it was.

    python -I advised.py MIB

It says ``ready PID``, and answers each command: ``flip`` changes the flags of a mapping and no bound of any, ``check``
compares its memory, ``quit`` ends it.
"""

import ctypes
import mmap
import os
import sys

PAGE = mmap.PAGESIZE
PROT_NONE = 0
SIZE = 4 * PAGE
MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL = 0, 1, 2
MADV_DONTFORK, MADV_DOFORK = 10, 11
MADV_MERGEABLE, MADV_HUGEPAGE, MADV_NOHUGEPAGE = 12, 14, 15
MADV_DONTDUMP, MADV_WIPEONFORK = 16, 18
ADVICE = (MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_DONTFORK, MADV_MERGEABLE, MADV_DONTDUMP, MADV_WIPEONFORK)

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def mapped(size: int, flags: int = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) -> int:
    """Memory between two pages that nobody may touch, so that it is a mapping of its own."""
    address = libc.mmap(None, size + 2 * PAGE, PROT_NONE, flags, -1, 0)
    assert address != ctypes.c_void_p(-1).value
    assert libc.mprotect(address + PAGE, size, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    return address + PAGE


def main() -> None:
    """See the module's text."""
    contents: dict[int, bytes] = {}

    def fill(address: int, size: int = SIZE) -> int:
        contents[address] = os.urandom(size)
        ctypes.memmove(address, contents[address], size)
        return address

    for advice in ADVICE:
        libc.madvise(fill(mapped(SIZE)), SIZE, advice)  # what the kernel does not have is no flag
    for advice in (MADV_HUGEPAGE, MADV_NOHUGEPAGE):
        libc.madvise(fill(mapped(4 << 20), 4 << 20), 4 << 20, advice)
    libc.mlock(fill(mapped(SIZE)), SIZE)
    fill(mapped(SIZE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS))
    fill(mapped(int(sys.argv[1]) << 20), int(sys.argv[1]) << 20)
    flipped = fill(mapped(SIZE))
    forks = True
    print(f"ready {os.getpid()}", flush=True)
    for line in sys.stdin:
        command = line.strip()
        if command == "flip":
            forks = not forks
            assert libc.madvise(flipped, SIZE, MADV_DOFORK if forks else MADV_DONTFORK) == 0
        if command == "check":
            good = all(ctypes.string_at(address, len(data)) == data for address, data in contents.items())
            print("good" if good else "wrong memory", flush=True)
            continue
        print(f"ok {command}", flush=True)
        if command == "quit":
            return


if __name__ == "__main__":
    main()
