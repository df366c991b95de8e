// What a training step does between its matrix products, on a CPU: one pass over memory each, float32 inside.
//
// bfloat16 in and out as uint16_t. Rows are contiguous unless a stride (in elements) says otherwise. Every function has a
// reference in plain torch, finetune/kernels/plain.py, and tests/kernels/test_native.py holds the two together.
#include "bfloat16.h"

extern "C" {

// y = weight * bf16(x * rstd), or bf16((weight + offset) * x * rstd); rstd = 1 / sqrt(mean(x^2) + eps).
void rms_forward(const bf16* x, const bf16* weight, bf16* y, float* rstd, int64_t rows, int64_t width, float eps, float offset,
                 int64_t rounds_first) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        const bf16* in = x + row * width;
        bf16* out = y + row * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++) sum += wide(in[i]) * wide(in[i]);
        float scale = 1.0f / std::sqrt(sum / width + eps);
        rstd[row] = scale;
        if (rounds_first) {
#pragma omp simd
            for (int64_t i = 0; i < width; i++) out[i] = narrow(wide(weight[i]) * wide(narrow(wide(in[i]) * scale)));
        } else {
#pragma omp simd
            for (int64_t i = 0; i < width; i++) out[i] = narrow((wide(weight[i]) + offset) * (wide(in[i]) * scale));
        }
    }
}

// dx of the above; the weight is frozen.
void rms_backward(const bf16* dy, const bf16* x, const bf16* weight, const float* rstd, bf16* dx, int64_t rows, int64_t width,
                  float offset) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *grad = dy + row * width, *in = x + row * width;
        bf16* out = dx + row * width;
        float scale = rstd[row], dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < width; i++) dot += wide(grad[i]) * (wide(weight[i]) + offset) * wide(in[i]);
        float share = dot * scale * scale / width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++)
            out[i] = narrow(scale * (wide(grad[i]) * (wide(weight[i]) + offset) - wide(in[i]) * share));
    }
}

// Beyond 100, a gate is 0 or 1; NaN stays NaN.
static inline float near_zero(float x) { return x > 100.0f ? 100.0f : x < -100.0f ? -100.0f : x; }

// The sigmoid's argument, linear x + cubic x^3.
static inline float exponent(float x, float linear, float cubic) {
    float near = near_zero(x);
    return near * (linear + cubic * near * near);
}

// out = gate * sigmoid(linear gate + cubic gate^3) * up; gate and up are the two halves of each row of ``both``.
void gated_forward(const bf16* both, bf16* out, int64_t rows, int64_t width, float linear, float cubic) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *gate = both + row * 2 * width, *up = gate + width;
        bf16* target = out + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float g = wide(gate[i]);
            target[i] = narrow(g * sigmoid(exponent(g, linear, cubic)) * wide(up[i]));
        }
    }
}

void gated_backward(const bf16* dy, const bf16* both, bf16* d_both, int64_t rows, int64_t width, float linear, float cubic) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *grad = dy + row * width, *gate = both + row * 2 * width, *up = gate + width;
        bf16 *d_gate = d_both + row * 2 * width, *d_up = d_gate + width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float g = wide(gate[i]), d = wide(grad[i]), near = near_zero(g), s = sigmoid(exponent(g, linear, cubic));
            d_up[i] = narrow(d * g * s);
            d_gate[i] = narrow(d * wide(up[i]) * s * (1.0f + near * (1.0f - s) * (linear + 3.0f * cubic * near * near)));
        }
    }
}

// Loss of each row in nats, and in place of the logits their gradient: softmax minus one at the target.
void cross_entropy(bf16* logits, const int64_t* targets, float* losses, int64_t rows, int64_t vocabulary) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        bf16* x = logits + row * vocabulary;
        float largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < vocabulary; i++) largest = wide(x[i]) > largest ? wide(x[i]) : largest;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < vocabulary; i++) sum += exponential(wide(x[i]) - largest);
        float log_sum = largest + std::log(sum), target = wide(x[targets[row]]);
        losses[row] = log_sum - target;
        float at_target = std::exp(target - log_sum) - 1.0f;
#pragma omp simd
        for (int64_t i = 0; i < vocabulary; i++) x[i] = narrow(exponential(wide(x[i]) - log_sum));
        x[targets[row]] = narrow(at_target);
    }
}
}
