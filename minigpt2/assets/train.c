/* Parts of GPT-2's training step on a CPU, each in one pass over memory: layer norm, GELU, dropout, and causal
   attention with dropout, and their gradients. Masks are not kept: whether a number is dropped follows from a seed and
   its place, and is found out again for the gradient.

   Letters as in model.py: B rows, H heads, T tokens, D numbers of a head. A matrix has n_rows rows of `size` numbers.
   Sums over the rows of a matrix are left in parts, one for each ROWS rows, so that they are the same whatever the
   number of threads. */
#include "vectors.h"

typedef uint32_t words __attribute__((vector_size(4 * LANES)));
#define ROWS 32

/* The numbers from k on of a row that has n, and zeros. */
INLINE vec only_some(vec v, int64_t k, int64_t n) {
    for (int i = 0; i < LANES && k + LANES > n; i++) v[i] = k + i < n ? v[i] : 0;
    return v;
}

INLINE void add_some(float *sums, int64_t k, int64_t n, vec v) { put_some(sums, k, n, some_of(sums, k, n) + v); }

/* ---- layer norm ---- */

/* y = (x - mean) / spread * weight + bias, and of each row its mean and its rstd, 1 / spread: moments (n_rows, 2) */
void normalize(const float *x, const float *weight, const float *bias, float epsilon, float *y, float *moments,
               int64_t n_rows, int64_t size) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < n_rows; row++) {
        const float *from = x + row * size;
        vec sums = all(0), squares = all(0);
        for (int64_t k = 0; k < size; k += LANES) sums += some_of(from, k, size);
        float mean = total(sums) / size;
        for (int64_t k = 0; k < size; k += LANES) {
            vec d = only_some(some_of(from, k, size) - mean, k, size);
            squares += d * d;
        }
        float rstd = 1 / sqrtf(total(squares) / size + epsilon);
        moments[2 * row] = mean, moments[2 * row + 1] = rstd;
        for (int64_t k = 0; k < size; k += LANES) {
            vec normal = (some_of(from, k, size) - mean) * rstd;
            put_some(y + row * size, k, size, normal * some_of(weight, k, size) + some_of(bias, k, size));
        }
    }
}

/* grad, that of y, becomes that of x, and `residual` is added; parts of the sums of the weight's gradient and of the
   bias's: sums (n_rows / ROWS, 2, size) */
void normalize_gradient(float *grad, const float *x, const float *moments, const float *weight, const float *residual,
                        float *sums, int64_t n_rows, int64_t size) {
#pragma omp parallel for schedule(static)
    for (int64_t begin = 0; begin < n_rows; begin += ROWS) {
        float *of_weight = sums + begin / ROWS * 2 * size, *of_bias = of_weight + size;
        memset(of_weight, 0, 2 * size * sizeof(float));
        for (int64_t row = begin; row < begin + ROWS && row < n_rows; row++) {
            float mean = moments[2 * row], rstd = moments[2 * row + 1], *g = grad + row * size;
            const float *from = x + row * size;
            vec all_g = all(0), all_gx = all(0);
            for (int64_t k = 0; k < size; k += LANES) {
                vec normal = (some_of(from, k, size) - mean) * rstd, some = some_of(g, k, size);
                vec weighted = some * some_of(weight, k, size);
                add_some(of_weight, k, size, some * normal), add_some(of_bias, k, size, some);
                all_g += weighted, all_gx += weighted * normal; /* beyond the end they are 0 */
            }
            float mean_g = total(all_g) / size, mean_gx = total(all_gx) / size;
            for (int64_t k = 0; k < size; k += LANES) {
                vec normal = (some_of(from, k, size) - mean) * rstd;
                vec weighted = some_of(g, k, size) * some_of(weight, k, size);
                vec through = (weighted - mean_g - normal * mean_gx) * rstd;
                put_some(g, k, size, through + some_of(residual + row * size, k, size));
            }
        }
    }
}

/* ---- GELU by tanh: u sigmoid(z) with z = 2 sqrt(2/pi) (u + 0.044715 u^3) ---- */

#define SLOPE 1.59576912f
#define CUBIC 0.044715f

INLINE vec sigmoid_of_z(vec u) { return 1 / (1 + exp_of(-SLOPE * (u + CUBIC * u * u * u))); }

INLINE void some_gelu(float *u, const float *bias, float *y, int64_t k, int64_t n) {
    vec x = some_of(u, k, n) + some_of(bias, k, n);
    put_some(u, k, n, x);
    put_some(y, k, n, x * sigmoid_of_z(x));
}

/* u += bias, and y = gelu(u) */
void gelu(float *u, const float *bias, float *y, int64_t n_rows, int64_t size) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < n_rows; row++) {
        int64_t k = 0, at = row * size;
        for (; k + LANES <= size; k += LANES) some_gelu(u + at, bias, y + at, k, k + LANES);
        some_gelu(u + at, bias, y + at, k, size);
    }
}

INLINE void some_gelu_gradient(float *grad, const float *u, float *y, float *sums, int64_t k, int64_t n) {
    vec x = some_of(u, k, n), s = sigmoid_of_z(x);
    /* beyond 20 the slope is 0 or 1 */
    vec z = either((ints)(x < -20), all(-20), either((ints)(x > 20), all(20), x));
    vec g = some_of(grad, k, n) * (s + z * s * (1 - s) * SLOPE * (1 + 3 * CUBIC * z * z));
    put_some(y, k, n, x * s);
    put_some(grad, k, n, g);
    add_some(sums, k, n, g);
}

/* grad *= gelu'(u), and y = gelu(u) once more; parts of the sums of grad: sums (n_rows / ROWS, size) */
void gelu_gradient(float *grad, const float *u, float *y, float *sums, int64_t n_rows, int64_t size) {
#pragma omp parallel for schedule(static)
    for (int64_t begin = 0; begin < n_rows; begin += ROWS) {
        float *sum = sums + begin / ROWS * size;
        memset(sum, 0, size * sizeof(float));
        for (int64_t row = begin; row < begin + ROWS && row < n_rows; row++) {
            int64_t k = 0, at = row * size;
            for (; k + LANES <= size; k += LANES) some_gelu_gradient(grad + at, u + at, y + at, sum, k, k + LANES);
            some_gelu_gradient(grad + at, u + at, y + at, sum, k, size);
        }
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

/* 0, 1, 2 and so on */
INLINE words in_order(void) {
    words number;
    for (int i = 0; i < LANES; i++) number[i] = i;
    return number;
}

/* 0 or the factor, for these places in rows with these keys, of which here are the lower and the upper halves. */
INLINE vec factors(const Dropout *how, words place, words low, words high) {
    if (!how->dropped) return all(1);
    words random = hashed(hashed(place ^ low) ^ high);
    return (vec)((ints)(random >= how->dropped) & (ints)all(how->factor));
}

/* y = residual + (x + bias), the latter dropped out; where there are none, residual and bias are 0 */
void drop(const float *x, const float *bias, const float *residual, float *y, int64_t n_rows, int64_t size,
          const Dropout *how) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < n_rows; row++) {
        uint64_t key = mixed(how->seed + row);
        words none = {0}, low = none + (uint32_t)key, high = none + (uint32_t)(key >> 32);
        for (int64_t k = 0, at = row * size; k < size; k += LANES) {
            vec some = some_of(x + at, k, size);
            if (bias) some += some_of(bias, k, size);
            some *= factors(how, in_order() + (uint32_t)k, low, high);
            put_some(y + at, k, size, residual ? some_of(residual + at, k, size) + some : some);
        }
    }
}

/* ---- products of small matrices, which fit the cache ---- */

/* Rows, and vectors of a row, of which one tile of a result is: as many as there are registers for. */
#define UP (LANES == 16 ? 8 : 4)
#define WIDE 2

/* A matrix whose numbers lie `down` and `right` apart, so that it may be read as its transpose. */
typedef struct {
    const float *x;
    int64_t down, right;
} Matrix;

INLINE void tile(int up, int wide, Matrix a, const float *b, int64_t n_cols, int64_t depth, float *c, int add) {
    vec sums[UP][WIDE];
    for (int i = 0; i < up; i++)
        for (int j = 0; j < wide; j++) sums[i][j] = add ? of_float(c + i * n_cols + j * LANES) : all(0);
    for (int64_t l = 0; l < depth; l++) {
        vec row[WIDE];
        for (int j = 0; j < wide; j++) row[j] = of_float(b + l * n_cols + j * LANES);
        for (int i = 0; i < up; i++)
            for (int j = 0; j < wide; j++) sums[i][j] += a.x[i * a.down + l * a.right] * row[j];
    }
    for (int i = 0; i < up; i++)
        for (int j = 0; j < wide; j++) put(c + i * n_cols + j * LANES, sums[i][j]);
}

/* c (m, n) = a (m, depth) b (depth, n), or added to it; rows of b and c are n_cols long, m is a multiple of UP and n a
   number of whole vectors. */
static void multiply(int64_t m, int64_t n, int64_t depth, Matrix a, const float *b, int64_t n_cols, float *c, int add) {
    for (; m > 0; m -= UP, a.x += UP * a.down, c += UP * n_cols) {
        int64_t j = 0;
        for (; j + WIDE * LANES <= n; j += WIDE * LANES) tile(UP, WIDE, a, b + j, n_cols, depth, c + j, add);
        for (; j < n; j += LANES) tile(UP, 1, a, b + j, n_cols, depth, c + j, add);
    }
}

/* ---- attention ---- */

/* Of (B, H, T, D): how far apart rows, heads and tokens lie; the numbers of a token lie side by side. Where there is
   a bias (H, D), it is to be added. */
typedef struct {
    float *x;
    int64_t row, head, token;
    const float *bias;
} Heads;

/* How attention is computed, by so many threads; `scratch` has room_to_attend() numbers for each. */
typedef struct {
    int64_t n_rows, n_heads, n_tokens, size, n_threads;
    float scale, *scratch;
} Attention;

#define QUERIES 16 /* whose scores are there at once, each in a lane: whole vectors, and a multiple of UP */
#define COPIES 7   /* of a head: q, k, v, and gradients of y, q, k, v */

/* Copies of a head have whole vectors, and tokens in whole groups. */
INLINE int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
INLINE int64_t grouped(int64_t n) { return (n + QUERIES - 1) / QUERIES * QUERIES; }

int64_t room_to_attend(int64_t n_tokens, int64_t size) {
    return grouped(n_tokens) * (COPIES * whole(size) + 3 * QUERIES) + 2 * size * QUERIES;
}

/* One head's copies (T, D), and of some queries their scores (T, QUERIES), and what they are made of (D, QUERIES). */
typedef struct {
    float *q, *k, *v, *grad_y, *grad_q, *grad_k, *grad_v, *probs, *dropped, *grad, *queries, *grads;
} Room;

static Room room_of(const Attention *how, int64_t thread) {
    int64_t n_tokens = grouped(how->n_tokens);
    float *x = how->scratch + thread * room_to_attend(how->n_tokens, how->size);
    Room room;
    float **of_tokens[] = {&room.q, &room.k, &room.v, &room.grad_y, &room.grad_q, &room.grad_k, &room.grad_v};
    for (int i = 0; i < COPIES; i++, x += n_tokens * whole(how->size)) *of_tokens[i] = x;
    float **of_scores[] = {&room.probs, &room.dropped, &room.grad};
    for (int i = 0; i < 3; i++, x += n_tokens * QUERIES) *of_scores[i] = x;
    room.queries = x, room.grads = x + how->size * QUERIES;
    return room;
}

#define AHEAD 16 /* tokens, of which the next are asked for: they lie so far apart that no processor sees it coming */

static float *place(const Heads *heads, const Attention *how, int64_t number) {
    return heads->x + number / how->n_heads * heads->row + number % how->n_heads * heads->head;
}

static void take(const Heads *heads, const Attention *how, int64_t number, float *to) {
    const float *from = place(heads, how, number);
    const float *bias = heads->bias ? heads->bias + number % how->n_heads * how->size : NULL;
    for (int64_t t = 0; t < how->n_tokens; t++, from += heads->token, to += whole(how->size))
        for (int64_t d = 0; d < how->size; d += LANES) {
            __builtin_prefetch(from + AHEAD * heads->token + d);
            vec some = some_of(from, d, how->size);
            put(to + d, bias ? some + some_of(bias, d, how->size) : some);
        }
    memset(to, 0, (grouped(how->n_tokens) - how->n_tokens) * whole(how->size) * sizeof(float));
}

static void give(const Heads *heads, const Attention *how, int64_t number, const float *from) {
    float *to = place(heads, how, number);
    for (int64_t t = 0; t < how->n_tokens; t++, to += heads->token, from += whole(how->size))
        for (int64_t d = 0; d < how->size; d += LANES) {
            __builtin_prefetch(to + AHEAD * heads->token + d, 1);
            put_some(to, d, how->size, of_float(from + d));
        }
}

/* sums (D) of x (T, D) */
static void sum_tokens(const Attention *how, const float *x, float *sums) {
    for (int64_t d = 0; d < how->size; d += LANES) {
        vec sum = all(0);
        for (int64_t t = 0; t < how->n_tokens; t++) sum += of_float(x + t * whole(how->size) + d);
        put_some(sums, d, how->size, sum);
    }
}

/* x (QUERIES, D) as (D, QUERIES) */
static void turn(const Attention *how, const float *x, float *to) {
    for (int64_t d = 0; d < how->size; d++)
        for (int64_t t = 0; t < QUERIES; t++) to[d * QUERIES + t] = x[t * whole(how->size) + d];
}

/* A thread's room, with q, k and v of a head in it. */
static Room room_with(const Heads *q, const Heads *k, const Heads *v, const Attention *how, int64_t thread,
                      int64_t head) {
    Room room = room_of(how, thread);
    take(q, how, head, room.q), take(k, how, head, room.k), take(v, how, head, room.v);
    return room;
}

/* LANES queries of a head, the first of them and its number among all; and the keys of their masks. */
typedef struct {
    int64_t first, number;
    words low, high;
} Lanes;

INLINE Lanes lanes_of(const Attention *how, const Dropout *dropout, int64_t head, int64_t first) {
    Lanes lanes = {.first = first, .number = head * how->n_tokens + first};
    for (int i = 0; i < LANES && dropout->dropped; i++) {
        uint64_t key = mixed(dropout->seed + lanes.number + i);
        lanes.low[i] = key, lanes.high[i] = key >> 32;
    }
    return lanes;
}

/* Which queries see a key. */
INLINE ints who_sees(Lanes lanes, int64_t key) { return (ints)in_order() >= (int32_t)(key - lanes.first); }

INLINE vec factors_of(const Dropout *how, Lanes lanes, int64_t key) {
    return factors(how, (words){0} + (uint32_t)key, lanes.low, lanes.high);
}

/* scores (n_keys, QUERIES) of some queries become their exponentials, dropped out, and 0 for keys that are not seen;
   the sums of those that were there, and the logarithm of what softmax divides by */
INLINE void exponentials(float *scores, int64_t n_keys, Lanes lanes, float scale, const Dropout *how, float *sums,
                         float *logs) {
    vec most = all(-INFINITY), sum = all(0);
    for (int64_t j = 0; j < n_keys; j++) {
        vec some = either(who_sees(lanes, j), of_float(scores + j * QUERIES), all(-INFINITY));
        most = either((ints)(some > most), some, most);
    }
    most *= scale;
    for (int64_t j = 0; j < n_keys; j++) {
        vec e = either(who_sees(lanes, j), exp_of(of_float(scores + j * QUERIES) * scale - most), all(0));
        put(scores + j * QUERIES, e * factors_of(how, lanes, j));
        sum += e;
    }
    put(sums, sum);
    for (int i = 0; i < LANES; i++) logs[i] = most[i] + logf(sum[i]);
}

/* y (B, H, T, D) of causal attention, dropped out, and of each query the logarithm of the sum of the exponentials of
   its scores: logs (B, H, T) */
void attend(const Heads *q, const Heads *k, const Heads *v, const Heads *y, float *logs, const Attention *how,
            const Dropout *dropout) {
    int64_t n_heads = how->n_rows * how->n_heads, T = how->n_tokens, narrow = whole(how->size);
#pragma omp parallel for schedule(static) num_threads(how->n_threads)
    for (int64_t thread = 0; thread < how->n_threads; thread++)
        for (int64_t head = thread; head < n_heads; head += how->n_threads) {
            Room room = room_with(q, k, v, how, thread, head);
            for (int64_t first = 0; first < T; first += QUERIES) {
                int64_t seen = first + QUERIES;
                Matrix keys = {room.k, narrow, 1}, probs = {room.probs, 1, QUERIES};
                /* no gradient is there yet, so that its room is free */
                float *y_here = room.grad_y + first * narrow, sums[QUERIES], logs_here[QUERIES];
                turn(how, room.q + first * narrow, room.queries);
                multiply(seen, QUERIES, how->size, keys, room.queries, QUERIES, room.probs, 0);
                for (int64_t i = 0; i < QUERIES; i += LANES)
                    exponentials(room.probs + i, seen, lanes_of(how, dropout, head, first + i), how->scale, dropout,
                                 sums + i, logs_here + i);
                multiply(QUERIES, narrow, seen, probs, room.v, narrow, y_here, 0);
                for (int64_t i = 0; i < QUERIES && first + i < T; i++) {
                    logs[head * T + first + i] = logs_here[i];
                    for (int64_t d = i * narrow; d < (i + 1) * narrow; d += LANES)
                        put(y_here + d, of_float(y_here + d) / sums[i]);
                }
            }
            give(y, how, head, room.grad_y);
        }
}

/* scores (n_keys, QUERIES) of some queries become their probabilities; `dropped` what remains of them; and grad, what
   was dropped of the products of the gradient and the values, becomes the gradient of the products of queries and
   keys. */
INLINE void softmax_gradient(float *probs, float *dropped, float *grad, int64_t n_keys, Lanes lanes, vec log,
                             float scale, const Dropout *how) {
    vec sum = all(0); /* of the probabilities times their gradients */
    for (int64_t j = 0, at = 0; j < n_keys; j++, at += QUERIES) {
        vec p = either(who_sees(lanes, j), exp_of(of_float(probs + at) * scale - log), all(0));
        vec kept = factors_of(how, lanes, j), g = of_float(grad + at) * kept;
        put(probs + at, p), put(dropped + at, p * kept), put(grad + at, g);
        sum += p * g;
    }
    for (int64_t at = 0; at < n_keys * QUERIES; at += QUERIES)
        put(grad + at, of_float(probs + at) * (of_float(grad + at) - sum) * scale);
}

/* The gradients of q, k and v from that of y, and their sums over the tokens of each row: sums (B, 3, H, D) */
void attend_gradient(const Heads *q, const Heads *k, const Heads *v, const Heads *grad_y, const float *logs,
                     const Heads *grad_q, const Heads *grad_k, const Heads *grad_v, float *sums, const Attention *how,
                     const Dropout *dropout) {
    int64_t n_heads = how->n_rows * how->n_heads, T = how->n_tokens, narrow = whole(how->size), size = how->size;
#pragma omp parallel for schedule(static) num_threads(how->n_threads)
    for (int64_t thread = 0; thread < how->n_threads; thread++)
        for (int64_t head = thread; head < n_heads; head += how->n_threads) {
            Room room = room_with(q, k, v, how, thread, head);
            take(grad_y, how, head, room.grad_y);
            memset(room.grad_k, 0, grouped(T) * narrow * sizeof(float));
            memset(room.grad_v, 0, grouped(T) * narrow * sizeof(float));
            for (int64_t first = 0; first < T; first += QUERIES) {
                int64_t seen = first + QUERIES, at = first * narrow;
                Matrix keys = {room.k, narrow, 1}, values = {room.v, narrow, 1};
                turn(how, room.q + at, room.queries), turn(how, room.grad_y + at, room.grads);
                multiply(seen, QUERIES, size, keys, room.queries, QUERIES, room.probs, 0);
                multiply(seen, QUERIES, size, values, room.grads, QUERIES, room.grad, 0);
                for (int64_t i = 0; i < QUERIES; i += LANES)
                    softmax_gradient(room.probs + i, room.dropped + i, room.grad + i, seen,
                                     lanes_of(how, dropout, head, first + i), some_of(logs + head * T, first + i, T),
                                     how->scale, dropout);
                Matrix grads = {room.grad, QUERIES, 1}, dropped = {room.dropped, QUERIES, 1};
                Matrix of_queries = {room.grad, 1, QUERIES};
                multiply(QUERIES, narrow, seen, of_queries, room.k, narrow, room.grad_q + at, 0);
                multiply(seen, narrow, QUERIES, grads, room.q + at, narrow, room.grad_k, 1);
                multiply(seen, narrow, QUERIES, dropped, room.grad_y + at, narrow, room.grad_v, 1);
            }
            const float *grads[] = {room.grad_q, room.grad_k, room.grad_v};
            const Heads *places[] = {grad_q, grad_k, grad_v};
            for (int64_t i = 0; i < 3; i++) {
                give(places[i], how, head, grads[i]);
                int64_t row = head / how->n_heads, number = (3 * row + i) * how->n_heads + head % how->n_heads;
                sum_tokens(how, grads[i], sums + number * size);
            }
        }
}
