// Layer norm with a scale and a shift, alone or of a gated residual sum that is made in the same pass.
#pragma once

#include "row.cuh"

namespace wanmoe {

// scale, shift, gate or weight: n numbers of this row's clip from `column` on.
template <class A>
__device__ __forceinline__ void load_clip(const Vector& v, int64_t clip, int column, int n, float (&out)[kUnit]) {
  A::load_vector(v.data + clip * v.clip_stride + column, n, out);
}

template <class A>
__global__ void __launch_bounds__(kMaxThreads, A::kBlocks) adaln_forward(const AdalnForward a) {
  const int64_t row = blockIdx.x, clip = row / a.shape.tokens, base = row * a.shape.width;
  const int width = a.shape.width;
  __shared__ float slots[2][kMaxThreads / 32];
  typename A::Unit x[kUnits], h[kUnits];
  each_unit<A>(width, [&](int j, int column, int n) {
    x[j] = A::load(a.x, base + column, n);
    if (a.h.data != nullptr) h[j] = A::load(a.h, base + column, n);
  });
  if (a.h.data != nullptr) {
    each_unit<A>(width, [&](int j, int column, int n) {
      float sum[kUnit], v[kUnit], gate[kUnit] = {1, 1, 1, 1, 1, 1, 1, 1};
      if (a.gate.data != nullptr) load_clip<A>(a.gate, clip, column, n, gate);
      A::unpack(x[j], sum);
      A::unpack(h[j], v);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) sum[i] += v[i] * gate[i];
      x[j] = A::pack(a.x_new, sum);
      A::store(a.x_new, base + column, n, x[j]);
    });
  }

  float sum = 0;
  each_unit<A>(width, [&](int j, int, int) {
    float v[kUnit];
    A::unpack(x[j], v);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) sum += v[i];  // what lies behind the end of a row reads as zero
  });
  const float mean = block_sum(sum, slots[0]) / width;
  float squares = 0;
  each_unit<A>(width, [&](int j, int, int n) {
    float v[kUnit];
    A::unpack(x[j], v);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) squares += i < n ? (v[i] - mean) * (v[i] - mean) : 0.f;
  });
  const float rstd = 1.f / sqrtf(block_sum(squares, slots[1]) / width + a.eps);
  if (threadIdx.x == 0) {
    store_element(a.mean + row, mean);
    store_element(a.rstd + row, rstd);
  }

  each_unit<A>(width, [&](int j, int column, int n) {
    float v[kUnit], scale[kUnit], shift[kUnit];
    load_clip<A>(a.scale, clip, column, n, scale);
    load_clip<A>(a.shift, clip, column, n, shift);
    A::unpack(x[j], v);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) v[i] = (v[i] - mean) * rstd * (a.offset + scale[i]) + shift[i];
    A::store(a.y, base + column, n, A::pack(a.y, v));
  });
}

// g = dy * (offset + scale); dx = rstd * (g - mean(g) - norm * mean(g * norm)) + dx_new.
// Three rows in registers: one resident CTA of 512 threads is asked for, not two, which would spill.
template <class A>
__global__ void __launch_bounds__(kMaxThreads) adaln_backward(const AdalnBackward a) {
  const int64_t row = blockIdx.x, clip = row / a.shape.tokens, base = row * a.shape.width;
  const int width = a.shape.width;
  __shared__ RowSums slots;
  const float mean = load_element(a.mean + row), rstd = load_element(a.rstd + row);
  typename A::Unit x[kUnits], dy[kUnits], dx_new[kUnits];
  each_unit<A>(width, [&](int j, int column, int n) {
    x[j] = A::load(a.x, base + column, n);
    dy[j] = A::load(a.dy, base + column, n);
    if (a.dx_new.data != nullptr) dx_new[j] = A::load(a.dx_new, base + column, n);
  });
  float2 sums = {0, 0};
  each_unit<A>(width, [&](int j, int column, int n) {
    float v[kUnit], g[kUnit], scale[kUnit];
    load_clip<A>(a.scale, clip, column, n, scale);
    A::unpack(x[j], v);
    A::unpack(dy[j], g);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      g[i] *= a.offset + scale[i];
      sums.x += g[i];
      sums.y += g[i] * (v[i] - mean) * rstd;
    }
  });
  const float2 total = block_sum(sums, slots);
  const float mean_g = total.x / width, mean_gx = total.y / width;

  each_unit<A>(width, [&](int j, int column, int n) {
    float v[kUnit], g[kUnit], scale[kUnit];
    load_clip<A>(a.scale, clip, column, n, scale);
    A::unpack(x[j], v);
    A::unpack(dy[j], g);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      g[i] = rstd * (g[i] * (a.offset + scale[i]) - mean_g - (v[i] - mean) * rstd * mean_gx);
    }
    if (a.dx_new.data != nullptr) {
      A::unpack(dx_new[j], v);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) g[i] += v[i];
    }
    A::store(a.dx, base + column, n, A::pack(a.dx, g));
    if (a.dh.data != nullptr) {
      load_clip<A>(a.gate, clip, column, n, scale);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) g[i] *= scale[i];
      A::store(a.dh, base + column, n, A::pack(a.dh, g));
    }
  });
}

template <class A>
__global__ void __launch_bounds__(kColumnThreads) adaln_param_grads(const AdalnParamGrads a) {
  const Columns at(a.shape);
  if (at.column >= a.shape.width) return;
  const int n = A::count(at.column, a.shape.width);
  float dscale[kUnit] = {}, dshift[kUnit] = {};
#pragma unroll 4
  for (int64_t row = at.row; row < at.end; ++row) {
    const int64_t index = row * a.shape.width + at.column;
    const float mean = load_element(a.mean + row), rstd = load_element(a.rstd + row);
    float x[kUnit], dy[kUnit];
    A::unpack(A::load(a.x, index, n), x);
    A::unpack(A::load(a.dy, index, n), dy);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      dscale[i] += dy[i] * (x[i] - mean) * rstd;
      dshift[i] += dy[i];
    }
  }
  store_sums<A>(a.dscale + at.out, n, dscale);
  store_sums<A>(a.dshift + at.out, n, dshift);
}

// ---- host: not inline, since one file alone includes this one ----

int run(const AdalnForward& a, void* stream) {
  Tensors tensors(a.shape.width);
  tensors.add(a.x).add(a.h).add(a.x_new).add(a.y).add(a.gate).add(a.scale).add(a.shift);
  return tensors.with_access([&](auto access) {
    return launch(adaln_forward<decltype(access)>, row_grid(a.shape), row_threads(a.shape.width), stream, a);
  });
}

int run(const AdalnBackward& a, void* stream) {
  Tensors tensors(a.shape.width);
  tensors.add(a.dy).add(a.dx_new).add(a.x).add(a.dx).add(a.dh).add(a.gate).add(a.scale);
  return tensors.with_access([&](auto access) {
    return launch(adaln_backward<decltype(access)>, row_grid(a.shape), row_threads(a.shape.width), stream, a);
  });
}

int run(const AdalnParamGrads& a, void* stream) {
  Tensors tensors(a.shape.width);
  tensors.add(a.dy).add(a.x).add(a.dscale).add(a.dshift);
  return tensors.with_access([&](auto access) {
    return launch(adaln_param_grads<decltype(access)>, column_grid(a.shape), kColumnThreads, stream, a);
  });
}

}  // namespace wanmoe
