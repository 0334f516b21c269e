/*
 * churn: options, the threads of a process, and the commands on standard input.
 *
 *   ready PID      the first line of output
 *   step N         N operations by every worker            ok OPERATIONS-SO-FAR
 *   run / stop     work without end / until here           ok run / ok stop
 *   check          verify everything, in every process     good
 *   where          the address of a page that is checked   where 0xADDRESS
 *   stats          how often each operation was done       stats NAME=COUNT ...
 *   quit           check, end children, exit with 0        ok quit
 *
 * "bad WHAT ADDRESS" instead, and exit status 99, when something was found wrong. The first process forks the others at
 * the start and hands every command down to them. Each process has a control thread and --threads workers; the first
 * worker is its main thread.
 */
#include "churn.h"

#include <errno.h>
#include <getopt.h>
#include <malloc.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

const struct operation operations[] = {
	{"write", 40, op_write, true},
	{"kwrite", 6, op_kwrite, true},
	{"zero", 6, op_zero, true},
	{"map", 6, op_map, true},
	{"split", 2, op_split, true},
	{"remap", 5, op_remap, true},
	{"protect", 6, op_protect, true},
	{"dontneed", 4, op_dontneed, true},
	{"free", 2, op_free, true},
	{"guard", 3, op_guard, true},
	{"replace", 3, op_replace, true},
	{"brk", 3, op_brk, true},
	{"thp", 2, op_thp, true},
	{"file", 4, op_file, true},
	{"shared", 5, op_shared, true},
	{"memfd", 3, op_memfd, false},
	{"sysv", 2, op_make_sysv, false},
	{"sparse", 3, op_make_sparse, true},
	{"droppable", 2, op_make_droppable, true},
	{"hugetlb", 1, op_make_hugetlb, false},
	{"stack", 4, op_stack, false},
	{"fork", 3, op_fork, false},
	{"zombie", 1, op_zombie, false},
	{"exec", 1, op_exec, true},
	{"threads", 2, op_threads, true},
	{"signal", 2, op_signal, true},
	{"regs", 2, op_regs, true},
	{"sleep", 1, op_sleep, true},
};
const size_t operation_count = sizeof(operations) / sizeof(operations[0]);

struct global *global;
struct options options = {.seed = 1, .threads = 2, .processes = 1, .mib = 16, .ops = ~0ull, .dir = "/tmp"};

enum request { R_STEP, R_CHECK, R_QUIT };

/* The workers of this process, and what they are to do now. */
static struct {
	pthread_mutex_t lock;
	pthread_cond_t go, done;
	unsigned long turn;
	enum request request;
	long count;
	int busy;
	atomic_bool stop;
	struct worker *workers[MAX_WORKERS];
} gang = {.lock = PTHREAD_MUTEX_INITIALIZER, .go = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER};

static struct {
	int in, out; /* of a process that was forked at the start, as seen by the first */
} others[MAX_PROCESSES];
static int other_count, process_index, in_fd = 0, out_fd = 1;
static bool running;

double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* --- workers --- */

static const struct operation *choose(struct worker *w, size_t *which)
{
	size_t total = 0, n, at;

	for (n = 0; n < operation_count; n++)
		if ((options.ops >> n & 1) && (operations[n].in_children || !w->generation))
			total += operations[n].weight;
	at = below(w, total);
	for (n = 0; n < operation_count; n++) {
		if (!(options.ops >> n & 1) || (!operations[n].in_children && w->generation))
			continue;
		if (at < operations[n].weight)
			break;
		at -= operations[n].weight;
	}
	*which = n;
	return n < operation_count ? &operations[n] : NULL;
}

/* One operation, another one if that was not possible. */
void do_operation(struct worker *w)
{
	double dirtied = w->pages_dirtied;

	for (int tries = 0; tries < 5; tries++) {
		size_t which;
		const struct operation *op = choose(w, &which);
		if (op && op->run(w)) {
			atomic_fetch_add(&global->count[which], 1);
			break;
		}
	}
	if (w->pages_dirtied > dirtied)
		atomic_fetch_add(&global->dirtied, (unsigned long)(w->pages_dirtied - dirtied));
	w->done_ops++;
	if (w->ops_left < 0 && w->done_ops % 512 == 0) {
		struct area *a = pick_area(w, 0);
		if (a)
			check_area(w, a);
	}
	if (w->ops_left < 0 && w->done_ops % 16384 == 0)
		check_everything(w);
}

#define MOST_BEHIND 0.002 /* seconds */

/* Free running at a rate: sleep while ahead of it. Time that was lost, since others ran or somebody
 * stopped it, is not made up for. */
static void keep_rate(struct worker *w)
{
	double rate = options.dirty_rate / (options.threads * options.processes);

	while (rate > 0 && !gang.stop) {
		double ahead = w->pages_dirtied / rate - (now() - w->started);
		struct timespec t = {0, (long)((ahead > 0.02 ? 0.02 : ahead) * 1e9)};
		if (ahead < -MOST_BEHIND)
			w->started += -MOST_BEHIND - ahead;
		if (ahead <= 0)
			return;
		clock_nanosleep(CLOCK_MONOTONIC, 0, &t, NULL);
	}
}

static void next_request(struct worker *w)
{
	enum request request;

	pthread_mutex_lock(&gang.lock);
	if (--gang.busy == 0)
		pthread_cond_signal(&gang.done);
	while (gang.turn == w->seen)
		pthread_cond_wait(&gang.go, &gang.lock);
	w->seen = gang.turn;
	request = gang.request;
	w->ops_left = request == R_STEP ? gang.count : 0;
	pthread_mutex_unlock(&gang.lock);
	w->started = now();
	w->pages_dirtied = 0;
	if (request != R_STEP)
		check_everything(w);
	if (request == R_QUIT) {
		end_children(w);
		w->quit = true;
	}
}

/* Carry out requests until told to quit, or until an operation wants this frame of the stack to end. */
void work(struct worker *w)
{
	while (!w->quit) {
		if (w->ops_left == 0 || (w->ops_left < 0 && gang.stop)) {
			next_request(w);
			continue;
		}
		if (w->ops_left > 0)
			w->ops_left--;
		do_operation(w);
		if (w->unwind) {
			w->unwind = false;
			return;
		}
		if (w->ops_left < 0)
			keep_rate(w);
	}
}

static void *map_own(size_t bytes)
{
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		bad("mmap", NULL);
	return p;
}

static struct worker *new_worker(int index)
{
	struct worker *w = map_own(sizeof(*w));
	uint64_t who = (uint64_t)(process_index * MAX_WORKERS + index + 1);

	w->process = process_index;
	w->index = index;
	w->random = mix(options.seed ^ mix(who));
	w->next_id = who << 40;
	w->budget = options.mib * 256 / (size_t)(options.threads * options.processes);
	w->capacity = w->budget / 8 > 1024 ? w->budget / 8 : 1024;
	w->shadows = map_own(MAX_AREAS * w->capacity * sizeof(struct shadow));
	for (size_t n = 0; n < MAX_AREAS; n++)
		w->areas[n].shadow = w->shadows + n * w->capacity;
	return w;
}

static void *worker_main(void *arg)
{
	struct worker *w = arg;

	for (int n = 0; n < 40 && w->used < w->budget * 7 / 10; n++) {
		struct area *a = make_area(w, K_ANON);
		if (a)
			populate(w, a);
	}
	work(w);
	pthread_mutex_lock(&gang.lock);
	if (--gang.busy == 0)
		pthread_cond_signal(&gang.done);
	pthread_mutex_unlock(&gang.lock);
	return NULL;
}

/* --- the control thread --- */

static void wait_idle(void)
{
	pthread_mutex_lock(&gang.lock);
	while (gang.busy)
		pthread_cond_wait(&gang.done, &gang.lock);
	pthread_mutex_unlock(&gang.lock);
}

static void ask(enum request request, long count)
{
	pthread_mutex_lock(&gang.lock);
	gang.stop = false;
	gang.request = request;
	gang.count = count;
	gang.busy = options.threads;
	gang.turn++;
	pthread_cond_broadcast(&gang.go);
	pthread_mutex_unlock(&gang.lock);
}

static void pause_all(void)
{
	gang.stop = true;
	wait_idle();
}

/* A line from fd, without the newline; 1, or 0 at the end of file, or -1 after `seconds` (if > 0). */
static int read_line(int fd, char *line, size_t size, double seconds)
{
	size_t n = 0;
	double end = now() + seconds;

	for (;;) {
		struct pollfd p = {.fd = fd, .events = POLLIN};
		double left = end - now();
		int got = poll(&p, 1, seconds > 0 ? (left > 0 ? (int)(left * 1000) + 1 : 0) : -1);
		if (got == 0 && now() >= end)
			return -1;
		if (got <= 0)
			continue;
		if (!read_all(fd, line + n, 1))
			return 0;
		if (line[n] == '\n') {
			line[n] = 0;
			return 1;
		}
		if (n + 2 < size)
			n++;
	}
}

static void tell_others(const char *line)
{
	for (int n = 0; n < other_count; n++) {
		write_all(others[n].in, line, strlen(line));
		write_all(others[n].in, "\n", 1);
	}
}

static void hear_others(void)
{
	char line[200];

	for (int n = 0; n < other_count; n++)
		if (read_line(others[n].out, line, sizeof(line), 0) != 1)
			bad("process died", (void *)(uintptr_t)(n + 1));
}

static void say_stats(void)
{
	char text[1024];
	size_t n = 0;

	n += (size_t)snprintf(text, sizeof(text), "stats");
	for (size_t k = 0; k < operation_count; k++)
		n += (size_t)snprintf(text + n, sizeof(text) - n, " %s=%lu", operations[k].name, (unsigned long)global->count[k]);
	n += (size_t)snprintf(text + n, sizeof(text) - n, " dirtied=%lu eintr=%lu\n", (unsigned long)global->dirtied,
			      (unsigned long)global->eintr);
	write_all(out_fd, text, n);
}

/* An address that `check` looks at, of a page that was written whole. Only while nobody works. */
static void say_where(void)
{
	char text[64] = "where 0\n";
	struct worker *w = gang.workers[0];

	for (size_t n = 0; n < MAX_AREAS; n++)
		for (size_t i = 0; w->areas[n].kind == K_ANON && i < w->areas[n].pages; i++)
			if (w->areas[n].shadow[i].version && w->areas[n].shadow[i].state == S_NORMAL && can_write(&w->areas[n], i))
				snprintf(text, sizeof(text), "where %#lx\n", (unsigned long)page_at(&w->areas[n], i));
	write_all(out_fd, text, strlen(text));
}

static void say(const char *text)
{
	write_all(out_fd, text, strlen(text));
}

static void check_all(void)
{
	bool was_running = running;

	/* Nobody writes while anybody checks: stop all processes first. */
	if (was_running) {
		tell_others("stop");
		pause_all();
		hear_others();
	}
	tell_others("check");
	ask(R_CHECK, 0);
	wait_idle();
	hear_others();
	if (was_running) {
		tell_others("run");
		ask(R_STEP, -1);
		hear_others();
	}
}

static void start_running(void)
{
	tell_others("run");
	ask(R_STEP, -1);
	hear_others();
	running = true;
}

static void stop_running(void)
{
	tell_others("stop");
	pause_all();
	hear_others();
	running = false;
}

static _Noreturn void quit(void)
{
	tell_others("quit");
	pause_all();
	ask(R_QUIT, 0);
	wait_idle();
	hear_others();
	say("ok quit\n");
	exit(global->failed ? BAD_EXIT : 0);
}

static void obey(const char *line)
{
	static unsigned long steps;
	char text[64];
	long n;

	if (sscanf(line, "step %ld", &n) == 1 && n > 0) {
		if (running)
			stop_running();
		tell_others(line);
		ask(R_STEP, n);
		wait_idle();
		hear_others();
		steps += (unsigned long)n;
		snprintf(text, sizeof(text), "ok %lu\n", steps);
		say(text);
	} else if (!strcmp(line, "check")) {
		check_all();
		say("good\n");
	} else if (!strcmp(line, "run")) {
		start_running();
		say("ok run\n");
	} else if (!strcmp(line, "stop")) {
		stop_running();
		say("ok stop\n");
	} else if (!strcmp(line, "stats")) {
		say_stats();
	} else if (!strcmp(line, "where")) {
		say_where();
	} else if (!strcmp(line, "quit")) {
		quit();
	} else {
		say("error: unknown command\n");
	}
}

static void *control_main(void *arg)
{
	char line[200];
	double end = options.seconds > 0 ? now() + options.seconds : 0;
	bool eof = false;

	(void)arg;
	wait_idle(); /* the workers have set up */
	hear_others();
	snprintf(line, sizeof(line), "ready %d\n", (int)getpid());
	say(line);
	if (options.free_run && process_index == 0)
		start_running();
	for (;;) {
		double left = end > 0 && process_index == 0 ? end - now() : 0;
		int got = left < 0 ? -1 : eof ? 0 : read_line(in_fd, line, sizeof(line), left);
		if (got < 0) {
			check_all();
			say("good\n");
			quit();
		} else if (got > 0) {
			obey(line);
		} else if (end > 0 && process_index == 0) { /* end of input: run on for the time that was asked for */
			eof = true;
			poll(NULL, 0, 20);
		} else {
			_exit(0);
		}
	}
}

/* --- start --- */

static void fork_others(void)
{
	for (int n = 1; n < options.processes; n++) {
		int in[2], out[2];
		pid_t pid;

		if (pipe(in) || pipe(out))
			bad("pipe", NULL);
		pid = fork();
		if (pid < 0)
			bad("fork", NULL);
		if (pid == 0) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			for (int k = 0; k < other_count; k++) {
				close(others[k].in);
				close(others[k].out);
			}
			close(in[1]);
			close(out[0]);
			other_count = 0;
			process_index = n;
			in_fd = in[0];
			out_fd = out[1];
			return;
		}
		close(in[0]);
		close(out[1]);
		others[other_count].in = in[1];
		others[other_count++].out = out[0];
	}
}

static void start_threads(void)
{
	pthread_t thread;
	pthread_attr_t attr;

	gang.busy = options.threads;
	for (int n = 0; n < options.threads; n++)
		gang.workers[n] = new_worker(n);
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, 2 << 20);
	for (int n = 1; n < options.threads; n++)
		if (pthread_create(&thread, &attr, worker_main, gang.workers[n]))
			bad("pthread_create", NULL);
	if (pthread_create(&thread, &attr, control_main, NULL))
		bad("pthread_create", NULL);
	worker_main(gang.workers[0]);
	pthread_join(thread, NULL); /* which exits */
}

static uint64_t parse_ops(const char *text)
{
	char copy[512], *save = NULL;
	uint64_t ops = 0;

	snprintf(copy, sizeof(copy), "%s", text);
	for (char *name = strtok_r(copy, ",", &save); name; name = strtok_r(NULL, ",", &save)) {
		bool off = *name == '-', found = !strcmp(name, "all");
		ops = found ? ~0ull : ops;
		for (size_t n = 0; n < operation_count; n++) {
			if (strcmp(name + off, operations[n].name))
				continue;
			found = true;
			ops = off ? ops & ~(1ull << n) : ops | 1ull << n;
		}
		if (!found) {
			fprintf(stderr, "churn: unknown operation %s\n", name);
			exit(2);
		}
	}
	return ops;
}

static void parse_options(int argc, char **argv)
{
	static const struct option known[] = {
		{"seed", 1, NULL, 's'},	     {"threads", 1, NULL, 't'},	   {"processes", 1, NULL, 'p'},
		{"mib", 1, NULL, 'm'},	     {"ops", 1, NULL, 'o'},	   {"free-run", 0, NULL, 'f'},
		{"dirty-rate", 1, NULL, 'r'}, {"seconds", 1, NULL, 'S'}, {"dir", 1, NULL, 'd'},
		{NULL, 0, NULL, 0},
	};
	int c;

	while ((c = getopt_long(argc, argv, "", known, NULL)) != -1) {
		switch (c) {
		case 's': options.seed = strtoull(optarg, NULL, 0); break;
		case 't': options.threads = atoi(optarg); break;
		case 'p': options.processes = atoi(optarg); break;
		case 'm': options.mib = strtoull(optarg, NULL, 0); break;
		case 'o': options.ops = parse_ops(optarg); break;
		case 'f': options.free_run = true; break;
		case 'r': options.dirty_rate = atof(optarg); break;
		case 'S': options.seconds = atof(optarg); break;
		case 'd': options.dir = optarg; break;
		default: exit(2);
		}
	}
	if (options.threads < 1 || options.threads > MAX_WORKERS || options.processes < 1 ||
	    options.processes > MAX_PROCESSES || sysconf(_SC_PAGESIZE) != (long)PAGE) {
		fprintf(stderr, "churn: 1 to %d threads, 1 to %d processes, pages of 4 KiB\n", MAX_WORKERS, MAX_PROCESSES);
		exit(2);
	}
}

int main(int argc, char **argv)
{
	sigset_t blocked;

	parse_options(argc, argv);
	signal(SIGPIPE, SIG_IGN);
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGRTMIN + 3); /* for op_signal */
	sigprocmask(SIG_BLOCK, &blocked, NULL);
	mallopt(M_TOP_PAD, 4 << 20); /* malloc takes its heap now, so that op_brk has the rest of it to itself */
	mallopt(M_TRIM_THRESHOLD, 1 << 30);
	free(malloc(64));
	global = mmap(NULL, sizeof(*global), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (global == MAP_FAILED)
		return 1;
	make_segments();
	fork_others();
	start_threads();
	return 0;
}
