// The gated sum x + h * gate, its gradient by h, and the partial sums of its gradient by the gate.
#pragma once

#include "row.cuh"

namespace wanmoe {

template <class A>
__global__ void __launch_bounds__(kMaxThreads, A::kBlocks) gated_sum(const GatedSum a) {
  const int64_t row = blockIdx.x, clip = row / a.shape.tokens, base = row * a.shape.width;
  typename A::Unit x[kUnits], h[kUnits];
  each_unit<A>(a.shape.width, [&](int j, int column, int n) {
    h[j] = A::load(a.h, base + column, n);
    if (a.x.data != nullptr) x[j] = A::load(a.x, base + column, n);
  });
  each_unit<A>(a.shape.width, [&](int j, int column, int n) {
    float sum[kUnit] = {}, v[kUnit], gate[kUnit] = {1, 1, 1, 1, 1, 1, 1, 1};
    if (a.gate.data != nullptr) A::load_vector(a.gate.data + clip * a.gate.clip_stride + column, n, gate);
    if (a.x.data != nullptr) A::unpack(x[j], sum);
    A::unpack(h[j], v);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) sum[i] += v[i] * gate[i];
    A::store(a.y, base + column, n, A::pack(a.y, sum));
  });
}

template <class A>
__global__ void __launch_bounds__(kColumnThreads) gate_grad(const GateGrad a) {
  const Columns at(a.shape);
  if (at.column >= a.shape.width) return;
  const int n = A::count(at.column, a.shape.width);
  float dgate[kUnit] = {};
#pragma unroll 4
  for (int64_t row = at.row; row < at.end; ++row) {
    const int64_t index = row * a.shape.width + at.column;
    float h[kUnit], dy[kUnit];
    A::unpack(A::load(a.h, index, n), h);
    A::unpack(A::load(a.dy, index, n), dy);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) dgate[i] += dy[i] * h[i];
  }
  store_sums<A>(a.dgate + at.out, n, dgate);
}

// ---- host: not inline, since one file alone includes this one ----

int run(const GatedSum& a, void* stream) {
  Tensors tensors(a.shape.width);
  tensors.add(a.x).add(a.h).add(a.y).add(a.gate);
  return tensors.with_access([&](auto access) {
    return launch(gated_sum<decltype(access)>, row_grid(a.shape), row_threads(a.shape.width), stream, a);
  });
}

int run(const GateGrad& a, void* stream) {
  Tensors tensors(a.shape.width);
  tensors.add(a.dy).add(a.h).add(a.dgate);
  return tensors.with_access([&](auto access) {
    return launch(gate_grad<decltype(access)>, column_grid(a.shape), kColumnThreads, stream, a);
  });
}

}  // namespace wanmoe
