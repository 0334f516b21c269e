/* Exchanges blocks of memory, as an allocator does: value[0] counts the exchanges, value[1] the failures.
 * It rests while value[2] is set. argv[2]: number of blocks of 16 KiB. */
#include "freeze_board.h"

int main(int argc, char **argv)
{
    const size_t size = 16 << 10;
    open_board(argv);
    long blocks = atol(argv[2]);
    char **block = malloc(blocks * sizeof *block);
    unsigned seed = 1;
    (void)argc;
    for (long i = 0; i < blocks; i++)
        block[i] = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ready();
    while (!board->quit) {
        if (board->value[2]) {
            beat();
            usleep(1000);
            continue;
        }
        long i = rand_r(&seed) % blocks;
        if (munmap(block[i], size))
            add(&board->value[1], 1);
        block[i] = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (block[i] == MAP_FAILED) {
            add(&board->value[1], 1);
            break;
        }
        block[i][0] = (char)i;
        add(&board->value[0], 1);
        beat();
    }
    return board->value[1] != 0;
}
