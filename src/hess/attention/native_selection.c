/* What selection asks of the rows of a chunk, as attention/torch_selection.py has it. */

#include "native_ranks.h"

#include <stdlib.h>

/* hess.attention.native_selection has the same fields in the same order. */
typedef struct {
    const float *rows; /* [num_rows][length] */
    int64_t num_rows, length;
    int64_t *next; /* the same for all threads */
} Rows;

/* The largest numbers of row r, ties to the lowest index, as an ascending list of indices at
   offsets[r] - offsets[0]; as many as there is room for until offsets[r + 1]. All three functions
   return 0, or 1 if there is no memory. */
int hess_write_lists(const Rows *rows, const int64_t *offsets, int32_t *lists) {
    uint32_t *keys = malloc(rows->length * sizeof *keys);
    if (!keys) return 1;
    for (int64_t first, count; (count = take_rows(rows->next, rows->num_rows, &first));)
        for (int64_t r = first; r < first + count; r++) {
            const int64_t wanted = offsets[r + 1] - offsets[r];
            if (wanted == 0) continue;
            keys_of(rows->rows + r * rows->length, rows->length, keys);
            list_largest(keys, rows->length, wanted, lists + offsets[r] - offsets[0]);
        }
    free(keys);
    return 0;
}

/* The number of rank ranks[r], from 0, in row r. */
int hess_at_ranks(const Rows *rows, const int64_t *ranks, float *found) {
    uint32_t *keys = malloc(rows->length * sizeof *keys);
    if (!keys) return 1;
    for (int64_t first, count; (count = take_rows(rows->next, rows->num_rows, &first));)
        for (int64_t r = first; r < first + count; r++) {
            keys_of(rows->rows + r * rows->length, rows->length, keys);
            const uint32_t least = least_of(keys, rows->length, ranks[r] + 1);
            uint32_t key = UINT32_MAX; /* the lowest that is reached */
            for (int64_t i = 0; i < rows->length; i++) {
                uint32_t reached = keys[i] >= least ? keys[i] : UINT32_MAX;
                key = reached < key ? reached : key;
            }
            key ^= key >> 31 ? 0x80000000u : 0xffffffffu;
            memcpy(found + r, &key, sizeof key);
        }
    free(keys);
    return 0;
}

#define ONE 0x1p61 /* so that what a probability of fp32 loses is nothing, and sums stay below 2^63 */

/* How many of the largest shares sum up to no more than the limit. */
static int64_t count_of_sum(const uint32_t *keys, const int64_t *shares, int64_t length,
                            int64_t limit) {
    /* The keys from ``known`` on are too many, the ``fit`` ones from some number above it are not. */
    uint32_t known = 0;
    int64_t many = length, fit = 0, sum_fit = 0;
    for (uint32_t bit = 1u << 31; bit && many - fit > 1; bit >>= 1) {
        int64_t count = 0, sum = 0;
        for (int64_t i = 0; i < length; i++) {
            int64_t reaches = -(int64_t)(keys[i] >= (known | bit));
            count -= reaches;
            sum += shares[i] & reaches;
        }
        if (sum > limit)
            known |= bit, many = count;
        else
            fit = count, sum_fit = sum;
    }
    if (many - fit <= 1) return fit;
    /* Ties: all those between have the key ``known``. */
    int64_t share = 1;
    for (int64_t i = 0; i < length; i++) share = keys[i] == known ? shares[i] : share;
    return fit + (limit - sum_fit) / share;
}

/* How many of the largest probabilities of row r, at least 0 each, sum up to no more than mass. */
int hess_count_within(const Rows *rows, double mass, int64_t *counts) {
    const int64_t length = rows->length, limit = mass * ONE;
    uint32_t *keys = malloc(length * sizeof *keys);
    int64_t *shares = malloc(length * sizeof *shares);
    const int has_memory = keys && shares;
    for (int64_t first, count; has_memory && (count = take_rows(rows->next, rows->num_rows, &first));)
        for (int64_t r = first; r < first + count; r++) {
            const float *row = rows->rows + r * length;
            int64_t sum = 0;
            for (int64_t i = 0; i < length; i++) sum += shares[i] = row[i] * ONE;
            keys_of(row, length, keys);
            counts[r] = sum <= limit ? length : count_of_sum(keys, shares, length, limit);
        }
    free(keys);
    free(shares);
    return !has_memory;
}
