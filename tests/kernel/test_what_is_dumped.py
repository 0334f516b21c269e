"""Which pages are in the images, and which are not: CRIU's rules, one by one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from incdump.errors import TargetDenied
from incdump.model.options import DumpOptions
from incdump.proc import memory
from tests import oracle
from tests.kernel.support import Chain, Odd, same_when_stopped

if TYPE_CHECKING:
    from incdump.model.options import PagemapName

pytestmark = [pytest.mark.kernel, pytest.mark.asyncio]

PAGE = 4096
PROT_NONE, PROT_READ, PROT_RW = 0, 1, 3
MADV_DONTNEED, MADV_FREE, MADV_MERGEABLE, MADV_GUARD_INSTALL, MADV_GUARD_REMOVE = 4, 8, 12, 102, 103


@pytest.fixture(params=["scan", "cache", "plain"])
def reader(request: pytest.FixtureRequest) -> PagemapName:
    """Each pagemap reader."""
    name: PagemapName = request.param
    return name


def held(chain: Chain, address: int, pages: int) -> dict[int, int]:
    """Of the pages at an address, those in the last images: {page: flags}."""
    _, entries = oracle.read_entries(Path(chain.last.images_dir) / f"pagemap-{chain.target.pid}.img")
    found = {}
    for vaddr, nr, flags in entries:
        for page in range(nr):
            number = (vaddr + page * PAGE - address) // PAGE
            if 0 <= number < pages:
                found[number] = flags
    return found


async def dumped(odd: Odd, root: Path, reader: PagemapName) -> Chain:
    """A dump, right by the oracle."""
    chain = Chain(odd, root, DumpOptions(pagemap=reader))
    await chain.prove()
    return chain


async def test_pages_that_were_never_touched_and_zero_pages_are_left_out(
    odd: Odd, images_root: Path, reader: PagemapName
) -> None:
    (address, _) = odd.do("anon 64")
    odd.do(f"fill {address} 10 1")
    odd.do(f"read {address + 20 * PAGE} 10")
    chain = await dumped(odd, images_root, reader)
    assert sorted(held(chain, address, 64)) == list(range(10))
    odd.do(f"poke {address + 25 * PAGE} 2 1")
    odd.do(f"advise {address} 5 {MADV_DONTNEED}")
    odd.do(f"read {address} 2")
    await chain.prove()
    assert sorted(held(chain, address, 64)) == [*range(5, 10), 25, 26]


async def test_a_page_that_was_dropped_is_no_hole(odd: Odd, images_root: Path, reader: PagemapName) -> None:
    (address, _) = odd.do("anon 32")
    odd.do(f"fill {address} 32 1")
    chain = Chain(odd, images_root, DumpOptions(pagemap=reader))
    await chain.predump()
    odd.do(f"advise {address} 16 {MADV_DONTNEED}")
    await chain.predump()
    flags = held(chain, address, 32)
    assert sorted(flags) == list(range(16, 32))
    assert set(flags.values()) == {oracle.PE_PARENT}
    odd.do(f"poke {address} 4 1")
    await chain.prove()
    flags = held(chain, address, 32)
    assert [n for n, f in flags.items() if f & oracle.PE_PRESENT] == [0, 1, 2, 3]


async def test_a_files_own_pages_are_left_out(odd: Odd, images_root: Path, reader: PagemapName) -> None:
    (address, _) = odd.do("file 32")
    odd.do(f"read {address} 32")
    odd.do(f"poke {address + 8 * PAGE} 4 1")
    chain = await dumped(odd, images_root, reader)
    flags = held(chain, address, 32)
    assert sorted(flags) == [8, 9, 10, 11]
    assert set(flags.values()) == {oracle.PE_PRESENT}


async def test_anonymous_pages_may_be_lazy(odd: Odd, images_root: Path, reader: PagemapName) -> None:
    (address, _) = odd.do("anon 8")
    odd.do(f"fill {address} 8 1")
    chain = await dumped(odd, images_root, reader)
    assert set(held(chain, address, 8).values()) == {oracle.PE_PRESENT | oracle.PE_LAZY}


async def test_memory_without_protection_is_dumped(odd: Odd, images_root: Path, reader: PagemapName) -> None:
    (address, _) = odd.do("anon 32")
    odd.do(f"fill {address} 32 1")
    odd.do(f"prot {address} 16 {PROT_NONE}")
    odd.do(f"prot {address + 16 * PAGE} 8 {PROT_READ}")
    chain = Chain(odd, images_root, DumpOptions(pagemap=reader))
    await chain.predump()
    assert sorted(held(chain, address, 32)) == list(range(32))
    odd.do(f"prot {address} 4 {PROT_RW}")
    odd.do(f"poke {address} 4 3")
    odd.do(f"prot {address} 4 {PROT_NONE}")
    await chain.predump()
    assert same_when_stopped(odd, chain.last.images_dir).ok
    assert [n for n, f in held(chain, address, 32).items() if f & oracle.PE_PRESENT] == [0, 1, 2, 3]
    await chain.prove()


async def test_memory_that_the_kernel_will_not_have_read_is_an_error_of_a_dump(
    odd: Odd, images_root: Path, reader: PagemapName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with proc_mem.force_override=never. A pre-dump may lack it: the dump on top of it will not."""
    (address, _) = odd.do("anon 32")
    odd.do(f"fill {address} 32 1")
    odd.do(f"prot {address} 16 {PROT_NONE}")
    chain = Chain(odd, images_root, DumpOptions(pagemap=reader))
    pread = memory._Reading.pread

    def refused(reading: memory._Reading, begin: int, end: int, at: int) -> int:
        return 0 if address <= at < address + 16 * PAGE else pread(reading, begin, end, at)

    with monkeypatch.context() as patch:
        patch.setattr(memory._Reading, "pread", refused)
        await chain.predump()
        assert chain.last.stats.pages_vanished == 16
        with pytest.raises(TargetDenied, match=f"16 pages of process {odd.pid} cannot be read") as caught:
            await chain.dump()
        assert (caught.value.pid, caught.value.vaddr) == (odd.pid, address)
    assert len(list(images_root.iterdir())) == 1
    await chain.prove()
    assert sorted(held(chain, address, 32)) == list(range(32))


async def test_guard_regions_are_left_out(odd: Odd, images_root: Path, reader: PagemapName) -> None:
    (address, _) = odd.do("anon 32")
    odd.do(f"fill {address} 32 1")
    chain = Chain(odd, images_root, DumpOptions(pagemap=reader))
    await chain.predump()
    odd.do(f"advise {address} 8 {MADV_GUARD_INSTALL}")
    await chain.predump()
    assert sorted(held(chain, address, 32)) == list(range(8, 32))
    assert same_when_stopped(odd, chain.last.images_dir).ok
    odd.do(f"advise {address} 4 {MADV_GUARD_REMOVE}")
    odd.do(f"poke {address} 2 1")
    await chain.prove()
    assert sorted(held(chain, address, 32)) == [0, 1, *range(8, 32)]


async def test_droppable_memory_is_left_out(odd: Odd, images_root: Path, reader: PagemapName) -> None:
    (address, _) = odd.do("droppable 16")
    odd.do(f"fill {address} 16 1")
    chain = await dumped(odd, images_root, reader)
    assert held(chain, address, 16) == {}


async def test_what_was_droppable_until_just_before_the_freeze_is_dumped(odd: Odd, images_root: Path) -> None:
    """Other mappings take the place of droppable ones, at the same addresses, at the last moment."""
    import incdump

    (address, _) = odd.do("droppable 16")
    (other, _) = odd.do("anon 16")
    odd.do(f"fill {other} 16 3")

    def swap(step: str, _stats: object) -> None:
        if step == "freezing":
            odd.do(f"at {address} 16 0")
            odd.do(f"fill {address} 16 1")
            odd.do(f"at {other} 16 1")
            odd.do(f"fill {other} 16 1")

    result = await incdump.dump(odd.pid, images_root / "1", progress=swap)
    report = same_when_stopped(odd, result.images_dir)
    assert not report.counts["missing"], report


async def test_the_vdso_is_dumped_whole_and_vvar_not_at_all(odd: Odd, images_root: Path, reader: PagemapName) -> None:
    chain = await dumped(odd, images_root, reader)
    vmas = {vma.name: vma for vma in oracle.read_vmas(odd.pid) if vma.name.startswith("[v")}
    vdso = vmas["[vdso]"]
    pages = (vdso.end - vdso.start) // PAGE
    assert sorted(held(chain, vdso.start, pages)) == list(range(pages))
    for name in ("[vvar]", "[vvar_vclock]", "[vsyscall]"):
        if name in vmas:
            assert held(chain, vmas[name].start, (vmas[name].end - vmas[name].start) // PAGE) == {}
    await chain.dump()
    assert set(held(chain, vdso.start, pages).values()) <= {oracle.PE_PRESENT}


async def test_pages_that_were_freed_lazily(odd: Odd, images_root: Path, reader: PagemapName) -> None:
    (address, _) = odd.do("anon 32")
    odd.do(f"fill {address} 32 1")
    chain = Chain(odd, images_root, DumpOptions(pagemap=reader))
    await chain.predump()
    odd.do(f"advise {address} 16 {MADV_FREE}")
    odd.do(f"poke {address} 4 1")
    await chain.predump()
    assert same_when_stopped(odd, chain.last.images_dir).ok
    await chain.prove()


async def test_a_sparse_mapping_costs_nothing(odd: Odd, images_root: Path) -> None:
    (address, _) = odd.do(f"anon {1 << 22}")
    odd.do(f"poke {address + (1 << 33)} 3 1")
    chain = await dumped(odd, images_root, "scan")
    assert chain.last.stats.pages_written < 200
    await chain.predump()
    assert chain.last.stats.pages_written < 40


async def test_the_counters_add_up(odd: Odd, images_root: Path, reader: PagemapName) -> None:
    (address, _), (shared, _) = odd.do("anon 64"), odd.do("shared 16")
    odd.do(f"fill {address} 64 1")
    odd.do(f"fill {shared} 16 1")
    chain = Chain(odd, images_root, DumpOptions(pagemap=reader))
    for n in range(3):
        odd.do(f"poke {address} {8 * n + 1} {n}")
        await chain.predump()
        stats = chain.last.stats
        assert stats.pages_scanned == stats.pages_written + stats.pages_skipped_parent
        assert stats.shpages_scanned == stats.shpages_written + stats.shpages_skipped_parent == 16
        assert stats.bytes_written == PAGE * (stats.pages_written + stats.shpages_written)
        assert stats.pages_vanished == 0
        _, entries = oracle.read_entries(Path(chain.last.images_dir) / f"pagemap-{odd.pid}.img")
        assert sum(nr for _, nr, flags in entries if flags & oracle.PE_PRESENT) == stats.pages_written
        assert sum(nr for _, nr, flags in entries if flags & oracle.PE_PARENT) == stats.pages_skipped_parent


async def test_a_dump_tells_what_is_needed_to_understand_it(odd: Odd, images_root: Path) -> None:
    (child,) = odd.do("fork")
    chain = await dumped(odd, images_root, "scan")
    names = {path.name for path in Path(chain.last.images_dir).iterdir()}
    wanted = {"pstree.img", "files.img", "inventory.img", "stats-dump", f"mm-{odd.pid}.img", f"mm-{child}.img"}
    assert wanted <= names
    for path in Path(chain.last.images_dir).iterdir():
        assert path.stat().st_mode & 0o077 == 0
    assert Path(chain.last.images_dir).stat().st_mode & 0o077 == 0
