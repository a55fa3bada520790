// Attention of many rows of a sequence over its pages: causal, keys and values from the pool only, the step's own among them.
// After FlashAttention-2 (Dao, 2023): 64 rows a block, 16 a warp; 64 keys a tile, two tiles in shared memory, softmax in registers.

enum { ROWS = 64, KEYS = 64, PREFILL_THREADS = 128 };

struct Tile { u32 row, rows, position, table_start; };  // consecutive rows of one sequence

struct PrefillAttention {
    const bf16 *qkv;   // [rows, (heads + 2 kv_heads) * D]
    const bf16 *pool;  // the layer's: [block][k|v][kv head][32][D]
    const Tile *tiles; // grid (heads, tiles)
    const u32 *tables;
    bf16 *out;         // [rows, heads * D]
    float scale;       // log2(e) / sqrt(D)
    int heads, kv_heads, window;
};

static __device__ __forceinline__ u32 shared_address(const void *at) { return (u32)__cvta_generic_to_shared(at); }
// 16 bytes from global to shared memory, or zeros.
static __device__ __forceinline__ void copy16(u32 to, const void *from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

template <int D>
static __device__ __forceinline__ void prefill_attention(const PrefillAttention &p) {
    // Bytes from row to row: 16-byte loads of keys, and ldmatrix of values, then meet no bank twice.
    enum { J = D / 32, KEY_PITCH = 2 * D + 64, VALUE_PITCH = 2 * D + 16, STAGE = KEYS * (KEY_PITCH + VALUE_PITCH) };
    extern __shared__ __align__(16) unsigned char shared[];
    let_next_start();
    wait_for_earlier();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, quad = lane & 3;
    const Tile tile = p.tiles[blockIdx.y];
    const int head = blockIdx.x, kv_head = head / (p.heads / p.kv_heads);
    const int width = (p.heads + 2 * p.kv_heads) * D, end = tile.position + tile.rows;
    const u32 *table = p.tables + tile.table_start;
    // Rows group and group + 8 of the warp's 16.
    const int own[2] = {warp * 16 + group, warp * 16 + group + 8};
    uint4 q[2][J];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < J; j++)
            q[i][j] = own[i] < (int)tile.rows ? load16(p.qkv + (size_t)(tile.row + own[i]) * width + head * D + j * 32 + quad * 8)
                                              : make_uint4(0, 0, 0, 0);
    auto fetch = [&](int stage, int first) {
        const u32 keys = shared_address(shared + stage * STAGE), values = keys + KEYS * KEY_PITCH;
#pragma unroll
        for (int i = 0; i < KEYS * D / 8 / PREFILL_THREADS; i++) {
            const int piece = threadIdx.x + i * PREFILL_THREADS, token = piece / (D / 8), at = piece % (D / 8);
            const bool inside = first + token < end;
            const u32 block = inside ? table[(first + token) / 32] : 0;
            const bf16 *k = p.pool + (((size_t)block * 2 * p.kv_heads + kv_head) * 32 + token % 32) * D + at * 8;
            copy16(keys + token * KEY_PITCH + at * 16, k, inside);
            copy16(values + token * VALUE_PITCH + at * 16, k + (size_t)p.kv_heads * 32 * D, inside);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    float o[D / 8][4], most[2] = {-infinity(), -infinity()}, sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < D / 2; i++) o[i >> 2][i & 3] = 0.0f;
    const int lowest = tile.position, seen = p.window > 0 && lowest + 1 > p.window ? lowest + 1 - p.window : 0;
    int first = seen / KEYS * KEYS, stage = 0;
    fetch(0, first);
    for (; first < end; first += KEYS, stage ^= 1) {
        if (first + KEYS < end) fetch(stage ^ 1, first + KEYS);
        else asm volatile("cp.async.commit_group;" ::: "memory");
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        __syncthreads();
        const unsigned char *keys = shared + stage * STAGE;
        float s[KEYS / 8][4];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
            s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll
            for (int j = 0; j < J; j++) {
                const uint4 k = *(const uint4 *)(keys + (n * 8 + group) * KEY_PITCH + j * 64 + quad * 16);
                mma(s[n], q[0][j].x, q[1][j].x, q[0][j].y, q[1][j].y, k.x, k.y);
                mma(s[n], q[0][j].z, q[1][j].z, q[0][j].w, q[1][j].w, k.z, k.w);
            }
        }
        const bool masked = first + KEYS > lowest + 1 || p.window > 0;
        float highest[2] = {-infinity(), -infinity()};
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float score = s[n][i] * p.scale;
                if (masked) {
                    const int token = first + n * 8 + 2 * quad + (i & 1), position = lowest + own[i >> 1];
                    if (token > position || (p.window > 0 && token + p.window <= position)) score = -infinity();
                }
                s[n][i] = score;
                highest[i >> 1] = fmaxf(highest[i >> 1], score);
            }
        float base[2], correction[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            highest[i] = fmaxf(highest[i], __shfl_xor_sync(~0u, highest[i], 1));
            highest[i] = fmaxf(highest[i], __shfl_xor_sync(~0u, highest[i], 2));
            const float now = fmaxf(most[i], highest[i]);
            base[i] = now == -infinity() ? 0.0f : now;
            correction[i] = exp2f(most[i] - base[i]);
            most[i] = now;
            sum[i] *= correction[i];
        }
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[n][i] = exp2f(s[n][i] - base[i >> 1]);
                sum[i >> 1] += s[n][i];
            }
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) o[n][i] *= correction[i >> 1];
        const u32 values = shared_address(keys + KEYS * KEY_PITCH) + (lane & 15) * VALUE_PITCH + (lane >> 4) * 16;
#pragma unroll
        for (int t = 0; t < KEYS / 16; t++) {
            const u32 a0 = narrow2(s[2 * t][0], s[2 * t][1]), a1 = narrow2(s[2 * t][2], s[2 * t][3]);
            const u32 a2 = narrow2(s[2 * t + 1][0], s[2 * t + 1][1]), a3 = narrow2(s[2 * t + 1][2], s[2 * t + 1][3]);
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                u32 v0, v1, v2, v3;
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                             : "=r"(v0), "=r"(v1), "=r"(v2), "=r"(v3) : "r"(values + t * 16 * VALUE_PITCH + n * 32) : "memory");
                mma(o[2 * n], a0, a1, a2, a3, v0, v1);
                mma(o[2 * n + 1], a0, a1, a2, a3, v2, v3);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
        sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
        if (own[i] >= (int)tile.rows) continue;
        bf16 *out = p.out + ((size_t)(tile.row + own[i]) * p.heads + head) * D + 2 * quad;
        const float inverse = 1.0f / sum[i];
#pragma unroll
        for (int n = 0; n < D / 8; n++) *(u32 *)(out + n * 8) = narrow2(o[n][2 * i] * inverse, o[n][2 * i + 1] * inverse);
    }
}

extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 2) prefill_attention_64(const PrefillAttention p) { prefill_attention<64>(p); }
extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 2) prefill_attention_128(const PrefillAttention p) { prefill_attention<128>(p); }
