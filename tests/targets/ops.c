/* Operations on memory. Each returns false when there was nothing that it could have been done to. */
#include "churn.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#define MADV_GUARD_REMOVE 103
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

int map_prot(enum prot prot)
{
	return prot == P_RW ? PROT_READ | PROT_WRITE : prot == P_READ ? PROT_READ : PROT_NONE;
}

bool can_write(const struct area *a, size_t i)
{
	struct shadow s = a->shadow[i];
	return s.prot == P_RW && s.state != S_GUARD && s.state != S_BEYOND;
}

/* Let the kernel write n bytes to a page: with process_vm_writev, or read(2) from a pipe. */
static void kernel_writes(char *to, void *data, size_t n, bool with_read)
{
	struct iovec mine = {data, n}, its = {to, n};
	int ends[2];

	if (!with_read) {
		if (process_vm_writev(getpid(), &mine, 1, &its, 1, 0) != (ssize_t)n)
			bad("process_vm_writev", to);
		return;
	}
	if (pipe2(ends, O_CLOEXEC))
		bad("pipe", to);
	write_all(ends[1], data, n);
	if (!read_all(ends[0], to, n))
		bad("read", to);
	close(ends[0]);
	close(ends[1]);
}

static void put(struct worker *w, struct area *a, size_t i, size_t offset, void *data, size_t n, enum how how)
{
	char *to = page_at(a, i) + offset;

	if (how == BY_ALIAS && a->alias)
		memcpy(a->alias + i * PAGE + offset, data, n);
	else if (how == BY_PWRITE && a->kind == K_MEMFD) {
		if (pwrite(a->fd, data, n, (off_t)((a->first + i) * PAGE + offset)) != (ssize_t)n)
			bad("pwrite", to);
	} else if (how == BY_VM_WRITEV || how == BY_READ)
		kernel_writes(to, data, n, how == BY_READ);
	else
		memcpy(to, data, n);
	w->pages_dirtied += 1;
}

/* The whole page, in a new version. */
void write_page(struct worker *w, struct area *a, size_t i, enum how how)
{
	struct shadow s = {.version = ++w->next_version, .prot = a->shadow[i].prot};

	expect(a, i, s, w->page);
	put(w, a, i, 0, w->page, PAGE, how);
	a->shadow[i] = s;
}

/* One byte of the page. */
void poke_page(struct worker *w, struct area *a, size_t i, enum how how)
{
	struct shadow s = a->shadow[i];
	size_t at = poke_offset(a, i, s);

	if (s.state == S_MAYBE || a->kind == K_DROPPABLE) { /* whether the rest of the page is still there is not known */
		write_page(w, a, i, how);
		return;
	}
	s.poke = (uint8_t)(s.poke % 255 + 1);
	expect(a, i, s, w->page);
	put(w, a, i, at, &w->page[at], 1, how);
	a->shadow[i] = s;
}

static void pick_range(struct worker *w, const struct area *a, size_t *from, size_t *to)
{
	*from = below(w, a->pages);
	*to = *from + 1 + below(w, a->pages - *from);
	if (one_in(w, 2) && *to > *from + 4)
		*to = *from + 1 + below(w, 4);
}

bool op_write(struct worker *w)
{
	struct area *a = pick_area(w, 0);
	enum how how = one_in(w, 2) ? BY_STORE : BY_ALIAS;
	size_t from, to;

	if (!a)
		return false;
	switch (below(w, 4)) {
	case 0: /* a byte here and there */
		for (int n = 0; n < 6; n++) {
			size_t i = below(w, a->pages);
			if (can_write(a, i))
				poke_page(w, a, i, how);
		}
		return true;
	case 1: /* a run of pages */
		pick_range(w, a, &from, &to);
		for (size_t i = from; i < to && i < from + 64; i++)
			if (can_write(a, i))
				write_page(w, a, i, how);
		return true;
	default:
		from = below(w, a->pages);
		if (!can_write(a, from))
			return false;
		if (one_in(w, 2))
			poke_page(w, a, from, how);
		else
			write_page(w, a, from, how);
		return true;
	}
}

bool op_kwrite(struct worker *w)
{
	struct area *a = pick_area(w, 0);
	enum how how = one_in(w, 2) ? BY_VM_WRITEV : BY_READ;
	size_t i = a ? below(w, a->pages) : 0;

	if (!a || !can_write(a, i))
		return false;
	if (one_in(w, 2))
		poke_page(w, a, i, how);
	else
		write_page(w, a, i, how);
	return true;
}

/* Zero pages: read what was never written (the kernel's shared zero page), or overwrite with zeros. */
bool op_zero(struct worker *w)
{
	struct area *a = pick_area(w, 0);
	size_t i = a ? below(w, a->pages) : 0;

	if (!a || !can_write(a, i))
		return false;
	if (a->shadow[i].version == 0 && !a->shadow[i].poke) {
		volatile char seen = *page_at(a, i);
		(void)seen;
		return true;
	}
	memset(page_at(a, i), 0, PAGE);
	a->shadow[i] = (struct shadow){.version = VERSION_ZERO, .prot = a->shadow[i].prot};
	w->pages_dirtied += 1;
	return true;
}

bool op_map(struct worker *w)
{
	struct area *a;

	if (w->used > w->budget || !free_area(w)) {
		a = pick_area(w, CAN_SPLIT);
		if (a)
			drop_area(w, a);
		return a != NULL;
	}
	a = make_area(w, K_ANON);
	if (a)
		populate(w, a);
	return a != NULL;
}

/* munmap of a piece at the front, in the middle, or at the end. */
bool op_split(struct worker *w)
{
	struct area *a = pick_area(w, CAN_SPLIT), *tail = free_area(w);
	size_t from, to;

	if (!a || !tail || a->pages < 3)
		return false;
	pick_range(w, a, &from, &to);
	if (from == 0 && to == a->pages)
		return false;
	if (munmap(page_at(a, from), (to - from) * PAGE))
		bad("munmap", page_at(a, from));
	w->used -= to - from;
	if (from == 0) {
		memmove(a->shadow, a->shadow + to, (a->pages - to) * sizeof(*a->shadow));
		a->base += to * PAGE;
		a->first += to;
		a->pages -= to;
	} else {
		if (to < a->pages) {
			struct shadow *shadow = tail->shadow;
			*tail = *a;
			tail->shadow = shadow;
			tail->fd = a->fd < 0 ? -1 : fcntl(a->fd, F_DUPFD_CLOEXEC, 3);
			tail->base = page_at(a, to);
			tail->first = a->first + to;
			tail->pages = a->pages - to;
			tail->mapped = tail->pages * PAGE;
			memcpy(tail->shadow, a->shadow + to, tail->pages * sizeof(*shadow));
		}
		a->pages = from;
	}
	a->mapped = a->pages * PAGE;
	return true;
}

/* Whether an area lies within one VMA: mremap refuses (EFAULT) to grow what does not. */
static bool one_vma(const struct area *a)
{
	void *p = mremap(a->base, a->mapped, a->mapped + PAGE, 0);

	if (p == MAP_FAILED)
		return errno == ENOMEM;
	munmap(a->base + a->mapped, PAGE);
	return true;
}

static bool resize(struct worker *w, struct area *a)
{
	size_t pages = one_in(w, 2) ? a->pages + 1 + below(w, 16) : 1 + below(w, a->pages);
	char *p;

	if (pages > w->capacity || pages == a->pages)
		return false;
	p = mremap(a->base, a->mapped, pages * PAGE, pages > a->pages ? MREMAP_MAYMOVE : 0);
	if (p == MAP_FAILED) {
		if (pages < a->pages)
			bad("mremap", a->base);
		return false;
	}
	a->base = p;
	if (pages > a->pages)
		reset_shadow(a, a->pages, pages, a->shadow[a->pages - 1].prot);
	w->used += pages - a->pages;
	a->pages = pages;
	a->mapped = pages * PAGE;
	return true;
}

static bool move(struct area *a)
{
	char *to = mmap(NULL, a->mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	char *p;

	if (to == MAP_FAILED)
		return false;
	p = mremap(a->base, a->mapped, a->mapped, MREMAP_MAYMOVE | MREMAP_FIXED, to);
	if (p == MAP_FAILED) {
		munmap(to, a->mapped);
		return false;
	}
	a->base = p;
	return true;
}

/* Move the pages but leave the mapping: what is left reads as zeros. */
static bool move_pages_only(struct worker *w, struct area *a)
{
	struct area *moved = free_area(w);
	struct shadow *shadow = moved ? moved->shadow : NULL;
	char *p;

	if (!moved || a->kind != K_ANON)
		return false;
	p = mremap(a->base, a->mapped, a->mapped, MREMAP_MAYMOVE | MREMAP_DONTUNMAP);
	if (p == MAP_FAILED)
		return false;
	*moved = *a;
	moved->shadow = shadow;
	moved->base = p;
	memcpy(moved->shadow, a->shadow, a->pages * sizeof(*shadow));
	reset_shadow(a, 0, a->pages, a->shadow[0].prot);
	w->used += a->pages;
	return true;
}

bool op_remap(struct worker *w)
{
	struct area *a = pick_area(w, CAN_MOVE);

	if (!a)
		return false;
	if ((kind_can[a->kind] & CAN_RESIZE) && one_in(w, 2))
		return resize(w, a);
	if (!one_vma(a))
		return false;
	return one_in(w, 3) ? move_pages_only(w, a) : move(a);
}

bool op_protect(struct worker *w)
{
	struct area *a = pick_area(w, CAN_PROTECT);
	enum prot prot = one_in(w, 2) ? P_RW : one_in(w, 2) ? P_READ : P_NONE;
	size_t from = 0, to;

	if (!a)
		return false;
	to = a->pages;
	if (!(prot == P_RW && one_in(w, 2)))
		pick_range(w, a, &from, &to);
	if (mprotect(page_at(a, from), (to - from) * PAGE, map_prot(prot)))
		bad("mprotect", page_at(a, from));
	for (size_t i = from; i < to; i++)
		a->shadow[i].prot = (uint8_t)prot;
	return true;
}

bool op_dontneed(struct worker *w)
{
	struct area *a = pick_area(w, CAN_DROP);
	size_t from, to;

	if (!a)
		return false;
	pick_range(w, a, &from, &to);
	if (a->stride != PAGE)
		to = from + 1;
	if (madvise(page_at(a, from), (to - from) * PAGE, MADV_DONTNEED))
		bad("MADV_DONTNEED", page_at(a, from));
	for (size_t i = from; i < to; i++)
		if (a->shadow[i].state != S_GUARD)
			reset_shadow(a, i, i + 1, a->shadow[i].prot);
	return true;
}

bool op_free(struct worker *w)
{
	struct area *a = pick_area(w, CAN_FREE);
	size_t from, to;

	if (!a)
		return false;
	pick_range(w, a, &from, &to);
	if (madvise(page_at(a, from), (to - from) * PAGE, MADV_FREE))
		return false;
	for (size_t i = from; i < to; i++)
		if (a->shadow[i].state == S_NORMAL && (a->shadow[i].version || a->shadow[i].poke))
			a->shadow[i].state = S_MAYBE;
	return true;
}

bool op_guard(struct worker *w)
{
	struct area *a = pick_area(w, CAN_GUARD);
	bool install = one_in(w, 2);
	size_t from, to;

	if (!a)
		return false;
	pick_range(w, a, &from, &to);
	if (madvise(page_at(a, from), (to - from) * PAGE, install ? MADV_GUARD_INSTALL : MADV_GUARD_REMOVE))
		return false; /* a kernel before 6.13 */
	for (size_t i = from; i < to; i++) {
		if (install)
			a->shadow[i] = (struct shadow){.prot = a->shadow[i].prot, .state = S_GUARD};
		else if (a->shadow[i].state == S_GUARD)
			a->shadow[i].state = S_NORMAL;
	}
	return true;
}

/* Another mapping at the same address and of the same size: nothing in maps tells it from the old one. */
bool op_replace(struct worker *w)
{
	struct area *a = pick_area(w, CAN_REPLACE);
	int fd, flags = MAP_PRIVATE | MAP_FIXED_NOREPLACE;
	void *p;

	if (!a)
		return false;
	fd = a->kind == K_FILE ? a->fd : -1;
	if (munmap(a->base, a->mapped))
		bad("munmap", a->base);
	p = mmap(a->base, a->mapped, PROT_READ | PROT_WRITE, flags | (fd < 0 ? MAP_ANONYMOUS : 0), fd,
		 fd < 0 ? 0 : (off_t)(a->first * PAGE));
	if (p != (void *)a->base) { /* another thread was faster */
		if (p != MAP_FAILED)
			munmap(p, a->mapped);
		close_file(a);
		w->used -= a->pages;
		a->kind = K_NONE;
		return false;
	}
	if (a->kind == K_THP)
		madvise(a->base, a->mapped, MADV_HUGEPAGE);
	if (fd < 0)
		a->id = ++w->next_id;
	reset_shadow(a, 0, a->pages, P_RW);
	populate(w, a);
	return true;
}

/* The heap belongs to the first worker of a process. */
bool op_brk(struct worker *w)
{
	struct area *a = pick_kind(w, K_HEAP);
	size_t pages;

	if (w->index)
		return false;
	if (!a) {
		a = make_area(w, K_HEAP);
		if (a)
			populate(w, a);
		return a != NULL;
	}
	if ((char *)sbrk(0) != a->base + a->mapped)
		return false; /* malloc has taken what follows */
	pages = 1 + below(w, a->pages + 16);
	if (pages > w->capacity || pages > w->budget / 4)
		return false;
	if (brk(a->base + pages * PAGE))
		return false;
	if (pages > a->pages)
		reset_shadow(a, a->pages, pages, P_RW);
	w->used += pages - a->pages;
	a->pages = pages;
	a->mapped = pages * PAGE;
	return true;
}

bool op_thp(struct worker *w)
{
	struct area *a = pick_kind(w, K_THP);
	size_t i;

	if (!a || (one_in(w, 4) && w->used < w->budget)) {
		a = make_area(w, K_THP);
		if (!a)
			return false;
		for (i = 0; i < a->pages; i += 512) /* one byte makes a huge page */
			poke_page(w, a, i + below(w, 512), BY_STORE);
		return true;
	}
	if (one_in(w, 2)) {
		uintptr_t start = ((uintptr_t)a->base + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1);
		if (start + HUGE_PAGE <= (uintptr_t)a->base + a->mapped)
			return madvise((void *)start, HUGE_PAGE, MADV_COLLAPSE) == 0;
		return false;
	}
	i = below(w, a->pages);
	if (can_write(a, i))
		poke_page(w, a, i, BY_STORE);
	return true;
}

/* Private file mappings, and a shared one now and then; mapped anew over itself, which drops every page written. */
bool op_file(struct worker *w)
{
	struct area *a = pick_kind(w, K_FILE);

	if (!a || (one_in(w, 3) && w->used < w->budget)) {
		a = make_area(w, one_in(w, 5) ? K_SHARED_FILE : K_FILE);
		if (a && one_in(w, 2))
			populate(w, a);
		return a != NULL;
	}
	if (mmap(a->base, a->mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, a->fd, (off_t)(a->first * PAGE)) != a->base)
		bad("mmap", a->base);
	reset_shadow(a, 0, a->pages, P_RW);
	return true;
}

bool op_memfd(struct worker *w)
{
	struct area *a = pick_kind(w, K_MEMFD);
	size_t from, to;

	if (!a || (one_in(w, 8) && w->used < w->budget)) {
		a = make_area(w, K_MEMFD);
		if (a)
			populate(w, a);
		return a != NULL;
	}
	pick_range(w, a, &from, &to);
	if (one_in(w, 8)) { /* a hole reads as zeros through every mapping */
		if (fallocate(a->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(from * PAGE), (off_t)((to - from) * PAGE)))
			return false;
		for (size_t i = from; i < to; i++)
			a->shadow[i] = (struct shadow){.prot = a->shadow[i].prot};
		return true;
	}
	for (size_t i = from; i < to && i < from + 16; i++) /* whatever the mapping's protection is */
		write_page(w, a, i, BY_PWRITE);
	return true;
}

static bool make_some(struct worker *w, enum kind kind, unsigned most)
{
	unsigned have = 0;
	struct area *a;

	for (size_t n = 0; n < MAX_AREAS; n++)
		have += w->areas[n].kind == kind;
	if (have >= most) {
		a = pick_kind(w, kind);
		if (a && one_in(w, 6)) {
			drop_area(w, a);
			return true;
		}
		if (!a)
			return false;
		for (size_t n = 0, i; n < 8; n++)
			if (i = below(w, a->pages), can_write(a, i))
				poke_page(w, a, i, BY_STORE);
		return true;
	}
	a = make_area(w, kind);
	for (size_t i = 0; a && i < a->pages; i++)
		if (one_in(w, kind == K_SPARSE ? 4 : 2))
			write_page(w, a, i, BY_STORE);
	return a != NULL;
}

bool op_make_sysv(struct worker *w)
{
	return make_some(w, K_SYSV, 2);
}

bool op_make_sparse(struct worker *w)
{
	return make_some(w, K_SPARSE, 1);
}

bool op_make_droppable(struct worker *w)
{
	return make_some(w, K_DROPPABLE, 2);
}

bool op_make_hugetlb(struct worker *w)
{
	return make_some(w, K_HUGETLB, 1);
}
