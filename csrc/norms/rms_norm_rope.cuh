// Root-mean-square norm of a row with a weight, then the rotation of its pairs (2i, 2i + 1) within each head.
#pragma once

#include "row.cuh"

namespace wanmoe {

constexpr int kPairs = kUnit / 2;

// Rotates the pairs of a unit of one token by +angle, or by -angle for the gradient. In fast access a unit lies within
// one head, so its angles are four in a row; else a unit may run across heads.
template <class A>
__device__ __forceinline__ void rotate(const float* cos, const float* sin, int64_t token, int head, int column, int n,
                                       float sign, float (&v)[kUnit]) {
  float c[kPairs], s[kPairs];
  if constexpr (std::is_same_v<A, Any>) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int64_t at = token * (head / 2) + (column + 2 * i) % head / 2;
      c[i] = 2 * i < n ? load_element(cos + at) : 0.f;
      s[i] = 2 * i < n ? load_element(sin + at) : 0.f;
    }
  } else {
    const int64_t at = token * (head / 2) + column % head / 2;
    A::load_vector(cos + at, kPairs, c);
    A::load_vector(sin + at, kPairs, s);
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const float even = v[2 * i], odd = v[2 * i + 1], turn = sign * s[i];
    v[2 * i] = even * c[i] - odd * turn;
    v[2 * i + 1] = even * turn + odd * c[i];
  }
}

template <class A>
__global__ void __launch_bounds__(kMaxThreads, A::kBlocks) rms_norm_rope_forward(const RmsRopeForward a) {
  const int64_t row = blockIdx.x, base = row * a.shape.width, token = row % a.shape.tokens;
  __shared__ float slots[kMaxThreads / 32];
  typename A::Unit x[kUnits];
  each_unit<A>(a.shape.width, [&](int j, int column, int n) { x[j] = A::load(a.x, base + column, n); });
  float squares = 0;
  each_unit<A>(a.shape.width, [&](int j, int, int) {
    float v[kUnit];
    A::unpack(x[j], v);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) squares += v[i] * v[i];
  });
  const float rstd = 1.f / sqrtf(block_sum(squares, slots) / a.shape.width + a.eps);
  if (threadIdx.x == 0) store_element(a.rstd + row, rstd);

  each_unit<A>(a.shape.width, [&](int j, int column, int n) {
    float v[kUnit], weight[kUnit];
    A::load_vector(a.weight + column, n, weight);
    A::unpack(x[j], v);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) v[i] *= rstd;
    A::unpack(A::pack(a.x, v), v);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) v[i] *= weight[i];
    if (a.cos != nullptr) {
      A::unpack(A::pack(a.x, v), v);
      rotate<A>(a.cos, a.sin, token, a.head, column, n, 1.f, v);
    }
    A::store(a.y, base + column, n, A::pack(a.y, v));
  });
}

// g = weight * rotate back(dy); dx = rstd * (g - norm * mean(g * norm)).
template <class A>
__global__ void __launch_bounds__(kMaxThreads, A::kBlocks) rms_norm_rope_backward(const RmsRopeBackward a) {
  const int64_t row = blockIdx.x, base = row * a.shape.width, token = row % a.shape.tokens;
  __shared__ float slots[kMaxThreads / 32];
  const float rstd = load_element(a.rstd + row);
  typename A::Unit x[kUnits], dy[kUnits];
  each_unit<A>(a.shape.width, [&](int j, int column, int n) {
    x[j] = A::load(a.x, base + column, n);
    dy[j] = A::load(a.dy, base + column, n);
  });
  const auto gradient = [&](int j, int column, int n, float (&g)[kUnit]) {
    float weight[kUnit];
    A::load_vector(a.weight + column, n, weight);
    A::unpack(dy[j], g);
    if (a.cos != nullptr) rotate<A>(a.cos, a.sin, token, a.head, column, n, -1.f, g);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) g[i] *= weight[i];
  };
  float sum = 0;
  each_unit<A>(a.shape.width, [&](int j, int column, int n) {
    float v[kUnit], g[kUnit];
    A::unpack(x[j], v);
    gradient(j, column, n, g);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) sum += g[i] * v[i];
  });
  const float mean_gx = block_sum(sum, slots) * rstd * rstd / a.shape.width;

  each_unit<A>(a.shape.width, [&](int j, int column, int n) {
    float v[kUnit], g[kUnit];
    A::unpack(x[j], v);
    gradient(j, column, n, g);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) g[i] = rstd * (g[i] - v[i] * mean_gx);
    A::store(a.dx, base + column, n, A::pack(a.dx, g));
  });
}

template <class A>
__global__ void __launch_bounds__(kColumnThreads) rms_norm_rope_weight_grad(const RmsRopeWeightGrad a) {
  const Columns at(a.shape);
  if (at.column >= a.shape.width) return;
  const int n = A::count(at.column, a.shape.width);
  float dweight[kUnit] = {};
#pragma unroll 4
  for (int64_t row = at.row, token = at.token; row < at.end; ++row, ++token) {
    const int64_t index = row * a.shape.width + at.column;
    const float rstd = load_element(a.rstd + row);
    float x[kUnit], dy[kUnit];
    A::unpack(A::load(a.x, index, n), x);
    A::unpack(A::load(a.dy, index, n), dy);
    if (a.cos != nullptr) rotate<A>(a.cos, a.sin, token, a.head, at.column, n, -1.f, dy);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) x[i] *= rstd;
    A::unpack(A::pack(a.x, x), x);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) dweight[i] += dy[i] * x[i];
  }
  store_sums<A>(a.dweight + at.out, n, dweight);
}

// ---- host: not inline, since one file alone includes this one ----

int run(const RmsRopeForward& a, void* stream) {
  Tensors tensors(a.shape.width);
  tensors.add(a.x).add(a.y).add(a.weight).add(a.cos).add(a.sin).require(a.head % kUnit == 0);
  return tensors.with_access([&](auto access) {
    return launch(rms_norm_rope_forward<decltype(access)>, row_grid(a.shape), row_threads(a.shape.width), stream, a);
  });
}

int run(const RmsRopeBackward& a, void* stream) {
  Tensors tensors(a.shape.width);
  tensors.add(a.dy).add(a.x).add(a.dx).add(a.weight).add(a.cos).add(a.sin).require(a.head % kUnit == 0);
  return tensors.with_access([&](auto access) {
    return launch(rms_norm_rope_backward<decltype(access)>, row_grid(a.shape), row_threads(a.shape.width), stream, a);
  });
}

int run(const RmsRopeWeightGrad& a, void* stream) {
  Tensors tensors(a.shape.width);
  tensors.add(a.dy).add(a.x).add(a.cos).add(a.sin).add(a.dweight).require(a.head % kUnit == 0);
  return tensors.with_access([&](auto access) {
    return launch(rms_norm_rope_weight_grad<decltype(access)>, column_grid(a.shape), kColumnThreads, stream, a);
  });
}

}  // namespace wanmoe
