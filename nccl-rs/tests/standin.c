/* Stands in for NCCL or RCCL: the same functions for ranks that are threads of one process and memory that is the host's.
 * standin_set turns its knobs, standin_get reads its counters.
 *   -DNO_CONFIG     an old library: no ncclCommInitRankConfig, ncclCommFinalize, ncclGetLastError
 *   -DNO_ALL_REDUCE a library that lacks a function
 *   -DVERSION=n     the version that it says
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifndef VERSION
#define VERSION 22809
#endif
#define RANKS 8

typedef struct { char internal[128]; } ncclUniqueId;
typedef struct { size_t size; unsigned magic, version; int blocking; } Config;
typedef struct { char id[128]; int used, ranks, joined, arrived, turn; const void *from[RANKS]; const void *mail[RANKS][RANKS]; } Group;
typedef struct { Group *group; int rank, blocking, polls, finalizing; } Comm;
typedef struct { Comm *comm; int peer, receives; const void *from; void *to; size_t bytes; } Pending;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static Group groups[64];
static __thread int depth;
static __thread Pending pending[16];
static __thread int num_pending;

/* Knobs and counters, by name. */
static struct { const char *name; int value; } cells[] = {
    {"init_result", 0}, {"init_hold", 0},   {"call_result", 0}, {"call_polls", 0},   {"async_error", 0}, {"finalize_hold", 0},
    {"end_ms", 0},      {"aborts", 0},      {"destroys", 0},    {"finalizes", 0},    {"config_size", 0}, {"config_version", 0},
    {"blocking", -1},   {"group_starts", 0}, {"group_ends", 0},
};
static int *cell(const char *name) {
    for (size_t i = 0; i < sizeof cells / sizeof *cells; i++)
        if (!strcmp(cells[i].name, name)) return &cells[i].value;
    abort();
}
void standin_set(const char *name, int value) { __atomic_store_n(cell(name), value, __ATOMIC_SEQ_CST); }
int standin_get(const char *name) { return __atomic_load_n(cell(name), __ATOMIC_SEQ_CST); }
static void count(const char *name) { __atomic_fetch_add(cell(name), 1, __ATOMIC_SEQ_CST); }

/* Waits, locked, for a change; not longer than 5 s. */
static int wait_change(void) {
    struct timespec end;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += 5;
    return pthread_cond_timedwait(&changed, &lock, &end);
}

/* All ranks come with a pointer; 0 when all are here. */
static int meet(Comm *comm, const void *from) {
    Group *group = comm->group;
    pthread_mutex_lock(&lock);
    int turn = group->turn, late = 0;
    group->from[comm->rank] = from;
    if (++group->arrived == group->ranks) {
        group->arrived = 0;
        group->turn++;
        pthread_cond_broadcast(&changed);
    }
    while (group->turn == turn && !late) late = wait_change();
    pthread_mutex_unlock(&lock);
    return late;
}

int ncclGetVersion(int *version) { *version = VERSION; return 0; }
const char *ncclGetErrorString(int code) { return code == 2 ? "stand-in system error" : "stand-in error"; }

int ncclGetUniqueId(ncclUniqueId *id) {
    static int made;
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "stand-in %d", __atomic_add_fetch(&made, 1, __ATOMIC_SEQ_CST));
    return 0;
}

static int join(Comm **out, int ranks, ncclUniqueId id, int rank, int blocking) {
    if (standin_get("init_result")) return standin_get("init_result");
    if (ranks > RANKS || rank >= ranks) return 4;
    Comm *comm = calloc(1, sizeof *comm);
    pthread_mutex_lock(&lock);
    Group *group = groups;
    while (group->used && memcmp(group->id, id.internal, 128)) group++;
    memcpy(group->id, id.internal, 128);
    group->used = 1;
    group->ranks = ranks;
    group->joined++;
    pthread_cond_broadcast(&changed);
    int late = 0;
    while (blocking && group->joined < ranks && !late) late = wait_change();
    pthread_mutex_unlock(&lock);
    comm->group = group;
    comm->rank = rank;
    comm->blocking = blocking;
    *out = comm;
    return late ? 2 : 0;
}

int ncclCommInitRank(Comm **out, int ranks, ncclUniqueId id, int rank) { return join(out, ranks, id, rank, 1); }

#ifndef NO_CONFIG
const char *ncclGetLastError(Comm *comm) { return comm ? "said of a communicator" : "said of none"; }

int ncclCommInitRankConfig(Comm **out, int ranks, ncclUniqueId id, int rank, Config *config) {
    if (config->magic != 0xcafebeef) return 4;
    standin_set("config_size", (int)config->size);
    standin_set("config_version", (int)config->version);
    standin_set("blocking", config->blocking);
    int result = join(out, ranks, id, rank, config->blocking);
    return result ? result : 7;
}

int ncclCommFinalize(Comm *comm) { comm->finalizing = 1; count("finalizes"); return 7; }
#endif

int ncclCommGetAsyncError(Comm *comm, int *state) {
    pthread_mutex_lock(&lock);
    int joined = comm->group->joined >= comm->group->ranks;
    pthread_mutex_unlock(&lock);
    *state = standin_get("async_error");
    if (*state) return 0;
    if (!joined || standin_get("init_hold") || (comm->finalizing && standin_get("finalize_hold"))) *state = 7;
    if (comm->polls > 0) { comm->polls--; *state = 7; }
    return 0;
}

static int end(Comm *comm, const char *counter) {
    struct timespec wait = {standin_get("end_ms") / 1000, standin_get("end_ms") % 1000 * 1000000L};
    nanosleep(&wait, NULL);
    count(counter);
    free(comm);
    return 0;
}
int ncclCommDestroy(Comm *comm) { return end(comm, "destroys"); }
int ncclCommAbort(Comm *comm) { return end(comm, "aborts"); }

/* What a call that was carried out answers. */
static int answer(Comm *comm, int late) {
    comm->polls = comm->blocking ? 0 : standin_get("call_polls");
    return late ? 6 : comm->polls ? 7 : 0;
}

static size_t width(int type) { return type < 2 ? 1 : type == 6 || type == 9 ? 2 : 4; }

/* One element of all ranks, in rank order; f32 (7) and u32 (3), sum (0) and max (2). */
static void reduce_one(Comm *comm, size_t i, int type, int op, void *to, size_t at) {
    const Group *group = comm->group;
    float f = ((const float *)group->from[0])[i];
    uint32_t u = ((const uint32_t *)group->from[0])[i];
    for (int r = 1; r < group->ranks; r++) {
        float g = ((const float *)group->from[r])[i];
        uint32_t v = ((const uint32_t *)group->from[r])[i];
        f = op == 0 ? f + g : g > f ? g : f;
        u = op == 0 ? u + v : v > u ? v : u;
    }
    if (type == 7) ((float *)to)[at] = f; else ((uint32_t *)to)[at] = u;
}

static int reduce(const void *from, void *to, size_t first, size_t count, int type, int op, Comm *comm) {
    if (standin_get("call_result")) return standin_get("call_result");
    if (type != 7 && type != 3) return 4;
    if (meet(comm, from)) return 6;
    void *sum = malloc(count * 4);
    for (size_t i = 0; i < count; i++) reduce_one(comm, first + i, type, op, sum, i);
    int late = meet(comm, from);
    memcpy(to, sum, count * 4);
    free(sum);
    return answer(comm, late);
}

#ifndef NO_ALL_REDUCE
int ncclAllReduce(const void *from, void *to, size_t count, int type, int op, Comm *comm, void *stream) {
    (void)stream;
    return reduce(from, to, 0, count, type, op, comm);
}
#endif

int ncclReduceScatter(const void *from, void *to, size_t count, int type, int op, Comm *comm, void *stream) {
    (void)stream;
    return reduce(from, to, count * (size_t)comm->rank, count, type, op, comm);
}

int ncclAllGather(const void *from, void *to, size_t count, int type, Comm *comm, void *stream) {
    (void)stream;
    if (meet(comm, from)) return 6;
    size_t bytes = count * width(type);
    for (int r = 0; r < comm->group->ranks; r++) memmove((char *)to + (size_t)r * bytes, comm->group->from[r], bytes);
    return answer(comm, meet(comm, from));
}

int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, Comm *comm, void *stream) {
    (void)stream;
    if (meet(comm, from)) return 6;
    memmove(to, comm->group->from[root], count * width(type));
    return answer(comm, meet(comm, from));
}

static int later(Pending what) {
    if (depth == 0 || num_pending == 16) return 5;
    pending[num_pending++] = what;
    return what.comm->blocking ? 0 : 7;
}
int ncclSend(const void *from, size_t count, int type, int peer, Comm *comm, void *stream) {
    (void)stream;
    return later((Pending){comm, peer, 0, from, NULL, count * width(type)});
}
int ncclRecv(void *to, size_t count, int type, int peer, Comm *comm, void *stream) {
    (void)stream;
    return later((Pending){comm, peer, 1, NULL, to, count * width(type)});
}

int ncclGroupStart(void) { depth++; count("group_starts"); return 0; }

int ncclGroupEnd(void) {
    count("group_ends");
    if (depth == 0) return 5;
    int late = 0;
    Comm *comm = NULL;
    if (--depth) return 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < num_pending; i++) {
        Pending *p = &pending[i];
        comm = p->comm;
        if (!p->receives) comm->group->mail[comm->rank][p->peer] = p->from;
    }
    pthread_cond_broadcast(&changed);
    for (int i = 0; i < num_pending && !late; i++) {
        Pending *p = &pending[i];
        if (!p->receives) continue;
        const void **mail = &comm->group->mail[p->peer][comm->rank];
        while (!*mail && !late) late = wait_change();
        if (*mail) memcpy(p->to, *mail, p->bytes);
        *mail = NULL;
        pthread_cond_broadcast(&changed);
    }
    for (int i = 0; i < num_pending && !late; i++)
        while (!pending[i].receives && comm->group->mail[comm->rank][pending[i].peer] && !late) late = wait_change();
    pthread_mutex_unlock(&lock);
    num_pending = 0;
    return comm ? answer(comm, late) : 0;
}
