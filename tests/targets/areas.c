/* Areas: runs of pages that one worker manages. Making, dropping and verifying them. */
#include "churn.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef MAP_DROPPABLE
#define MAP_DROPPABLE 0x08
#endif
#define SPARSE_BYTES (8UL << 30)
#define SPARSE_PAGES 128
#define SPARSE_STRIDE (63UL * (1 << 20) + PAGE)

const unsigned kind_can[K_COUNT] = {
	[K_ANON] = CAN_DROP | CAN_PROTECT | CAN_RESIZE | CAN_MOVE | CAN_SPLIT | CAN_FREE | CAN_GUARD | CAN_REPLACE,
	[K_THP] = CAN_DROP | CAN_PROTECT | CAN_MOVE | CAN_SPLIT | CAN_FREE | CAN_REPLACE,
	[K_FILE] = CAN_DROP | CAN_PROTECT | CAN_RESIZE | CAN_MOVE | CAN_SPLIT | CAN_REPLACE,
	[K_SHARED_FILE] = CAN_PROTECT | CAN_MOVE,
	[K_DROPPABLE] = CAN_DROP,
	[K_SPARSE] = CAN_DROP,
	[K_MEMFD] = CAN_PROTECT | CAN_MOVE,
	[K_SYSV] = CAN_PROTECT,
	[K_HEAP] = CAN_DROP | CAN_PROTECT | CAN_FREE,
};

char *page_at(const struct area *a, size_t i)
{
	return a->base + i * a->stride;
}

struct area *free_area(struct worker *w)
{
	for (size_t n = 0; n < MAX_AREAS; n++)
		if (w->areas[n].kind == K_NONE)
			return &w->areas[n];
	return NULL;
}

/* A random area that can do all of `can`, or NULL. */
struct area *pick_area(struct worker *w, unsigned can)
{
	size_t from = below(w, MAX_AREAS);

	for (size_t n = 0; n < MAX_AREAS; n++) {
		struct area *a = &w->areas[(from + n) % MAX_AREAS];
		if (a->kind != K_NONE && a->pages && (kind_can[a->kind] & can) == can)
			return a;
	}
	return NULL;
}

struct area *pick_kind(struct worker *w, enum kind kind)
{
	size_t from = below(w, MAX_AREAS);

	for (size_t n = 0; n < MAX_AREAS; n++) {
		struct area *a = &w->areas[(from + n) % MAX_AREAS];
		if (a->kind == kind && a->pages)
			return a;
	}
	return NULL;
}

/* Pages [from, to) are as if newly mapped. */
void reset_shadow(struct area *a, size_t from, size_t to, enum prot prot)
{
	bool file = a->kind == K_FILE || a->kind == K_SHARED_FILE;

	for (size_t i = from; i < to; i++) {
		bool beyond = file && a->first + i >= a->file_pages;
		a->shadow[i] = (struct shadow){.prot = (uint8_t)prot, .state = beyond ? S_BEYOND : S_NORMAL};
	}
}

static int new_file(struct worker *w, struct area *a)
{
	char name[256];
	int fd;

	snprintf(name, sizeof(name), "%s/churn-XXXXXX", options.dir);
	fd = mkostemp(name, O_CLOEXEC);
	if (fd < 0)
		bad("mkstemp", name);
	for (size_t i = 0; i < a->file_pages; i++) {
		expect(a, i, (struct shadow){0}, w->page);
		write_all(fd, w->page, PAGE);
	}
	if (w->generation || one_in(w, 2))
		unlink(name);
	return fd;
}

static char *map_anon(size_t bytes, int flags)
{
	char *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0);
	return p == MAP_FAILED ? NULL : p;
}

/* Aligned to a huge page. */
static char *map_thp(size_t bytes)
{
	char *p = map_anon(bytes + HUGE_PAGE, MAP_PRIVATE | MAP_NORESERVE), *start;

	if (!p)
		return NULL;
	start = (char *)(((uintptr_t)p + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1));
	if (start > p)
		munmap(p, (size_t)(start - p));
	munmap(start + bytes, (size_t)(p + HUGE_PAGE - start));
	madvise(start, bytes, MADV_HUGEPAGE);
	return start;
}

/* With an unmapped page on either side, so that it is a VMA of its own. */
static char *map_apart(size_t bytes)
{
	char *p = map_anon(bytes + 2 * PAGE, MAP_PRIVATE);

	if (!p)
		return NULL;
	munmap(p, PAGE);
	munmap(p + PAGE + bytes, PAGE);
	return p + PAGE;
}

static char *map_fd(struct area *a, int flags)
{
	char *p = mmap(NULL, a->mapped, PROT_READ | PROT_WRITE, flags, a->fd, 0);
	return p == MAP_FAILED ? NULL : p;
}

static char *map_memfd(struct worker *w, struct area *a)
{
	a->fd = memfd_create("churn", MFD_CLOEXEC);
	if (a->fd < 0 || ftruncate(a->fd, (off_t)a->mapped))
		return NULL;
	if (one_in(w, 2))
		a->alias = map_fd(a, MAP_SHARED);
	return map_fd(a, MAP_SHARED);
}

static char *map_sysv(struct area *a)
{
	int id = shmget(IPC_PRIVATE, a->mapped, 0600 | IPC_CREAT);
	char *p;

	if (id < 0)
		return NULL;
	p = shmat(id, NULL, 0);
	shmctl(id, IPC_RMID, NULL); /* it stays until the last one detaches */
	return p == (char *)-1 ? NULL : p;
}

static char *map_heap(size_t bytes)
{
	uintptr_t top = (uintptr_t)sbrk(0);
	size_t pad = (PAGE - top % PAGE) % PAGE;

	if (sbrk((intptr_t)(bytes + pad)) == (void *)-1)
		return NULL;
	return (char *)(top + pad);
}

static char *map_kind(struct worker *w, struct area *a)
{
	switch (a->kind) {
	case K_ANON:
		return one_in(w, 3) ? map_apart(a->mapped) : map_anon(a->mapped, MAP_PRIVATE);
	case K_THP:
		return map_thp(a->mapped);
	case K_DROPPABLE:
		return map_anon(a->mapped, MAP_DROPPABLE);
	case K_SPARSE:
		return map_anon(a->mapped, MAP_PRIVATE | MAP_NORESERVE);
	case K_HUGETLB:
		return map_anon(a->mapped, MAP_PRIVATE | MAP_HUGETLB);
	case K_FILE:
	case K_SHARED_FILE:
		a->fd = new_file(w, a);
		return map_fd(a, a->kind == K_FILE ? MAP_PRIVATE : MAP_SHARED);
	case K_MEMFD:
		return map_memfd(w, a);
	case K_SYSV:
		return map_sysv(a);
	case K_HEAP:
		return map_heap(a->mapped);
	default:
		return NULL;
	}
}

static size_t new_size(struct worker *w, enum kind kind)
{
	size_t most = w->budget / 8;

	if (most > w->capacity)
		most = w->capacity;
	switch (kind) {
	case K_THP:
		return one_in(w, 2) ? 512 : 1024;
	case K_HUGETLB:
		return 512;
	case K_SPARSE:
		return SPARSE_PAGES;
	case K_HEAP:
		return 32;
	default:
		return 1 + below(w, one_in(w, 2) || most < 10 ? 10 : most);
	}
}

/* A new area with nothing written to it, or NULL when that cannot be had. */
struct area *make_area(struct worker *w, enum kind kind)
{
	struct area *a = free_area(w);

	if (!a)
		return NULL;
	*a = (struct area){.kind = kind, .stride = PAGE, .fd = -1, .shadow = a->shadow};
	a->id = ++w->next_id;
	a->pages = new_size(w, kind);
	a->mapped = a->pages * PAGE;
	if (kind == K_SPARSE) {
		a->stride = SPARSE_STRIDE;
		a->mapped = SPARSE_BYTES;
	}
	if (kind == K_FILE || kind == K_SHARED_FILE)
		a->file_pages = one_in(w, 3) && a->pages > 2 ? a->pages - 2 : a->pages;
	a->base = map_kind(w, a);
	if (!a->base) {
		if (a->alias)
			munmap(a->alias, a->mapped);
		close_file(a);
		a->kind = K_NONE;
		return NULL;
	}
	reset_shadow(a, 0, a->pages, P_RW);
	w->used += a->pages;
	return a;
}

/* Close the file of an area; its name, if it still has one, goes too. */
void close_file(struct area *a)
{
	char link[64], name[256];
	ssize_t n;

	if (a->fd < 0)
		return;
	snprintf(link, sizeof(link), "/proc/self/fd/%d", a->fd);
	n = readlink(link, name, sizeof(name) - 1);
	if (n > 0 && (a->kind == K_FILE || a->kind == K_SHARED_FILE)) {
		name[n] = 0;
		unlink(name);
	}
	close(a->fd);
	a->fd = -1;
}

void drop_area(struct worker *w, struct area *a)
{
	int failed = 0;

	if (a->kind == K_SYSV)
		failed = shmdt(a->base);
	else if (a->kind == K_HEAP)
		failed = brk(a->base);
	else
		failed = munmap(a->base, a->mapped);
	if (failed)
		bad("munmap", a->base);
	if (a->alias)
		munmap(a->alias, a->mapped);
	close_file(a);
	w->used -= a->pages;
	a->kind = K_NONE;
}

/* Write to about half of the pages of a new area; some of the others are only read. */
void populate(struct worker *w, struct area *a)
{
	volatile char seen;

	for (size_t i = 0; i < a->pages; i++) {
		if (!can_write(a, i))
			continue;
		if (one_in(w, 2))
			write_page(w, a, i, BY_STORE);
		else if (one_in(w, 4) && a->kind != K_SPARSE)
			seen = *page_at(a, i);
	}
	(void)seen;
}

static bool reads_as(struct worker *w, const struct area *a, size_t i, const unsigned char *content)
{
	static const unsigned char zeros[PAGE];
	struct shadow s = a->shadow[i];

	expect(a, i, s, w->expected);
	if (memcmp(content, w->expected, PAGE) == 0)
		return true;
	return (s.state == S_MAYBE || a->kind == K_DROPPABLE) && memcmp(content, zeros, PAGE) == 0;
}

/* What the kernel says to a copy from or to one byte of this page: a wrong protection shows here. */
static bool kernel_can(const char *at, bool write)
{
	char byte = 0;
	struct iovec mine = {&byte, 1}, its = {(void *)(uintptr_t)at, 1};

	return (write ? process_vm_writev(getpid(), &mine, 1, &its, 1, 0) : process_vm_readv(getpid(), &mine, 1, &its, 1, 0)) == 1;
}

static void check_protected_page(struct worker *w, const struct area *a, size_t i)
{
	char *at = page_at(a, i);
	bool got = false;
	int fd;

	if (kernel_can(at, true))
		bad("protection (writable)", at);
	if (a->shadow[i].prot == P_READ) {
		if (!reads_as(w, a, i, (unsigned char *)at))
			bad("page", at);
		return;
	}
	if (kernel_can(at, false))
		bad("protection (readable)", at);
	fd = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		got = pread(fd, w->page, PAGE, (off_t)(uintptr_t)at) == (ssize_t)PAGE;
		close(fd);
	}
	if (!got) {
		mprotect(at, PAGE, PROT_READ);
		memcpy(w->page, at, PAGE);
		mprotect(at, PAGE, PROT_NONE);
	}
	if (!reads_as(w, a, i, w->page))
		bad("page (PROT_NONE)", at);
}

void check_area(struct worker *w, struct area *a)
{
	for (size_t i = 0; i < a->pages; i++) {
		struct shadow s = a->shadow[i];

		if (s.state == S_BEYOND)
			continue;
		if (s.state == S_GUARD) {
			if (kernel_can(page_at(a, i), false))
				bad("guard", page_at(a, i));
		} else if (s.prot != P_RW) {
			check_protected_page(w, a, i);
		} else if (!reads_as(w, a, i, (unsigned char *)page_at(a, i))) {
			bad("page", page_at(a, i));
		} else if (a->alias && !reads_as(w, a, i, (unsigned char *)a->alias + i * PAGE)) {
			bad("page (alias)", a->alias + i * PAGE);
		}
	}
}

/* The frames that deep recursion has left on this worker's stack, and which it will come back to. */
void check_frames(const struct worker *w)
{
	for (struct frame *f = w->frames; f; f = f->up)
		for (size_t j = 0; j < f->count; j++)
			if (f->words[j] != mix(f->key + j * 0xd1b54a32d192ed03u))
				bad("stack", &f->words[j]);
}

void check_everything(struct worker *w)
{
	for (size_t n = 0; n < MAX_AREAS; n++)
		if (w->areas[n].kind != K_NONE)
			check_area(w, &w->areas[n]);
	check_frames(w);
	check_segments();
	check_children(w);
}
