#include <stdint.h>

/* y[m][n] = scale[n] * sum over k of x[m][k] * w[n][k] + bias[n], for M rows of K inputs and N outputs.
   Every weight is read once per row, as a byte, and widened in a register. */
void int8_rows(const float *restrict x, const int8_t *restrict w, const float *restrict scale,
               const float *restrict bias, float *restrict y, long M, long N, long K) {
#pragma omp parallel for schedule(static)
    for (long n = 0; n < N; n++)
        for (long m = 0; m < M; m++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (long k = 0; k < K; k++) sum += x[m * K + k] * (float)w[n * K + k];
            y[m * N + n] = sum * scale[n] + (bias ? bias[n] : 0);
        }
}
