// How a CTA walks over a row: units of 8 numbers, up to 4 units a thread, and sums over the row.
//
// Two ways of access. Fast<dtype>: every tensor has that dtype, D is a multiple of 8, pointers are aligned to 16
// bytes; loads and stores are 16 bytes wide. Any: mixed dtypes, any D, any alignment, one number at a time.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "norms.h"

namespace wanmoe {

template <Dtype dtype>
struct Fast {
  static constexpr int kWords = dtype == Dtype::float32 ? 2 : 1;
  static constexpr int kBlocks = dtype == Dtype::float32 ? 1 : 2;  // CTAs of 512 threads that an SM must hold
  struct Unit {
    uint4 words[kWords];
  };

  static __device__ __forceinline__ int count(int, int) { return kUnit; }

  static __device__ __forceinline__ Unit load(const Array& a, int64_t index, int) {
    const char* p = static_cast<const char*>(a.data) + index * (2 * kWords);
    Unit unit;
#pragma unroll
    for (int w = 0; w < kWords; ++w) unit.words[w] = load_once(p + 16 * w);
    return unit;
  }

  static __device__ __forceinline__ void store(const Array& a, int64_t index, int, const Unit& unit) {
    char* p = static_cast<char*>(a.data) + index * (2 * kWords);
#pragma unroll
    for (int w = 0; w < kWords; ++w) wanmoe::store(p + 16 * w, unit.words[w]);
  }

  static __device__ __forceinline__ void unpack(const Unit& unit, float (&v)[kUnit]) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const uint32_t bits[4] = {unit.words[w].x, unit.words[w].y, unit.words[w].z, unit.words[w].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (dtype == Dtype::float32) {
          v[4 * w + i] = as_float(bits[i]);
        } else {
          const float2 pair = dtype == Dtype::float16 ? unpack_float16(bits[i]) : unpack_bfloat16(bits[i]);
          v[2 * i] = pair.x;
          v[2 * i + 1] = pair.y;
        }
      }
    }
  }

  // v rounded to the dtype of the array.
  static __device__ __forceinline__ Unit pack(const Array&, const float (&v)[kUnit]) {
    Unit unit;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      uint32_t bits[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (dtype == Dtype::float32) {
          bits[i] = as_bits(v[4 * w + i]);
        } else if constexpr (dtype == Dtype::float16) {
          bits[i] = pack_float16(v[2 * i], v[2 * i + 1]);
        } else {
          bits[i] = pack_bfloat16(v[2 * i], v[2 * i + 1]);
        }
      }
      unit.words[w] = {bits[0], bits[1], bits[2], bits[3]};
    }
    return unit;
  }

  template <int n>
  static __device__ __forceinline__ void load_vector(const float* p, int, float (&v)[n]) {
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      const float4 four = load_shared_by_rows(p + i);
      v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
    }
  }
};

struct Any {
  static constexpr int kBlocks = 1;
  struct Unit {
    float v[kUnit];
  };

  static __device__ __forceinline__ int count(int column, int width) { return min(kUnit, width - column); }

  static __device__ __forceinline__ float read(const Array& a, int64_t i) {
    if (a.dtype == Dtype::float32) return load_element(static_cast<const float*>(a.data) + i);
    const uint32_t bits = load_element(static_cast<const uint16_t*>(a.data) + i);
    return a.dtype == Dtype::float16 ? unpack_float16(bits).x : unpack_bfloat16(bits).x;
  }

  static __device__ __forceinline__ Unit load(const Array& a, int64_t index, int n) {
    Unit unit;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) unit.v[i] = i < n ? read(a, index + i) : 0.f;
    return unit;
  }

  static __device__ __forceinline__ void store(const Array& a, int64_t index, int n, const Unit& unit) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if (i >= n) break;
      if (a.dtype == Dtype::float32) {
        store_element(static_cast<float*>(a.data) + index + i, unit.v[i]);
      } else {
        const uint32_t bits =
            a.dtype == Dtype::float16 ? pack_float16(unit.v[i], 0.f) : pack_bfloat16(unit.v[i], 0.f);
        store_element(static_cast<uint16_t*>(a.data) + index + i, static_cast<uint16_t>(bits));
      }
    }
  }

  static __device__ __forceinline__ void unpack(const Unit& unit, float (&v)[kUnit]) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) v[i] = unit.v[i];
  }

  static __device__ __forceinline__ Unit pack(const Array& a, const float (&v)[kUnit]) {
    Unit unit;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      unit.v[i] = v[i];
      if (a.dtype == Dtype::float16) unit.v[i] = unpack_float16(pack_float16(v[i], 0.f)).x;
      if (a.dtype == Dtype::bfloat16) unit.v[i] = unpack_bfloat16(pack_bfloat16(v[i], 0.f)).x;
    }
    return unit;
  }

  // n of the count numbers in a unit, or of as many for its pairs.
  template <int n>
  static __device__ __forceinline__ void load_vector(const float* p, int count, float (&v)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] = i < count ? load_element(p + i) : 0.f;
  }
};

// Calls f(j, column, n) for each of this thread's units of a row: number j, its first column, its n <= 8 numbers.
template <class A, class F>
__device__ __forceinline__ void each_unit(int width, F f) {
#pragma unroll
  for (int j = 0; j < kUnits; ++j) {
    const int column = (j * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kUnit;
    if (column < width) f(j, column, A::count(column, width));
  }
}

struct RowSums {
  float first[kMaxThreads / 32];
  float second[kMaxThreads / 32];
};

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}

// The sum of every thread's v, in an order that depends on blockDim alone. `slots` is used once per kernel: that
// saves the barrier behind the reads.
__device__ __forceinline__ float block_sum(float v, float* slots) {
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = v;
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) total += slots[warp];
  return total;
}

__device__ __forceinline__ float2 block_sum(float2 v, RowSums& slots) {
  v.x = warp_sum(v.x);
  v.y = warp_sum(v.y);
  if (threadIdx.x % 32 == 0) {
    slots.first[threadIdx.x / 32] = v.x;
    slots.second[threadIdx.x / 32] = v.y;
  }
  __syncthreads();
  float2 total = {0, 0};
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) {
    total.x += slots.first[warp];
    total.y += slots.second[warp];
  }
  return total;
}

// ---- host: which access, how many threads ----

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

class Tensors {
 public:
  explicit Tensors(int width) : fast_(width % kUnit == 0) {}
  Tensors& add(const Array& a) {
    if (a.data == nullptr) return *this;
    fast_ = fast_ && aligned(a.data) && (first_ == nullptr || first_->dtype == a.dtype);
    if (first_ == nullptr) first_ = &a;
    return *this;
  }
  Tensors& add(const Vector& v) {
    fast_ = fast_ && aligned(v.data) && v.clip_stride % 4 == 0;
    return *this;
  }
  Tensors& add(const float* p) {
    fast_ = fast_ && aligned(p);
    return *this;
  }
  Tensors& require(bool condition) {
    fast_ = fast_ && condition;
    return *this;
  }

  // Calls f(access) with a value of the type of access that these tensors allow.
  template <class F>
  int with_access(F f) const {
    if (!fast_) return f(Any());
    if (first_->dtype == Dtype::float32) return f(Fast<Dtype::float32>());
    if (first_->dtype == Dtype::float16) return f(Fast<Dtype::float16>());
    return f(Fast<Dtype::bfloat16>());
  }

 private:
  bool fast_;
  const Array* first_ = nullptr;
};

// One CTA per row, in whole warps: 160 threads at D = 5120, all of them with four full units.
inline int row_threads(int width) {
  constexpr int per_warp = kUnit * kUnits * 32;
  return (width + per_warp - 1) / per_warp * 32;
}

inline dim3 row_grid(const Shape& shape) { return dim3(static_cast<unsigned>(shape.clips * shape.tokens)); }

// ---- sums over tokens: a thread owns 8 columns and walks down 64 rows ----

constexpr int kColumnThreads = 128;

inline dim3 column_grid(const Shape& shape) {
  constexpr int per_block = kColumnThreads * kUnit;
  return dim3(static_cast<unsigned>((shape.width + per_block - 1) / per_block),
              static_cast<unsigned>(chunks(shape)), static_cast<unsigned>(shape.clips));
}

struct Columns {
  int column;         // the first of this thread's
  int64_t row, end;   // of this chunk, over all clips
  int64_t token;      // of `row` in its clip
  int64_t out;        // index of the partial sum

  __device__ __forceinline__ explicit Columns(const Shape& shape) {
    column = static_cast<int>(blockIdx.x * kColumnThreads + threadIdx.x) * kUnit;
    token = static_cast<int64_t>(blockIdx.y) * kChunkRows;
    const int64_t first = blockIdx.z * shape.tokens;
    row = first + token;
    end = first + min(token + kChunkRows, shape.tokens);
    out = (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * shape.width + column;
  }
};

template <class A>
__device__ __forceinline__ void store_sums(float* p, int n, const float (&v)[kUnit]) {
  using Sums = std::conditional_t<std::is_same_v<A, Any>, Any, Fast<Dtype::float32>>;
  const Array sums = {p, Dtype::float32};
  Sums::store(sums, 0, n, Sums::pack(sums, v));
}

}  // namespace wanmoe
