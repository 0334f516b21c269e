/* One wait with an end, argv[2], after argv[3] ms, that must go on through stops. A child reads stdin: at its first byte
 * it lets happen what is waited for. SIGUSR1 is blocked; SIGUSR2 ends calls.
 * value[0] is set before the call; value[1] is its result, value[2] its errno, value[3] the milliseconds it took,
 * value[4] how many signals came, value[5] is the timeout's register (r10, x3) after it; beats is 1 when it is over. */
#include "freeze_board.h"
#include <linux/aio_abi.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>

static struct sockaddr_un name = {AF_UNIX};
static struct timespec end;
static struct epoll_event event = {.events = EPOLLIN};
static struct sembuf down = {0, -1, 0}, up = {0, 1, 0};
static struct io_event io_done;
static aio_context_t aio;
static char big[1 << 20];
static int pair[2], trigger[2], listener, client, ep, sem, ring;
static sigset_t set;

static long raw(long nr, long a, void *b, long c, long d, long e, long f)
{
#ifdef __x86_64__
    long result;
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    __asm__ volatile("syscall" : "=a"(result), "+r"(r10)
                     : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
    board->value[5] = r10;
#else
    register long x8 __asm__("x8") = nr, result __asm__("x0") = a, x2 __asm__("x2") = c, x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e, x5 __asm__("x5") = f;
    register void *x1 __asm__("x1") = b;
    __asm__ volatile("svc #0" : "+r"(result), "+r"(x3) : "r"(x8), "r"(x1), "r"(x2), "r"(x4), "r"(x5) : "memory");
    board->value[5] = x3;
#endif
    if (result >= 0)
        return result;
    errno = -result;
    return -1;
}

static long wait_in(const char *call, long ms)
{
    struct iovec iov = {big, 1};
    struct mmsghdr message = {.msg_hdr = {.msg_iov = &iov, .msg_iovlen = 1}};
    int is_out = !strncmp(call, "send", 4) || !strncmp(call, "write", 5);
    if (is_out)
        while (send(pair[0], big, sizeof big, MSG_DONTWAIT) > 0)
            ;
    errno = 0;
    board->value[0] = 1;
    if (!strcmp(call, "recv"))
        return recv(pair[0], big, 1, 0);
    if (!strcmp(call, "recvmsg"))
        return recvmsg(pair[0], &message.msg_hdr, 0);
    if (!strcmp(call, "recvmmsg"))
        return recvmmsg(pair[0], &message, 1, 0, NULL);
    if (!strcmp(call, "read"))
        return read(pair[0], big, 1);
    if (!strcmp(call, "send"))
        return send(pair[0], big, 1, 0);
    if (!strcmp(call, "sendmsg"))
        return sendmsg(pair[0], &message.msg_hdr, 0);
    if (!strcmp(call, "write"))
        return write(pair[0], big, 1);
    if (!strcmp(call, "accept"))
        return accept(listener, NULL, NULL) < 0 ? -1 : 1;
    if (!strcmp(call, "connect"))
        return connect(client, (void *)&name, sizeof name);
    if (!strcmp(call, "epoll_wait"))
        return epoll_wait(ep, &event, 1, ms);
    if (!strcmp(call, "epoll_pwait"))
        return epoll_pwait(ep, &event, 1, ms, &set);
    if (!strcmp(call, "epoll_pwait by itself"))
        return raw(SYS_epoll_pwait, ep, &event, 1, ms, 0, 8);
    if (!strcmp(call, "epoll_pwait2"))
        return syscall(441, ep, &event, 1, &end, NULL, 8);
    if (!strcmp(call, "sigtimedwait"))
        return sigtimedwait(&set, NULL, &end);
    if (!strcmp(call, "semtimedop"))
        return semtimedop(sem, &down, 1, &end);
    if (!strcmp(call, "io_getevents"))
        return syscall(SYS_io_getevents, aio, 1L, 1L, &io_done, &end);
    if (!strcmp(call, "io_uring_enter")) {
        struct { uint64_t sigmask; uint32_t size, min_wait; struct timespec *ts; } arg = {0, 8, 0, &end};
        return syscall(SYS_io_uring_enter, ring, 0, 1, 9, &arg, sizeof arg); /* GETEVENTS, EXT_ARG */
    }
    if (!strcmp(call, "io_uring_enter for ever"))
        return syscall(SYS_io_uring_enter, ring, 0, 1, 1, NULL, 0);
    exit(105);
}

/* A ring that polls the trigger. */
static int make_ring(void)
{
    struct io_uring_params p = {0};
    int fd = syscall(SYS_io_uring_setup, 1, &p);
    if (fd < 0)
        exit(77);
    char *sq = mmap(NULL, p.sq_off.array + 4, PROT_READ | PROT_WRITE, MAP_SHARED, fd, IORING_OFF_SQ_RING);
    struct io_uring_sqe *sqe = mmap(NULL, 64, PROT_READ | PROT_WRITE, MAP_SHARED, fd, IORING_OFF_SQES);
    if (sq == MAP_FAILED || sqe == MAP_FAILED)
        exit(108);
    *sqe = (struct io_uring_sqe){.opcode = IORING_OP_POLL_ADD, .fd = trigger[0], .poll32_events = POLLIN};
    *(unsigned *)(sq + p.sq_off.array) = 0;
    __atomic_store_n((unsigned *)(sq + p.sq_off.tail), 1, __ATOMIC_RELEASE);
    if (syscall(SYS_io_uring_enter, fd, 1, 0, 0, NULL, 0) != 1)
        exit(109);
    return fd;
}

/* What is waited for, in a process of its own. */
static void let_happen(const char *call, pid_t who)
{
    char byte;
    if (read(0, &byte, 1) != 1)
        _exit(0);
    if (!strcmp(call, "accept"))
        connect(client, (void *)&name, sizeof name);
    else if (!strcmp(call, "connect"))
        accept(listener, NULL, NULL);
    else if (!strncmp(call, "send", 4) || !strncmp(call, "write", 5))
        while (recv(pair[1], big, sizeof big, MSG_DONTWAIT) > 0)
            ;
    else if (!strcmp(call, "sigtimedwait"))
        kill(who, SIGUSR1);
    else if (!strcmp(call, "semtimedop"))
        semop(sem, &up, 1);
    else if (write(pair[1], "x", 1) + write(trigger[1], "x", 1) != 2)
        wrong("write");
    pause();
}

static void set_up(const char *call, long ms)
{
    struct timeval tv = {ms / 1000, ms % 1000 * 1000};
    int one = socket(AF_UNIX, SOCK_STREAM, 0);
    end = (struct timespec){ms / 1000, ms % 1000 * 1000000};
    client = socket(AF_UNIX, SOCK_STREAM, 0);
    listener = socket(AF_UNIX, SOCK_STREAM, 0);
    snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "incdump-timed-%d", getpid());
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) || pipe(trigger) || bind(listener, (void *)&name, sizeof name))
        exit(106);
    listen(listener, 0);
    int sockets[] = {pair[0], listener, client};
    for (int i = 0; i < 3; i++) {
        setsockopt(sockets[i], SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
        setsockopt(sockets[i], SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof tv);
    }
    if (!strcmp(call, "connect") && connect(one, (void *)&name, sizeof name))
        exit(107);
    ep = epoll_create1(0);
    epoll_ctl(ep, EPOLL_CTL_ADD, trigger[0], &event);
    unshare(CLONE_NEWIPC); /* a semaphore that goes with us */
    sem = semget(IPC_PRIVATE, 1, 0600);
    if (!strncmp(call, "io_uring_enter", 14))
        ring = make_ring();
    if (!strcmp(call, "io_getevents")) {
        struct iocb cb = {.aio_lio_opcode = IOCB_CMD_POLL, .aio_fildes = trigger[0], .aio_buf = POLLIN}, *cbs = &cb;
        if (syscall(SYS_io_setup, 1, &aio) || syscall(SYS_io_submit, aio, 1L, &cbs) != 1)
            exit(77);
    }
}

static void ignore(int sig) { (void)sig; add(&board->value[4], 1); }

int main(int argc, char **argv)
{
    struct timespec a, b;
    struct sigaction handler = {.sa_handler = ignore, .sa_flags = SA_RESTART}; /* such a wait fails all the same */
    pid_t self = getpid();
    open_board(argv);
    sigaction(SIGUSR1, &handler, NULL);
    sigaction(SIGUSR2, &handler, NULL);
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigprocmask(SIG_BLOCK, &set, NULL);
    set_up(argv[2], atol(argv[3]));
    if (!fork())
        let_happen(argv[2], self);
    ready();
    clock_gettime(CLOCK_MONOTONIC, &a);
    board->value[1] = wait_in(argv[2], atol(argv[3]));
    board->value[2] = errno;
    clock_gettime(CLOCK_MONOTONIC, &b);
    board->value[3] = (b.tv_sec - a.tv_sec) * 1000 + (b.tv_nsec - a.tv_nsec) / 1000000;
    if (end.tv_sec * 1000 + end.tv_nsec / 1000000 != atol(argv[3]))
        wrong("the program's own timespec was changed");
    board->beats = 1;
    return board->errors != 0;
}
