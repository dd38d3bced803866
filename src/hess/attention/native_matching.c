/* The blocks that match the output of a row, as attention/matching.py has it written out.

   A row is worked on as a whole, so that its numbers stay in the cache. In comments u counts the
   parts of its queries, s the parts of a key block, j the blocks. Columns are the parts of all key
   blocks, [s][j], and the special tokens; both are filled up with columns that have no weight. */

#include "native_ranks.h"
#include "native_vectors.h"

#include <stdlib.h>

#define MOST_PARTS 4
#define LEAST_MASS 1e-12f
#define WORST 1e30f
#define LOG2_E 1.44269504f

/* hess.attention.native_matching has the same fields in the same order. */
typedef struct {
    const float *queries;      /* [heads][u][q_blocks][dim], scaled */
    const float *query_shares; /* [u][q_blocks] */
    const float *keys;         /* [heads][dim][columns] */
    const float *biases;       /* [columns], added to the logits */
    const float *values;       /* [heads][columns][dim] */
    const float *values_t;     /* [heads][dim][columns] */
    const float *products;     /* [heads][s][s][padded_blocks], of the values of parts of a block */
    const int64_t *offsets;    /* [heads * q_blocks + 1]: where in ... */
    int32_t *lists;            /* ... the blocks of a row go */
    int64_t *next;             /* the same for all threads */
    int64_t num_heads, q_blocks, kv_blocks, padded_blocks, columns, dim, parts, rounds;
} Matching;

/* What is known of a row. */
typedef struct {
    float *queries, *out, *residual; /* [u][dim] */
    float *probs, *along;            /* [u][columns] */
    float *block_probs, *squares;    /* [u][padded_blocks] */
    float mass[MOST_PARTS], share[MOST_PARTS];
    float *worth;         /* [padded_blocks] */
    uint32_t *keys;       /* [kv_blocks] */
    int32_t *fresh;       /* [kv_blocks], blocks of the last round */
    int64_t num_fresh, num_taken;
    uint8_t *taken;       /* [kv_blocks] */
} Row;

/* out[u][column] = sum over c of a[u][c] * b[c][column], for ``columns`` of a ``width``. */
INLINE void times_columns(const float *a, const float *b, int parts, int64_t dim, int64_t columns,
                          int64_t width, float *out) {
    for (int64_t at = 0; at < columns; at += 2 * LANES) {
        Floats sums[MOST_PARTS][2];
        for (int u = 0; u < parts; u++) sums[u][0] = sums[u][1] = same(0);
        for (int64_t c = 0; c < dim; c++) {
            const Floats left = load(b + c * width + at), right = load(b + c * width + at + LANES);
            for (int u = 0; u < parts; u++) {
                sums[u][0] += a[u * dim + c] * left;
                sums[u][1] += a[u * dim + c] * right;
            }
        }
        for (int u = 0; u < parts; u++) {
            store(out + u * width + at, sums[u][0]);
            store(out + u * width + at + LANES, sums[u][1]);
        }
    }
}

/* out[u][c] = sum over rows of p[u][row] * v[row][c] */
INLINE void times_rows(const float *p, const float *v, int parts, int64_t dim, int64_t rows,
                       int64_t width, float *out) {
    for (int64_t c = 0; c < dim; c += LANES) {
        Floats sums[MOST_PARTS];
        for (int u = 0; u < parts; u++) sums[u] = same(0);
        for (int64_t row = 0; row < rows; row++) {
            const Floats value = load(v + row * dim + c);
            for (int u = 0; u < parts; u++) sums[u] += p[u * width + row] * value;
        }
        for (int u = 0; u < parts; u++) store(out + u * dim + c, sums[u]);
    }
}

static float sum_of(const float *x, int64_t length) {
    Floats sums = same(0);
    for (int64_t i = 0; i < length; i += LANES) sums += load(x + i);
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += sums[i];
    return sum;
}

static float dot(const float *a, const float *b, int64_t length) {
    Floats sums = same(0);
    for (int64_t i = 0; i < length; i += LANES) sums += load(a + i) * load(b + i);
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += sums[i];
    return sum;
}

/* Of logits without their biases. */
static void softmax(const float *biases, int64_t length, float *x) {
    Floats tops = same(-INFINITY);
    for (int64_t i = 0; i < length; i += LANES) {
        store(x + i, load(x + i) + load(biases + i));
        tops = larger(load(x + i), tops);
    }
    float top = -INFINITY;
    for (int i = 0; i < LANES; i++) top = tops[i] > top ? tops[i] : top;
    for (int64_t i = 0; i < length; i += LANES)
        store(x + i, power_of_two((load(x + i) - top) * LOG2_E));
    const float factor = 1 / sum_of(x, length);
    for (int64_t i = 0; i < length; i += LANES) store(x + i, load(x + i) * factor);
}

/* Take the ``wanted`` blocks that are worth most. */
static void take_blocks(const Matching *m, Row *row, int64_t wanted) {
    keys_of(row->worth, m->kv_blocks, row->keys);
    list_largest(row->keys, m->kv_blocks, wanted, row->fresh);
    for (int64_t i = 0; i < wanted; i++) row->taken[row->fresh[i]] = 1;
    row->num_fresh = wanted;
    row->num_taken += wanted;
}

/* Probabilities of the parts and blocks of a row, its output, ||r_j||^2, and what the special
   tokens alone leave. */
INLINE void begin_row(const Matching *m, Row *row, int64_t head, int64_t q_block, int parts) {
    const int64_t dim = m->dim, width = m->columns, blocks = m->padded_blocks;
    const int64_t special = parts * blocks;
    const float *values = m->values + head * width * dim;
    for (int u = 0; u < parts; u++) {
        const int64_t at = (head * parts + u) * m->q_blocks + q_block;
        memcpy(row->queries + u * dim, m->queries + at * dim, dim * sizeof(float));
        row->share[u] = m->query_shares[u * m->q_blocks + q_block];
    }
    times_columns(row->queries, m->keys + head * dim * width, parts, dim, width, width, row->probs);
    for (int u = 0; u < parts; u++) softmax(m->biases, width, row->probs + u * width);
    times_rows(row->probs, values, parts, dim, width, width, row->out);
    times_rows(row->probs + special, values + special * dim, parts, dim, width - special, width,
               row->residual);
    times_columns(row->out, m->values_t + head * dim * width, parts, dim, special, width, row->along);

    for (int64_t j = 0; j < blocks; j += LANES) {
        Floats worth = same(0);
        for (int u = 0; u < parts; u++) {
            const float *probs = row->probs + u * width + j, *along = row->along + u * width + j;
            const float *products = m->products + head * parts * parts * blocks + j;
            const float norm = sqrtf(dot(row->out + u * dim, row->out + u * dim, dim));
            Floats block = same(0), weighted = same(0), squares = same(0);
            for (int s = 0; s < parts; s++) {
                const Floats p = load(probs + s * blocks);
                Floats sum = same(0);
                for (int t = 0; t < parts; t++)
                    sum += load(probs + t * blocks) * load(products + (s * parts + t) * blocks);
                block += p;
                weighted += p * load(along + s * blocks);
                squares += p * sum;
            }
            squares += block * norm * (block * norm) - 2 * block * weighted;
            store(row->block_probs + u * blocks + j, block);
            store(row->squares + u * blocks + j, squares);
            worth += row->share[u] * block;
        }
        store(row->worth + j, worth);
    }
    for (int u = 0; u < parts; u++) {
        row->mass[u] = sum_of(row->probs + u * width + special, width - special);
        for (int64_t c = 0; c < dim; c++)
            row->residual[u * dim + c] -= row->mass[u] * row->out[u * dim + c];
    }
    memset(row->taken, 0, m->kv_blocks);
    row->num_taken = 0;
}

/* Add the blocks that were taken last to the mass and to the residual. */
INLINE void add_fresh(const Matching *m, Row *row, int64_t head, int parts) {
    const int64_t dim = m->dim, width = m->columns;
    for (int64_t i = 0; i < row->num_fresh; i++)
        for (int s = 0; s < parts; s++) {
            const int64_t column = s * m->padded_blocks + row->fresh[i];
            const float *value = m->values + (head * width + column) * dim;
            for (int u = 0; u < parts; u++) {
                const float p = row->probs[u * width + column], *out = row->out + u * dim;
                float *residual = row->residual + u * dim;
                row->mass[u] += p;
                for (int64_t c = 0; c < dim; c += LANES)
                    store(residual + c, load(residual + c) + p * (load(value + c) - load(out + c)));
            }
        }
}

/* What each block is worth beside those that are taken: the less error with it, the more. */
INLINE void rate_blocks(const Matching *m, Row *row, int64_t head, int parts) {
    const int64_t dim = m->dim, width = m->columns, blocks = m->padded_blocks;
    float square[MOST_PARTS], along_out[MOST_PARTS];
    times_columns(row->residual, m->values_t + head * dim * width, parts, dim, parts * blocks, width,
                  row->along);
    for (int u = 0; u < parts; u++) {
        square[u] = dot(row->residual + u * dim, row->residual + u * dim, dim);
        along_out[u] = dot(row->residual + u * dim, row->out + u * dim, dim);
    }
    for (int64_t j = 0; j < blocks; j += LANES) {
        Floats worth = same(0);
        for (int u = 0; u < parts; u++) {
            const Floats block = load(row->block_probs + u * blocks + j);
            Floats along = -block * along_out[u];
            for (int s = 0; s < parts; s++)
                along += load(row->probs + u * width + s * blocks + j) *
                         load(row->along + u * width + s * blocks + j);
            const Floats mass = row->mass[u] + block;
            Floats error = 2 * along + load(row->squares + u * blocks + j) + square[u];
            error = larger(same(0), error) / (mass * mass);
            /* Also where it is no number. */
            const Ints known = (mass >= LEAST_MASS) & (error <= WORST);
            error = (Floats)(((Ints)error & known) | ((Ints)same(WORST) & ~known));
            worth -= row->share[u] * error;
        }
        store(row->worth + j, worth);
    }
    for (int64_t j = 0; j < m->kv_blocks; j++)
        if (row->taken[j]) row->worth[j] = -INFINITY;
}

INLINE void match_row(const Matching *m, Row *row, int64_t r, int parts) {
    const int64_t head = r / m->q_blocks, wanted = m->offsets[r + 1] - m->offsets[r];
    if (wanted == 0) return;
    begin_row(m, row, head, r % m->q_blocks, parts);
    const int64_t first = (float)wanted * sqrtf((float)wanted / m->kv_blocks);
    take_blocks(m, row, first);
    for (int64_t i = 1; i <= m->rounds; i++) {
        add_fresh(m, row, head, parts);
        rate_blocks(m, row, head, parts);
        const int64_t until = first + ((wanted - first) * i + m->rounds - 1) / m->rounds;
        take_blocks(m, row, until - row->num_taken);
    }
    int32_t *list = m->lists + m->offsets[r];
    for (int64_t j = 0; j < m->kv_blocks; j++)
        if (row->taken[j]) *list++ = j;
}

/* Lists of all rows. Returns 0, or 1 if there is no memory. */
int hess_match(const Matching *m) {
    const int64_t floats =
        m->parts * (3 * m->dim + 2 * m->columns + 2 * m->padded_blocks) + 4 * m->padded_blocks;
    float *memory = aligned_alloc(64, floats * sizeof(float));
    if (!memory) return 1;
    Row row = {.queries = memory};
    row.out = row.queries + m->parts * m->dim;
    row.residual = row.out + m->parts * m->dim;
    row.probs = row.residual + m->parts * m->dim;
    row.along = row.probs + m->parts * m->columns;
    row.block_probs = row.along + m->parts * m->columns;
    row.squares = row.block_probs + m->parts * m->padded_blocks;
    row.worth = row.squares + m->parts * m->padded_blocks;
    row.keys = (uint32_t *)(row.worth + m->padded_blocks);
    row.fresh = (int32_t *)(row.keys + m->padded_blocks);
    row.taken = (uint8_t *)(row.fresh + m->padded_blocks);
    for (int64_t first, count;
         (count = take_rows(m->next, m->num_heads * m->q_blocks, &first));)
        for (int64_t r = first; r < first + count; r++) {
            if (m->parts == 4)
                match_row(m, &row, r, 4);
            else if (m->parts == 3)
                match_row(m, &row, r, 3);
            else if (m->parts == 2)
                match_row(m, &row, r, 2);
            else
                match_row(m, &row, r, 1);
        }
    free(memory);
    return 0;
}
