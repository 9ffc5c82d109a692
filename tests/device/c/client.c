/* A libnrt client in C, written from the documented prototypes: load, bind, execute, read, and what a careless client does.
 *
 *   client run NEFF FOLDER     FOLDER/NAME.in holds each input's bytes; writes FOLDER/NAME.out for each output
 *   client misuse NEFF         stale, double, foreign and null handles; bounds; order
 *   client threads NEFF FOLDER eight threads, each with its own tensors and sets, 25 executions; all results equal
 *   client fork                children forked before nrt_init may use the library, children forked after it may not
 *
 * Exit code 0 if everything was as it should be; else a line says what was not.
 */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

typedef enum {
    NRT_SUCCESS = 0,
    NRT_FAILURE = 1,
    NRT_INVALID = 2,
    NRT_INVALID_HANDLE = 3,
    NRT_RESOURCE = 4,
    NRT_UNINITIALIZED = 13,
    NRT_CLOSED = 14
} NRT_STATUS;
typedef enum { NRT_FRAMEWORK_TYPE_INVALID = 0, NRT_FRAMEWORK_TYPE_NO_FW = 1 } nrt_framework_type_t;
typedef enum { NRT_TENSOR_PLACEMENT_DEVICE = 0, NRT_TENSOR_PLACEMENT_HOST = 1 } nrt_tensor_placement_t;
typedef enum { NRT_TENSOR_USAGE_INPUT = 0, NRT_TENSOR_USAGE_OUTPUT = 1 } nrt_tensor_usage_t;
typedef enum { NRT_DTYPE_UNKNOWN = 0 } nrt_dtype_t;

typedef struct nrt_model nrt_model_t;
typedef struct nrt_tensor nrt_tensor_t;
typedef void nrt_tensor_set_t;

typedef struct {
    uint64_t rt_major, rt_minor, rt_patch, rt_maintenance;
    char rt_detail[128];
    char git_hash[64];
} nrt_version_t;
typedef struct {
    char name[256];
    nrt_tensor_usage_t usage;
    size_t size;
    nrt_dtype_t dtype;
    uint32_t *shape;
    uint32_t ndim;
} nrt_tensor_info_t;
typedef struct {
    uint64_t tensor_count;
    nrt_tensor_info_t tensor_array[];
} nrt_tensor_info_array_t;
typedef struct {
    uint64_t offset, size;
    void *buffer;
} nrt_tensor_batch_op_t;
typedef struct {
    const nrt_tensor_t *tensor;
    const nrt_tensor_batch_op_t *ops;
    uint32_t num_ops;
} nrt_tensor_batch_t;
typedef struct {
    size_t bytes_used, bytes_limit;
} nrt_vnc_memory_stats_t;
typedef struct {
    uint32_t vnc;
} nrt_model_info_t;

_Static_assert(sizeof(NRT_STATUS) == 4, "enums have four bytes");
_Static_assert(sizeof(nrt_version_t) == 224, "nrt_version_t");
_Static_assert(sizeof(nrt_tensor_info_t) == 296, "nrt_tensor_info_t");
_Static_assert(offsetof(nrt_tensor_info_array_t, tensor_array) == 8, "nrt_tensor_info_array_t");
_Static_assert(sizeof(nrt_tensor_batch_t) == 24, "nrt_tensor_batch_t");

NRT_STATUS nrt_init(nrt_framework_type_t framework, const char *fw_version, const char *fal_version);
void nrt_close(void);
NRT_STATUS nrt_get_version(nrt_version_t *ver, size_t size);
NRT_STATUS nrt_get_total_nc_count(uint32_t *nc_count);
NRT_STATUS nrt_get_visible_nc_count(uint32_t *nc_count);
NRT_STATUS nrt_load(const void *neff, size_t size, int32_t vnc, int32_t vnc_count, nrt_model_t **model);
NRT_STATUS nrt_unload(nrt_model_t *model);
NRT_STATUS nrt_get_model_tensor_info(nrt_model_t *model, nrt_tensor_info_array_t **info);
NRT_STATUS nrt_free_model_tensor_info(nrt_tensor_info_array_t *info);
NRT_STATUS nrt_allocate_tensor_set(nrt_tensor_set_t **set);
void nrt_destroy_tensor_set(nrt_tensor_set_t **set);
NRT_STATUS nrt_add_tensor_to_tensor_set(nrt_tensor_set_t *set, const char *name, nrt_tensor_t *tensor);
NRT_STATUS nrt_get_tensor_from_tensor_set(nrt_tensor_set_t *set, const char *name, nrt_tensor_t **tensor);
NRT_STATUS nrt_execute(nrt_model_t *model, const nrt_tensor_set_t *inputs, nrt_tensor_set_t *outputs);
NRT_STATUS nrt_tensor_allocate(nrt_tensor_placement_t placement, int vnc, size_t size, const char *name,
                               nrt_tensor_t **tensor);
void nrt_tensor_free(nrt_tensor_t **tensor);
NRT_STATUS nrt_tensor_read(const nrt_tensor_t *tensor, void *buf, size_t offset, size_t size);
NRT_STATUS nrt_tensor_write(nrt_tensor_t *tensor, const void *buf, size_t offset, size_t size);
size_t nrt_tensor_get_size(const nrt_tensor_t *tensor);
NRT_STATUS nrt_tensor_copy(const nrt_tensor_t *src, size_t src_offset, nrt_tensor_t *dst, size_t dst_offset, size_t size);
NRT_STATUS nrt_tensor_memset(nrt_tensor_t *tensor, uint64_t offset, int value, size_t size);
NRT_STATUS nrt_tensor_allocate_slice(const nrt_tensor_t *src, size_t offset, size_t size, const char *name,
                                     nrt_tensor_t **slice);
void *nrt_tensor_get_va(const nrt_tensor_t *tensor);
const char *nrt_get_status_as_str(NRT_STATUS status);
NRT_STATUS nrt_get_model_info(const nrt_model_t *model, nrt_model_info_t *info, size_t in, size_t *out);
NRT_STATUS nrt_get_vnc_memory_stats(uint32_t vnc, nrt_vnc_memory_stats_t *stats, size_t in, size_t *out);
NRT_STATUS nrt_tensor_read_batch(const nrt_tensor_batch_t *batches, uint64_t n, bool unsafe);
NRT_STATUS nrt_tensor_write_batch(const nrt_tensor_batch_t *batches, uint64_t n, bool unsafe);

/* Control calls of the emulated library. */
uint64_t emunrt_violation_count(void);
size_t emunrt_violation_text(uint64_t i, char *buffer, size_t len);
size_t emunrt_last_reason(char *buffer, size_t len);
uint64_t emunrt_live(uint32_t kind);

static void fail(int line, const char *what) {
    char reason[512] = "";
    emunrt_last_reason(reason, sizeof reason);
    fprintf(stderr, "client.c:%d: %s (last reason: %s)\n", line, what, reason);
    exit(1);
}
#define CHECK(condition) ((condition) ? (void)0 : fail(__LINE__, #condition))
#define OK(call) CHECK((call) == NRT_SUCCESS)
#define GIVES(status, call) CHECK((call) == (status))

static unsigned char *load_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        perror(path);
        exit(1);
    }
    CHECK(fseek(file, 0, SEEK_END) == 0);
    *size = (size_t)ftell(file);
    rewind(file);
    unsigned char *bytes = malloc(*size + 1);
    CHECK(bytes != NULL && fread(bytes, 1, *size, file) == *size);
    fclose(file);
    return bytes;
}

static void path_of(char *path, size_t len, const char *folder, const char *name, const char *suffix) {
    CHECK((size_t)snprintf(path, len, "%s/%s.%s", folder, name, suffix) < len);
}

/* An input updated in place is NAME.must_alias_input; its output NAME is the same tensor. */
static const char ALIAS[] = ".must_alias_input";

static bool is_alias(const char *input, const char *output) {
    size_t n = strlen(output);
    return strncmp(input, output, n) == 0 && strcmp(input + n, ALIAS) == 0;
}

enum { MOST = 32 };
typedef struct {
    size_t n;
    char name[MOST][256];
    nrt_tensor_usage_t usage[MOST];
    size_t size[MOST];
    nrt_tensor_t *tensor[MOST];
    bool owned[MOST];
    nrt_tensor_set_t *sets[2]; /* by usage */
} binding_t;

/* Copies what the model takes and gives, then frees the library's array. */
static void describe(nrt_model_t *model, binding_t *b) {
    nrt_tensor_info_array_t *info = NULL;
    OK(nrt_get_model_tensor_info(model, &info));
    CHECK(info != NULL && info->tensor_count <= MOST);
    b->n = (size_t)info->tensor_count;
    for (size_t i = 0; i < b->n; i++) {
        const nrt_tensor_info_t *t = &info->tensor_array[i];
        memcpy(b->name[i], t->name, sizeof t->name);
        CHECK(memchr(b->name[i], 0, sizeof b->name[i]) != NULL);
        CHECK(t->ndim >= 1 && t->ndim <= 8 && t->shape != NULL);
        size_t elements = 1;
        for (uint32_t d = 0; d < t->ndim; d++) elements *= t->shape[d];
        CHECK(t->size % elements == 0 && t->size / elements <= 8);
        b->usage[i] = t->usage;
        b->size[i] = t->size;
    }
    OK(nrt_free_model_tensor_info(info));
}

/* Allocates tensors, writes the inputs from FOLDER, fills the outputs, and makes both sets. */
static void bind(nrt_model_t *model, const char *folder, binding_t *b) {
    describe(model, b);
    OK(nrt_allocate_tensor_set(&b->sets[0]));
    OK(nrt_allocate_tensor_set(&b->sets[1]));
    for (size_t i = 0; i < b->n; i++) {
        b->tensor[i] = NULL;
        b->owned[i] = true;
        for (size_t j = 0; j < b->n && b->usage[i] == NRT_TENSOR_USAGE_OUTPUT; j++) {
            if (b->usage[j] == NRT_TENSOR_USAGE_INPUT && is_alias(b->name[j], b->name[i])) {
                CHECK(j < i);
                b->tensor[i] = b->tensor[j];
                b->owned[i] = false;
            }
        }
        if (b->owned[i]) {
            OK(nrt_tensor_allocate(NRT_TENSOR_PLACEMENT_DEVICE, 0, b->size[i], b->name[i], &b->tensor[i]));
            CHECK(nrt_tensor_get_size(b->tensor[i]) == b->size[i]);
        }
        if (b->usage[i] == NRT_TENSOR_USAGE_INPUT) {
            char path[1024];
            size_t size;
            path_of(path, sizeof path, folder, b->name[i], "in");
            unsigned char *bytes = load_file(path, &size);
            CHECK(size == b->size[i]);
            /* In two pieces: offsets are in bytes. */
            OK(nrt_tensor_write(b->tensor[i], bytes, 0, size / 2));
            OK(nrt_tensor_write(b->tensor[i], bytes + size / 2, size / 2, size - size / 2));
            memset(bytes, 0xEE, size);
            free(bytes);
        } else if (b->owned[i]) {
            OK(nrt_tensor_memset(b->tensor[i], 0, 0xCC, b->size[i]));
        }
        OK(nrt_add_tensor_to_tensor_set(b->sets[b->usage[i]], b->name[i], b->tensor[i]));
    }
}

static void release(binding_t *b) {
    for (int usage = 0; usage < 2; usage++) {
        nrt_destroy_tensor_set(&b->sets[usage]);
        CHECK(b->sets[usage] == NULL);
    }
    for (size_t i = 0; i < b->n; i++) {
        if (b->owned[i]) {
            nrt_tensor_free(&b->tensor[i]);
            CHECK(b->tensor[i] == NULL);
        }
    }
}

static void clean(void) {
    char text[512] = "";
    emunrt_violation_text(0, text, sizeof text);
    if (emunrt_violation_count() != 0) fprintf(stderr, "violation: %s\n", text);
    CHECK(emunrt_violation_count() == 0);
    CHECK(emunrt_live(0) == 0);
}

static nrt_model_t *start(const char *neff_path) {
    nrt_version_t version;
    memset(&version, 0, sizeof version);
    OK(nrt_get_version(&version, sizeof version));
    CHECK(version.rt_major == 2 && memchr(version.rt_detail, 0, sizeof version.rt_detail) != NULL);
    uint32_t total = 0, visible = 0;
    OK(nrt_get_total_nc_count(&total));
    OK(nrt_get_visible_nc_count(&visible));
    CHECK(visible >= 1 && visible <= total);
    OK(nrt_init(NRT_FRAMEWORK_TYPE_NO_FW, "", ""));
    size_t size;
    unsigned char *neff = load_file(neff_path, &size);
    nrt_model_t *model = NULL;
    OK(nrt_load(neff, size, 0, -1, &model));
    /* The bytes are needed during the call only. */
    memset(neff, 0xEE, size);
    free(neff);
    nrt_model_info_t info = {99};
    size_t written = 0;
    OK(nrt_get_model_info(model, &info, sizeof info, &written));
    CHECK(written == sizeof info && info.vnc == 0);
    return model;
}

static void run(const char *neff_path, const char *folder) {
    nrt_model_t *model = start(neff_path);
    static binding_t b;
    bind(model, folder, &b);
    nrt_vnc_memory_stats_t stats = {0, 0};
    size_t written = 0, most = 0;
    OK(nrt_get_vnc_memory_stats(0, &stats, sizeof stats, &written));
    for (size_t i = 0; i < b.n; i++) most += b.owned[i] ? b.size[i] : 0;
    CHECK(written == sizeof stats && stats.bytes_used == most && stats.bytes_limit >= most);
    OK(nrt_execute(model, b.sets[0], b.sets[1]));
    for (size_t i = 0; i < b.n; i++) {
        if (b.usage[i] != NRT_TENSOR_USAGE_OUTPUT) continue;
        nrt_tensor_t *tensor = NULL;
        OK(nrt_get_tensor_from_tensor_set(b.sets[1], b.name[i], &tensor));
        CHECK(tensor == b.tensor[i]);
        unsigned char *bytes = malloc(b.size[i]), *again = malloc(b.size[i]);
        CHECK(bytes != NULL && again != NULL);
        OK(nrt_tensor_read(tensor, bytes, 0, b.size[i]));
        /* The same through a slice and a batch. */
        nrt_tensor_t *slice = NULL;
        size_t half = b.size[i] / 2;
        OK(nrt_tensor_allocate_slice(tensor, half, b.size[i] - half, "half", &slice));
        nrt_tensor_batch_op_t first = {0, half, again}, second = {0, b.size[i] - half, again + half};
        nrt_tensor_batch_t batches[2] = {{tensor, &first, 1}, {slice, &second, 1}};
        OK(nrt_tensor_read_batch(batches, 2, false));
        CHECK(memcmp(bytes, again, b.size[i]) == 0);
        nrt_tensor_free(&slice);
        char path[1024];
        path_of(path, sizeof path, folder, b.name[i], "out");
        FILE *file = fopen(path, "wb");
        CHECK(file != NULL && fwrite(bytes, 1, b.size[i], file) == b.size[i] && fclose(file) == 0);
        free(bytes);
        free(again);
    }
    release(&b);
    OK(nrt_unload(model));
    nrt_close();
    clean();
}

static void misuse(const char *neff_path) {
    nrt_model_t *model = NULL;
    nrt_tensor_t *tensor = NULL, *other = NULL, *untouched = (nrt_tensor_t *)&model;
    nrt_tensor_set_t *set = NULL;
    unsigned char bytes[64], fresh[64];
    GIVES(NRT_UNINITIALIZED, nrt_tensor_allocate(NRT_TENSOR_PLACEMENT_DEVICE, 0, 64, "early", &tensor));
    CHECK(tensor == NULL);
    uint64_t violations = emunrt_violation_count();
    CHECK(violations == 1);
    model = start(neff_path);

    /* Fresh memory is not zero. */
    OK(nrt_tensor_allocate(NRT_TENSOR_PLACEMENT_DEVICE, 0, 64, NULL, &tensor));
    OK(nrt_tensor_allocate(NRT_TENSOR_PLACEMENT_DEVICE, 1, 64, "core 1", &other));
    memset(fresh, 0xA5, sizeof fresh);
    OK(nrt_tensor_read(tensor, bytes, 0, 64));
    CHECK(memcmp(bytes, fresh, 64) == 0);
    CHECK(nrt_tensor_get_va(tensor) != NULL && nrt_tensor_get_va(tensor) != nrt_tensor_get_va(other));

    /* Bounds, cores and misses are refused; they are mistakes that the status tells, not violations. */
    GIVES(NRT_INVALID, nrt_tensor_read(tensor, bytes, 1, 64));
    GIVES(NRT_INVALID, nrt_tensor_write(tensor, bytes, SIZE_MAX, 2));
    GIVES(NRT_INVALID, nrt_tensor_memset(tensor, UINT64_MAX, 0, 1));
    GIVES(NRT_INVALID, nrt_tensor_copy(tensor, 0, other, 0, 64));
    GIVES(NRT_INVALID, nrt_tensor_allocate(NRT_TENSOR_PLACEMENT_DEVICE, 99, 64, "x", &untouched));
    GIVES(NRT_RESOURCE, nrt_tensor_allocate(NRT_TENSOR_PLACEMENT_DEVICE, 0, (size_t)1 << 50, "x", &untouched));
    GIVES(NRT_INVALID, nrt_load("not a neff", 10, 0, -1, (nrt_model_t **)&untouched));
    OK(nrt_allocate_tensor_set(&set));
    GIVES(NRT_FAILURE, nrt_get_tensor_from_tensor_set(set, "nothing", &untouched));
    CHECK(untouched == (nrt_tensor_t *)&model);
    GIVES(NRT_INVALID, nrt_execute(model, set, set));
    CHECK(emunrt_violation_count() == violations);

    /* Overlapping copies inside one tensor are as memmove. */
    for (int i = 0; i < 64; i++) bytes[i] = (unsigned char)i;
    OK(nrt_tensor_write(tensor, bytes, 0, 64));
    OK(nrt_tensor_copy(tensor, 0, tensor, 8, 32));
    OK(nrt_tensor_read(tensor, fresh, 0, 64));
    memmove(bytes + 8, bytes, 32);
    CHECK(memcmp(bytes, fresh, 64) == 0);

    /* Null, foreign, confused and stale handles. Each is a violation, none is followed. */
    int somewhere = 0;
    nrt_tensor_t *wrong[] = {NULL, (nrt_tensor_t *)&somewhere, (nrt_tensor_t *)model, (nrt_tensor_t *)set};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        GIVES(NRT_INVALID_HANDLE, nrt_tensor_read(wrong[i], bytes, 0, 1));
        GIVES(0, nrt_tensor_get_size(wrong[i]));
        CHECK(nrt_tensor_get_va(wrong[i]) == NULL);
        violations += 3;
        CHECK(emunrt_violation_count() == violations);
    }
    nrt_tensor_t *stale = tensor, *again = tensor;
    nrt_tensor_free(&tensor);
    CHECK(emunrt_violation_count() == violations);
    GIVES(NRT_INVALID_HANDLE, nrt_tensor_write(stale, bytes, 0, 1));
    GIVES(NRT_INVALID_HANDLE, nrt_add_tensor_to_tensor_set(set, "x", stale));
    nrt_tensor_free(&again);
    violations += 3;
    CHECK(emunrt_violation_count() == violations && again == stale);

    /* A tensor freed under a set. */
    OK(nrt_add_tensor_to_tensor_set(set, "x", other));
    nrt_tensor_free(&other);
    nrt_destroy_tensor_set(&set);
    CHECK(emunrt_violation_count() == ++violations);

    /* A tensor info array freed twice, and null. */
    nrt_tensor_info_array_t *info = NULL;
    OK(nrt_get_model_tensor_info(model, &info));
    OK(nrt_free_model_tensor_info(info));
    CHECK(info->tensor_count > MOST);
    GIVES(NRT_INVALID_HANDLE, nrt_free_model_tensor_info(info));
    GIVES(NRT_INVALID_HANDLE, nrt_free_model_tensor_info(NULL));
    violations += 2;

    /* Null places for results. */
    GIVES(NRT_INVALID, nrt_allocate_tensor_set(NULL));
    GIVES(NRT_INVALID, nrt_get_version(NULL, sizeof(nrt_version_t)));
    violations += 2;
    CHECK(emunrt_violation_count() == violations);

    /* Closing over a live model, and calls after the close. */
    nrt_close();
    CHECK(emunrt_violation_count() == ++violations && emunrt_live(0) == 0);
    GIVES(NRT_CLOSED, nrt_unload(model));
    CHECK(emunrt_violation_count() == ++violations);

    /* It starts again; handles of before stay stale. */
    OK(nrt_init(NRT_FRAMEWORK_TYPE_NO_FW, "", ""));
    GIVES(NRT_INVALID_HANDLE, nrt_unload(model));
    nrt_close();
    CHECK(emunrt_violation_count() == ++violations);
    CHECK(strcmp(nrt_get_status_as_str(NRT_CLOSED), "NRT_CLOSED") == 0);
}

enum { THREADS = 8, TURNS = 25 };
static nrt_model_t *shared_model;
static const char *shared_folder;

static void *work(void *result) {
    binding_t *b = calloc(1, sizeof *b);
    CHECK(b != NULL);
    bind(shared_model, shared_folder, b);
    uint64_t sum = 0;
    for (int turn = 0; turn < TURNS; turn++) {
        OK(nrt_execute(shared_model, b->sets[0], b->sets[1]));
        for (size_t i = 0; i < b->n; i++) {
            if (b->usage[i] != NRT_TENSOR_USAGE_OUTPUT) continue;
            unsigned char *bytes = malloc(b->size[i]);
            CHECK(bytes != NULL);
            OK(nrt_tensor_read(b->tensor[i], bytes, 0, b->size[i]));
            uint64_t hash = 14695981039346656037u;
            for (size_t k = 0; k < b->size[i]; k++) hash = (hash ^ bytes[k]) * 1099511628211u;
            sum += hash;
            free(bytes);
        }
    }
    release(b);
    free(b);
    *(uint64_t *)result = sum;
    return NULL;
}

static void threads(const char *neff_path, const char *folder) {
    shared_model = start(neff_path);
    shared_folder = folder;
    pthread_t thread[THREADS];
    uint64_t sum[THREADS];
    for (int i = 0; i < THREADS; i++) CHECK(pthread_create(&thread[i], NULL, work, &sum[i]) == 0);
    for (int i = 0; i < THREADS; i++) CHECK(pthread_join(thread[i], NULL) == 0);
    for (int i = 0; i < THREADS; i++) CHECK(sum[i] == sum[0]);
    OK(nrt_unload(shared_model));
    nrt_close();
    clean();
}

static bool stop;

/* Takes and leaves the library's lock all the time, so that some fork happens while it is held. */
static void *busy(void *tensor) {
    while (!__atomic_load_n(&stop, __ATOMIC_RELAXED)) CHECK(nrt_tensor_get_size(tensor) == 64);
    return NULL;
}

static void wait_for_child(pid_t child) {
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void forks(void) {
    uint32_t count = 0;
    OK(nrt_get_total_nc_count(&count));
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        OK(nrt_init(NRT_FRAMEWORK_TYPE_NO_FW, "", ""));
        nrt_close();
        CHECK(emunrt_violation_count() == 0);
        _exit(0);
    }
    wait_for_child(child);
    OK(nrt_init(NRT_FRAMEWORK_TYPE_NO_FW, "", ""));
    nrt_tensor_t *tensor = NULL;
    OK(nrt_tensor_allocate(NRT_TENSOR_PLACEMENT_DEVICE, 0, 64, "t", &tensor));
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, busy, tensor) == 0);
    for (int i = 0; i < 100; i++) {
        child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            alarm(10); /* a deadlock ends here, with a signal */
            unsigned char byte;
            nrt_tensor_t *mine = tensor;
            bool refused = nrt_tensor_read(tensor, &byte, 0, 1) == NRT_FAILURE;
            nrt_tensor_free(&mine);
            nrt_close();
            _exit(refused && mine == tensor && emunrt_violation_count() == 3 ? 0 : 1);
        }
        wait_for_child(child);
    }
    __atomic_store_n(&stop, true, __ATOMIC_RELAXED);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(nrt_tensor_get_size(tensor) == 64);
    nrt_tensor_free(&tensor);
    nrt_close();
    clean();
}

int main(int argc, char **argv) {
    if (argc == 4 && strcmp(argv[1], "run") == 0) {
        run(argv[2], argv[3]);
    } else if (argc == 3 && strcmp(argv[1], "misuse") == 0) {
        misuse(argv[2]);
    } else if (argc == 4 && strcmp(argv[1], "threads") == 0) {
        threads(argv[2], argv[3]);
    } else if (argc == 2 && strcmp(argv[1], "fork") == 0) {
        forks();
    } else {
        fprintf(stderr, "usage: client run NEFF FOLDER | misuse NEFF | threads NEFF FOLDER | fork\n");
        return 2;
    }
    puts("ok");
    return 0;
}
