/*
 * churn: a busy process tree that checks itself.
 *
 * Every page that the program manages has an expected content, which follows from (seed, identity of the page, version):
 * the version of each page is kept in a shadow table, in a mapping of its own. A worker is one thread with its own random
 * numbers, its own areas and its own shadow, so that workers share nothing (but the segments of procs.c, under a lock).
 *
 *   pattern.c     random numbers, expected contents, shadow entries
 *   areas.c       making, dropping and verifying areas
 *   ops.c         operations on memory
 *   procs.c       operations with processes, threads, signals, registers, shared segments
 *   churn_main.c  options, control thread, commands
 */
#ifndef CHURN_H
#define CHURN_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PAGE 4096UL
#define HUGE_PAGE (2UL << 20)
#define MAX_AREAS 64
#define MAX_CHILDREN 2
#define MAX_HELPERS 2
#define MAX_ZOMBIES 3
#define MAX_WORKERS 64
#define MAX_PROCESSES 16
#define SEGMENTS 3
#define SEGMENT_PAGES 48
#define BAD_EXIT 99

enum kind {
	K_NONE, K_ANON, K_THP, K_FILE, K_SHARED_FILE, K_DROPPABLE, K_SPARSE, K_MEMFD, K_SYSV, K_HEAP, K_HUGETLB, K_COUNT
};

/* What may be done with an area of a kind, beside writing to its pages. */
enum {
	CAN_DROP = 1,     /* MADV_DONTNEED brings back the base content */
	CAN_PROTECT = 2,  /* mprotect, whole or in part */
	CAN_RESIZE = 4,   /* mremap to another size */
	CAN_MOVE = 8,     /* mremap to another address */
	CAN_SPLIT = 16,   /* munmap of a piece out of the middle */
	CAN_FREE = 32,    /* MADV_FREE */
	CAN_GUARD = 64,   /* MADV_GUARD_INSTALL */
	CAN_REPLACE = 128 /* munmap and mmap at the same address */
};
extern const unsigned kind_can[K_COUNT];

/* A shadow entry: version (32 bits), poke (8), protection (2), state (2). Version 0 is the base content of the area. */
enum state { S_NORMAL, S_MAYBE /* as written, or zeros: MADV_FREE */, S_GUARD, S_BEYOND /* beyond the end of the file */ };
enum prot { P_RW, P_READ, P_NONE };
#define VERSION_ZERO 0xffffffffu /* the page was overwritten with zeros */

struct shadow {
	uint32_t version;
	uint8_t poke, prot, state, unused;
};

struct area {
	enum kind kind;
	char *base;            /* address of page 0 */
	char *alias;           /* a second mapping of the same pages, or NULL */
	size_t pages, stride;  /* stride: bytes from page to page */
	size_t mapped;         /* bytes mapped at base, for munmap */
	uint64_t id;           /* page i is (id, first + i) */
	size_t first, file_pages;
	int fd;                /* of the file or the memfd, or -1 */
	struct shadow *shadow;
};

struct frame {
	struct frame *up;
	uint64_t *words;
	size_t count;
	uint64_t key;
};

struct child {
	pid_t pid;
	int fd, unanswered, left;
};

struct helper {
	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t leave;
	bool used, leaving;
	size_t pages;
	uint64_t key;
};

struct worker {
	uint64_t random, next_id;
	uint32_t next_version;
	int process, index, generation; /* generation: 0, or 1 in a child made by the operation "fork" */
	size_t capacity, budget, used;  /* pages: of one area at most, of all areas, of all areas now */
	struct area areas[MAX_AREAS];
	struct shadow *shadows;
	struct frame *frames;
	size_t stack_pages;
	bool unwind, quit;
	long ops_left; /* < 0: until told to stop */
	unsigned long seen, done_ops;
	double started, pages_dirtied;
	struct child children[MAX_CHILDREN];
	struct helper helpers[MAX_HELPERS];
	pid_t zombies[MAX_ZOMBIES];
	int signals_pending, next_signal;
	unsigned char page[PAGE], expected[PAGE];
};

struct options {
	uint64_t seed;
	int threads, processes;
	size_t mib;
	uint64_t ops;
	bool free_run;
	double dirty_rate, seconds;
	const char *dir;
};

struct operation {
	const char *name;
	unsigned weight;
	bool (*run)(struct worker *w); /* false: nothing to do this time */
	bool in_children;
};
extern const struct operation operations[];
extern const size_t operation_count;

/* In memory shared by all processes. */
struct global {
	atomic_ulong count[64];
	atomic_ulong dirtied, eintr;
	atomic_bool failed;
};
extern struct global *global;
extern struct options options;

/* pattern.c */
uint64_t mix(uint64_t x);
uint64_t rnd(struct worker *w);
size_t below(struct worker *w, size_t n);
bool one_in(struct worker *w, unsigned n);
void fill_words(uint64_t *words, size_t count, uint64_t key);
void expect(const struct area *a, size_t i, struct shadow s, unsigned char *out);
size_t poke_offset(const struct area *a, size_t i, struct shadow s);
_Noreturn void bad(const char *what, const void *at);

/* areas.c */
char *page_at(const struct area *a, size_t i);
struct area *free_area(struct worker *w);
struct area *pick_area(struct worker *w, unsigned can);
struct area *pick_kind(struct worker *w, enum kind kind);
struct area *make_area(struct worker *w, enum kind kind);
void reset_shadow(struct area *a, size_t from, size_t to, enum prot prot);
void drop_area(struct worker *w, struct area *a);
void close_file(struct area *a);
void populate(struct worker *w, struct area *a);
void check_area(struct worker *w, struct area *a);
void check_frames(const struct worker *w);
void check_everything(struct worker *w);

/* ops.c */
enum how { BY_STORE, BY_ALIAS, BY_VM_WRITEV, BY_READ, BY_PWRITE };
bool can_write(const struct area *a, size_t i);
void write_page(struct worker *w, struct area *a, size_t i, enum how how);
void poke_page(struct worker *w, struct area *a, size_t i, enum how how);
int map_prot(enum prot prot);
bool op_write(struct worker *w);
bool op_kwrite(struct worker *w);
bool op_zero(struct worker *w);
bool op_map(struct worker *w);
bool op_split(struct worker *w);
bool op_remap(struct worker *w);
bool op_protect(struct worker *w);
bool op_dontneed(struct worker *w);
bool op_free(struct worker *w);
bool op_guard(struct worker *w);
bool op_replace(struct worker *w);
bool op_brk(struct worker *w);
bool op_thp(struct worker *w);
bool op_file(struct worker *w);
bool op_memfd(struct worker *w);
bool op_make_sysv(struct worker *w);
bool op_make_sparse(struct worker *w);
bool op_make_droppable(struct worker *w);
bool op_make_hugetlb(struct worker *w);

/* procs.c */
void make_segments(void);
void check_segments(void);
bool op_shared(struct worker *w);
bool op_stack(struct worker *w);
bool op_fork(struct worker *w);
bool op_zombie(struct worker *w);
bool op_exec(struct worker *w);
bool op_threads(struct worker *w);
bool op_signal(struct worker *w);
bool op_regs(struct worker *w);
bool op_sleep(struct worker *w);
void check_children(struct worker *w);
void end_children(struct worker *w);
void write_all(int fd, const void *data, size_t n);
bool read_all(int fd, void *data, size_t n);

/* churn_main.c */
void do_operation(struct worker *w);
void work(struct worker *w);
double now(void);

#endif
