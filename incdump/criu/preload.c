/*
 * Answers CRIU's scans of other processes' memory, inside CRIU: for where no seccomp filter may be put on it.
 *
 * incdump (incdump/criu/preloaded.py) has it loaded into `criu dump` by LD_PRELOAD, and is at the other end of a socket.
 * In any other program that is on the way there, a shell that wraps CRIU for instance, it does nothing. In CRIU it
 * says at once that it is there, takes itself out of the environment, so that nothing that CRIU starts is affected, and
 * asks:
 *
 *   at an ioctl PAGEMAP_SCAN that looks for the populated pages of another process: whether it may go on. The scan then
 *   finds none, and is through with all of the address space. When nobody is left to answer, the scan fails, and CRIU
 *   gives up and lets the tree run on;
 *
 *   at an openat of another process's smaps: whether there is a file to be read in its place.
 *
 * Everything else goes to the kernel as it came. Nothing in here depends on the processor: the one address that does
 * comes from incdump.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <linux/fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SOCKET_VARIABLE "INCDUMP_PRELOAD_SOCKET"
#define PRELOAD_VARIABLE "LD_PRELOAD"
#define OWN_PLACE "/proc/self/fd/"

/* include/uapi/linux/fs.h, from 6.7 on; older headers lack it. */
#define PAGEMAP_SCAN_REQUEST 0xc0606610u
#define POPULATED (1u << 3 | 1u << 4) /* PAGE_IS_PRESENT, PAGE_IS_SWAPPED */
struct scan_argument {
	uint64_t size, flags, start, end, walk_end, regions, regions_length, most_pages;
	uint64_t inverted, mask, any_of, told;
};

enum { LOADED = 1, SCAN = 2, SMAPS = 3 };
struct question {
	int32_t what, pid;
};
struct answer {
	int32_t error, unused; /* error: 0 for yes; with SMAPS a descriptor comes along then */
	uint64_t walk_end;
};

static int channel = -1;
static pid_t owner;

/* Ask incdump. Returns 0 for yes, an error number for no; -1 when nobody is there. fd: takes a descriptor, or -1. */
static int ask(int what, pid_t pid, struct answer *answer, int *fd)
{
	struct question question = {what, pid};
	union {
		char room[CMSG_SPACE(sizeof(int))];
		struct cmsghdr aligned;
	} control;
	struct iovec vector = {answer, sizeof(*answer)};
	struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = &control,
				 .msg_controllen = sizeof(control)};
	struct cmsghdr *header;
	ssize_t length;

	*fd = -1;
	do
		length = send(channel, &question, sizeof(question), MSG_NOSIGNAL);
	while (length < 0 && errno == EINTR);
	if (length != (ssize_t)sizeof(question))
		return -1;
	do
		length = recvmsg(channel, &message, MSG_CMSG_CLOEXEC);
	while (length < 0 && errno == EINTR);
	if (length < 0)
		return -1;
	header = CMSG_FIRSTHDR(&message);
	if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS)
		memcpy(fd, CMSG_DATA(header), sizeof(*fd));
	return length == (ssize_t)sizeof(*answer) ? answer->error : -1;
}

/* A number at the begin of a text. rest: what comes after. Without strtol, that has another name in newer libraries. */
static long number_in(const char *text, const char **rest)
{
	long number = 0;

	while (*text >= '0' && *text <= '9')
		number = 10 * number + (*text++ - '0');
	*rest = text;
	return number;
}

/* Cut a number off the end of a path, and the slash before it. Returns -1 where there is none. */
static long cut_number(char *path)
{
	char *slash = strrchr(path, '/');
	const char *rest;
	long number;

	if (!slash || slash[1] < '0' || slash[1] > '9')
		return -1;
	number = number_in(slash + 1, &rest);
	if (*rest)
		return -1;
	*slash = 0;
	return number;
}

/* The process, another one than this, whose file of that name in /proc a descriptor is; else -1. */
static long process_behind(int fd, const char *name)
{
	char link[sizeof(OWN_PLACE) + 16], path[512], *slash;
	ssize_t length;
	long pid;

	snprintf(link, sizeof(link), OWN_PLACE "%d", fd);
	length = readlink(link, path, sizeof(path) - 1);
	if (length < 0)
		return -1;
	path[length] = 0;
	slash = strrchr(path, '/');
	if (!slash || strcmp(slash + 1, name))
		return -1;
	*slash = 0;
	pid = cut_number(path);
	slash = strrchr(path, '/');
	if (pid >= 0 && slash && !strcmp(slash, "/task")) {
		*slash = 0;
		pid = cut_number(path);
	}
	return pid == owner ? -1 : pid;
}

/* Whether this is the process that has been heard. Its children, that share the socket, do not use it. */
static int is_heard(void)
{
	return channel >= 0 && getpid() == owner;
}

/* Returns 1 for a scan that is the kernel's to answer, else what ioctl is to return. */
static int scan(int fd, struct scan_argument *argument)
{
	struct answer answer;
	long pid;
	int passed, error;

	if (!((argument->any_of | argument->mask) & POPULATED) || (pid = process_behind(fd, "pagemap")) < 0)
		return 1;
	error = ask(SCAN, pid, &answer, &passed);
	if (passed >= 0)
		close(passed);
	if (error) {
		errno = error < 0 ? ECONNRESET : error;
		return -1;
	}
	argument->walk_end = answer.walk_end;
	return 0;
}

int ioctl(int fd, unsigned long request, ...)
{
	va_list arguments;
	void *argument;
	int before = errno, result;

	va_start(arguments, request);
	argument = va_arg(arguments, void *);
	va_end(arguments);
	if ((uint32_t)request == PAGEMAP_SCAN_REQUEST && argument && is_heard()) {
		result = scan(fd, argument);
		if (result < 0)
			return result;
		errno = before;
		if (!result)
			return result;
	}
	return syscall(SYS_ioctl, fd, request, argument);
}

/* A descriptor for smaps that was just opened, or for what is read in its place. */
static int replaced(int fd, const char *path, int flags)
{
	size_t length = strlen(path);
	struct answer answer;
	int before = errno, other;
	long pid;

	if (fd < 0 || length < 5 || strcmp(path + length - 5, "smaps") || !is_heard())
		return fd;
	pid = process_behind(fd, "smaps");
	if (pid >= 0) {
		if (!ask(SMAPS, pid, &answer, &other) && other >= 0)
			syscall(SYS_dup3, other, fd, flags & O_CLOEXEC);
		if (other >= 0)
			close(other);
	}
	errno = before;
	return fd;
}

static int open_at(int directory, const char *path, int flags, unsigned int mode)
{
	return replaced(syscall(SYS_openat, directory, path, flags, mode), path, flags);
}

/* Its mode, where the flags say that there is one. */
#define WITH_MODE(name)                                                        \
	int name(int directory, const char *path, int flags, ...)              \
	{                                                                      \
		unsigned int mode = 0;                                         \
		va_list arguments;                                             \
                                                                               \
		if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) {     \
			va_start(arguments, flags);                            \
			mode = va_arg(arguments, unsigned int);                \
			va_end(arguments);                                     \
		}                                                              \
		return open_at(directory, path, flags, mode);                  \
	}

/* What programs call that are compiled with _FORTIFY_SOURCE. */
#define WITHOUT_MODE(name)                                                     \
	int name(int directory, const char *path, int flags)                   \
	{                                                                      \
		return open_at(directory, path, flags, 0);                     \
	}

WITH_MODE(openat)
WITH_MODE(openat64)
WITHOUT_MODE(__openat_2)
WITHOUT_MODE(__openat64_2)

/* CRIU has this for its plugins. A weak reference is null in any other program, a wrapper of CRIU for instance. */
extern int criu_get_image_dir(void) __attribute__((weak));

/* Take this library out of the environment, and let go of what it was loaded from. */
static void leave_environment(void)
{
	const char *preload = getenv(PRELOAD_VARIABLE), *rest;
	char *others;

	unsetenv(SOCKET_VARIABLE);
	if (!preload || strncmp(preload, OWN_PLACE, strlen(OWN_PLACE)))
		return;
	close(number_in(preload + strlen(OWN_PLACE), &rest));
	if (*rest == ':' && (others = strdup(rest + 1))) {
		setenv(PRELOAD_VARIABLE, others, 1);
		free(others);
	} else {
		unsetenv(PRELOAD_VARIABLE);
	}
}

__attribute__((constructor)) static void begin(void)
{
	const char *number = getenv(SOCKET_VARIABLE), *rest;
	struct answer answer;
	int before = errno, passed;

	if (!number || !criu_get_image_dir)
		return;
	channel = number_in(number, &rest);
	leave_environment();
	syscall(SYS_fcntl, channel, F_SETFD, FD_CLOEXEC);
	owner = getpid();
	if (ask(LOADED, owner, &answer, &passed)) {
		close(channel);
		channel = -1;
	}
	errno = before;
}
