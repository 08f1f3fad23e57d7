/* Vectors of as many floats as this processor adds at once, for the C files beside this one. GCC's own, so that they
   are the same for all processors but for their number. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef float floats_there __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))

INLINE vec of_float(const float *w) { return *(const floats_there *)w; }

INLINE void put(float *y, vec v) { *(floats_there *)y = v; }
INLINE vec all(float x) { return x - (vec){0}; }
INLINE vec either(ints first, vec a, vec b) { return (vec)((first & (ints)a) | (~first & (ints)b)); }

/* The sum of a vector, by halves. */
INLINE float total(vec v) {
    float x[LANES];
    memcpy(x, &v, sizeof x);
    for (int n = LANES / 2; n > 2; n /= 2)
        for (int i = 0; i < n; i++) x[i] += x[i + n];
    return (x[0] + x[2]) + (x[1] + x[3]);
}

/* Added to a small number it rounds it to a whole one, which then are the last bits: 1.5 * 2^23. */
#define TO_WHOLE 12582912.0f

/* e^x within 2e-7 of it: 2^n e^r with r from -ln(2)/2 to ln(2)/2, e^r by the polynomial of Cephes' expf. */
INLINE vec exp_of(vec x) {
    const vec low = all(-87), high = all(88);
    x = either((ints)(x < low), low, x); /* what is not a number stays so */
    x = either((ints)(x > high), high, x);
    vec n = x * 1.44269504f + TO_WHOLE;
    ints power = (ints)n;
    n -= TO_WHOLE;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1) * (vec)((power << 23) + 0x3f800000);
}

/* LANES numbers of x (K) from k on, or what there are and zeros; and so many written there. */
INLINE vec some_of(const float *x, long k, long K) {
    if (k + LANES <= K) return of_float(x + k);
    float some[LANES] = {0};
    if (k < K) memcpy(some, x + k, (K - k) * sizeof(float));
    return of_float(some);
}

INLINE void put_some(float *x, long k, long K, vec v) {
    if (k + LANES <= K) put(x + k, v);
    else if (k < K) memcpy(x + k, &v, (K - k) * sizeof(float));
}
