/* Has argv[2] MiB of huge pages, where the kernel gives some: value[0] is where they begin. It writes to each of their
 * pages when value[1] is set, and sets that back. */
#include "freeze_board.h"

int main(int argc, char **argv)
{
    open_board(argv);
    size_t size = (size_t)atol(argv[2]) << 20;
    (void)argc;
    char *raw = mmap(NULL, size + (2 << 20), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *place = (char *)(((uintptr_t)raw + (2 << 20) - 1) & ~(uintptr_t)((2 << 20) - 1));
    if (raw == MAP_FAILED || madvise(place, size, MADV_HUGEPAGE))
        return 77;
    memset(place, 1, size);
    board->value[0] = (uintptr_t)place;
    ready();
    while (!board->quit) {
        if (board->value[1]) {
            for (size_t at = 0; at < size; at += 4096)
                place[at]++;
            board->value[1] = 0;
        }
        beat();
        usleep(1000);
    }
    return 0;
}
