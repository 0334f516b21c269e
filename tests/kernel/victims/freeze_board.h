/* What a victim tells the test: a page of shared memory (the file named by argv[1]), written all the time. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct board {
    volatile uint64_t errors;     /* something was not as it must be */
    volatile uint64_t eintr;      /* a system call failed with EINTR */
    volatile uint64_t quit;       /* set by the test: come to an end */
    volatile uint64_t beats;      /* grows while anything of the victim runs */
    volatile uint64_t value[64];  /* each victim's own */
};

static struct board *board;

static inline void add(volatile uint64_t *slot, uint64_t n) { __atomic_fetch_add(slot, n, __ATOMIC_RELAXED); }

static inline void beat(void) { add(&board->beats, 1); }

static inline void wrong(const char *what)
{
    add(&board->errors, 1);
    fprintf(stderr, "victim: %s (errno %d)\n", what, errno);
}

static inline void open_board(char **argv)
{
    int fd = open(argv[1], O_RDWR | O_CLOEXEC);
    board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (fd < 0 || board == MAP_FAILED)
        exit(100);
    close(fd);
}

static inline void ready(void)
{
    if (write(1, "ready\n", 6) != 6)
        exit(101);
}

static inline pthread_t start(void *(*body)(void *), void *arg)
{
    pthread_t thread;
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, 65536);
    if (pthread_create(&thread, &attr, body, arg))
        exit(102);
    return thread;
}
