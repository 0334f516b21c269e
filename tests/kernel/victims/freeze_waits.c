/* One blocking call, argv[2], that must end as if nothing had been; argv[3]: after so many ms, 400 if it is not there.
 * SIGUSR1 is blocked; SIGUSR2 ends calls. value[0] is set before it; value[1] is its result,
 * value[2] its errno, value[3] the milliseconds it took, value[4] how many signals came; beats is set to 1 when it is
 * over. */
#include "freeze_board.h"
#include <linux/futex.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/sem.h>

static int word;

static long wait_in(const char *call, long ms)
{
    struct timespec short_time = {ms / 1000, ms % 1000 * 1000000}, rest;
    struct pollfd p = {0, POLLIN, 0};
    struct epoll_event e = {.events = EPOLLIN};
    char byte;
    sigset_t set;
    fd_set fds;
    int ep = epoll_create1(0);
    epoll_ctl(ep, EPOLL_CTL_ADD, 0, &e);
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigprocmask(SIG_BLOCK, &set, NULL);
    FD_ZERO(&fds);
    FD_SET(0, &fds);
    board->value[0] = 1;
    if (!strcmp(call, "nanosleep"))
        return nanosleep(&short_time, &rest);
    if (!strcmp(call, "clock_nanosleep"))
        return syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &short_time, &rest);
    if (!strcmp(call, "poll with a timeout"))
        return poll(NULL, 0, ms);
    if (!strcmp(call, "futex with a timeout"))
        return syscall(SYS_futex, &word, FUTEX_WAIT, 0, &short_time, NULL, 0) < 0 && errno == ETIMEDOUT ? 0 : -1;
    if (!strcmp(call, "select with a timeout")) {
        struct timeval t = {ms / 1000, ms % 1000 * 1000};
        return select(0, NULL, NULL, NULL, &t);
    }
    if (!strcmp(call, "read"))
        return read(0, &byte, 1);
    if (!strcmp(call, "poll"))
        return poll(&p, 1, -1);
    if (!strcmp(call, "ppoll"))
        return ppoll(&p, 1, NULL, &set);
    if (!strcmp(call, "select"))
        return select(1, &fds, NULL, NULL, NULL);
    if (!strcmp(call, "pselect"))
        return pselect(1, &fds, NULL, NULL, NULL, &set);
    if (!strcmp(call, "epoll_wait"))
        return epoll_wait(ep, &e, 1, -1);
    if (!strcmp(call, "epoll_pwait"))
        return epoll_pwait(ep, &e, 1, -1, &set);
    if (!strcmp(call, "futex"))
        return syscall(SYS_futex, (int *)&board->value[10], FUTEX_WAIT, 0, NULL, NULL, 0);
    if (!strcmp(call, "sigwait"))
        return sigwaitinfo(&set, NULL);
    if (!strcmp(call, "sigsuspend")) {
        sigset_t none;
        sigemptyset(&none);
        return sigsuspend(&none) < 0 && errno == EINTR ? 0 : -1;
    }
    exit(105);
}

static void ignore(int sig) { (void)sig; add(&board->value[4], 1); }

int main(int argc, char **argv)
{
    struct timespec a, b;
    struct sigaction handler = {.sa_handler = ignore};
    open_board(argv);
    sigaction(SIGUSR1, &handler, NULL);
    sigaction(SIGUSR2, &handler, NULL);
    ready();
    clock_gettime(CLOCK_MONOTONIC, &a);
    errno = 0;
    board->value[1] = wait_in(argv[2], argc > 3 ? atol(argv[3]) : 400);
    board->value[2] = errno;
    clock_gettime(CLOCK_MONOTONIC, &b);
    board->value[3] = (b.tv_sec - a.tv_sec) * 1000 + (b.tv_nsec - a.tv_nsec) / 1000000;
    board->beats = 1;
    return 0;
}
