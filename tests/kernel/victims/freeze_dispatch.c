/* Has its system calls sent back to itself as SIGSYS, but for those that the C library makes: it owns that range. */
#include "freeze_board.h"
#include <sys/prctl.h>

#ifndef PR_SET_SYSCALL_USER_DISPATCH
#define PR_SET_SYSCALL_USER_DISPATCH 59
#endif

static volatile char selector; /* 0: allow */

int main(int argc, char **argv)
{
    (void)argc;
    open_board(argv);
    if (prctl(PR_SET_SYSCALL_USER_DISPATCH, 1, 0, 0, &selector))
        return 77;
    ready();
    while (!board->quit) {
        beat();
        usleep(100);
    }
    return 0;
}
