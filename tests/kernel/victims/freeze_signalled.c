/* Waits for ever, with SIGUSR2 let through for the time of the wait only: so each one that comes runs its handler, which
 * value[0] counts, and ends one wait with EINTR, which value[1] counts. Nothing else ends a wait. */
#include "freeze_board.h"
#include <sys/epoll.h>

static void count(int sig)
{
    (void)sig;
    add(&board->value[0], 1);
}

int main(int argc, char **argv)
{
    (void)argc;
    open_board(argv);
    struct sigaction handler = {.sa_handler = count};
    struct epoll_event e = {.events = EPOLLIN};
    sigset_t set, none;
    int ep = epoll_create1(EPOLL_CLOEXEC);
    sigemptyset(&none);
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    sigaction(SIGUSR2, &handler, NULL);
    sigprocmask(SIG_BLOCK, &set, NULL);
    if (epoll_ctl(ep, EPOLL_CTL_ADD, 0, &e))
        return 104;
    ready();
    while (!board->quit) {
        if (epoll_pwait(ep, &e, 1, -1, &none) != -1 || errno != EINTR)
            wrong("epoll_pwait");
        add(&board->value[1], 1);
        beat();
    }
    return board->errors != 0;
}
