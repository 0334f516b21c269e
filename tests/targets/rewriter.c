/*
 * rewriter: a target for benchmarks. It fills memory with incompressible data and rewrites a share of it when told to.
 *
 *   rewriter --mib N                  one mapping of N MiB
 *   rewriter --vmas N --vma-kib K     N mappings of K KiB each, with gaps between them (in addition to --mib, if given)
 *   rewriter ... --rate P             from the start, rewrites P pages a second, chosen at random
 *
 *   ready PID                the first line of output
 *   dirty PERCENT SEED       rewrites this share of all pages, each once       ok PAGES
 *   stripe STEP SEED         rewrites every STEP-th page                       ok PAGES
 *   rate P                   rewrites P pages a second from now on (0: none)   ok
 *   written                  pages rewritten by the rate so far                ok PAGES
 *   quit (or end of input)   ends
 */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL

static size_t mib, vmas, vma_pages = 10;
static double rate;
static char *big;
static char **small; /* the address of each small mapping */
static size_t big_pages, pages;
static uint32_t *order; /* a permutation of the pages, of which `dirty` takes the first ones */
static uint64_t state = 88172645463325252ull;

static uint64_t xorshift(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	return state ^= state << 17;
}

static void rewrite(size_t page)
{
	uint64_t *words;

	if (page < big_pages)
		words = (uint64_t *)(void *)(big + page * PAGE);
	else
		words = (uint64_t *)(void *)(small[(page - big_pages) / vma_pages] + (page - big_pages) % vma_pages * PAGE);
	for (size_t j = 0; j < PAGE / 8; j++)
		words[j] = xorshift();
}

static char *map(size_t bytes)
{
	char *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED) {
		fprintf(stderr, "rewriter: mmap: %s\n", strerror(errno));
		exit(1);
	}
	return p;
}

static void allocate(void)
{
	big_pages = mib * 256;
	pages = big_pages + vmas * vma_pages;
	if (big_pages)
		big = map(mib << 20);
	small = (char **)(void *)map(vmas * sizeof(*small) + PAGE);
	order = (uint32_t *)(void *)map(pages * sizeof(*order) + PAGE);
	for (size_t n = 0; n < vmas; n++) { /* last of all, so that nothing comes to lie in a gap */
		char *p = map((vma_pages + 2) * PAGE);
		munmap(p, PAGE); /* the gaps: without them the kernel merges neighbours */
		munmap(p + (vma_pages + 1) * PAGE, PAGE);
		small[n] = p + PAGE;
	}
	for (size_t n = 0; n < pages; n++) {
		order[n] = (uint32_t)n;
		rewrite(n);
	}
}

/* The first `count` of a random permutation, so that no page is rewritten twice. */
static size_t dirty(double percent, uint64_t seed)
{
	size_t count = (size_t)((double)pages * percent / 100.0 + 0.5);

	state = seed * 2 + 1;
	for (int n = 0; n < 16; n++)
		xorshift();
	for (size_t n = 0; n < count && n < pages; n++) {
		size_t other = n + xorshift() % (pages - n);
		uint32_t page = order[other];
		order[other] = order[n];
		order[n] = page;
		rewrite(page);
	}
	return count < pages ? count : pages;
}

/* As many runs of pages as there can be. */
static size_t stripe(size_t step, uint64_t seed)
{
	size_t count = 0;

	state = seed * 2 + 1;
	for (size_t page = 0; page < pages; page += step, count++)
		rewrite(page);
	return count;
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Rewrite what the rate demands until there is something to read. */
static size_t run_free(size_t written)
{
	double start = now();
	size_t done = 0;
	struct pollfd p = {.fd = 0, .events = POLLIN};

	while (poll(&p, 1, rate > 0 ? 1 : -1) <= 0)
		for (size_t due = (size_t)((now() - start) * rate); rate > 0 && done < due; done++)
			rewrite(xorshift() % pages);
	return written + done;
}

static int serve(void)
{
	char line[200];
	size_t written = 0;
	double percent;
	unsigned long long seed;
	size_t step;

	for (;;) {
		written = run_free(written);
		if (!fgets(line, sizeof(line), stdin) || !strcmp(line, "quit\n"))
			return 0;
		if (sscanf(line, "dirty %lf %llu", &percent, &seed) == 2)
			printf("ok %zu\n", dirty(percent, seed));
		else if (sscanf(line, "stripe %zu %llu", &step, &seed) == 2 && step)
			printf("ok %zu\n", stripe(step, seed));
		else if (sscanf(line, "rate %lf", &rate) == 1)
			printf("ok\n");
		else if (!strcmp(line, "written\n"))
			printf("ok %zu\n", written);
		else
			printf("error: unknown command\n");
		fflush(stdout);
	}
}

int main(int argc, char **argv)
{
	static const struct option known[] = {
		{"mib", 1, NULL, 'm'}, {"vmas", 1, NULL, 'v'}, {"vma-kib", 1, NULL, 'k'}, {"rate", 1, NULL, 'r'}, {NULL, 0, NULL, 0},
	};
	int c;

	while ((c = getopt_long(argc, argv, "", known, NULL)) != -1) {
		switch (c) {
		case 'm': mib = strtoull(optarg, NULL, 0); break;
		case 'v': vmas = strtoull(optarg, NULL, 0); break;
		case 'k': vma_pages = strtoull(optarg, NULL, 0) / 4; break;
		case 'r': rate = atof(optarg); break;
		default: return 2;
		}
	}
	if ((!mib && !vmas) || !vma_pages) {
		fprintf(stderr, "usage: rewriter [--mib N] [--vmas N --vma-kib K] [--rate PAGES-A-SECOND]\n");
		return 2;
	}
	setvbuf(stdin, NULL, _IONBF, 0); /* poll sees what stdio has not taken */
	allocate();
	printf("ready %d\n", (int)getpid());
	fflush(stdout);
	return serve();
}
