/* Vectors of fp32 numbers, as wide as the processor has them: the vector types of GCC and Clang. */

#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));

INLINE Floats same(float x) { return x - (Floats){0}; }

INLINE Floats load(const float *from) { return *(const Floats *)from; }

INLINE void store(float *to, Floats x) { *(Floats *)to = x; }

INLINE Floats larger(Floats a, Floats b) {
    Ints is_larger = a > b;
    return (Floats)(((Ints)a & is_larger) | ((Ints)b & ~is_larger));
}

/* 2^x for x <= 0, with a relative error of 1e-7. Below -126 it is 0; NaN stays NaN. */
INLINE Floats power_of_two(Floats x) {
    /* Adding 1.5 * 2^23 leaves no bits for fractions, so the last bits are the rounded number. */
    Floats shifted = x + 12582912.0f;
    Floats f = x - (shifted - 12582912.0f);
    /* The polynomial of this degree with the least relative error for f in [-1/2, 1/2]. */
    Floats p = same(1.53533623e-4f);
    p = p * f + 1.33988744e-3f;
    p = p * f + 9.61843736e-3f;
    p = p * f + 5.55033247e-2f;
    p = p * f + 2.40226479e-1f;
    p = p * f + 6.93147203e-1f;
    p = p * f + 1.0f;
    Bits bits = (Bits)p + ((Bits)shifted << 23);
    return (Floats)(bits & ~(Bits)(x < -126.0f));
}
