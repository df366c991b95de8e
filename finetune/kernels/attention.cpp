// Causal attention over documents that lie end to end, each by itself, on a CPU with AMX tiles (bfloat16 products, float32 sums).
//
// ``joint`` holds q, k and v of a token, before rotary positions: (heads + 2 key_heads) * width elements. A task is
// one document and head, so everything between its products stays in the core's own cache. Lengths are padded with zeros to
// whole tiles in scratch memory only.
//
// A product of tiles takes its right side in pairs of rows: "paired" means [rows / 2][columns][2].
#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <vector>

#include "bfloat16.h"

static const int64_t BLOCK = 32;  // rows and columns of two tiles by two
static const int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // Linux: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA

struct Shape {
    int64_t heads, key_heads, width;
    int64_t joint() const { return (heads + 2 * key_heads) * width; }
    int64_t group() const { return heads / key_heads; }
};

// Tiles as this file uses them; what another library had set up on this thread comes back at the end.
class Tiles {
    alignas(64) char before[64];

  public:
    Tiles() {
        alignas(64) char mine[64] = {1};
        for (int tile = 0; tile < 8; tile++) {
            mine[16 + 2 * tile] = 64;  // bytes of a row
            mine[48 + tile] = 16;      // rows
        }
        _tile_storeconfig(before);
        _tile_loadconfig(mine);
    }
    ~Tiles() {
        if (before[0]) _tile_loadconfig(before);
        else _tile_release();
    }
};

// c (32 x 32) = or += a (32 x 32 steps, row after row) times b (paired). Strides in elements; b's is that of a pair of rows.
static void product(const bf16* a, int64_t a_stride, const bf16* b, int64_t b_stride, float* c, int64_t c_stride, int64_t steps, bool add) {
    if (add) {
        _tile_loadd(0, c, c_stride * 4);
        _tile_loadd(1, c + 16, c_stride * 4);
        _tile_loadd(2, c + 16 * c_stride, c_stride * 4);
        _tile_loadd(3, c + 16 * c_stride + 16, c_stride * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; step++) {
        const bf16 *left = a + step * 32, *right = b + step * 16 * b_stride;
        _tile_loadd(4, left, a_stride * 2);
        _tile_loadd(5, left + 16 * a_stride, a_stride * 2);
        _tile_loadd(6, right, b_stride * 2);
        _tile_loadd(7, right + 32, b_stride * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_stride * 4);
    _tile_stored(1, c + 16, c_stride * 4);
    _tile_stored(2, c + 16 * c_stride, c_stride * 4);
    _tile_stored(3, c + 16 * c_stride + 16, c_stride * 4);
}

// One head of a document, padded to whole tiles.
struct Matrix {
    int64_t rows, width;
    std::vector<bf16> plain;      // [rows][width]
    std::vector<uint32_t> pairs;  // paired rows, [rows / 2][width]
    std::vector<uint32_t> turned; // paired and transposed, [width / 2][rows]

    void load(const bf16* source, int64_t stride, int64_t length, int64_t columns) {
        width = columns, rows = (length + BLOCK - 1) / BLOCK * BLOCK;
        plain.assign(rows * width, 0);
        for (int64_t row = 0; row < length; row++) std::memcpy(&plain[row * width], source + row * stride, width * sizeof(bf16));
    }
    void rotate(const bf16* cosine, const bf16* sine, int64_t length) {
        int64_t half = width / 2;
        for (int64_t row = 0; row < length; row++) {
            bf16 *low = &plain[row * width], *high = low + half;
            const bf16 *c = cosine + row * width, *s = sine + row * width;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float x = wide(low[i]), y = wide(high[i]);
                low[i] = narrow(x * wide(c[i]) - y * wide(s[i]));
                high[i] = narrow(y * wide(c[i + half]) + x * wide(s[i + half]));
            }
        }
    }
    void pair() {
        pairs.resize(rows / 2 * width);
        for (int64_t row = 0; row < rows; row += 2) {
            const bf16 *one = &plain[row * width], *two = one + width;
            uint32_t* target = &pairs[row / 2 * width];
#pragma omp simd
            for (int64_t i = 0; i < width; i++) target[i] = one[i] | static_cast<uint32_t>(two[i]) << 16;
        }
    }
    void turn() {
        turned.resize(width / 2 * rows);
        const uint32_t* source = reinterpret_cast<const uint32_t*>(plain.data());
        for (int64_t row = 0; row < rows; row += 16)
            for (int64_t i = 0; i < width / 2; i++)
                for (int64_t j = 0; j < 16; j++) turned[i * rows + row + j] = source[(row + j) * (width / 2) + i];
    }
    const bf16* paired(int64_t row) const { return reinterpret_cast<const bf16*>(&pairs[row / 2 * width]); }
    const bf16* transposed(int64_t column) const { return reinterpret_cast<const bf16*>(&turned[column]); }
};

// float32 gradients of a head's rows, turned back by their positions where they were turned forward.
static void store(const float* grad, int64_t stride, int64_t step, const bf16* cosine, const bf16* sine, bf16* target, int64_t target_stride,
                  int64_t length, int64_t width) {
    int64_t half = width / 2;
    for (int64_t row = 0; row < length; row++) {
        const float* in = grad + row * stride;
        bf16* out = target + row * target_stride;
        if (!cosine) {
            for (int64_t i = 0; i < width; i++) out[i] = narrow(in[i * step]);
            continue;
        }
        const bf16 *c = cosine + row * width, *s = sine + row * width;
        for (int64_t i = 0; i < half; i++) {
            float x = wide(narrow(in[i * step])), y = wide(narrow(in[(i + half) * step]));
            out[i] = narrow(x * wide(c[i]) + y * wide(s[i + half]));
            out[i + half] = narrow(y * wide(c[i + half]) - x * wide(s[i]));
        }
    }
}

static void forward_head(const bf16* joint, const bf16* cosine, const bf16* sine, int64_t length, int64_t head, Shape shape, float scale,
                         bf16* out, float* log_sum) {
    thread_local Matrix q, k, v;
    thread_local std::vector<float> scores, sums;
    thread_local std::vector<bf16> chances;
    int64_t width = shape.width, key_head = head / shape.group();
    q.load(joint + head * width, shape.joint(), length, width);
    k.load(joint + (shape.heads + key_head) * width, shape.joint(), length, width);
    v.load(joint + (shape.heads + shape.key_heads + key_head) * width, shape.joint(), length, width);
    q.rotate(cosine, sine, length);
    k.rotate(cosine, sine, length);
    k.turn();
    v.pair();
    scores.resize(BLOCK * q.rows);
    chances.resize(BLOCK * q.rows);
    sums.resize(BLOCK * width);
    for (int64_t first = 0; first < length; first += BLOCK) {
        int64_t keys = first + BLOCK, queries = std::min(BLOCK, length - first);
        float inverse[BLOCK];
        for (int64_t key = 0; key < keys; key += BLOCK)
            product(&q.plain[first * width], width, k.transposed(key), 2 * k.rows, &scores[key], q.rows, width / BLOCK, false);
        for (int64_t query = 0; query < BLOCK; query++) {
            float *s = &scores[query * q.rows], largest = -INFINITY, sum = 0;
            bf16* p = &chances[query * q.rows];
            int64_t seen = first + query + 1;
#pragma omp simd reduction(max : largest)
            for (int64_t key = 0; key < seen; key++) largest = s[key] > largest ? s[key] : largest;
#pragma omp simd reduction(+ : sum)
            for (int64_t key = 0; key < seen; key++) {
                float chance = exponential((s[key] - largest) * scale);
                sum += chance;
                p[key] = narrow(chance);
            }
            for (int64_t key = seen; key < keys; key++) p[key] = 0;
            inverse[query] = 1.0f / sum;
            if (query < queries) log_sum[(first + query) * shape.heads + head] = largest * scale + std::log(sum);
        }
        for (int64_t column = 0; column < width; column += BLOCK)
            product(chances.data(), q.rows, v.paired(0) + 2 * column, 2 * width, &sums[column], width, keys / BLOCK, false);
        for (int64_t query = 0; query < queries; query++) {
            bf16* target = out + (first + query) * shape.heads * width + head * width;
            for (int64_t i = 0; i < width; i++) target[i] = narrow(sums[query * width + i] * inverse[query]);
        }
    }
}

// One query head's part of the way back: adds to dk and dv, gives dq transposed, [width][rows].
static void backward_head(const Matrix& q, const Matrix& k, const Matrix& v, const Matrix& d_out, const std::vector<bf16>& keys_turned,
                          const std::vector<float>& log_sum, const std::vector<float>& delta, float scale, std::vector<float>& dq,
                          std::vector<float>& dk, std::vector<float>& dv) {
    thread_local std::vector<float> scores, d_scores;
    thread_local std::vector<bf16> chances, d_plain;
    thread_local std::vector<uint32_t> d_pairs;
    int64_t rows = q.rows, width = q.width;
    scores.resize(BLOCK * rows), d_scores.resize(BLOCK * rows), chances.resize(BLOCK * rows), d_plain.resize(BLOCK * rows);
    d_pairs.resize(BLOCK / 2 * rows);
    dq.assign(width * rows, 0);
    for (int64_t key = 0; key < rows; key += BLOCK) {  // keys down, queries across: only those that see the keys
        for (int64_t query = key; query < rows; query += BLOCK) {
            product(&k.plain[key * width], width, q.transposed(query), 2 * rows, &scores[query], rows, width / BLOCK, false);
            product(&v.plain[key * width], width, d_out.transposed(query), 2 * rows, &d_scores[query], rows, width / BLOCK, false);
        }
        for (int64_t pair = 0; pair < BLOCK; pair += 2) {
            for (int64_t one = pair; one < pair + 2; one++) {
                const float *s = &scores[one * rows], *d = &d_scores[one * rows];
                bf16 *p = &chances[one * rows], *g = &d_plain[one * rows];
                for (int64_t query = key; query < key + one; query++) p[query] = g[query] = 0;
#pragma omp simd
                for (int64_t query = key + one; query < rows; query++) {
                    float chance = exponential(s[query] * scale - log_sum[query]);
                    p[query] = narrow(chance);
                    g[query] = narrow(chance * (d[query] - delta[query]) * scale);
                }
            }
            const bf16 *even = &d_plain[pair * rows], *odd = even + rows;
            uint32_t* both = &d_pairs[pair / 2 * rows];
#pragma omp simd
            for (int64_t query = key; query < rows; query++) both[query] = even[query] | static_cast<uint32_t>(odd[query]) << 16;
        }
        int64_t steps = (rows - key) / BLOCK;
        for (int64_t column = 0; column < width; column += BLOCK) {
            product(&chances[key], rows, d_out.paired(key) + 2 * column, 2 * width, &dv[key * width + column], width, steps, true);
            product(&d_plain[key], rows, q.paired(key) + 2 * column, 2 * width, &dk[key * width + column], width, steps, true);
            for (int64_t query = key; query < rows; query += BLOCK)
                product(&keys_turned[column * rows + key], rows, reinterpret_cast<const bf16*>(&d_pairs[query]), 2 * rows,
                        &dq[column * rows + query], rows, 1, true);
        }
    }
}

// All query heads that share a key head.
static void backward_group(const bf16* joint, const bf16* cosine, const bf16* sine, const bf16* out, const bf16* d_result,
                           const float* sums, int64_t length, int64_t key_head, Shape shape, float scale, bf16* d_joint) {
    thread_local Matrix q, k, v, d_out;
    thread_local std::vector<bf16> keys_turned;
    thread_local std::vector<float> log_sum, delta, dq, dk, dv;
    int64_t width = shape.width, all = shape.heads * width, stride = shape.joint();
    int64_t k_at = (shape.heads + key_head) * width, v_at = k_at + shape.key_heads * width;
    k.load(joint + k_at, stride, length, width);
    v.load(joint + v_at, stride, length, width);
    k.rotate(cosine, sine, length);
    int64_t rows = k.rows;
    keys_turned.resize(width * rows);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < width; i++) keys_turned[i * rows + row] = k.plain[row * width + i];
    dk.assign(rows * width, 0), dv.assign(rows * width, 0);
    for (int64_t head = key_head * shape.group(); head < (key_head + 1) * shape.group(); head++) {
        q.load(joint + head * width, stride, length, width);
        q.rotate(cosine, sine, length);
        d_out.load(d_result + head * width, all, length, width);
        q.turn(), q.pair(), d_out.turn(), d_out.pair();
        log_sum.assign(rows, 0), delta.assign(rows, 0);
        for (int64_t row = 0; row < length; row++) {
            const bf16 *o = out + row * all + head * width, *g = d_result + row * all + head * width;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < width; i++) sum += wide(o[i]) * wide(g[i]);
            delta[row] = sum;
            log_sum[row] = sums[row * shape.heads + head];
        }
        backward_head(q, k, v, d_out, keys_turned, log_sum, delta, scale, dq, dk, dv);
        store(dq.data(), 1, rows, cosine, sine, d_joint + head * width, stride, length, width);
    }
    store(dk.data(), width, 1, cosine, sine, d_joint + k_at, stride, length, width);
    store(dv.data(), width, 1, nullptr, nullptr, d_joint + v_at, stride, length, width);
}

extern "C" {

// 0 where the kernel lets this process use tiles.
int64_t attention_permission() { return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA); }

// out: (tokens, heads * width); log_sum: (tokens, heads), the log of the sum of exp(scale q k). borders: documents + 1 elements.
void attention_forward(const bf16* joint, const bf16* cosine, const bf16* sine, const int64_t* borders, int64_t documents, int64_t heads,
                       int64_t key_heads, int64_t width, float scale, bf16* out, float* log_sum) {
    Shape shape = {heads, key_heads, width};
#pragma omp parallel
    {
        Tiles tiles;
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t document = 0; document < documents; document++)
            for (int64_t head = 0; head < heads; head++) {
                int64_t start = borders[document];
                forward_head(joint + start * shape.joint(), cosine + start * width, sine + start * width, borders[document + 1] - start,
                             head, shape, scale, out + start * heads * width, log_sum + start * heads);
            }
    }
}

void attention_backward(const bf16* joint, const bf16* cosine, const bf16* sine, const int64_t* borders, int64_t documents, int64_t heads,
                        int64_t key_heads, int64_t width, float scale, const bf16* out, const bf16* d_out, const float* log_sum,
                        bf16* d_joint) {
    Shape shape = {heads, key_heads, width};
#pragma omp parallel
    {
        Tiles tiles;
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t document = 0; document < documents; document++)
            for (int64_t head = 0; head < key_heads; head++) {
                int64_t start = borders[document];
                backward_group(joint + start * shape.joint(), cosine + start * width, sine + start * width, out + start * heads * width,
                               d_out + start * heads * width, log_sum + start * heads, borders[document + 1] - start, head, shape, scale,
                               d_joint + start * shape.joint());
            }
    }
}
}
#endif
