/*
 * Stands for CRIU: has the name by which the library knows it, and tells what comes of its calls.
 *
 *   asker PID      one "what=value ..." a line
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define SCAN 0xc0606610ul
#define PRESENT (1 << 3)

struct argument {
	uint64_t size, flags, start, end, walk_end, regions, length, most, inverted, mask, any_of, told;
};

int criu_get_image_dir(void);
int criu_get_image_dir(void)
{
	return -1;
}

/* A scan for nothing, of a span without a mapping. */
static void scan(const char *what, const char *path, uint64_t mask, uint64_t any_of)
{
	uint64_t regions[3] = {0};
	struct argument argument = {.size = sizeof(argument), .end = 4096, .regions = (uintptr_t)regions, .length = 1,
				    .mask = mask, .any_of = any_of, .told = PRESENT};
	int fd = open(path, O_RDONLY), result;

	errno = 0;
	result = ioctl(fd, SCAN, &argument);
	printf("%s=%d,%d,%llu\n", what, result, errno, (unsigned long long)argument.walk_end);
	close(fd);
}

static void begin_of(const char *what, const char *directory, const char *name)
{
	char text[16] = "";
	int at = open(directory, O_PATH | O_DIRECTORY), fd = openat(at, name, O_RDONLY);

	printf("%s=%.*s\n", what, (int)read(fd, text, 8), text);
	close(fd);
	close(at);
}

int main(int n, char **arguments)
{
	char directory[64], path[96];
	const char *preload = getenv("LD_PRELOAD");
	struct stat stat;
	int fd, waiting = 0, status, ends[2];

	(void)n;
	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("preload=%s\n", preload ? preload : "");
	snprintf(directory, sizeof(directory), "/proc/%s", arguments[1]);
	begin_of("smaps of another", directory, "smaps");
	begin_of("smaps of its own", "/proc/self", "smaps");
	begin_of("status", directory, "status");
	snprintf(path, sizeof(path), "%s/pagemap", directory);
	scan("own", "/proc/self/pagemap", 0, PRESENT);
	scan("no pages", path, 1 << 8, 0);
	scan("any of", path, 0, PRESENT);
	scan("mask", path, PRESENT, 0);
	snprintf(path, sizeof(path), "%s/task/%s/pagemap", directory, arguments[1]);
	scan("thread", path, PRESENT, 0);
	fd = open("/dev/null", O_RDONLY);
	errno = 0;
	printf("no pagemap=%d\n", ioctl(fd, SCAN, path));
	close(fd);
	if (!pipe(ends) && write(ends[1], "abc", 3) == 3 && !ioctl(ends[0], FIONREAD, &waiting))
		printf("pipe=%d\n", waiting);
	umask(0);
	fd = openat(AT_FDCWD, "made", O_CREAT | O_RDWR, 0640);
	printf("mode=%o\n", fstat(fd, &stat) ? 0 : stat.st_mode & 0777);
	errno = 0;
	fd = openat(AT_FDCWD, "none", O_RDONLY);
	printf("none=%d\n", fd < 0 ? errno : 0);
	snprintf(path, sizeof(path), "%s/pagemap", directory);
	fflush(stdout);
	if (!fork()) {
		scan("child", path, 0, PRESENT);
		_exit(0);
	}
	wait(&status);
	return 0;
}
