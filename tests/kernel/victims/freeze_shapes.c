/* Process trees of odd shapes, argv[2]. */
#include "freeze_board.h"
#include <sys/prctl.h>

static void *beats(void *arg)
{
    (void)arg;
    while (!board->quit) {
        beat();
        usleep(100);
    }
    exit(0);
}

static void *pauses(void *arg)
{
    for (;;)
        pause();
    return arg;
}

static void *execs(void *arg)
{
    char **argv = arg;
    execv("/proc/self/exe", argv);
    wrong("exec");
    return NULL;
}

/* A tree `depth` deep in which each process has two children and a thread that beats. */
static void tree(int depth)
{
    for (int i = 0; depth > 0 && i < 2; i++)
        if (fork() == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            depth--;
            i = -1;
        }
    add(&board->value[0], 1);
    beats(NULL);
}

int main(int argc, char **argv)
{
    open_board(argv);
    const char *shape = argv[2];
    int number = argc > 3 ? atoi(argv[3]) : 0;
    if (!strcmp(shape, "threads")) {
        for (int i = 1; i < number; i++)
            start(pauses, NULL);
        ready();
        beats(NULL);
    }
    if (!strcmp(shape, "no leader")) { /* the leader exits, others go on */
        start(beats, NULL);
        start(pauses, NULL);
        ready();
        pthread_exit(NULL);
    }
    if (!strcmp(shape, "tree")) {
        if (fork() == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            tree(number);
        }
        while (board->value[0] < (2u << number) - 1)
            usleep(1000);
        ready();
        beats(NULL);
    }
    if (!strcmp(shape, "zombie child")) {
        if (fork() == 0)
            _exit(0);
        siginfo_t info;
        waitid(P_ALL, 0, &info, WEXITED | WNOWAIT);
        ready();
        beats(NULL);
    }
    if (!strcmp(shape, "vfork")) { /* the child goes on until told to end; its parent cannot be stopped meanwhile */
        ready();
        if (vfork() == 0) {
            while (!board->quit) {
                beat();
                usleep(100);
            }
            _exit(0);
        }
        add(&board->value[1], 1);
        pauses(NULL);
    }
    if (!strcmp(shape, "exec")) { /* many threads, any of which starts the program again */
        for (int i = 0; i < number; i++)
            start(pauses, NULL);
        start(execs, argv);
        if (board->value[2]++ == 0)
            ready();
        beat();
        pauses(NULL);
    }
    if (!strcmp(shape, "io worker")) { /* a thread of the kernel's, which is among the process's threads */
        uint32_t params[30] = {0, 0, 2 /* IORING_SETUP_SQPOLL */, 0, 1000};
        if (syscall(425 /* io_uring_setup */, 8, params) < 0)
            return 77;
        ready();
        beats(NULL);
    }
    if (!strcmp(shape, "spawner")) { /* posix_spawn-like: vfork and exec, all the time */
        ready();
        while (!board->quit) {
            pid_t pid = vfork();
            if (pid == 0) {
                execl("/bin/true", "true", NULL);
                _exit(1);
            }
            int status;
            if (waitpid(pid, &status, 0) != pid || status)
                wrong("a child failed");
            beat();
        }
        return 0;
    }
    return 106;
}
