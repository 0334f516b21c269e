/* Threads that check themselves: their registers, flags and vector registers; and blocking calls that must neither fail
 * nor lose a wakeup. argv[2]: how many threads compute. */
#include "freeze_board.h"
#include <linux/futex.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/select.h>

#if defined(__x86_64__)
/* Fill every register but rsp and rbp with a pattern of its own, let time pass, compare; carry and direction too. */
static int registers_hold(uint64_t seed)
{
    uint64_t bad = 0, memory[14], vectors[32];
    for (int i = 0; i < 14; i++)
        memory[i] = seed * (i + 3) + i;
    for (int i = 0; i < 32; i++)
        vectors[i] = ~seed * (i + 7);
    uint64_t *m = memory, *v = vectors, *b = &bad;
    __asm__ volatile(
        "push %%rbp\n push %2\n push %1\n mov %0, %%rbp\n"
        "mov (%%rsp), %%rax\n"
#define V(n) "movdqu " #n "*16(%%rax), %%xmm" #n "\n"
        V(0) V(1) V(2) V(3) V(4) V(5) V(6) V(7) V(8) V(9) V(10) V(11) V(12) V(13) V(14) V(15)
#define L(i, r) "mov " #i "*8(%%rbp), %%" #r "\n"
        L(0, rax) L(1, rbx) L(2, rcx) L(3, rdx) L(4, rsi) L(5, rdi) L(6, r8) L(7, r9) L(8, r10) L(9, r11) L(10, r12)
        L(11, r13) L(12, r14) L(13, r15)
        "push $3000\n"
        "1: stc\n jnc 2f\n decq (%%rsp)\n jnz 1b\n"
        "stc\n pause\n pause\n pause\n pause\n jnc 2f\n"
#define C(i, r) "cmp " #i "*8(%%rbp), %%" #r "\n jne 2f\n"
        C(0, rax) C(1, rbx) C(2, rcx) C(3, rdx) C(4, rsi) C(5, rdi) C(6, r8) C(7, r9) C(8, r10) C(9, r11) C(10, r12)
        C(11, r13) C(12, r14) C(13, r15)
        "add $8, %%rsp\n mov (%%rsp), %%rax\n"
#define W(n) "movdqu " #n "*16(%%rax), %%xmm0\n"
#define X(n) "movdqu " #n "*16(%%rax), %%xmm15\n pcmpeqb %%xmm" #n ", %%xmm15\n pmovmskb %%xmm15, %%ecx\n cmp $0xffff, %%ecx\n jne 3f\n"
        X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14)
        "jmp 4f\n"
        "2: add $8, %%rsp\n"
        "3: mov 8(%%rsp), %%rax\n movq $1, (%%rax)\n"
        "4: add $16, %%rsp\n pop %%rbp\n"
        : "+r"(m), "+r"(v), "+r"(b)
        :
        : "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "cc", "memory",
          "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
          "xmm13", "xmm14", "xmm15");
    return !bad;
}
#else
static int registers_hold(uint64_t seed)
{
    uint64_t a = seed, b = ~seed;
    for (int i = 0; i < 3000; i++)
        __asm__ volatile("" : "+r"(a), "+r"(b));
    return a == seed && b == ~seed;
}
#endif

static void *computes(void *arg)
{
    for (uint64_t n = (uintptr_t)arg; !board->quit; n++) {
        if (!registers_hold(n))
            wrong("a register has changed");
        beat();
    }
    return NULL;
}

static int pipes[2], polled[2], watched[2];
static int word;

static void *reads(void *arg)
{
    unsigned char expected = 0, got;
    (void)arg;
    while (!board->quit) {
        ssize_t n = read(pipes[0], &got, 1);
        if (n != 1)
            wrong("read");
        else if (got != expected++)
            wrong("read another byte");
        add(&board->value[0], 1);
        for (int i = 0; i < 3; i++) {
            struct pollfd p = {polled[0], POLLIN, 0};
            if (i == 0 && (poll(&p, 1, -1) != 1 || read(polled[0], &got, 1) != 1))
                wrong("poll");
            if (i == 1) {
                fd_set set;
                FD_ZERO(&set);
                FD_SET(polled[0], &set);
                if (select(polled[0] + 1, &set, NULL, NULL, NULL) != 1 || read(polled[0], &got, 1) != 1)
                    wrong("select");
            }
            if (i == 2) {
                struct epoll_event e;
                int n = epoll_wait(watched[0], &e, 1, -1);
                if (n < 0 && errno == EINTR)
                    add(&board->eintr, 1);
                if (n != 1 || read(polled[0], &got, 1) != 1)
                    wrong("epoll_wait");
            }
        }
    }
    return NULL;
}

static void *writes(void *arg)
{
    unsigned char next = 0;
    struct timespec brief = {0, 200000};
    (void)arg;
    while (!board->quit) {
        if (write(pipes[1], &next, 1) != 1)
            wrong("write");
        next++;
        for (int i = 0; i < 3; i++) {
            if (nanosleep(&brief, NULL))
                wrong("nanosleep");
            if (write(polled[1], "x", 1) != 1)
                wrong("write");
        }
    }
    return NULL;
}

static void *futexes(void *arg)
{
    (void)arg;
    while (!board->quit) {
        struct timespec limit = {20, 0};
        if (syscall(SYS_futex, &word, FUTEX_WAIT, 0, &limit, NULL, 0) && errno != EAGAIN)
            wrong("futex");
        __atomic_store_n(&word, 0, __ATOMIC_SEQ_CST);
        add(&board->value[1], 1);
    }
    return NULL;
}

static void *wakes(void *arg)
{
    struct timespec brief = {0, 300000}, rest;
    (void)arg;
    while (!board->quit) {
        __atomic_store_n(&word, 1, __ATOMIC_SEQ_CST);
        syscall(SYS_futex, &word, FUTEX_WAKE, 1, NULL, NULL, 0);
        if (clock_nanosleep(CLOCK_MONOTONIC, 0, &brief, &rest))
            wrong("clock_nanosleep");
    }
    return NULL;
}

int main(int argc, char **argv)
{
    open_board(argv);
    int computing = argc > 2 ? atoi(argv[2]) : 2;
    if (pipe(pipes) || pipe(polled))
        return 103;
    struct epoll_event e = {.events = EPOLLIN};
    watched[0] = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_ctl(watched[0], EPOLL_CTL_ADD, polled[0], &e))
        return 104;
    int fds = dup(0);
    close(fds);
    for (int i = 0; i < computing; i++)
        start(computes, (void *)(uintptr_t)(i + 1));
    start(reads, NULL);
    start(writes, NULL);
    start(futexes, NULL);
    start(wakes, NULL);
    ready();
    struct timespec second = {0, 1000000};
    while (!board->quit) {
        if (nanosleep(&second, NULL))
            wrong("nanosleep of main");
        int fd = dup(0); /* the lowest free descriptor is always the same one, but for the moment of an injection */
        if (fd < fds || fd > fds + 1)
            wrong("a descriptor is left behind");
        close(fd);
        add(&board->value[2], 1);
    }
    return board->errors != 0;
}
