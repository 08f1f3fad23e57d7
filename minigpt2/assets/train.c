/* Parts of GPT-2's training step on a CPU, each in one pass over memory: GELU and its gradient, dropout, and
   between the products of attention the softmax with dropout and its gradient. Masks are not kept: whether a number
   is dropped follows from a seed and its place, and is found out again for the gradient.

   Letters: R rows of S scores each. */
#include "vectors.h"

typedef uint32_t words __attribute__((vector_size(4 * LANES)));
#define AT_ONCE 4096 /* numbers of an array, which one thread takes */

/* ---- GELU by tanh: u sigmoid(z) with z = 2 sqrt(2/pi) (u + 0.044715 u^3) ---- */

#define SLOPE 1.59576912f
#define CUBIC 0.044715f

INLINE vec sigmoid_of_z(vec u) { return 1 / (1 + exp_of(-SLOPE * (u + CUBIC * u * u * u))); }

/* y = gelu(u), n numbers */
void gelu(const float *u, float *y, int64_t n) {
#pragma omp parallel for schedule(static)
    for (int64_t begin = 0; begin < n; begin += AT_ONCE)
        for (int64_t k = begin; k < begin + AT_ONCE && k < n; k += LANES) {
            vec x = some_of(u, k, n);
            put_some(y, k, n, x * sigmoid_of_z(x));
        }
}

/* grad *= gelu'(u), and y = gelu(u) once more */
void gelu_gradient(float *grad, const float *u, float *y, int64_t n) {
#pragma omp parallel for schedule(static)
    for (int64_t begin = 0; begin < n; begin += AT_ONCE)
        for (int64_t k = begin; k < begin + AT_ONCE && k < n; k += LANES) {
            vec x = some_of(u, k, n), s = sigmoid_of_z(x);
            vec slope = s + x * s * (1 - s) * SLOPE * (1 + 3 * CUBIC * x * x);
            put_some(y, k, n, x * s);
            put_some(grad, k, n, some_of(grad, k, n) * slope);
        }
}

/* ---- dropout ---- */

/* How numbers are dropped: those whose 32 random bits are below `dropped`; the others grow by `factor`. */
typedef struct {
    uint64_t seed;
    uint32_t dropped;
    float factor;
} Dropout;

/* SplitMix64 (Steele, Lea and Flood 2014): neighbouring numbers give bits that have nothing in common. */
static uint64_t mixed(uint64_t x) {
    x += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

/* The finalizer of MurmurHash3 (Appleby), for every number of a vector. */
INLINE words hashed(words x) {
    x = (x ^ (x >> 16)) * 0x85ebca6b;
    x = (x ^ (x >> 13)) * 0xc2b2ae35;
    return x ^ (x >> 16);
}

/* 0 or the factor for the numbers from k on of a row with this key. */
INLINE vec factors(const Dropout *how, uint64_t key, int64_t k) {
    words place;
    for (int i = 0; i < LANES; i++) place[i] = (uint32_t)k + i;
    words random = hashed(hashed(place ^ (uint32_t)key) ^ (uint32_t)(key >> 32));
    return (vec)((ints)(random >= how->dropped) & (ints)all(how->factor));
}

/* y = x, dropped out; n numbers */
void drop(const float *x, float *y, int64_t n, const Dropout *how) {
#pragma omp parallel for schedule(static)
    for (int64_t begin = 0; begin < n; begin += AT_ONCE) {
        uint64_t key = mixed(how->seed + begin);
        for (int64_t k = begin; k < begin + AT_ONCE && k < n; k += LANES)
            put_some(y, k, n, some_of(x, k, n) * factors(how, key, k - begin));
    }
}

/* ---- attention ---- */

/* Some queries of some heads: row r of the scores is that of query first + r % queries, which sees as many keys and
   itself. `scale` is that of attention. */
typedef struct {
    int64_t n_rows, n_keys, queries, first;
    float scale;
} Part;

INLINE int64_t seen_by(const Part *part, int64_t r) { return part->first + r % part->queries + 1; }

/* numbers from k on, and -infinity where there are none */
INLINE vec some_or_least(const float *x, int64_t k, int64_t n) {
    if (k + LANES <= n) return of_float(x + k);
    float some[LANES];
    for (int i = 0; i < LANES; i++) some[i] = k + i < n ? x[k + i] : -INFINITY;
    return of_float(some);
}

static float most_of(const float *x, int64_t n) {
    vec most = all(-INFINITY);
    for (int64_t k = 0; k < n; k += LANES) {
        vec some = some_or_least(x, k, n);
        most = either((ints)(some > most), some, most);
    }
    float found = -INFINITY;
    for (int i = 0; i < LANES; i++) found = most[i] > found ? most[i] : found;
    return found;
}

/* scores (R, S), products of queries and keys, become probabilities, dropped out; logs (R) become the logarithms of
   the sums of their exponentials */
void softmax_dropped(float *scores, float *logs, const Part *part, const Dropout *how) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < part->n_rows; r++) {
        float *row = scores + r * part->n_keys;
        int64_t n = seen_by(part, r);
        float most = most_of(row, n) * part->scale, sum = 0;
        vec sums = all(0);
        for (int64_t k = 0; k < n; k += LANES) {
            vec e = exp_of(some_or_least(row, k, n) * part->scale - most);
            put_some(row, k, n, e);
            if (k + LANES <= n) sums += e;
            else for (int i = 0; k + i < n; i++) sum += e[i];
        }
        sum += total(sums);
        logs[r] = most + logf(sum);
        uint64_t key = mixed(how->seed + r);
        for (int64_t k = 0; k < n; k += LANES)
            put_some(row, k, n, some_of(row, k, n) * (1 / sum) * factors(how, key, k));
        memset(row + n, 0, (part->n_keys - n) * sizeof *row);
    }
}

/* For the same scores, and grad (R, S), the products of gradients and values: the scores become the probabilities
   once more, and grad the gradient of the products of queries and keys. `dots` (R) are the sums of the
   probabilities times their gradients. */
void softmax_dropped_gradient(float *scores, float *grad, const float *logs, const float *dots, const Part *part,
                              const Dropout *how) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < part->n_rows; r++) {
        float *row = scores + r * part->n_keys, *g = grad + r * part->n_keys;
        int64_t n = seen_by(part, r);
        uint64_t key = mixed(how->seed + r);
        for (int64_t k = 0; k < n; k += LANES) {
            vec probs = exp_of(some_of(row, k, n) * part->scale - logs[r]), kept = factors(how, key, k);
            put_some(row, k, n, probs * kept);
            put_some(g, k, n, probs * (some_of(g, k, n) * kept - dots[r]) * part->scale);
        }
        memset(row + n, 0, (part->n_keys - n) * sizeof *row);
        memset(g + n, 0, (part->n_keys - n) * sizeof *g);
    }
}
