/* Handlers whose frames are seen in memory: value[0] counts SIGUSR1, value[1] SIGALRM (a timer's),
 * value[2] SIGCHLD (of two children, when they stop). argv[2]: number of threads; argv[3]: microseconds between two
 * ticks of the timer, 0: there is none. */
#include "freeze_board.h"
#include <sys/prctl.h>
#include <sys/time.h>

static void count(int sig) { add(&board->value[sig == SIGUSR1 ? 0 : sig == SIGALRM ? 1 : 2], 1); }

static void *beats(void *arg)
{
    for (volatile uint64_t work = 0; !board->quit; work++)
        beat(); /* busy: the registers in a frame differ from those in the one before */
    return arg;
}

int main(int argc, char **argv)
{
    open_board(argv);
    for (int i = 0; i < 2; i++)
        if (fork() == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            for (;;)
                pause();
        }
    struct sigaction action = {.sa_handler = count, .sa_flags = SA_RESTART};
    sigaction(SIGUSR1, &action, NULL);
    sigaction(SIGALRM, &action, NULL);
    sigaction(SIGCHLD, &action, NULL);
    (void)argc;
    for (int i = 1; i < atoi(argv[2]); i++)
        start(beats, NULL);
    struct itimerval every = {{0, atoi(argv[3])}, {0, atoi(argv[3])}};
    setitimer(ITIMER_REAL, &every, NULL);
    ready();
    beats(NULL);
    return board->errors != 0;
}
