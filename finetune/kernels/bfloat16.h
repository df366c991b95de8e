// bfloat16 as uint16_t, and an exp that compilers turn into vectors.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

typedef uint16_t bf16;

static inline float wide(bf16 value) {
    uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

static inline bf16 narrow(float value) {  // to the nearest, ties to even, as torch rounds
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// exp to 2 units in the last place of float32: libm's is not vectorized without giving up NaN. Cephes' polynomial.
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float whole = std::nearbyint(x * 1.44269504f);
    float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return sum * power;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }
