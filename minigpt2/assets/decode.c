/* GPT-2's decode step on a CPU: the blocks of minigpt2/model.py once more, for few tokens, as fast as
   memory gives the weights. Every weight is read once for up to 8 tokens, as the file has it (float,
   half, or byte and a scale for each row), and widened in a register; sums are made in float, and in
   an order that does not depend on how many tokens there are.

   Letters: M tokens, of B rows with T tokens each; N outputs of a matrix, K its inputs; C n_embd,
   H heads, D head size, S positions seen. An array of M tokens lies token after token. */
#include "vectors.h"
#include <omp.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

typedef int16_t shorts __attribute__((vector_size(2 * LANES)));

/* ---- numbers of 16 and 8 bits ---- */

typedef uint16_t half; /* its bits */
#if defined(__F16C__) && LANES == 16
INLINE vec of_half(const half *w) { return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)w)); }
#elif defined(__F16C__)
INLINE vec of_half(const half *w) { return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)w)); }
#elif defined(__ARM_FP16_FORMAT_IEEE)
INLINE vec of_half(const half *w) {
    vec v;
    for (int i = 0; i < LANES; i++) v[i] = ((const __fp16 *)w)[i];
    return v;
}
#else
#define NO_HALF
INLINE vec of_half(const half *w) { return (vec){w[0]}; }
#endif

/* sums + the products of neighbouring pairs of 2 LANES weights and inputs */
INLINE ints add_pairs(ints sums, const int8_t *w, const int16_t *x) {
#if defined(__AVX512BW__)
    __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)w));
    __m512i inputs = _mm512_loadu_si512(x);
#ifdef __AVX512VNNI__
    return (ints)_mm512_dpwssd_epi32((__m512i)sums, wide, inputs);
#else
    return sums + (ints)_mm512_madd_epi16(wide, inputs);
#endif
#elif defined(__AVX2__) && LANES == 8
    __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w));
    return sums + (ints)_mm256_madd_epi16(wide, _mm256_loadu_si256((const __m256i *)x));
#else
    for (int i = 0; i < LANES; i++) sums[i] += w[2 * i] * x[2 * i] + w[2 * i + 1] * x[2 * i + 1];
    return sums;
#endif
}

/* ---- products ---- */

enum { FLOAT, HALF, BYTE };

typedef struct {
    const void *weight; /* (N, K) */
    const float *scale; /* (N), of bytes */
    const float *bias;  /* (N), or none */
    int64_t n, k, kind;
} Matrix;

/* Inputs are read in steps of so many; bytes are multiplied with inputs of 16 bits, for which there is one
   instruction where floats take three. */
#define STEP LANES
#define BYTE_STEP (2 * LANES)
#define WHOLE(k, step) (((k) + (step) - 1) / (step) * (step))
#define ROOM(k) WHOLE(k, BYTE_STEP) /* floats that a token's packed inputs take at most */
#define AHEAD 6144                  /* bytes: with few tokens, memory is all that is waited for */
#define MOST_AHEAD(TYPE) (sizeof(TYPE) == 1 ? 2 : 1) /* tokens: with more, it costs more than it brings */

INLINE vec add_floats(vec sums, const float *w, const float *x) { return sums + of_float(w) * of_float(x); }
INLINE vec add_halves(vec sums, const half *w, const float *x) { return sums + of_half(w) * of_float(x); }

/* For R tokens and O neighbouring outputs from n on: y[m][n] = x[m] . w[n]. The inputs are packed (see `pack`),
   and all sums stay in registers. */
#define TILE(NAME, TYPE, INPUT, SUMS, WIDTH, ADD)                                                             \
    INLINE void NAME(int R, int O, const INPUT *x, const TYPE *w, float *y, long K, long n, long N) {         \
        SUMS sums[O][R];                                                                                      \
        for (int o = 0; o < O; o++)                                                                           \
            for (int m = 0; m < R; m++) sums[o][m] = (SUMS){0};                                               \
        long k = 0;                                                                                           \
        for (; k + WIDTH <= K; k += WIDTH)                                                                    \
            for (int o = 0; o < O; o++) {                                                                     \
                const TYPE *there = w + (n + o) * K + k;                                                      \
                if (R <= MOST_AHEAD(TYPE)) __builtin_prefetch((const char *)there + AHEAD);                   \
                for (int m = 0; m < R; m++) sums[o][m] = ADD(sums[o][m], there, x + k * R + m * WIDTH);       \
            }                                                                                                 \
        if (k < K)                                                                                            \
            for (int o = 0; o < O; o++) {                                                                     \
                TYPE some[WIDTH] = {0};                                                                       \
                memcpy(some, w + (n + o) * K + k, (K - k) * sizeof(TYPE));                                    \
                for (int m = 0; m < R; m++) sums[o][m] = ADD(sums[o][m], some, x + k * R + m * WIDTH);        \
            }                                                                                                 \
        for (int o = 0; o < O; o++)                                                                           \
            for (int m = 0; m < R; m++) y[m * N + n + o] = total(__builtin_convertvector(sums[o][m], vec));   \
    }
TILE(float_tile, float, float, vec, STEP, add_floats)
TILE(half_tile, half, float, vec, STEP, add_halves)
TILE(byte_tile, int8_t, int16_t, ints, BYTE_STEP, add_pairs)

INLINE void tile(int R, int O, const Matrix *w, const float *x, float *y, long n) {
    if (w->kind == FLOAT) float_tile(R, O, x, w->weight, y, w->k, n, w->n);
    if (w->kind == HALF) half_tile(R, O, x, w->weight, y, w->k, n, w->n);
    if (w->kind == BYTE) byte_tile(R, O, (const int16_t *)x, w->weight, y, w->k, n, w->n);
}

/* How many neighbouring outputs of R tokens are made at once. As long as the inputs stay in the nearest cache, weights
   of one output after the other come from memory the soonest; inputs that do not fit are read once for several outputs.
   With one token or two there is little to compute, and several rows of weights are waited for at once. Measured on
   a Skylake Xeon, with vectors of 16 and of 8 floats (of which a processor has 32 and 16). */
#define NEAR (28 * 1024) /* bytes: of 32 KB, some are for weights */
INLINE int outputs_at_once(int R, const Matrix *w) {
    if (R == 1) return w->kind == HALF ? 4 : 2;
    if (R == 2) return 4;
    if (R * w->k * (long)(w->kind == BYTE ? sizeof(int16_t) : sizeof(float)) <= NEAR) return 1;
    return R == 4 ? 4 : LANES == 16 ? 3 : 2;
}

/* The outputs from `begin` to `end` of R tokens. */
#define OUTPUTS(R)                                                                                 \
    static void outputs_##R(const Matrix *w, const float *x, float *y, long begin, long end) {     \
        const int O = outputs_at_once(R, w);                                                       \
        long n = begin;                                                                            \
        if (O == 4) for (; n + 4 <= end; n += 4) tile(R, 4, w, x, y, n);                           \
        if (O == 3) for (; n + 3 <= end; n += 3) tile(R, 3, w, x, y, n);                           \
        if (O == 2) for (; n + 2 <= end; n += 2) tile(R, 2, w, x, y, n);                           \
        for (; n < end; n++) tile(R, 1, w, x, y, n);                                               \
    }
OUTPUTS(1)
OUTPUTS(2)
OUTPUTS(4)
OUTPUTS(8)

/* Tokens go in groups of 8, 4, 2 and 1: how many of the M that are left are in the next. */
INLINE long group(long M) { return M >= 8 ? 8 : M >= 4 ? 4 : M >= 2 ? 2 : 1; }

/* x (R, K) in the order in which it is read: STEP inputs of one token, of the next, ... */
static void pack(const float *x, float *packed, long R, long K) {
    for (long k = 0; k < K; k += STEP)
        for (long m = 0; m < R; m++, packed += STEP) put(packed, some_of(x + m * K, k, K));
}

INLINE float largest_of(vec v) {
    float largest = v[0];
    for (int i = 1; i < LANES; i++) largest = v[i] > largest ? v[i] : largest;
    return largest;
}

/* x (R, K) in that order, as whole steps of 16 bits (fewer for so many inputs that a sum of 32 bits could overflow),
   and the size of the steps of each token; with an input that is no finite number, the size is none either. */
static void pack_rounded(const float *x, int16_t *packed, float *sizes, long R, long K) {
    const long most = INT32_MAX / 127 / (WHOLE(K, BYTE_STEP) / LANES);
    const float steps = most < INT16_MAX ? most : INT16_MAX;
    for (long m = 0; m < R; m++, x += K) {
        vec largest = all(1e-30f), odd = all(0);
        for (long k = 0; k < K; k += LANES) {
            vec size = some_of(x, k, K);
            size = either((ints)(size < 0), -size, size);
            largest = either((ints)(size > largest), size, largest);
            odd += 0 * size;
        }
        sizes[m] = largest_of(largest) / steps;
        const float per_size = 1 / sizes[m];
        for (long k = 0; k < WHOLE(K, BYTE_STEP); k += LANES) {
            vec value = some_of(x, k, K) * per_size + TO_WHOLE;
            shorts whole = __builtin_convertvector((ints)value - (ints)all(TO_WHOLE), shorts);
            memcpy(packed + k / BYTE_STEP * BYTE_STEP * R + m * BYTE_STEP + k % BYTE_STEP, &whole, sizeof whole);
        }
        sizes[m] += total(odd);
    }
}

/* The outputs from `begin` to `end` of x (M, K) -> y (M, N). `own` holds ROOM(K) numbers for each of the M
   tokens. A block of outputs goes through all groups of tokens, of which those after the first find its weights
   in the cache. */
static void product(const Matrix *w, const float *x, float *y, long M, long begin, long end, float *own) {
    const long K = w->k, N = w->n, room = ROOM(K), block = 64;
    float *packed = own;
    for (long left = M, R; left; left -= R, packed += R * room, x += R * K) {
        R = group(left);
        if (w->kind == BYTE) pack_rounded(x, (int16_t *)packed, packed + R * (room - 1), R, K);
        else pack(x, packed, R, K);
    }
    for (long from = begin; from < end; from += block) {
        const long to = from + block < end ? from + block : end;
        float *there = y;
        packed = own;
        for (long left = M, R; left; left -= R, packed += R * room, there += R * N) {
            R = group(left);
            if (R == 8) outputs_8(w, packed, there, from, to);
            if (R == 4) outputs_4(w, packed, there, from, to);
            if (R == 2) outputs_2(w, packed, there, from, to);
            if (R == 1) outputs_1(w, packed, there, from, to);
            for (long m = 0; m < R; m++)
                for (long n = from; n < to; n++) {
                    float sum = there[m * N + n];
                    if (w->kind == BYTE) sum *= w->scale[n] * packed[R * (room - 1) + m];
                    there[m * N + n] = sum + (w->bias ? w->bias[n] : 0);
                }
        }
    }
}

/* The part of n things that is this thread's. */
static long first_of(long n, long thread, long n_threads) { return n * thread / n_threads; }
#define MINE(n) first_of(n, thread, n_threads), first_of(n, thread + 1, n_threads)

/* x (M, K) -> y (M, N), by all threads. `work` holds room_for(K) numbers for
   each token and thread. */
void linear(const Matrix *w, const float *x, float *y, int64_t M, float *work, int64_t most_threads) {
#pragma omp parallel num_threads(most_threads)
    {
        long thread = omp_get_thread_num(), n_threads = omp_get_num_threads();
        product(w, x, y, M, MINE(w->n), work + thread * M * ROOM(w->k));
    }
}

int64_t room_for(int64_t k) { return ROOM(k); }

int64_t has_half(void) {
#ifdef NO_HALF
    return 0;
#else
    return 1;
#endif
}

/* ---- the parts of a block ---- */

typedef struct {
    const float *weight, *bias; /* (C) */
} Norm;

INLINE float sum_of(const float *x, long n) {
    vec sums = all(0);
    float rest = 0;
    long i = 0;
    for (; i + LANES <= n; i += LANES) sums += of_float(x + i);
    for (; i < n; i++) rest += x[i];
    return total(sums) + rest;
}

INLINE float dot(const float *a, const float *b, long n) {
    vec sums = all(0);
    float rest = 0;
    long i = 0;
    for (; i + LANES <= n; i += LANES) sums += of_float(a + i) * of_float(b + i);
    for (; i < n; i++) rest += a[i] * b[i];
    return total(sums) + rest;
}

/* x (M, C) -> y (M, C): mean 0 and variance 1, then scaled and moved. */
static void layer_norm(const Norm *norm, float epsilon, const float *x, float *y, long M, long C) {
    for (long m = 0; m < M; m++, x += C, y += C) {
        float mean = sum_of(x, C) / C;
        for (long c = 0; c < C; c++) y[c] = x[c] - mean;
        float scale = 1 / sqrtf(dot(y, y, C) / C + epsilon);
        for (long c = 0; c < C; c++) y[c] = y[c] * scale * norm->weight[c] + norm->bias[c];
    }
}

enum { GELU_TANH, GELU, RELU, SILU };

/* x / (1 + e^-x) is silu; with 2 sqrt(2/pi) (x + 0.044715 x^3) for the x of e it is gelu's tanh form. */
INLINE vec activated(vec x, int64_t kind) {
    if (kind == RELU) return either((ints)(x < 0), all(0), x);
    if (kind == GELU) {
        for (int i = 0; i < LANES; i++) x[i] = 0.5f * x[i] * (1 + erff(x[i] * 0.70710678f));
        return x;
    }
    vec inner = kind == SILU ? x : 1.59576912f * (x + 0.044715f * x * x * x);
    return x / (1 + exp_of(-inner));
}

/* x (M, N), from the column `begin` to `end`. */
static void activate(int64_t kind, float *x, long M, long N, long begin, long end) {
    for (long m = 0; m < M; m++, x += N)
        for (long n = begin; n < end; n += LANES) put_some(x, n, end, activated(some_of(x, n, end), kind));
}

/* x += y, both (M, N), from the column `begin` to `end`. */
static void add(float *x, const float *y, long M, long N, long begin, long end) {
    for (long m = 0; m < M; m++)
        for (long n = begin; n < end; n++) x[m * N + n] += y[m * N + n];
}

/* scores (S) -> probabilities (S) */
static void softmax(float *scores, long S) {
    float most = -INFINITY;
    for (long s = 0; s < S; s++) most = scores[s] > most ? scores[s] : most;
    for (long s = 0; s < S; s += LANES) put_some(scores, s, S, exp_of(some_of(scores, s, S) - most));
    float sum = sum_of(scores, S);
    for (long s = 0; s < S; s++) scores[s] /= sum;
}

/* One head of one token: query (D), keys and values (S, D) -> mixed (D). */
static void attend(const float *query, const float *keys, const float *restrict values, float *restrict mixed,
                   float *scores, float scale, long S, long D) {
    for (long s = 0; s < S; s++) scores[s] = dot(query, keys + s * D, D) * scale;
    softmax(scores, S);
    memset(mixed, 0, D * sizeof(float));
    for (long s = 0; s < S; s++)
        for (long d = 0; d < D; d++) mixed[d] += scores[s] * values[s * D + d];
}

/* ---- the step ---- */

typedef struct {
    Norm ln_1;
    Matrix c_attn, attn_c_proj;
    Norm ln_2;
    Matrix c_fc, mlp_c_proj;
    float scale; /* of attention scores */
} Block;

typedef struct {
    int64_t n_layer, n_head, n_embd, n_inner, activation;
    float epsilon;
    Norm ln_f;
} Shape;

/* One layer's part of the cache: keys and values (B, H, capacity, D). */
typedef struct {
    float *keys, *values;
    int64_t row_stride, head_stride, capacity;
} Slots;

/* One head of the T tokens of row b: the new keys and values into the cache, then each token looks at what it sees. */
static void gather(const Block *block, const Slots *slots, const float *qkv, const int64_t *positions, float *mixed,
                   float *scores, long b, long h, long T, long C, long D) {
    float *keys = slots->keys + b * slots->row_stride + h * slots->head_stride;
    float *values = slots->values + b * slots->row_stride + h * slots->head_stride;
    for (long m = b * T; m < (b + 1) * T; m++) {
        const float *query = qkv + m * 3 * C + h * D;
        memcpy(keys + positions[m] * D, query + C, D * sizeof(float));
        memcpy(values + positions[m] * D, query + 2 * C, D * sizeof(float));
        attend(query, keys, values, mixed + m * C + h * D, scores, block->scale, positions[m] + 1, D);
    }
}

/* x (M, C), the embeddings of tokens and positions -> x, what the last layer knows, after its layer norm. The new
   keys and values are written to the slots at `positions` (B, T). `work` holds
   M (4 C + n_inner) + most_threads (M (C + room_for(the wider of C and n_inner)) + capacity) numbers. */
void decode_step(const Shape *shape, const Block *blocks, const Slots *slots, const int64_t *positions, float *x,
                 int64_t B, int64_t T, float *work, int64_t most_threads) {
    const long M = B * T, C = shape->n_embd, H = shape->n_head, D = C / H, inner = shape->n_inner;
    const long room = ROOM(inner > C ? inner : C), own = M * (C + room) + slots->capacity;
    float *qkv = work, *mixed = qkv + M * 3 * C, *hidden = mixed + M * C, *owned = hidden + M * inner;
    float *added = qkv; /* (M, C): what a part adds to the residual stream, once qkv was read */
#pragma omp parallel num_threads(most_threads)
    {
        const long thread = omp_get_thread_num(), n_threads = omp_get_num_threads();
        float *normed = owned + thread * own, *packed = normed + M * C, *scores = packed + M * room;
        for (long layer = 0; layer < shape->n_layer; layer++) {
            const Block *block = &blocks[layer];
            /* every thread makes the whole layer norm for itself: that is sooner than to wait for another */
            layer_norm(&block->ln_1, shape->epsilon, x, normed, M, C);
            product(&block->c_attn, normed, qkv, M, MINE(3 * C), packed);
#pragma omp barrier
            for (long i = first_of(B * H, thread, n_threads); i < first_of(B * H, thread + 1, n_threads); i++)
                gather(block, &slots[layer], qkv, positions, mixed, scores, i / H, i % H, T, C, D);
#pragma omp barrier
            product(&block->attn_c_proj, mixed, added, M, MINE(C), packed);
            add(x, added, M, C, MINE(C));
#pragma omp barrier
            layer_norm(&block->ln_2, shape->epsilon, x, normed, M, C);
            product(&block->c_fc, normed, hidden, M, MINE(inner), packed);
            activate(shape->activation, hidden, M, inner, MINE(inner));
#pragma omp barrier
            product(&block->mlp_c_proj, hidden, added, M, MINE(C), packed);
            add(x, added, M, C, MINE(C));
#pragma omp barrier
        }
    }
    layer_norm(&shape->ln_f, shape->epsilon, x, x, M, C);
}
