/* Parts of GPT-2's training step on a CPU, each in one pass over memory: GELU and its gradient, dropout, and causal
   attention with dropout and its gradients. Masks are not kept: whether a number is dropped follows from a seed and
   its place, and is found out again for the gradient.

   Letters as in model.py: B rows, H heads, T tokens, D numbers of a head. */
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
            /* beyond 20 the slope is 0 or 1 */
            vec z = either((ints)(x < -20), all(-20), either((ints)(x > 20), all(20), x));
            vec slope = s + z * s * (1 - s) * SLOPE * (1 + 3 * CUBIC * z * z);
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
    if (!how->dropped) return all(1);
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

/* ---- products of small matrices, which fit the cache ---- */

#define UP 6   /* rows, and */
#define WIDE 2 /* vectors of a row, of which one tile of a result is: as many as there are registers for */

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

INLINE void tiles(int up, Matrix a, const float *b, int64_t n_cols, int64_t n, int64_t depth, float *c, int add) {
    int64_t j = 0;
    for (; j + WIDE * LANES <= n; j += WIDE * LANES) tile(up, WIDE, a, b + j, n_cols, depth, c + j, add);
    for (; j < n; j += LANES) tile(up, 1, a, b + j, n_cols, depth, c + j, add);
}

/* c (m, n) = a (m, depth) b (depth, n), or added to it; rows of b and c are n_cols long, and n is a number of whole
   vectors. */
static void multiply(int64_t m, int64_t n, int64_t depth, Matrix a, const float *b, int64_t n_cols, float *c, int add) {
    for (; m >= UP; m -= UP, a.x += UP * a.down, c += UP * n_cols)
        tiles(UP, a, b, n_cols, n, depth, c, add);
    for (; m > 0; m--, a.x += a.down, c += n_cols) tiles(1, a, b, n_cols, n, depth, c, add);
}

/* ---- attention ---- */

/* Of (B, H, T, D): how far apart rows, heads and tokens lie; the numbers of a token lie side by side. */
typedef struct {
    float *x;
    int64_t row, head, token;
} Heads;

/* How attention is computed, by so many threads; `scratch` has room_to_attend() numbers for each. */
typedef struct {
    int64_t n_rows, n_heads, n_tokens, size, n_threads;
    float scale, *scratch;
} Attention;

/* Numbers of a head are copied to where they lie in whole vectors; so many floats does a row then have. */
INLINE int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

#define QUERIES 24 /* whose scores are there at once: a multiple of UP */
#define COPIES 9   /* of a head: q, k, v, k and v transposed, and gradients of y, q, k, v */

int64_t room_to_attend(int64_t n_tokens, int64_t size) {
    int64_t narrow = n_tokens * whole(size), transposed = size * whole(n_tokens);
    return (COPIES - 2) * narrow + 2 * transposed + 3 * QUERIES * whole(n_tokens);
}

/* One head's copies, and the scores of some queries. */
typedef struct {
    float *q, *k, *v, *k_turned, *v_turned, *grad_y, *grad_q, *grad_k, *grad_v, *probs, *dropped, *grad;
    int64_t wide, narrow; /* the numbers of a row of scores, and of a token */
} Room;

static Room room_of(const Attention *how, int64_t thread) {
    int64_t narrow = whole(how->size), wide = whole(how->n_tokens);
    float *x = how->scratch + thread * room_to_attend(how->n_tokens, how->size);
    Room room = {.wide = wide, .narrow = narrow};
    float **of_tokens[] = {&room.q, &room.k, &room.v, &room.grad_y, &room.grad_q, &room.grad_k, &room.grad_v};
    for (int i = 0; i < COPIES - 2; i++, x += how->n_tokens * narrow) *of_tokens[i] = x;
    float **turned[] = {&room.k_turned, &room.v_turned};
    for (int i = 0; i < 2; i++, x += how->size * wide) *turned[i] = x;
    float **of_scores[] = {&room.probs, &room.dropped, &room.grad};
    for (int i = 0; i < 3; i++, x += QUERIES * wide) *of_scores[i] = x;
    return room;
}

#define AHEAD 16 /* tokens, of which the next are asked for: they lie so far apart that no processor sees it coming */

static float *place(const Heads *heads, const Attention *how, int64_t number) {
    return heads->x + number / how->n_heads * heads->row + number % how->n_heads * heads->head;
}

static void take(const Heads *heads, const Attention *how, int64_t number, float *to) {
    const float *from = place(heads, how, number);
    for (int64_t t = 0; t < how->n_tokens; t++, from += heads->token, to += whole(how->size))
        for (int64_t d = 0; d < how->size; d += LANES) {
            __builtin_prefetch(from + AHEAD * heads->token + d);
            put(to + d, some_of(from, d, how->size));
        }
}

static void give(const Heads *heads, const Attention *how, int64_t number, const float *from) {
    float *to = place(heads, how, number);
    for (int64_t t = 0; t < how->n_tokens; t++, to += heads->token, from += whole(how->size))
        for (int64_t d = 0; d < how->size; d += LANES) {
            __builtin_prefetch(to + AHEAD * heads->token + d, 1);
            put_some(to, d, how->size, of_float(from + d));
        }
}

/* x (T, D) as (D, T) */
static void turn(const Attention *how, const float *x, float *to) {
    int64_t wide = whole(how->n_tokens), narrow = whole(how->size);
    for (int64_t d = 0; d < how->size; d++)
        for (int64_t t = 0; t < wide; t++) to[d * wide + t] = t < how->n_tokens ? x[t * narrow + d] : 0;
}

/* A thread's room, with q, k and v of a head in it. */
static Room room_with(const Heads *q, const Heads *k, const Heads *v, const Attention *how, int64_t thread,
                      int64_t head) {
    Room room = room_of(how, thread);
    take(q, how, head, room.q), take(k, how, head, room.k), take(v, how, head, room.v);
    turn(how, room.k, room.k_turned);
    return room;
}

/* numbers from k on, and -infinity where there are none */
INLINE vec some_or_least(const float *x, int64_t k, int64_t n) {
    vec some = of_float(x + k);
    for (int i = 0; i < LANES && k + LANES > n; i++) some[i] = k + i < n ? some[i] : -INFINITY;
    return some;
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

/* n scores of a query become its probabilities, dropped out, and after them zeros up to whole vectors; the logarithm
   of the sum of their exponentials. */
static float softmax_dropped(float *scores, int64_t n, float scale, const Dropout *how, uint64_t key) {
    float most = most_of(scores, n) * scale;
    vec sums = all(0);
    for (int64_t k = 0; k < n; k += LANES) {
        vec e = exp_of(some_or_least(scores, k, n) * scale - most);
        for (int i = 0; i < LANES && k + LANES > n; i++) e[i] = k + i < n ? e[i] : 0;
        put(scores + k, e);
        sums += e;
    }
    float sum = total(sums);
    for (int64_t k = 0; k < n; k += LANES) put(scores + k, of_float(scores + k) * (1 / sum) * factors(how, key, k));
    return most + logf(sum);
}

/* y (B, H, T, D) of causal attention, dropped out, and of each query the logarithm of the sum of the exponentials of
   its scores: logs (B, H, T) */
void attend(const Heads *q, const Heads *k, const Heads *v, const Heads *y, float *logs, const Attention *how,
            const Dropout *dropout) {
    int64_t n_heads = how->n_rows * how->n_heads, T = how->n_tokens;
#pragma omp parallel for schedule(static) num_threads(how->n_threads)
    for (int64_t thread = 0; thread < how->n_threads; thread++)
        for (int64_t head = thread; head < n_heads; head += how->n_threads) {
            Room room = room_with(q, k, v, how, thread, head);
            for (int64_t first = 0; first < T; first += UP) {
                int64_t n = T - first < UP ? T - first : UP, seen = first + n;
                Matrix some = {room.q + first * room.narrow, room.narrow, 1}, probs = {room.probs, room.wide, 1};
                multiply(n, whole(seen), how->size, some, room.k_turned, room.wide, room.probs, 0);
                for (int64_t i = 0; i < n; i++) {
                    float *row = room.probs + i * room.wide;
                    int64_t number = head * T + first + i, own = first + i + 1;
                    logs[number] = softmax_dropped(row, own, how->scale, dropout, mixed(dropout->seed + number));
                    for (int64_t j = whole(own); j < whole(seen); j++) row[j] = 0;
                }
                multiply(n, room.narrow, seen, probs, room.v, room.narrow, room.grad_y + first * room.narrow, 0);
            }
            give(y, how, head, room.grad_y);
        }
}

/* scores (n) of a query become its probabilities; `dropped` what remains of them; and grad, what was dropped of the
   products of the gradient and the values, becomes the gradient of the products of query and keys. All have zeros
   from n to `end`. */
static void softmax_gradient(float *probs, float *dropped, float *grad, int64_t n, int64_t end, float log, float scale,
                             const Dropout *how, uint64_t key) {
    vec sums = all(0);
    for (int64_t k = 0; k < n; k += LANES) {
        vec p = exp_of(of_float(probs + k) * scale - log), kept = factors(how, key, k);
        for (int i = 0; i < LANES && k + LANES > n; i++) p[i] = k + i < n ? p[i] : 0;
        vec g = of_float(grad + k) * kept;
        put(probs + k, p), put(dropped + k, p * kept), put(grad + k, g);
        sums += p * g;
    }
    float sum = total(sums); /* of the probabilities times their gradients */
    for (int64_t k = 0; k < n; k += LANES)
        put(grad + k, of_float(probs + k) * (of_float(grad + k) - sum) * scale);
    for (int64_t k = whole(n); k < end; k += LANES) put(dropped + k, all(0)), put(grad + k, all(0));
}

/* The gradients of q, k and v from that of y. */
void attend_gradient(const Heads *q, const Heads *k, const Heads *v, const Heads *grad_y, const float *logs,
                     const Heads *grad_q, const Heads *grad_k, const Heads *grad_v, const Attention *how,
                     const Dropout *dropout) {
    int64_t n_heads = how->n_rows * how->n_heads, T = how->n_tokens;
#pragma omp parallel for schedule(static) num_threads(how->n_threads)
    for (int64_t thread = 0; thread < how->n_threads; thread++)
        for (int64_t head = thread; head < n_heads; head += how->n_threads) {
            Room room = room_with(q, k, v, how, thread, head);
            int64_t wide = room.wide, narrow = room.narrow, size = how->size;
            take(grad_y, how, head, room.grad_y);
            turn(how, room.v, room.v_turned);
            memset(room.grad_k, 0, T * narrow * sizeof(float)), memset(room.grad_v, 0, T * narrow * sizeof(float));
            for (int64_t first = 0; first < T; first += QUERIES) {
                int64_t n = T - first < QUERIES ? T - first : QUERIES, end = whole(first + n);
                for (int64_t at = 0; at < n; at += UP) {
                    int64_t up = n - at < UP ? n - at : UP, query = first + at, seen = query + up;
                    float *probs = room.probs + at * wide, *dropped = room.dropped + at * wide;
                    float *grad = room.grad + at * wide;
                    Matrix queries = {room.q + query * narrow, narrow, 1};
                    Matrix grads = {room.grad_y + query * narrow, narrow, 1};
                    multiply(up, whole(seen), size, queries, room.k_turned, wide, probs, 0);
                    multiply(up, whole(seen), size, grads, room.v_turned, wide, grad, 0);
                    for (int64_t i = 0; i < up; i++) {
                        int64_t number = head * T + query + i, row = i * wide;
                        softmax_gradient(probs + row, dropped + row, grad + row, query + i + 1, end, logs[number],
                                         how->scale, dropout, mixed(dropout->seed + number));
                    }
                    Matrix of_scores = {grad, wide, 1};
                    multiply(up, narrow, seen, of_scores, room.k, narrow, room.grad_q + query * narrow, 0);
                }
                Matrix grads = {room.grad, 1, wide}, dropped = {room.dropped, 1, wide};
                multiply(first + n, narrow, n, grads, room.q + first * narrow, narrow, room.grad_k, 1);
                multiply(first + n, narrow, n, dropped, room.grad_y + first * narrow, narrow, room.grad_v, 1);
            }
            give(grad_q, how, head, room.grad_q), give(grad_k, how, head, room.grad_k);
            give(grad_v, how, head, room.grad_v);
        }
}
