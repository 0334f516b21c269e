/* Threads that check themselves: their registers, flags and vector registers; and blocking calls that must neither fail
 * nor lose a wakeup. argv[2]: how many threads compute. argv[3], if there: descriptors may appear. */
#include "freeze_board.h"
#include <linux/futex.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/select.h>

#if defined(__x86_64__)
/* int compare(memory, vectors): fill every register but rsp with what the two arrays hold, set the carry flag, let time
 * pass (dec leaves the carry flag alone), and see whether all is as it was. */
#define LOAD(i, r) "mov " #i "*8(%rdi), %" #r "\n"
#define SAME(i, r) "cmp " #i "*8(%rdi), %" #r "\n jne 9f\n"
#define VLOAD(n) "movdqu " #n "*16(%rsi), %xmm" #n "\n"
#define VSAME(n) \
    "movdqu " #n "*16(%rsi), %xmm0\n pcmpeqb %xmm" #n ", %xmm0\n pmovmskb %xmm0, %ecx\n cmp $0xffff, %ecx\n jne 9f\n"
__asm__(
    ".text\ncompare:\n"
    "push %rbx\n push %rbp\n push %r12\n push %r13\n push %r14\n push %r15\n push %rdi\n push %rsi\n"
    VLOAD(0) VLOAD(1) VLOAD(2) VLOAD(3) VLOAD(4) VLOAD(5) VLOAD(6) VLOAD(7)
    VLOAD(8) VLOAD(9) VLOAD(10) VLOAD(11) VLOAD(12) VLOAD(13) VLOAD(14) VLOAD(15)
    LOAD(0, rax) LOAD(1, rbx) LOAD(2, rcx) LOAD(3, rdx) LOAD(4, rbp) LOAD(5, rsi) LOAD(6, r8) LOAD(7, r9)
    LOAD(8, r10) LOAD(9, r11) LOAD(10, r12) LOAD(11, r13) LOAD(12, r14) LOAD(13, r15)
    "push $3000\n stc\n"
    "1: decq (%rsp)\n jnz 1b\n"
    "lea 8(%rsp), %rsp\n jnc 9f\n"
    "cmp 8(%rsp), %rdi\n jne 9f\n"
    SAME(0, rax) SAME(1, rbx) SAME(2, rcx) SAME(3, rdx) SAME(4, rbp) SAME(5, rsi) SAME(6, r8) SAME(7, r9)
    SAME(8, r10) SAME(9, r11) SAME(10, r12) SAME(11, r13) SAME(12, r14) SAME(13, r15)
    "mov (%rsp), %rsi\n movdqu %xmm0, -32(%rsp)\n"
    "mov -32(%rsp), %rax\n cmp (%rsi), %rax\n jne 9f\n mov -24(%rsp), %rax\n cmp 8(%rsi), %rax\n jne 9f\n"
    VSAME(1) VSAME(2) VSAME(3) VSAME(4) VSAME(5) VSAME(6) VSAME(7)
    VSAME(8) VSAME(9) VSAME(10) VSAME(11) VSAME(12) VSAME(13) VSAME(14) VSAME(15)
    "mov $1, %eax\n jmp 8f\n"
    "9: xor %eax, %eax\n"
    "8: add $16, %rsp\n pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbp\n pop %rbx\n ret\n");
int compare(const uint64_t *memory, const uint64_t *vectors);

static int registers_hold(uint64_t seed)
{
    uint64_t memory[14], vectors[32];
    for (int i = 0; i < 14; i++)
        memory[i] = seed * (i + 3) + i;
    for (int i = 0; i < 32; i++)
        vectors[i] = ~seed * (i + 7);
    return compare(memory, vectors);
}
#elif defined(__aarch64__)
/* The same, of all registers but sp: x27 counts up and x28 down meanwhile; Z, C and V are set. */
#define VPAIR(n, m) "ldp q" #n ", q" #m ", [x1, #" #n "*16]\n"
#define PAIR(n, m) "ldp x" #n ", x" #m ", [x0, #" #n "*8]\n"
#define SAME(n) "ldr x27, [x28, #" #n "*8]\n eor x27, x27, x" #n "\n cbnz x27, 9f\n"
#define VSAME(n) \
    "ldr q0, [x28, #" #n "*16]\n eor v0.16b, v0.16b, v" #n ".16b\n" \
    "umov x0, v0.d[0]\n umov x1, v0.d[1]\n orr x0, x0, x1\n cbnz x0, 9f\n"
__asm__(
    ".text\ncompare:\n"
    "stp x29, x30, [sp, #-176]!\n stp x19, x20, [sp, #16]\n stp x21, x22, [sp, #32]\n stp x23, x24, [sp, #48]\n"
    "stp x25, x26, [sp, #64]\n stp x27, x28, [sp, #80]\n stp d8, d9, [sp, #96]\n stp d10, d11, [sp, #112]\n"
    "stp d12, d13, [sp, #128]\n stp d14, d15, [sp, #144]\n stp x0, x1, [sp, #160]\n"
    VPAIR(0, 1) VPAIR(2, 3) VPAIR(4, 5) VPAIR(6, 7) VPAIR(8, 9) VPAIR(10, 11) VPAIR(12, 13) VPAIR(14, 15)
    VPAIR(16, 17) VPAIR(18, 19) VPAIR(20, 21) VPAIR(22, 23) VPAIR(24, 25) VPAIR(26, 27) VPAIR(28, 29) VPAIR(30, 31)
    PAIR(2, 3) PAIR(4, 5) PAIR(6, 7) PAIR(8, 9) PAIR(10, 11) PAIR(12, 13) PAIR(14, 15) PAIR(16, 17) PAIR(18, 19)
    PAIR(20, 21) PAIR(22, 23) PAIR(24, 25) PAIR(26, 27) PAIR(29, 30) PAIR(0, 1)
    "mov x27, #0x70000000\n msr nzcv, x27\n mov x27, #0\n mov x28, #3000\n"
    "1: add x27, x27, #1\n sub x28, x28, #1\n cbnz x28, 1b\n"
    "sub x27, x27, #3000\n cbnz x27, 9f\n"
    "mrs x27, nzcv\n mov x28, #0x70000000\n eor x27, x27, x28\n cbnz x27, 9f\n"
    "ldr x28, [sp, #160]\n"
    SAME(0) SAME(1) SAME(2) SAME(3) SAME(4) SAME(5) SAME(6) SAME(7) SAME(8) SAME(9) SAME(10) SAME(11) SAME(12) SAME(13)
    SAME(14) SAME(15) SAME(16) SAME(17) SAME(18) SAME(19) SAME(20) SAME(21) SAME(22) SAME(23) SAME(24) SAME(25)
    SAME(26) SAME(29) SAME(30)
    "ldr x28, [sp, #168]\n"
    "ldp x0, x1, [x28]\n umov x2, v0.d[0]\n umov x3, v0.d[1]\n cmp x0, x2\n ccmp x1, x3, #0, eq\n b.ne 9f\n"
    VSAME(1) VSAME(2) VSAME(3) VSAME(4) VSAME(5) VSAME(6) VSAME(7) VSAME(8) VSAME(9) VSAME(10) VSAME(11) VSAME(12)
    VSAME(13) VSAME(14) VSAME(15) VSAME(16) VSAME(17) VSAME(18) VSAME(19) VSAME(20) VSAME(21) VSAME(22) VSAME(23)
    VSAME(24) VSAME(25) VSAME(26) VSAME(27) VSAME(28) VSAME(29) VSAME(30) VSAME(31)
    "mov w0, #1\n b 8f\n"
    "9: mov w0, #0\n"
    "8: ldp x19, x20, [sp, #16]\n ldp x21, x22, [sp, #32]\n ldp x23, x24, [sp, #48]\n ldp x25, x26, [sp, #64]\n"
    "ldp x27, x28, [sp, #80]\n ldp d8, d9, [sp, #96]\n ldp d10, d11, [sp, #112]\n ldp d12, d13, [sp, #128]\n"
    "ldp d14, d15, [sp, #144]\n ldp x29, x30, [sp], #176\n ret\n");
int compare(const uint64_t *memory, const uint64_t *vectors);

static int registers_hold(uint64_t seed)
{
    uint64_t memory[31], vectors[64];
    for (int i = 0; i < 31; i++)
        memory[i] = seed * (i + 3) + i;
    for (int i = 0; i < 64; i++)
        vectors[i] = ~seed * (i + 7);
    return compare(memory, vectors);
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
                int n;
                while ((n = epoll_wait(watched[0], &e, 1, -1)) < 0 && errno == EINTR)
                    add(&board->eintr, 1); /* signal(7) allows that; the test may not */
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
        if (argc < 4 && (fd < fds || fd > fds + 1))
            wrong("a descriptor is left behind");
        close(fd);
        add(&board->value[2], 1);
    }
    return board->errors != 0;
}
