/* Ranking the numbers of a row without sorting them: a value is found bit by bit.

   For the bits of a number from the highest on it is counted how many numbers are at least as
   large as one with this bit set. Those are 32 passes at most, which the compiler turns into
   vectors; quicker than putting the row in order. */

#pragma once

#include <stdint.h>
#include <string.h>

/* Keys in the same order as the numbers, -0 and 0 the same. */
static inline void keys_of(const float *row, int64_t length, uint32_t *keys) {
    for (int64_t i = 0; i < length; i++) {
        float x = row[i] + 0.0f;
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        keys[i] = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
    }
}

static inline int64_t count_above(const uint32_t *keys, int64_t length, uint32_t bound) {
    int32_t count = 0;
    for (int64_t i = 0; i < length; i++) count += keys[i] > bound;
    return count;
}

/* A number that ``wanted`` keys reach, or if ties are in the way, the largest that more reach. */
static inline uint32_t least_of(const uint32_t *keys, int64_t length, int64_t wanted) {
    uint32_t known = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        int64_t count = count_above(keys, length, (known | bit) - 1);
        if (count >= wanted) known |= bit;
        if (count == wanted) break; /* the bits to come would make no difference */
    }
    return known;
}

/* Which keys are the ``wanted`` largest, ties to the lowest index, as an ascending list. */
static inline void list_largest(const uint32_t *keys, int64_t length, int64_t wanted,
                                int32_t *list) {
    if (wanted == 0) return;
    const uint32_t least = least_of(keys, length, wanted);
    int64_t ties = wanted - count_above(keys, length, least);
    for (int64_t i = 0; i < length; i++)
        if (keys[i] > least || (keys[i] == least && ties-- > 0)) *list++ = i;
}

/* Some rows of num_rows that no other thread has; their number, 0 if none is left. */
static inline int64_t take_rows(int64_t *next, int64_t num_rows, int64_t *first) {
    enum { AT_ONCE = 16 };
    *first = __atomic_fetch_add(next, AT_ONCE, __ATOMIC_RELAXED);
    int64_t left = num_rows - *first;
    return left < 0 ? 0 : left < AT_ONCE ? left : AT_ONCE;
}
