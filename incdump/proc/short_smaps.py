"""What smaps tells of mappings, without its numbers of pages: the first line of each, and VmFlags.

For its other lines the kernel walks all page tables: 8 to 17 ms a GiB of memory that is there. maps has the first
lines, and a BPF iterator (`incdump._uapi.bpf`) the flags: neither takes longer for bigger mappings.

The iterator tells numbers, VmFlags are words, and which bit has which word is the kernel's own business. It is learned
from mappings of this very process, which are in both. The kernel writes the words in the order of the bits, one for
each that is set; some have none (on aarch64 one that the heap has, and no mapping of mmap). So where, but for what is
known already, there are as many words as bits they belong together one by one, and where there are no words the bits
have none. What is left unknown is not guessed: the text of a mapping with such a bit cannot be had here.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING

from incdump._uapi import bpf, mapping, userfaultfd
from incdump.model.runs import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_SPECIAL = (b"[vdso]", b"[vvar]", b"[vvar_vclock]", b"[heap]")
_GATE = b"[vsyscall]"
_HUGE_PAGE = 2 << 20
_HEADER = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) \S{4} .*")
_ADVICE = (
    mapping.MADV_RANDOM,
    mapping.MADV_SEQUENTIAL,
    mapping.MADV_DONTFORK,
    mapping.MADV_MERGEABLE,
    mapping.MADV_HUGEPAGE,
    mapping.MADV_NOHUGEPAGE,
    mapping.MADV_DONTDUMP,
    mapping.MADV_WIPEONFORK,
    mapping.MADV_GUARD_INSTALL,
)


class ShortSmaps:
    """Reads it. Close it.

    :raises OSError: this kernel does not tell flags in this way, or not to this user.
    """

    def __init__(self) -> None:
        self._program = bpf.load_vma_iterator()
        try:
            self._words, self._gate = _learned(self._program)
        except BaseException:
            self.close()
            raise
        self._lines: dict[int, bytes] = {}

    def read(self, pid: int) -> bytes:
        """The text, of a process that stands still.

        :raises OSError: it cannot be had. EAGAIN: maps and the iterator tell of other mappings. EOPNOTSUPP: one has a
            flag that is not known.
        """
        with open(f"/proc/{pid}/maps", "rb", buffering=0) as file:
            shown = file.readall().split(b"\n")[:-1]
        rows = bpf.iterate_vmas(self._program, pid)
        text: list[bytes] = []
        for line, (start, end, flags) in zip(shown, rows, strict=False):
            if not line.startswith(b"%08x-%08x " % (start, end)):
                break
            text += (line, self._lines.get(flags) or self._line(flags))
        more = shown[len(text) // 2 :]
        if len(text) != 2 * len(rows) or not all(line in self._gate for line in more):
            raise OSError(errno.EAGAIN, "maps and the iterator tell of different mappings", f"/proc/{pid}/maps")
        for line in more:
            text += (line, self._gate[line])
        return b"\n".join([*text, b""])

    def _line(self, flags: int) -> bytes:
        words = [self._words.get(bit) for bit in _bits(flags)]
        if None in words:
            raise OSError(errno.EOPNOTSUPP, f"a mapping has a flag that is not known, of {flags:#x}")
        # As the kernel writes it, with a space at the end.
        line = self._lines[flags] = b" ".join([b"VmFlags:", *filter(None, words), b""])
        return line

    def close(self) -> None:
        """Nothing can be read any more."""
        fd, self._program = self._program, -1
        if fd >= 0:
            os.close(fd)


def _bits(flags: int) -> list[int]:
    return [bit for bit in range(flags.bit_length()) if flags >> bit & 1]


_memory: dict[str, tuple[dict[int, bytes], dict[bytes, bytes]]] = {}


def _learned(program: int) -> tuple[dict[int, bytes], dict[bytes, bytes]]:
    """The word of each bit, and the gate page's first line and VmFlags: once in a process, the kernel is what it is."""
    if not _memory:
        _memory["learned"] = _learn(program)
    return _memory["learned"]


def _learn(program: int) -> tuple[dict[int, bytes], dict[bytes, bytes]]:
    with ExitStack() as stack:
        ours = set(_samples(stack))
        before = bpf.iterate_vmas(program, os.getpid())
        with open("/proc/self/smaps", "rb", buffering=0) as file:
            told = dict(_headers_and_flags(file.readall()))
        after = bpf.iterate_vmas(program, os.getpid())
    # Others may be other mappings by now: this process has threads. The heap may have grown.
    flags = dict({(start, flags) for start, _, flags in before} & {(start, flags) for start, _, flags in after})
    samples: list[tuple[list[int], list[bytes]]] = []
    gate: dict[bytes, bytes] = {}
    for line, said in told.items():
        match = _HEADER.fullmatch(line)
        if match is None:
            continue
        start = int(match[1], 16)
        if line.endswith(_GATE) and start not in flags:
            gate[line] = said
        if start in flags and (start in ours or line.endswith(_SPECIAL)):
            samples.append((_bits(flags[start]), said.split()[1:]))
    return words_of_bits(samples), gate


def words_of_bits(samples: Sequence[tuple[list[int], list[bytes]]]) -> dict[int, bytes]:
    """The word of each bit, as far as it follows from what mappings have; empty for a bit without one.

    :param samples: each the bits of a mapping, ascending, and its words in their order.
    :raises OSError: EOPNOTSUPP: a bit has two words, or they come in another order.
    """
    words: dict[int, bytes] = {}
    known = -1
    while known < len(words):
        known = len(words)
        for bits, said in samples:
            unknown = [bit for bit in bits if bit not in words]
            left = [word for word in said if word not in {words.get(bit) for bit in bits}]
            if not left or len(left) == len(unknown):
                words.update(zip(unknown, left or [b""] * len(unknown), strict=True))
    for bits, said in samples:
        if all(bit in words for bit in bits) and [words[bit] for bit in bits if words[bit]] != said:
            raise OSError(errno.EOPNOTSUPP, f"the mappings' flags do not go with {b' '.join(said).decode()}")
    return words


def _headers_and_flags(text: bytes) -> Iterator[tuple[bytes, bytes]]:
    header = b""
    for line in text.split(b"\n"):
        if _HEADER.fullmatch(line):
            header = line
        elif line.startswith(b"VmFlags:"):
            yield header, line


def _samples(stack: ExitStack) -> Iterator[int]:
    """Mappings of this process for a while, that between them have every flag that is known here; their addresses."""
    private = mapping.MAP_PRIVATE | mapping.MAP_ANONYMOUS
    ways: list[Callable[[], int]] = [
        partial(_sample, stack, private),
        partial(_sample, stack, private, prot=mapping.PROT_READ),
        partial(_sample, stack, private, prot=mapping.PROT_READ | mapping.PROT_EXEC),
        partial(_sample, stack, private | mapping.MAP_NORESERVE),
        partial(_sample, stack, private | mapping.MAP_GROWSDOWN),
        partial(_sample, stack, private | mapping.MAP_NORESERVE | mapping.MAP_HUGETLB, length=_HUGE_PAGE),
        partial(_sample, stack, mapping.MAP_SHARED | mapping.MAP_ANONYMOUS),
        partial(_sample, stack, mapping.MAP_DROPPABLE | mapping.MAP_ANONYMOUS),
        *(partial(_advised, stack, advice) for advice in _ADVICE),
        partial(_locked, stack),
        partial(_watched, stack),
    ]
    for way in ways:
        # This kernel may have no such thing, or not for this user: no target has it then, or it stays unknown.
        with suppress(OSError):
            yield way()


def _sample(
    stack: ExitStack,
    flags: int,
    *,
    prot: int = mapping.PROT_READ | mapping.PROT_WRITE,
    length: int = PAGE_SIZE,
) -> int:
    """One mapping for a while, between two that are no part of it: it cannot grow together with another."""
    address = mapping.map_pages(3 * length, mapping.PROT_NONE, flags)
    stack.callback(mapping.unmap, address, 3 * length)
    mapping.protect(address + length, length, prot)
    return address + length


def _advised(stack: ExitStack, advice: int) -> int:
    address = _sample(stack, mapping.MAP_PRIVATE | mapping.MAP_ANONYMOUS)
    mapping.advise(address, PAGE_SIZE, advice)
    return address


def _locked(stack: ExitStack) -> int:
    address = _sample(stack, mapping.MAP_PRIVATE | mapping.MAP_ANONYMOUS)
    mapping.lock(address, PAGE_SIZE)
    return address


def _watched(stack: ExitStack) -> int:
    """As the tracker uffd-wp has it."""
    address = _sample(stack, mapping.MAP_PRIVATE | mapping.MAP_ANONYMOUS)
    fd = userfaultfd.open_userfaultfd(userfaultfd.UFFD_USER_MODE_ONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    userfaultfd.api(fd, userfaultfd.FEATURE_WP_ASYNC)
    userfaultfd.register_wp(fd, address, PAGE_SIZE)
    return address
