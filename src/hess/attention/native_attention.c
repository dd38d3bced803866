/* Block-sparse attention on a CPU, without copies of keys and without scores in memory.

   A task is a block of queries of one head. Its queries are turned so that they lie side by side
   in vectors, in panels of one or two vectors. Keys and values come in batches, row by row from
   wherever they lie. For every panel and batch:

       scores[key][query]   = sum over c of keys[key][c] * queries[c][query]
       weights[key][query]  = 2^(scale * (score - highest score of the query so far))
       sums[c][query]      += sum over keys of values[key][c] * weights[key][query]

   Each product is of one number of a key and a vector of queries, so keys and values are used as
   they are, and all that a panel needs stays in the first-level cache.

   Data are words of 32 bits: one fp32 number or, where the processor multiplies them, a pair of
   bfloat16 numbers, whose products are added up in fp32. A pair is two channels of a query or key,
   or one channel of two values or two weights.

   Plain C with the vector types of GCC and Clang, for any processor they know. */

#include "native_vectors.h"

#include <stdlib.h>
#include <string.h>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#define PANEL (2 * LANES) /* queries of a panel of two vectors */
#define MAX_QUERIES 128   /* of a task; a multiple of PANEL */
#define BATCH 64          /* keys of a batch; a multiple of TILE */
#define TILE 8            /* vectors summed up at once: enough to keep the multipliers busy */

typedef float Word;

/* Tokens of some heads: the numbers of one lie in a row. */
typedef struct {
    char *const *heads; /* where the first token of each head lies */
    int64_t token;      /* bytes from one token to the next */
} Tensor;

/* hess.attention.native has the same fields in the same order. */
typedef struct {
    Tensor queries, keys, values, out;
    const int64_t *mask_heads;         /* the head in the mask of each head here */
    const int64_t *row_offsets;        /* [mask heads * num_rows + 1], where in ... */
    const int32_t *blocks;             /* ... the key blocks of a row lie */
    int64_t *next;                     /* the same for all threads */
    int64_t num_heads, num_rows, dim, block_size_q, block_size_kv;
    int64_t num_views, special_per_view, patches_per_view;
    int32_t has_pairs; /* whether all four tensors are bfloat16, not fp32 */
    float scale;       /* of scores, so that weights are powers of two */
} Attention;

/* Some queries of a task. Words of queries and sums are [words or dim][lanes of the panel]. */
typedef struct {
    Word *queries;
    float *sums;
    Floats top[2], total[2]; /* highest score, and sum of the weights */
} Panel;

/* The rows of a batch of keys, gathered one by one and used when the batch is full. */
typedef struct {
    const Word *keys[BATCH], *values[BATCH];
    int size;
} Batch;

/* Queries of one head that see the same keys. */
typedef struct {
    const Attention *attention;
    int64_t head, first, end; /* which patches, or which special tokens */
    int is_special;
    int num_panels, last_vectors; /* vectors of the last panel; all others have two */
    Panel panels[MAX_QUERIES / PANEL];
    Batch batch;
    float *memory; /* queries, sums, scores of a panel, pairs of values */
} Task;

/* sums + the products of the numbers in a word and in each word of a vector. */
INLINE Floats add_products(Floats sums, Word word, Floats words, int has_pairs) {
#if defined(__AVX512BF16__)
    if (has_pairs) return _mm512_dpbf16_ps(sums, (__m512bh)same(word), (__m512bh)words);
#endif
    return sums + word * words;
}

/* Two vectors of positive numbers as pairs of bfloat16. */
INLINE Floats pairs_of(Floats first, Floats second) {
    Bits low = ((Bits)first + 0x8000) >> 16, high = ((Bits)second + 0x8000) & 0xffff0000u;
    return (Floats)(low | high);
}

/* Scores of TILE / vectors keys: [key][lanes]. */
INLINE void score(const Panel *panel, const Word *const *keys, int words, int vectors,
                  int has_pairs, float *scores, Floats *top) {
    const int count = TILE / vectors, width = vectors * LANES;
    const Word *key[TILE];
    Floats sums[TILE];
    for (int i = 0; i < count; i++) key[i] = keys[i];
    for (int i = 0; i < TILE; i++) sums[i] = same(0);
    for (int c = 0; c < words; c++) {
        const Word *queries = panel->queries + c * width;
        UNROLL for (int i = 0; i < count; i++)
            for (int v = 0; v < vectors; v++)
                sums[i * vectors + v] = add_products(
                    sums[i * vectors + v], key[i][c], load(queries + v * LANES), has_pairs);
    }
    UNROLL for (int i = 0; i < count; i++)
        for (int v = 0; v < vectors; v++) {
            top[v] = larger(sums[i * vectors + v], top[v]);
            store(scores + i * width + v * LANES, sums[i * vectors + v]);
        }
}

/* Add the weighted values of a batch to what is kept of TILE / vectors of the sums, from channel
   c on. Within a batch they are summed up apart, which rounds less. */
INLINE void add_values(const Panel *panel, const Word *const *values, int num_values, int c,
                       int vectors, int has_pairs, const Floats *kept, const Word *weights) {
    const int count = TILE / vectors, width = vectors * LANES;
    float *at = panel->sums + c * width;
    Floats sums[TILE];
    for (int i = 0; i < TILE; i++) sums[i] = same(0);
    for (int j = 0; j < num_values; j++) {
        const Word *value = values[j] + c;
        UNROLL for (int i = 0; i < count; i++)
            for (int v = 0; v < vectors; v++)
                sums[i * vectors + v] =
                    add_products(sums[i * vectors + v], value[i],
                                 load(weights + j * width + v * LANES), has_pairs);
    }
    UNROLL for (int i = 0; i < TILE; i++)
        store(at + i * LANES, load(at + i * LANES) * kept[i % vectors] + sums[i]);
}

INLINE void attend_batch(Panel *panel, const Batch *batch, int dim, int vectors, int has_pairs,
                         float scale, float *scores) {
    const int count = TILE / vectors, width = vectors * LANES, size = batch->size;
    Floats top[2], total[2], kept[2], shift[2];
    for (int v = 0; v < vectors; v++) top[v] = panel->top[v];
    for (int j = 0; j < size; j += count)
        score(panel, batch->keys + j, has_pairs ? dim / 2 : dim, vectors, has_pairs,
              scores + j * width, top);

    for (int v = 0; v < vectors; v++) {
        kept[v] = power_of_two((panel->top[v] - top[v]) * scale);
        panel->top[v] = top[v];
        shift[v] = top[v] * scale;
        total[v] = same(0);
    }

    /* Weights take the place of the scores, pairs that of the first of two. */
    const int step = has_pairs ? 2 : 1;
    for (int j = 0; j < size; j += step)
        for (int v = 0; v < vectors; v++) {
            float *at = scores + j * width + v * LANES;
            Floats weight = power_of_two(load(at) * scale - shift[v]);
            total[v] += weight;
            if (has_pairs) {
                Floats next = same(0);
                if (j + 1 < size) next = power_of_two(load(at + width) * scale - shift[v]);
                total[v] += next;
                weight = pairs_of(weight, next);
            }
            store(scores + j / step * width + v * LANES, weight);
        }
    for (int v = 0; v < vectors; v++) panel->total[v] = panel->total[v] * kept[v] + total[v];
    for (int c = 0; c < dim; c += count)
        add_values(panel, batch->values, (size + step - 1) / step, c, vectors, has_pairs, kept,
                   scores);
}

/* Two rows of bfloat16 numbers as one row of pairs. */
static void pair_up(const Word *first, const Word *second, int dim, Word *pairs) {
    const uint16_t *low = (const uint16_t *)first, *high = (const uint16_t *)second;
    for (int c = 0; c < dim; c++) ((uint32_t *)pairs)[c] = low[c] | (uint32_t)high[c] << 16;
}

/* Attend to the batch. */
INLINE void use_as(Task *task, int has_pairs) {
    const int dim = task->attention->dim;
    const float scale = task->attention->scale;
    Batch *batch = &task->batch;
    float *scores = task->memory + 2 * MAX_QUERIES * dim;
    /* A tile that is not full repeats a key; its scores are never looked at but for the highest. */
    for (int i = batch->size; i % TILE != 0; i++) batch->keys[i] = batch->keys[0];
    if (has_pairs) {
        Word *pairs = scores + BATCH * PANEL;
        for (int j = 0; j < batch->size; j += 2, pairs += dim) {
            const Word *next = batch->values[j + 1 < batch->size ? j + 1 : j];
            pair_up(batch->values[j], next, dim, pairs);
            batch->values[j / 2] = pairs;
        }
    }
    for (int p = 0; p < task->num_panels; p++) {
        if (p < task->num_panels - 1 || task->last_vectors == 2)
            attend_batch(task->panels + p, batch, dim, 2, has_pairs, scale, scores);
        else
            attend_batch(task->panels + p, batch, dim, 1, has_pairs, scale, scores);
    }
    batch->size = 0;
}

static void use(Task *task) {
    if (task->batch.size == 0) return;
    if (task->attention->has_pairs)
        use_as(task, 1);
    else
        use_as(task, 0);
}

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE char *at(const Tensor *x, int64_t head, int64_t token) {
    return x->heads[head] + token * x->token;
}

/* The queries see the keys of these tokens. */
static void see_tokens(Task *task, int64_t first, int64_t end) {
    const Attention *a = task->attention;
    Batch *batch = &task->batch;
    for (int64_t token = first; token < end; token++) {
        batch->keys[batch->size] = (const Word *)at(&a->keys, task->head, token);
        batch->values[batch->size++] = (const Word *)at(&a->values, task->head, token);
        if (batch->size == BATCH) use(task);
    }
}

/* The queries see the keys of these patches, which come after the special tokens of a view. */
static void see_patches(Task *task, int64_t first, int64_t end) {
    const Attention *a = task->attention;
    while (first < end) {
        int64_t view = first / a->patches_per_view, lead = (view + 1) * a->special_per_view;
        int64_t until = smaller(end, (view + 1) * a->patches_per_view);
        see_tokens(task, lead + first, lead + until);
        first = until;
    }
}

static int width_of(const Task *task, int panel) {
    return panel < task->num_panels - 1 ? PANEL : task->last_vectors * LANES;
}

/* Where the i-th query of a panel lies in a tensor; NULL if there is none. */
static char *query_at(const Task *task, const Tensor *x, int panel, int i) {
    const Attention *a = task->attention;
    int64_t query = task->first + panel * PANEL + i;
    if (query >= task->end) return NULL;
    int64_t in_view = task->is_special ? a->special_per_view : a->patches_per_view;
    int64_t lead = task->is_special ? 0 : a->special_per_view;
    int64_t per_view = a->special_per_view + a->patches_per_view;
    return at(x, task->head, query / in_view * per_view + lead + query % in_view);
}

/* Queries ``first`` to ``end`` of the task, which have not seen a key yet. */
static void begin(Task *task, int64_t first, int64_t end) {
    const Attention *a = task->attention;
    const int words = a->has_pairs ? a->dim / 2 : a->dim;
    task->first = first, task->end = end, task->batch.size = 0;
    task->num_panels = (end - first + PANEL - 1) / PANEL;
    task->last_vectors = end - first - (task->num_panels - 1) * PANEL <= LANES ? 1 : 2;
    memset(task->memory, 0, 2 * MAX_QUERIES * a->dim * sizeof(float));
    for (int p = 0; p < task->num_panels; p++) {
        Panel *panel = task->panels + p;
        panel->queries = task->memory + p * PANEL * a->dim;
        panel->sums = panel->queries + MAX_QUERIES * a->dim;
        for (int v = 0; v < 2; v++) panel->top[v] = same(-INFINITY), panel->total[v] = same(0);
        for (int i = 0, width = width_of(task, p); i < width; i++) {
            const char *query = query_at(task, &a->queries, p, i);
            for (int c = 0; query && c < words; c++)
                memcpy(panel->queries + c * width + i, query + c * sizeof(Word), sizeof(Word));
        }
    }
}

static uint16_t bfloat16_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return 0x7fc0; /* rounding might make it a number */
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* Write what the queries have seen. */
static void finish(Task *task) {
    const Attention *a = task->attention;
    use(task);
    for (int p = 0; p < task->num_panels; p++) {
        Panel *panel = task->panels + p;
        const int width = width_of(task, p);
        for (int c = 0; c < a->dim; c++)
            for (int v = 0; v < width / LANES; v++) {
                float *sums = panel->sums + c * width + v * LANES;
                store(sums, load(sums) / panel->total[v]);
            }
        for (int i = 0; i < width; i++) {
            char *out = query_at(task, &a->out, p, i);
            const float *sums = panel->sums + i;
            if (!out) break;
            if (a->has_pairs)
                for (int c = 0; c < a->dim; c++) ((uint16_t *)out)[c] = bfloat16_of(sums[c * width]);
            else
                for (int c = 0; c < a->dim; c++) ((float *)out)[c] = sums[c * width];
        }
    }
}

/* Some special tokens, which see every key. */
static void attend_special(Task *task, int64_t first, int64_t end) {
    const Attention *a = task->attention;
    task->is_special = 1;
    begin(task, first, end);
    see_tokens(task, 0, a->num_views * (a->special_per_view + a->patches_per_view));
    finish(task);
}

/* The queries of a row of the mask, which see all special tokens and the blocks of its list. */
static void attend_row(Task *task, int64_t row) {
    const Attention *a = task->attention;
    const int64_t num_patches = a->num_views * a->patches_per_view;
    const int64_t *span = a->row_offsets + a->mask_heads[task->head] * a->num_rows + row;
    const int64_t end = smaller((row + 1) * a->block_size_q, num_patches);
    task->is_special = 0;
    for (int64_t first = row * a->block_size_q; first < end; first += MAX_QUERIES) {
        begin(task, first, smaller(first + MAX_QUERIES, end));
        for (int64_t view = 0; view < a->num_views; view++) {
            int64_t token = view * (a->special_per_view + a->patches_per_view);
            see_tokens(task, token, token + a->special_per_view);
        }
        for (int64_t i = span[0]; i < span[1]; i++) {
            int64_t patch = a->blocks[i] * a->block_size_kv;
            see_patches(task, patch, smaller(patch + a->block_size_kv, num_patches));
        }
        finish(task);
    }
}

/* Whether has_pairs may be set. */
int hess_multiplies_pairs(void) {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

/* Do tasks until none is left. Of every head first the special tokens, MAX_QUERIES at once, then
   row after row of the mask. Returns 0, or 1 if there is no memory. */
int hess_attend(const Attention *a) {
    const int64_t num_special = a->num_views * a->special_per_view;
    const int64_t special_tasks = (num_special + MAX_QUERIES - 1) / MAX_QUERIES;
    const int64_t tasks_per_head = special_tasks + a->num_rows;
    const size_t floats = 2 * MAX_QUERIES * a->dim + BATCH * PANEL + BATCH / 2 * a->dim;
    Task task = {.attention = a, .memory = aligned_alloc(64, floats * sizeof(float))};
    if (!task.memory) return 1;
    for (;;) {
        int64_t number = __atomic_fetch_add(a->next, 1, __ATOMIC_RELAXED);
        if (number >= a->num_heads * tasks_per_head) break;
        task.head = number / tasks_per_head;
        int64_t of_head = number % tasks_per_head, first = of_head * MAX_QUERIES;
        if (of_head < special_tasks)
            attend_special(&task, first, smaller(first + MAX_QUERIES, num_special));
        else
            attend_row(&task, of_head - special_tasks);
    }
    free(task.memory);
    return 0;
}
