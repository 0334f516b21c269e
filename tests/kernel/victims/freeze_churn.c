/* Threads and processes that come and go all the time. argv[2]: how many threads do that. */
#include "freeze_board.h"

static void *nothing(void *arg)
{
    *(volatile int *)arg += 1;
    beat();
    return NULL;
}

static void *churns(void *arg)
{
    int self = (int)(uintptr_t)arg;
    while (!board->quit) {
        volatile int done = 0;
        pthread_t a = start(nothing, (void *)&done);
        pthread_join(a, NULL);
        if (done != 1)
            wrong("a thread did not run once");
        if (self % 8 == 0) {
            pid_t pid = fork();
            if (pid == 0) {
                for (int i = 0; i < 50; i++)
                    beat();
                _exit(7);
            }
            int status;
            if (pid < 0 || waitpid(pid, &status, 0) != pid || !WIFEXITED(status) || WEXITSTATUS(status) != 7)
                wrong("a child did not exit as it should");
            add(&board->value[1], 1);
        }
        add(&board->value[0], 1);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    open_board(argv);
    int threads = argc > 2 ? atoi(argv[2]) : 64;
    for (int i = 0; i < threads; i++)
        start(churns, (void *)(uintptr_t)i);
    ready();
    while (!board->quit)
        usleep(1000);
    return board->errors != 0;
}
