/* Operations with other processes, threads, signals, registers and the stack; segments shared by all processes. */
#include "churn.h"

#include <alloca.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define FRAME_PAGES 8
#define STACK_PAGES 96
#define HELPER_PAGES 4
#define CHILD_EXIT 7

void write_all(int fd, const void *data, size_t n)
{
	const char *p = data;

	while (n) {
		ssize_t got = write(fd, p, n);
		if (got < 0 && errno == EINTR) {
			atomic_fetch_add(&global->eintr, 1);
			continue;
		}
		if (got <= 0)
			return;
		p += got;
		n -= (size_t)got;
	}
}

/* False at the end of file. */
bool read_all(int fd, void *data, size_t n)
{
	char *p = data;

	while (n) {
		ssize_t got = read(fd, p, n);
		if (got < 0 && errno == EINTR) {
			atomic_fetch_add(&global->eintr, 1);
			continue;
		}
		if (got <= 0)
			return false;
		p += got;
		n -= (size_t)got;
	}
	return true;
}

/* Wait for a child and demand how it ended. */
static void reap(pid_t pid, int code)
{
	int status = 0;

	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			bad("waitpid", (void *)(uintptr_t)pid);
	if (!WIFEXITED(status) || WEXITSTATUS(status) != code)
		bad("child's exit", (void *)(uintptr_t)pid);
}

/* --- segments: shared anonymous memory that any process writes to and any checks, under a lock --- */

struct segment {
	pthread_mutex_t lock;
	uint32_t version;
	struct shadow shadow[SEGMENT_PAGES];
	_Alignas(4096) unsigned char pages[SEGMENT_PAGES][PAGE];
};
static struct segment *segments[SEGMENTS];

void make_segments(void)
{
	pthread_mutexattr_t shared;

	pthread_mutexattr_init(&shared);
	pthread_mutexattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
	for (size_t n = 0; n < SEGMENTS; n++) {
		segments[n] = mmap(NULL, sizeof(struct segment), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
		if (segments[n] == MAP_FAILED)
			bad("mmap", NULL);
		pthread_mutex_init(&segments[n]->lock, &shared);
	}
}

static struct area view(size_t n)
{
	struct segment *s = segments[n];

	return (struct area){.kind = K_SYSV, .base = (char *)s->pages, .pages = SEGMENT_PAGES, .stride = PAGE,
			     .id = 1000 + n, .fd = -1, .shadow = s->shadow};
}

static void check_segment(size_t n)
{
	struct area a = view(n);
	unsigned char expected[PAGE] __attribute__((aligned(8)));

	pthread_mutex_lock(&segments[n]->lock);
	for (size_t i = 0; i < a.pages; i++) {
		expect(&a, i, a.shadow[i], expected);
		if (memcmp(page_at(&a, i), expected, PAGE))
			bad("page (shared)", page_at(&a, i));
	}
	pthread_mutex_unlock(&segments[n]->lock);
}

void check_segments(void)
{
	for (size_t n = 0; n < SEGMENTS; n++)
		check_segment(n);
}

bool op_shared(struct worker *w)
{
	size_t n = below(w, SEGMENTS);
	struct area a = view(n);
	uint32_t version = w->next_version;

	if (one_in(w, 4)) {
		check_segment(n);
		return true;
	}
	pthread_mutex_lock(&segments[n]->lock);
	w->next_version = segments[n]->version;
	for (int k = 0; k < 4; k++) {
		size_t i = below(w, a.pages);
		if (one_in(w, 2))
			poke_page(w, &a, i, BY_STORE);
		else
			write_page(w, &a, i, BY_STORE);
	}
	segments[n]->version = w->next_version;
	pthread_mutex_unlock(&segments[n]->lock);
	w->next_version = version;
	return true;
}

/* --- the stack --- */

/* Fill a frame, go on working above it (through later requests too), and demand that it is unchanged at the end. */
static __attribute__((noinline)) void deeper(struct worker *w, size_t pages)
{
	struct frame frame = {.up = w->frames, .count = pages * PAGE / 8, .key = rnd(w)};

	frame.words = alloca(pages * PAGE);
	fill_words(frame.words, frame.count, frame.key);
	w->frames = &frame;
	w->stack_pages += pages;
	work(w);
	check_frames(w);
	w->stack_pages -= pages;
	w->frames = frame.up;
}

bool op_stack(struct worker *w)
{
	size_t pages = 1 + below(w, FRAME_PAGES);

	w->pages_dirtied += (double)pages;
	if (w->stack_pages + pages > STACK_PAGES || (w->frames && one_in(w, 2)))
		w->unwind = true;
	else
		deeper(w, pages);
	return true;
}

/* --- children that live on --- */

struct order {
	char what; /* 'S' work, 'C' check, 'Q' quit */
	int count;
};

/* In a child made by one of many threads: what is shared with the parent is the parent's to write and to check. */
static void disown(struct worker *w)
{
	w->generation = 1;
	memset(w->children, 0, sizeof(w->children));
	memset(w->helpers, 0, sizeof(w->helpers));
	memset(w->zombies, 0, sizeof(w->zombies));
	w->signals_pending = 0;
	for (size_t n = 0; n < MAX_AREAS; n++) {
		struct area *a = &w->areas[n];
		if (a->kind == K_MEMFD || a->kind == K_SYSV || a->kind == K_SHARED_FILE || a->kind == K_HUGETLB) {
			if (a->fd >= 0)
				close(a->fd);
			w->used -= a->pages;
			a->kind = K_NONE; /* but it stays mapped */
		}
	}
}

static _Noreturn void live(struct worker *w, int fd)
{
	struct order order;

	disown(w);
	while (read_all(fd, &order, sizeof(order))) {
		if (order.what == 'S')
			for (int n = 0; n < order.count; n++)
				do_operation(w);
		else
			check_everything(w);
		write_all(fd, "k", 1);
		if (order.what == 'Q')
			_exit(CHILD_EXIT);
	}
	_exit(0);
}

static void answered(struct child *c)
{
	char byte;

	for (; c->unanswered; c->unanswered--)
		if (!read_all(c->fd, &byte, 1))
			bad("child died", (void *)(uintptr_t)c->pid);
}

static void tell(struct child *c, char what, int count)
{
	struct order order = {what, count};

	answered(c);
	write_all(c->fd, &order, sizeof(order));
	c->unanswered = 1;
}

static void end_child(struct child *c)
{
	tell(c, 'Q', 0);
	answered(c);
	reap(c->pid, CHILD_EXIT);
	close(c->fd);
	c->pid = 0;
}

/* A child ends itself when its parent thread is gone. */
static pid_t fork_bound(void)
{
	pid_t parent = getpid(), pid = fork();

	if (pid < 0)
		bad("fork", NULL);
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != parent)
			_exit(0);
	}
	return pid;
}

bool op_fork(struct worker *w)
{
	struct child *c = &w->children[below(w, MAX_CHILDREN)];
	int ends[2];

	if (c->pid) {
		if (c->left-- > 0)
			tell(c, one_in(w, 8) ? 'C' : 'S', 1 + (int)below(w, 40));
		else
			end_child(c);
		return true;
	}
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends))
		bad("socketpair", NULL);
	*c = (struct child){.fd = ends[0], .left = 2 + (int)below(w, 8)};
	c->pid = fork_bound();
	if (c->pid == 0) {
		close(ends[0]);
		live(w, ends[1]);
	}
	close(ends[1]);
	tell(c, 'S', 1 + (int)below(w, 20));
	return true;
}

void check_children(struct worker *w)
{
	for (size_t n = 0; n < MAX_CHILDREN; n++)
		if (w->children[n].pid)
			tell(&w->children[n], 'C', 0);
	for (size_t n = 0; n < MAX_CHILDREN; n++)
		if (w->children[n].pid)
			answered(&w->children[n]);
}

/* --- children that do not --- */

bool op_zombie(struct worker *w)
{
	pid_t *slot = &w->zombies[below(w, MAX_ZOMBIES)];

	if (*slot) {
		reap(*slot, CHILD_EXIT);
		*slot = 0;
		return true;
	}
	*slot = fork_bound();
	if (*slot == 0)
		_exit(CHILD_EXIT);
	return true;
}

bool op_exec(struct worker *w)
{
	static const char *const argv[] = {"true", NULL};
	pid_t pid = vfork();

	(void)w;
	if (pid == 0) {
		execve("/bin/true", (char *const *)(uintptr_t)argv, NULL);
		_exit(1);
	}
	if (pid < 0)
		bad("vfork", NULL);
	reap(pid, 0);
	return true;
}

/* --- threads that come and go --- */

static void *helper_main(void *arg)
{
	struct helper *h = arg;
	size_t count = h->pages * PAGE / 8;
	uint64_t *words = mmap(NULL, h->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (words == MAP_FAILED)
		bad("mmap", NULL);
	fill_words(words, count, h->key);
	pthread_mutex_lock(&h->lock);
	while (!h->leaving)
		pthread_cond_wait(&h->leave, &h->lock);
	pthread_mutex_unlock(&h->lock);
	for (size_t j = 0; j < count; j++)
		if (words[j] != mix(h->key + j * 0xd1b54a32d192ed03u))
			bad("page (helper)", &words[j]);
	munmap(words, h->pages * PAGE);
	return h;
}

static void join_helper(struct helper *h)
{
	void *result = NULL;

	pthread_mutex_lock(&h->lock);
	h->leaving = true;
	pthread_cond_signal(&h->leave);
	pthread_mutex_unlock(&h->lock);
	if (pthread_join(h->thread, &result) || result != h)
		bad("thread", h);
	h->used = false;
}

bool op_threads(struct worker *w)
{
	struct helper *h = &w->helpers[below(w, MAX_HELPERS)];

	if (h->used) {
		join_helper(h);
		return true;
	}
	memset(h, 0, sizeof(*h));
	pthread_mutex_init(&h->lock, NULL);
	pthread_cond_init(&h->leave, NULL);
	h->pages = 1 + below(w, HELPER_PAGES);
	h->key = rnd(w);
	if (pthread_create(&h->thread, NULL, helper_main, h))
		return false;
	h->used = true;
	return true;
}

void end_children(struct worker *w)
{
	for (size_t n = 0; n < MAX_CHILDREN; n++)
		if (w->children[n].pid)
			end_child(&w->children[n]);
	for (size_t n = 0; n < MAX_ZOMBIES; n++)
		if (w->zombies[n])
			reap(w->zombies[n], CHILD_EXIT);
	for (size_t n = 0; n < MAX_HELPERS; n++)
		if (w->helpers[n].used)
			join_helper(&w->helpers[n]);
}

/* --- pending signals, registers, interrupted calls --- */

/* Signals that this thread keeps blocked: none may be lost, and their order and values stay. */
bool op_signal(struct worker *w)
{
	int number = SIGRTMIN + 3;
	struct timespec wait = {5, 0};
	sigset_t set;
	siginfo_t info;

	sigemptyset(&set);
	sigaddset(&set, number);
	if (w->signals_pending < 3) {
		union sigval value = {.sival_int = w->next_signal + w->signals_pending};
		if (pthread_sigqueue(pthread_self(), number, value))
			return false;
		w->signals_pending++;
		return true;
	}
	for (; w->signals_pending; w->signals_pending--) {
		int got;
		while ((got = sigtimedwait(&set, &info, &wait)) < 0 && errno == EINTR)
			atomic_fetch_add(&global->eintr, 1);
		if (got != number || info.si_value.sival_int != w->next_signal++)
			bad("signal", (void *)(uintptr_t)w->next_signal);
	}
	return true;
}

/* Hold known values in registers for some time; zero if they are all still there. */
static uint64_t hold_registers(uint64_t key, uint64_t turns)
{
	uint64_t wrong = 0;
#if defined(__x86_64__)
	__asm__ volatile("lea 1(%[k]), %%rbx\n lea 2(%[k]), %%r8\n lea 3(%[k]), %%r9\n lea 4(%[k]), %%r10\n"
			 "lea 5(%[k]), %%r11\n lea 6(%[k]), %%r12\n lea 7(%[k]), %%r13\n lea 8(%[k]), %%r14\n"
			 "lea 9(%[k]), %%r15\n movq %%rbx, %%xmm0\n movq %%r8, %%xmm7\n movq %%r9, %%xmm15\n"
			 "1: dec %[n]\n jnz 1b\n"
			 "movq %%xmm0, %[n]\n sub %%rbx, %[n]\n or %[n], %[w]\n movq %%xmm7, %[n]\n sub %%r8, %[n]\n"
			 "or %[n], %[w]\n movq %%xmm15, %[n]\n sub %%r9, %[n]\n or %[n], %[w]\n"
			 "sub %[k], %%rbx\n sub $1, %%rbx\n or %%rbx, %[w]\n sub %[k], %%r8\n sub $2, %%r8\n or %%r8, %[w]\n"
			 "sub %[k], %%r9\n sub $3, %%r9\n or %%r9, %[w]\n sub %[k], %%r10\n sub $4, %%r10\n or %%r10, %[w]\n"
			 "sub %[k], %%r11\n sub $5, %%r11\n or %%r11, %[w]\n sub %[k], %%r12\n sub $6, %%r12\n or %%r12, %[w]\n"
			 "sub %[k], %%r13\n sub $7, %%r13\n or %%r13, %[w]\n sub %[k], %%r14\n sub $8, %%r14\n or %%r14, %[w]\n"
			 "sub %[k], %%r15\n sub $9, %%r15\n or %%r15, %[w]\n"
			 : [n] "+r"(turns), [w] "+r"(wrong)
			 : [k] "r"(key)
			 : "rbx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0", "xmm7", "xmm15", "cc");
#elif defined(__aarch64__)
	__asm__ volatile("add x9, %[k], #1\n add x10, %[k], #2\n add x19, %[k], #3\n add x20, %[k], #4\n"
			 "add x21, %[k], #5\n add x27, %[k], #6\n fmov d0, x9\n fmov d31, x10\n"
			 "1: subs %[n], %[n], #1\n b.ne 1b\n"
			 "fmov %[n], d0\n sub %[n], %[n], x9\n orr %[w], %[w], %[n]\n"
			 "fmov %[n], d31\n sub %[n], %[n], x10\n orr %[w], %[w], %[n]\n"
			 "sub x9, x9, %[k]\n sub x9, x9, #1\n orr %[w], %[w], x9\n"
			 "sub x10, x10, %[k]\n sub x10, x10, #2\n orr %[w], %[w], x10\n"
			 "sub x19, x19, %[k]\n sub x19, x19, #3\n orr %[w], %[w], x19\n"
			 "sub x20, x20, %[k]\n sub x20, x20, #4\n orr %[w], %[w], x20\n"
			 "sub x21, x21, %[k]\n sub x21, x21, #5\n orr %[w], %[w], x21\n"
			 "sub x27, x27, %[k]\n sub x27, x27, #6\n orr %[w], %[w], x27\n"
			 : [n] "+&r"(turns), [w] "+&r"(wrong)
			 : [k] "r"(key)
			 : "x9", "x10", "x19", "x20", "x21", "x27", "v0", "v31", "cc");
#else
	(void)key;
	(void)turns;
#endif
	return wrong;
}

bool op_regs(struct worker *w)
{
	if (hold_registers(rnd(w), 20000 + below(w, 200000)))
		bad("register", NULL);
	return true;
}

/* Wait in the kernel. An errno that only the kernel may see (ERESTARTSYS and its kin, 512 to 516) is an error. */
bool op_sleep(struct worker *w)
{
	struct timespec t = {0, (long)(100000 + below(w, 1500000))};
	int got;

	if (one_in(w, 2)) {
		while ((got = clock_nanosleep(CLOCK_MONOTONIC, 0, &t, &t)) == EINTR)
			atomic_fetch_add(&global->eintr, 1);
	} else {
		got = poll(NULL, 0, 1) < 0 ? errno : 0;
		if (got == EINTR) {
			atomic_fetch_add(&global->eintr, 1);
			got = 0;
		}
	}
	if (got)
		bad("interrupted call", (void *)(uintptr_t)got);
	return true;
}
