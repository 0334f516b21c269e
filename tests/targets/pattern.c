/* Random numbers, the expected contents of pages, and what happens when they differ. */
#include "churn.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15u;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
	return x ^ (x >> 31);
}

uint64_t rnd(struct worker *w)
{
	return mix(w->random++);
}

size_t below(struct worker *w, size_t n)
{
	return n ? rnd(w) % n : 0;
}

bool one_in(struct worker *w, unsigned n)
{
	return rnd(w) % n == 0;
}

void fill_words(uint64_t *words, size_t count, uint64_t key)
{
	for (size_t j = 0; j < count; j++)
		words[j] = mix(key + j * 0xd1b54a32d192ed03u);
}

static uint64_t page_key(const struct area *a, size_t i, uint32_t version)
{
	return mix(options.seed ^ mix(a->id ^ mix((a->first + i) ^ ((uint64_t)version << 32))));
}

size_t poke_offset(const struct area *a, size_t i, struct shadow s)
{
	return page_key(a, i, s.version ^ 0x55555555u) % PAGE;
}

/* The content that page i of an area must have if its shadow entry is s. */
void expect(const struct area *a, size_t i, struct shadow s, unsigned char *out)
{
	bool file = a->kind == K_FILE || a->kind == K_SHARED_FILE;

	if (s.version == VERSION_ZERO || (s.version == 0 && !file))
		memset(out, 0, PAGE);
	else
		fill_words((uint64_t *)(void *)out, PAGE / 8, page_key(a, i, s.version));
	if (s.poke)
		out[poke_offset(a, i, s)] ^= s.poke;
}

/* Something is wrong: say it on both outputs, in one write each, and end this process. */
void bad(const char *what, const void *at)
{
	char text[160];
	int n = snprintf(text, sizeof(text), "bad %s %#lx (pid %d)\n", what, (unsigned long)at, (int)getpid());

	if (!atomic_exchange(&global->failed, true))
		write_all(1, text, (size_t)n);
	write_all(2, text, (size_t)n);
	_exit(BAD_EXIT);
}
