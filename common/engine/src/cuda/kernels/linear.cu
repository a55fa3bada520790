// Linear layers for few rows: out[m][n] = sum over k of weight[n][k] * x[m][k], at the speed of reading the weights once.
//
// The weight is the A operand, straight from global memory; x the B operand, 8 rows a tile. A block owns 16 * R rows of the weight, and its 16 warps take
// turns along k, in steps of 64; their sums are added in the order of warps. So a row's result depends neither on how many rows there are nor on
// which they are. Two steps of the weight are in flight per warp (of three row
// tiles one, for want of registers). Whole steps: k is a multiple of 64, n of 16 * R.

enum { WARPS = 16 };
enum Then { STORE, LOGITS, RESIDUAL, GATED };

struct Linear {
    const bf16 *weight;  // [n, k]; of GATED [2 n, k]: gates, then ups
    const bf16 *x;       // [rows, k]
    void *out;           // bf16 [rows, n]; of LOGITS f32; of RESIDUAL the normed row, still to be divided by its root mean square
    float *residual;     // [rows, n]: out is added to it (RESIDUAL)
    const float *norm;   // [n] (RESIDUAL)
    float *squares_out;  // [rows, n / 16]: sums of squares of the residual (RESIDUAL)
    const float *squares; // [rows, k / 16] of the residual that x was normed from without the division; null: x is whole
    float epsilon;
    int rows, n, k;
};

template <int R, int TILES, int THEN>
static __device__ __forceinline__ void skinny(const Linear &p) {
    enum { AHEAD = R > 2 ? 1 : 2 };
    __shared__ float partial[WARPS][R][16][8 * TILES + 1];
    __shared__ float scales[8 * TILES];
    let_next_start();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, quad = lane & 3;
    const int k = p.k, first = blockIdx.x * (THEN == GATED ? 8 * R : 16 * R);
    const bf16 *weight[R][2];
#pragma unroll
    for (int r = 0; r < R; r++) {
        const int row = first + (THEN == GATED ? 8 : 16) * r + group;
        weight[r][0] = p.weight + (size_t)row * k + quad * 8;
        weight[r][1] = weight[r][0] + (size_t)(THEN == GATED ? p.n : 8) * k;
    }
    const int steps = (k / 64 - warp + WARPS - 1) / WARPS;
    uint4 a[AHEAD][R][4];
    auto fetch = [&](int slot, int step) {
        const int at = (warp + step * WARPS) * 64;
#pragma unroll
        for (int r = 0; r < R; r++) {
            a[slot][r][0] = stream16(weight[r][0] + at);
            a[slot][r][1] = stream16(weight[r][1] + at);
            a[slot][r][2] = stream16(weight[r][0] + at + 32);
            a[slot][r][3] = stream16(weight[r][1] + at + 32);
        }
    };
#pragma unroll
    for (int slot = 0; slot < AHEAD; slot++)
        if (slot < steps) fetch(slot, slot);
    wait_for_earlier();

    float c[R][TILES][2][4];
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int i = 0; i < 8; i++) c[r][tile][i >> 2][i & 3] = 0.0f;
    for (int step = 0; step < steps; step += AHEAD) {
#pragma unroll
        for (int slot = 0; slot < AHEAD; slot++) {
            if (step + slot >= steps) continue;
            const int at = (warp + (step + slot) * WARPS) * 64 + quad * 8;
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                uint4 x0 = make_uint4(0, 0, 0, 0), x1 = x0;
                if (tile * 8 + group < p.rows) {
                    const bf16 *x = p.x + (size_t)(tile * 8 + group) * k + at;
                    x0 = load16(x);
                    x1 = load16(x + 32);
                }
#pragma unroll
                for (int r = 0; r < R; r++) {
                    const uint4 *w = a[slot][r];
                    mma(c[r][tile][0], w[0].x, w[1].x, w[0].y, w[1].y, x0.x, x0.y);
                    mma(c[r][tile][1], w[0].z, w[1].z, w[0].w, w[1].w, x0.z, x0.w);
                    mma(c[r][tile][0], w[2].x, w[3].x, w[2].y, w[3].y, x1.x, x1.y);
                    mma(c[r][tile][1], w[2].z, w[3].z, w[2].w, w[3].w, x1.z, x1.w);
                }
            }
            if (step + slot + AHEAD < steps) fetch(slot, step + slot + AHEAD);
        }
    }
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                partial[warp][r][group + (i >> 1) * 8][tile * 8 + 2 * quad + (i & 1)] = c[r][tile][0][i] + c[r][tile][1][i];
    // What norms the rows.
    if (p.squares) {
        for (int row = warp; row < p.rows; row += WARPS) {
            float sum = 0.0f;
            for (int i = lane; i < k / 16; i += 32) sum += p.squares[(size_t)row * (k / 16) + i];
            sum = warp_sum(sum);
            if (lane == 0) scales[row] = rsqrtf(sum / (float)k + p.epsilon);
        }
    }
    __syncthreads();
    auto total = [&](int r, int row, int m) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += partial[w][r][row][m];
        return p.squares ? sum * scales[m] : sum;
    };
    if (THEN == GATED) {
        for (int e = threadIdx.x; e < R * 8 * p.rows; e += WARPS * 32) {
            const int row = e & 7, r = (e >> 3) % R, m = e / (8 * R);
            const float gate = total(r, row, m), up = total(r, row + 8, m);
            ((bf16 *)p.out)[(size_t)m * p.n + first + r * 8 + row] = narrow(silu(gate) * up);
        }
    } else {
        const int elements = R * 16 * p.rows;
        // Whole warps stay together: 16 lanes share a sum of squares.
        for (int e = threadIdx.x; e < (elements + 31 & ~31); e += WARPS * 32) {
            const int row = e & 15, r = (e >> 4) % R, m = e / (16 * R);
            const bool inside = e < elements;
            const size_t at = (size_t)m * p.n + first + r * 16 + row;
            const float sum = inside ? total(r, row, m) : 0.0f;
            if (THEN == STORE) {
                if (inside) ((bf16 *)p.out)[at] = narrow(sum);
            } else if (THEN == LOGITS) {
                if (inside) ((float *)p.out)[at] = sum;
            } else {
                const float h = inside ? p.residual[at] + sum : 0.0f;
                float square = h * h;
#pragma unroll
                for (int step = 8; step; step >>= 1) square += __shfl_xor_sync(~0u, square, step);
                if (inside) {
                    p.residual[at] = h;
                    ((bf16 *)p.out)[at] = narrow(h * p.norm[first + r * 16 + row]);
                    if (row == 0) p.squares_out[(size_t)m * (p.n / 16) + first / 16 + r] = square;
                }
            }
        }
    }
}

#define SKINNY(name, r, tiles, then) \
    extern "C" __global__ void __launch_bounds__(WARPS * 32) name##_##r##_##tiles(const Linear p) { skinny<r, tiles, then>(p); }
#define SKINNY_ALL(name, then) \
    SKINNY(name, 1, 1, then) SKINNY(name, 2, 1, then) SKINNY(name, 3, 1, then) SKINNY(name, 1, 2, then) SKINNY(name, 2, 2, then)
SKINNY_ALL(linear_store, STORE)
SKINNY_ALL(linear_logits, LOGITS)
SKINNY_ALL(linear_residual, RESIDUAL)
SKINNY_ALL(linear_gated, GATED)
