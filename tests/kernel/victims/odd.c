/*
 * odd: makes every unusual kind of memory, on command. Numbers are decimal or 0x..., sizes are pages, answers one line:
 *
 *   ready PID                       at the start, and after "exec"
 *   ok [NUMBER ...] / no WHY        done / the kernel does not do that here
 *
 *   ping · peek ADDR · read ADDR PAGES · fill ADDR PAGES SEED (every page another content) · poke ADDR PAGES VALUE
 *   anon · droppable · shared · memfd · sysv · file · hugetlb PAGES     a new mapping: ok ADDR [FD]
 *   private FD PAGES                a private mapping of an open file: ok ADDR
 *   at ADDR PAGES 0|1               a new anonymous (1: droppable) mapping in place of whatever is there
 *   unmap ADDR PAGES · grow ADDR PAGES PAGES · move ADDR PAGES: ok ADDR · prot ADDR PAGES BITS · advise ADDR PAGES NUMBER
 *   pwrite FD PAGE SEED · truncate FD PAGES · close FD
 *   direct PAGES: ok FD             a file with contents, open with O_DIRECT
 *   pread FD ADDR PAGES             read(2) into memory
 *   aio: ok ADDR                    an AIO context; ADDR is its ring
 *   uring ADDR PAGES: ok FD         an io_uring instance with a registered buffer
 *   fixed FD ADDR PAGES             read from a file into the registered buffer
 *   uffd ADDR PAGES: ok FD          a userfaultfd of the victim's own, asynchronous write protection
 *   written ADDR PAGES: ok COUNT    what that one says was written; and protected again
 *   fork · clonevm · vfork: ok PID  a child that waits to be killed
 *   forkat PID: ok PID              the same, with that pid
 *   reap PID · exec · exit
 *   seccomp kill|errno              userfaultfd(2) kills, or fails with EPERM, from now on
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <linux/filter.h>
#include <linux/io_uring.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL
#ifndef MAP_DROPPABLE
#define MAP_DROPPABLE 0x08
#endif

typedef unsigned long ul;

static char **arguments;

static void ok(const char *format, ...)
{
	va_list list;
	char text[200];
	int n = snprintf(text, sizeof(text), "ok ");

	va_start(list, format);
	n += vsnprintf(text + n, sizeof(text) - (size_t)n, format, list);
	va_end(list);
	text[n++] = '\n';
	if (write(1, text, (size_t)n) != n)
		_exit(3);
}

static void no(const char *what)
{
	char text[200];
	int n = snprintf(text, sizeof(text), "no %s: %s\n", what, strerror(errno));

	if (write(1, text, (size_t)n) != n)
		_exit(3);
}

static void fill(volatile char *at, ul pages, ul seed)
{
	for (ul i = 0; i < pages; i++)
		for (ul k = 0; k < PAGE / sizeof(ul); k++)
			((volatile ul *)(at + i * PAGE))[k] = (seed * 1000003 + i) * 0x9e3779b97f4a7c15 + k;
}

static int file_with(ul pages, int flags)
{
	char name[] = "odd-XXXXXX";
	int fd = mkstemp(name), other;
	char *page = aligned_alloc(PAGE, PAGE);

	for (ul i = 0; i < pages; i++) {
		fill(page, 1, 77 + i);
		if (fd < 0 || write(fd, page, PAGE) != (ssize_t)PAGE)
			_exit(4);
	}
	free(page);
	fsync(fd);
	other = open(name, O_RDWR | flags);
	close(fd);
	return other;
}

static void map_new(const char *kind, ul pages)
{
	int fd = -1, flags = MAP_PRIVATE | MAP_ANONYMOUS, id;
	char *p;

	if (!strcmp(kind, "sysv")) {
		id = shmget(IPC_PRIVATE, pages * PAGE, 0600);
		p = id < 0 ? MAP_FAILED : shmat(id, NULL, 0);
		if (id >= 0)
			shmctl(id, IPC_RMID, NULL);
		if (p == MAP_FAILED)
			no("shmget");
		else
			ok("%#lx %d", (ul)p, id);
		return;
	}
	if (!strcmp(kind, "droppable"))
		flags = MAP_DROPPABLE | MAP_ANONYMOUS;
	else if (!strcmp(kind, "shared"))
		flags = MAP_SHARED | MAP_ANONYMOUS;
	else if (!strcmp(kind, "hugetlb"))
		flags |= MAP_HUGETLB;
	else if (!strcmp(kind, "memfd")) {
		fd = memfd_create("odd", MFD_CLOEXEC);
		if (fd < 0 || ftruncate(fd, (off_t)(pages * PAGE)))
			_exit(4);
		flags = MAP_SHARED;
	} else if (!strcmp(kind, "file")) {
		fd = file_with(pages, 0);
		flags = MAP_PRIVATE;
	}
	p = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (p == MAP_FAILED)
		no(kind);
	else
		ok("%#lx %d", (ul)p, fd);
}

/* --- AIO, io_uring --- */

static void make_aio(void)
{
	aio_context_t context = 0;

	if (syscall(SYS_io_setup, 64, &context))
		no("io_setup");
	else
		ok("%#lx", (ul)context);
}

static struct {
	unsigned *tail, *mask, *array, *cq_head, *cq_tail;
	struct io_uring_sqe *sqes;
	int fd;
	unsigned enter;
} ring;

static void make_uring(ul address, ul pages)
{
	struct io_uring_params p;
	struct iovec buffer = {(void *)address, pages * PAGE};
	char *sq;

	memset(&p, 0, sizeof(p));
	ring.fd = (int)syscall(SYS_io_uring_setup, 4, &p);
	if (ring.fd < 0) {
		no("io_uring_setup");
		return;
	}
	sq = mmap(NULL, p.sq_off.array + p.sq_entries * 4 + p.cq_off.cqes + p.cq_entries * 16 + PAGE, PROT_READ | PROT_WRITE,
		  MAP_SHARED | MAP_POPULATE, ring.fd, IORING_OFF_SQ_RING);
	ring.sqes = mmap(NULL, p.sq_entries * sizeof(struct io_uring_sqe), PROT_READ | PROT_WRITE, MAP_SHARED, ring.fd,
			 IORING_OFF_SQES);
	if (sq == MAP_FAILED)
		sq = mmap(NULL, p.sq_off.array + p.sq_entries * 4, PROT_READ | PROT_WRITE, MAP_SHARED, ring.fd, IORING_OFF_SQ_RING);
	if (sq == MAP_FAILED || ring.sqes == MAP_FAILED) {
		no("mmap of the ring");
		return;
	}
	ring.tail = (unsigned *)(sq + p.sq_off.tail);
	ring.mask = (unsigned *)(sq + p.sq_off.ring_mask);
	ring.array = (unsigned *)(sq + p.sq_off.array);
	if (syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_BUFFERS, &buffer, 1))
		no("IORING_REGISTER_BUFFERS");
	else
		ok("%d", ring.fd);
}

/* From here on the ring has no descriptor, as after io_uring_register_ring_fd(3) and io_uring_close_ring_fd(3). */
static void hide_uring(void)
{
	struct {
		uint32_t offset, reserved;
		uint64_t data;
	} update = {-1U, 0, (uint64_t)ring.fd};

	if (syscall(SYS_io_uring_register, ring.fd, 20 /* IORING_REGISTER_RING_FDS */, &update, 1) != 1) {
		no("IORING_REGISTER_RING_FDS");
		return;
	}
	close(ring.fd);
	ring.fd = (int)update.offset;
	ring.enter = 1 << 4; /* IORING_ENTER_REGISTERED_RING */
	ok("");
}

static void read_fixed(int fd, ul address, ul pages)
{
	unsigned at = *ring.tail & *ring.mask;
	struct io_uring_sqe *s = &ring.sqes[at];

	memset(s, 0, sizeof(*s));
	s->opcode = IORING_OP_READ_FIXED;
	s->fd = fd;
	s->addr = address;
	s->len = (unsigned)(pages * PAGE);
	ring.array[at] = at;
	__atomic_store_n(ring.tail, *ring.tail + 1, __ATOMIC_RELEASE);
	if (syscall(SYS_io_uring_enter, ring.fd, 1, 1, IORING_ENTER_GETEVENTS | ring.enter, NULL, 0) != 1)
		no("io_uring_enter");
	else
		ok("");
}

/* --- a userfaultfd of its own --- */

static void make_uffd(ul address, ul pages)
{
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
	struct uffdio_api api = {.api = UFFD_API, .features = 1 << 15 | 1 << 13};
	struct uffdio_register r = {.range = {address, pages * PAGE}, .mode = UFFDIO_REGISTER_MODE_WP};

	if (fd < 0 || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &r))
		no("userfaultfd");
	else
		ok("%d", fd);
}

static void say_written(ul address, ul pages)
{
	uint64_t vec[3 * 512], arg[12] = {96, 1 | 2, address, address + pages * PAGE, 0, (uint64_t)vec, 512, 0, 0, 2, 0, 2};
	int fd = open("/proc/self/pagemap", O_RDONLY);
	long n = ioctl(fd, _IOC(_IOC_READ | _IOC_WRITE, 'f', 16, 96), arg), count = 0;

	close(fd);
	for (long i = 0; i < n; i++)
		count += (long)((vec[3 * i + 1] - vec[3 * i]) / PAGE);
	if (n < 0)
		no("PAGEMAP_SCAN");
	else
		ok("%ld", count);
}

/* --- children --- */

static int wait_for_the_end(void *unused)
{
	(void)unused;
	for (;;)
		syscall(SYS_ppoll, NULL, 0, NULL, NULL, 0);
	return 0;
}

static void *vfork_main(void *pid)
{
	(void)!syscall(SYS_gettid);
	if (!(*(volatile pid_t *)pid = vfork())) {
		for (;;)
			syscall(SYS_ppoll, NULL, 0, NULL, NULL, 0);
	}
	return NULL;
}

static void make_child(const char *how, pid_t wanted)
{
	static char *stack;
	static pid_t vforked;
	pthread_t thread;
	pid_t pid = -1;
	struct {
		uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup;
	} args = {.exit_signal = SIGCHLD, .set_tid = (uint64_t)&wanted, .set_tid_size = 1};

	if (!strcmp(how, "fork"))
		pid = fork();
	else if (!strcmp(how, "forkat"))
		pid = (pid_t)syscall(SYS_clone3, &args, sizeof(args));
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		wait_for_the_end(NULL);
	}
	if (!strcmp(how, "clonevm")) {
		stack = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		pid = clone(wait_for_the_end, stack + 16 * PAGE, CLONE_VM | SIGCHLD, NULL);
	} else if (!strcmp(how, "vfork")) {
		pthread_create(&thread, NULL, vfork_main, &vforked);
		/* the vforking thread cannot tell before its child is gone: the child's memory write is ours */
		while (!syscall(SYS_getpid) || !vforked) {
			FILE *children = fopen("/proc/self/task/self", "r");
			if (children)
				fclose(children);
			usleep(1000);
			break;
		}
		usleep(20000);
		ok("0");
		return;
	}
	if (pid < 0)
		no(how);
	else
		ok("%d", pid);
}

static void restrict_syscalls(int kills)
{
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, kills ? SECCOMP_RET_KILL_PROCESS : SECCOMP_RET_ERRNO | EPERM),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {sizeof(filter) / sizeof(filter[0]), filter};

	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
		no("seccomp");
	else
		ok("");
}

static void done(long result, const char *what)
{
	if (result < 0)
		no(what);
	else
		ok("");
}

static void obey(char *line)
{
	char *word[5] = {"", "", "", "", ""}, *save = NULL, *name;
	ul n[5];
	volatile ul sum = 0;
	int count = 0;

	for (char *w = strtok_r(line, " ", &save); w && count < 5; w = strtok_r(NULL, " ", &save))
		word[count++] = w;
	for (int i = 0; i < 5; i++)
		n[i] = strtoul(word[i], NULL, 0);
	name = word[0];
	if (!strcmp(name, "ping"))
		ok("");
	else if (!strcmp(name, "peek"))
		ok("%d", *(volatile unsigned char *)n[1]);
	else if (!strcmp(name, "read")) {
		for (ul i = 0; i < n[2]; i++)
			sum += ((volatile unsigned char *)n[1])[i * PAGE];
		ok("");
	} else if (!strcmp(name, "fill")) {
		fill((char *)n[1], n[2], n[3]);
		ok("");
	} else if (!strcmp(name, "poke")) {
		for (ul i = 0; i < n[2]; i++)
			((volatile unsigned char *)n[1])[i * PAGE + 99] = (unsigned char)n[3];
		ok("");
	} else if (!strcmp(name, "private"))
		ok("%#lx", (ul)mmap(NULL, n[2] * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, (int)n[1], 0));
	else if (!strcmp(name, "at"))
		done(mmap((void *)n[1], n[2] * PAGE, PROT_READ | PROT_WRITE,
			  (n[3] ? MAP_DROPPABLE : MAP_PRIVATE) | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED ? -1 : 0, "mmap");
	else if (!strcmp(name, "unmap"))
		done(munmap((void *)n[1], n[2] * PAGE), "munmap");
	else if (!strcmp(name, "grow"))
		done(mremap((void *)n[1], n[2] * PAGE, n[3] * PAGE, 0) == MAP_FAILED ? -1 : 0, "mremap");
	else if (!strcmp(name, "move")) {
		char *to = mmap(NULL, n[2] * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		ok("%#lx", (ul)mremap((void *)n[1], n[2] * PAGE, n[2] * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to));
	} else if (!strcmp(name, "prot"))
		done(mprotect((void *)n[1], n[2] * PAGE, (int)n[3]), "mprotect");
	else if (!strcmp(name, "advise"))
		done(madvise((void *)n[1], n[2] * PAGE, (int)n[3]), "madvise");
	else if (!strcmp(name, "pwrite")) {
		char *page = aligned_alloc(PAGE, PAGE);
		fill(page, 1, n[3]);
		done(pwrite((int)n[1], page, PAGE, (off_t)(n[2] * PAGE)), "pwrite");
		free(page);
	} else if (!strcmp(name, "truncate"))
		done(ftruncate((int)n[1], (off_t)(n[2] * PAGE)), "ftruncate");
	else if (!strcmp(name, "close"))
		done(close((int)n[1]), "close");
	else if (!strcmp(name, "direct")) {
		int fd = file_with(n[1], O_DIRECT);
		if (fd < 0)
			no("O_DIRECT");
		else
			ok("%d", fd);
	} else if (!strcmp(name, "pread"))
		done(pread((int)n[1], (void *)n[2], n[3] * PAGE, 0), "pread");
	else if (!strcmp(name, "aio"))
		make_aio();
	else if (!strcmp(name, "uring"))
		make_uring(n[1], n[2]);
	else if (!strcmp(name, "hide"))
		hide_uring();
	else if (!strcmp(name, "fixed"))
		read_fixed((int)n[1], n[2], n[3]);
	else if (!strcmp(name, "uffd"))
		make_uffd(n[1], n[2]);
	else if (!strcmp(name, "written"))
		say_written(n[1], n[2]);
	else if (!strcmp(name, "fork") || !strcmp(name, "clonevm") || !strcmp(name, "vfork") || !strcmp(name, "forkat"))
		make_child(name, (pid_t)n[1]);
	else if (!strcmp(name, "reap")) {
		kill((pid_t)n[1], SIGKILL);
		done(waitpid((pid_t)n[1], NULL, __WALL), "waitpid");
	} else if (!strcmp(name, "exec"))
		execv("/proc/self/exe", arguments);
	else if (!strcmp(name, "seccomp"))
		restrict_syscalls(!strcmp(word[1], "kill"));
	else if (!strcmp(name, "exit"))
		_exit(0);
	else
		map_new(name, n[1]);
}

int main(int argc, char **argv)
{
	char line[200];
	size_t n = 0;

	(void)argc;
	arguments = argv;
	n = (size_t)snprintf(line, sizeof(line), "ready %d\n", (int)getpid());
	if (write(1, line, n) != (ssize_t)n)
		return 3;
	for (n = 0; read(0, line + n, 1) == 1;) {
		if (line[n] == '\n') {
			line[n] = 0;
			n = 0;
			obey(line);
		} else if (n + 2 < sizeof(line))
			n++;
	}
	return 0;
}
