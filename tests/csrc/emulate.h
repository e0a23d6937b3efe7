// Host emulation of what csrc/norms uses of CUDA: a CTA's threads as fibres that meet at barriers and shuffles.
//
// It proves the arithmetic and the indexing of the sources that nvcc compiles, and counts the bytes that they move. It
// is no GPU: no data races beyond the order of fibres (shuffled, from a fixed seed), no memory model, no timing. A
// misaligned 16-byte access, a barrier that not all threads reach, and a shuffle that a lane skips are errors.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct float2 {
  float x, y;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

using std::min;

namespace emulate {

enum class State { ready, at_block, at_warp, done };

struct Fibre {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 << 10);
  State state = State::ready;
};

inline std::vector<Fibre> fibres;
inline ucontext_t scheduler;
inline std::vector<float> lanes;  // what each thread shows in a shuffle
inline void (*body)();
// Bytes read once, bytes shared by rows (scale, shift, gate, weight, angles), single numbers, bytes written.
inline int64_t streamed = 0, shared = 0, scalar = 0, written = 0;

inline void wait(State where) {
  Fibre& self = fibres[threadIdx.x];
  self.state = where;
  swapcontext(&self.context, &scheduler);
}

inline void enter() {
  body();
  fibres[threadIdx.x].state = State::done;
}

inline void release(size_t from, size_t to, State where) {
  for (size_t i = from; i < to; ++i) {
    if (fibres[i].state != where) return;
  }
  for (size_t i = from; i < to; ++i) fibres[i].state = State::ready;
}

inline void run_block(size_t threads, uint32_t& seed) {
  std::vector<size_t> order(threads);
  for (size_t i = 0; i < threads; ++i) {
    order[i] = i;
    Fibre& fibre = fibres[i];
    fibre.state = State::ready;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = fibre.stack.size();
    fibre.context.uc_link = &scheduler;
    makecontext(&fibre.context, enter, 0);
  }
  for (size_t done = 0; done < threads;) {
    for (size_t i = threads - 1; i > 0; --i) {
      seed = seed * 1664525u + 1013904223u;
      std::swap(order[i], order[(seed >> 8) % (i + 1)]);
    }
    bool moved = false;
    for (size_t i : order) {
      if (fibres[i].state != State::ready) continue;
      moved = true;
      threadIdx = {static_cast<unsigned>(i), 0, 0};
      swapcontext(&scheduler, &fibres[i].context);
      done += fibres[i].state == State::done;
    }
    if (!moved) throw std::runtime_error("threads of a CTA wait at different barriers");
    for (size_t warp = 0; warp < threads; warp += 32) release(warp, warp + 32, State::at_warp);
    release(0, threads, State::at_block);
  }
}

inline void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) throw std::runtime_error("a 16-byte access is misaligned");
}

}  // namespace emulate

inline void __syncthreads() { emulate::wait(emulate::State::at_block); }

inline float __shfl_xor_sync(unsigned, float v, int mask) {
  const unsigned self = threadIdx.x;
  emulate::lanes[self] = v;
  emulate::wait(emulate::State::at_warp);
  const float other = emulate::lanes[self ^ static_cast<unsigned>(mask)];
  emulate::wait(emulate::State::at_warp);
  return other;
}

namespace wanmoe {

inline uint4 load_once(const void* p) {
  emulate::check_aligned(p);
  emulate::streamed += 16;
  return *static_cast<const uint4*>(p);
}

inline float4 load_shared_by_rows(const float* p) {
  emulate::check_aligned(p);
  emulate::shared += 16;
  return *reinterpret_cast<const float4*>(p);
}

inline void store(void* p, uint4 v) {
  emulate::check_aligned(p);
  emulate::written += 16;
  *static_cast<uint4*>(p) = v;
}

template <class T>
T load_element(const T* p) {
  emulate::scalar += sizeof(T);
  return *p;
}

template <class T>
void store_element(T* p, T v) {
  emulate::written += sizeof(T);
  *p = v;
}

inline uint32_t as_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

inline float as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

inline float2 unpack_bfloat16(uint32_t pair) { return {as_float(pair << 16), as_float(pair & 0xffff0000u)}; }

inline uint32_t round_bfloat16(float v) {
  const uint32_t bits = as_bits(v);
  if (std::isnan(v)) return 0x7fff;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline uint32_t pack_bfloat16(float low, float high) { return round_bfloat16(low) | round_bfloat16(high) << 16; }

inline float2 unpack_float16(uint32_t pair) {
  _Float16 halves[2];
  std::memcpy(halves, &pair, 4);
  return {static_cast<float>(halves[0]), static_cast<float>(halves[1])};
}

inline uint32_t pack_float16(float low, float high) {
  const _Float16 halves[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  uint32_t pair;
  std::memcpy(&pair, halves, 4);
  return pair;
}

template <class Args>
int launch(void (*kernel)(Args), dim3 grid, int threads, void*, const Args& args) {
  static void (*current)(Args);
  static const Args* arguments;
  current = kernel;
  arguments = &args;
  emulate::body = [] { current(*arguments); };
  if (threads % 32 != 0 || threads > 1024) throw std::runtime_error("a CTA takes whole warps, 1024 threads at most");
  if (emulate::fibres.size() < static_cast<size_t>(threads)) emulate::fibres.resize(threads);
  emulate::lanes.assign(threads, NAN);
  blockDim = dim3(static_cast<unsigned>(threads));
  gridDim = grid;
  uint32_t seed = 1;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        emulate::run_block(static_cast<size_t>(threads), seed);
      }
    }
  }
  return 0;
}

}  // namespace wanmoe
