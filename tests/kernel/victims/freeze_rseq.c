/* Nearly always inside a restartable sequence, which checks that it is still announced when it commits: the kernel takes
 * the announcement back when it sees the thread elsewhere. */
#include "freeze_board.h"
#include <linux/rseq.h>
#include <stddef.h>

extern const ptrdiff_t __rseq_offset __attribute__((weak));
extern const unsigned int __rseq_size __attribute__((weak));

int main(int argc, char **argv)
{
    (void)argc;
    open_board(argv);
    if (!&__rseq_size || !__rseq_size)
        return 77;
    struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
    uint64_t broken = 0, aborted = 0;
    ready();
    while (!board->quit) {
#if defined(__x86_64__)
        __asm__ volatile goto(
            ".pushsection __rseq_cs, \"aw\"\n .balign 32\n"
            "3: .long 0, 0\n .quad 1f, 2f - 1f, 4f\n .popsection\n"
            "lea 3b(%%rip), %%rax\n mov %%rax, 8(%0)\n"
            "1: mov $100000, %%ecx\n"
            "5: dec %%ecx\n jnz 5b\n"
            "cmp %%rax, 8(%0)\n jne %l[unannounced]\n"
            "2: jmp %l[committed]\n"
            ".byte 0x0f, 0xb9, 0x3d\n .long 0x53053053\n"
            "4: jmp %l[abort]\n"
            :
            : "r"(area)
            : "rax", "rcx", "memory", "cc"
            : unannounced, committed, abort);
#elif defined(__aarch64__)
        __asm__ volatile goto(
            ".pushsection __rseq_cs, \"aw\"\n .balign 32\n"
            "3: .long 0, 0\n .quad 1f, 2f - 1f, 4f\n .popsection\n"
            "adrp x9, 3b\n add x9, x9, :lo12:3b\n str x9, [%0, #8]\n"
            "1: mov w10, #0x10000\n"
            "5: sub w10, w10, #1\n cbnz w10, 5b\n"
            "ldr x10, [%0, #8]\n cmp x10, x9\n b.ne %l[unannounced]\n"
            "2: b %l[committed]\n"
            ".inst 0xd428bc00\n"
            "4: b %l[abort]\n"
            :
            : "r"(area)
            : "x9", "x10", "memory", "cc"
            : unannounced, committed, abort);
#endif
    committed:
        beat();
        continue;
    abort:
        board->value[0] = ++aborted;
        continue;
    unannounced:
        board->value[1] = ++broken;
        wrong("a restartable sequence went on after it was interrupted");
    }
    return 0;
}
