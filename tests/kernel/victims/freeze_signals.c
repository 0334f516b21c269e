/* Counts the signals it gets: value[0] SIGUSR1, value[1] realtime signals, value[2] the sum of their values,
 * value[3] SIGCONT. SIGTRAP is ignored, which must stay so. A realtime value out of order is an error. */
#include "freeze_board.h"

static void handler(int sig, siginfo_t *info, void *context)
{
    (void)context;
    if (sig == SIGUSR1)
        add(&board->value[0], 1);
    else if (sig == SIGCONT)
        add(&board->value[3], 1);
    else {
        if ((uint64_t)info->si_value.sival_int != board->value[1] + 1 || info->si_code != SI_QUEUE)
            wrong("a realtime signal out of order, or not as it was sent");
        add(&board->value[1], 1);
        add(&board->value[2], info->si_value.sival_int);
    }
}

int main(int argc, char **argv)
{
    (void)argc;
    open_board(argv);
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_RESTART}, old;
    sigaction(SIGUSR1, &action, NULL);
    sigaction(SIGCONT, &action, NULL);
    sigaction(SIGRTMIN, &action, NULL);
    signal(SIGTRAP, SIG_IGN);
    sigset_t mask, now;
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR2);
    sigprocmask(SIG_SETMASK, &mask, NULL);
    ready();
    while (!board->quit) {
        beat();
        sigprocmask(SIG_SETMASK, NULL, &now);
        if (memcmp(&mask, &now, 8))
            wrong("another signal mask");
        sigaction(SIGTRAP, NULL, &old);
        if (old.sa_handler != SIG_IGN)
            wrong("SIGTRAP is no longer ignored");
    }
    return board->errors != 0;
}
