// SPDX-License-Identifier: Apache-2.0
//
// The CPU form of the kernels in lamb.py and lars.py: the same passes over the same chunk table.
// REAL is float or double, the type of parameters, gradients and states alike.

#include <tgmath.h>
#include <stdint.h>

typedef struct {
    int64_t place, segment, begin, end; // tensor, norm, elements
} chunk;

typedef struct {
    const int64_t *addresses; // (lists, n)
    int64_t n;
    const chunk *chunks;
    int64_t count;
    int64_t threads;
} table;

static REAL *at(const table *t, int list, const chunk *c)
{
    return (REAL *)(intptr_t)t->addresses[list * t->n + c->place];
}

#define EACH_CHUNK(t, k)                                                  \
    _Pragma("omp parallel for num_threads((t)->threads) schedule(static)") \
    for (int64_t k = 0; k < (t)->count; ++k)

// The root of the second moment and the division are the arithmetic of both LAMB passes.
static inline REAL lamb_direction(REAL x, REAL m, REAL v, REAL per_c1, REAL per_root2, REAL eps, REAL decay)
{
    return m * per_c1 / (sqrt(v) * per_root2 + eps) + decay * x;
}

void lamb_moments(const table *t, const REAL *corrections, double eps_, double decay_, REAL *partials,
                  double beta1_, double gain_, double beta2_, double gain2_, double scale_)
{
    const REAL eps = eps_, decay = decay_, beta1 = beta1_, gain = gain_ * scale_;
    const REAL beta2 = beta2_, gain2 = gain2_ * scale_ * scale_;
    EACH_CHUNK(t, k) {
        const chunk *c = t->chunks + k;
        const REAL *restrict x = at(t, 0, c), *restrict g = at(t, 1, c);
        REAL *restrict m = at(t, 2, c), *restrict v = at(t, 3, c);
        const REAL per_c1 = 1 / corrections[2 * c->place], per_root2 = 1 / corrections[2 * c->place + 1];
        REAL weight = 0, update = 0;
#pragma omp simd reduction(+ : weight, update)
        for (int64_t i = c->begin; i < c->end; ++i) {
            m[i] = m[i] * beta1 + g[i] * gain;
            v[i] = v[i] * beta2 + g[i] * g[i] * gain2;
            const REAL u = lamb_direction(x[i], m[i], v[i], per_c1, per_root2, eps, decay);
            weight += x[i] * x[i];
            update += u * u;
        }
        partials[k] = weight;
        partials[t->count + k] = update;
    }
}

void lamb_apply(const table *t, const REAL *corrections, double eps_, double decay_, const REAL *ratios,
                double lr_, double keep_)
{
    const REAL eps = eps_, decay = decay_, keep = keep_;
    EACH_CHUNK(t, k) {
        const chunk *c = t->chunks + k;
        REAL *restrict x = at(t, 0, c);
        const REAL *restrict m = at(t, 2, c), *restrict v = at(t, 3, c);
        const REAL per_c1 = 1 / corrections[2 * c->place], per_root2 = 1 / corrections[2 * c->place + 1];
        const REAL step = (REAL)lr_ * ratios[c->segment];
#pragma omp simd
        for (int64_t i = c->begin; i < c->end; ++i)
            x[i] = x[i] * keep - step * lamb_direction(x[i], m[i], v[i], per_c1, per_root2, eps, decay);
    }
}

// Sums of squares of x and of g + decay · x; with `average` of the buffer, which is updated first.
void lars_norms(const table *t, REAL *partials, double scale_, double decay_, double old_, double new_,
                int average)
{
    const REAL scale = scale_, decay = decay_, old = old_, new = new_;
    EACH_CHUNK(t, k) {
        const chunk *c = t->chunks + k;
        const REAL *restrict x = at(t, 0, c), *restrict g = at(t, 1, c);
        REAL weight = 0, update = 0;
        if (average) {
            REAL *restrict b = at(t, 2, c);
#pragma omp simd reduction(+ : weight, update)
            for (int64_t i = c->begin; i < c->end; ++i) {
                b[i] = old * b[i] + new * (g[i] * scale + decay * x[i]);
                weight += x[i] * x[i];
                update += b[i] * b[i];
            }
        } else {
#pragma omp simd reduction(+ : weight, update)
            for (int64_t i = c->begin; i < c->end; ++i) {
                const REAL d = g[i] * scale + decay * x[i];
                weight += x[i] * x[i];
                update += d * d;
            }
        }
        partials[k] = weight;
        partials[t->count + k] = update;
    }
}

// d = inner · ratio · (g + decay · x); b = old · b + new · d; x -= outer · (direct · d + held · b).
void lars_apply(const table *t, const REAL *ratios, double scale_, double decay_, double old_, double new_,
                double inner_, double outer_, double direct_, double held_)
{
    const REAL decay = decay_, old = old_, direct = outer_ * direct_, held = outer_ * held_;
    EACH_CHUNK(t, k) {
        const chunk *c = t->chunks + k;
        REAL *restrict x = at(t, 0, c);
        const REAL *restrict g = at(t, 1, c);
        const REAL inner = (REAL)inner_ * ratios[c->segment];
        const REAL scale = scale_, new = new_;
        if (held == 0) {
#pragma omp simd
            for (int64_t i = c->begin; i < c->end; ++i)
                x[i] -= direct * inner * (g[i] * scale + decay * x[i]);
        } else {
            REAL *restrict b = at(t, 2, c);
#pragma omp simd
            for (int64_t i = c->begin; i < c->end; ++i) {
                const REAL d = inner * (g[i] * scale + decay * x[i]);
                b[i] = old * b[i] + new * d;
                x[i] -= direct * d + held * b[i];
            }
        }
    }
}

// x -= outer · ratio · b, for the variant whose norm is the buffer's.
void lars_apply_average(const table *t, const REAL *ratios, double outer_)
{
    EACH_CHUNK(t, k) {
        const chunk *c = t->chunks + k;
        REAL *restrict x = at(t, 0, c);
        const REAL *restrict b = at(t, 2, c);
        const REAL outer = (REAL)outer_ * ratios[c->segment];
#pragma omp simd
        for (int64_t i = c->begin; i < c->end; ++i)
            x[i] -= outer * b[i];
    }
}
