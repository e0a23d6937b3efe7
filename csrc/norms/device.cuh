// All that touches the hardware: memory instructions, 16-bit conversions, the launch.
//
// tests/csrc/emulate.h has the same functions for the host; everything that includes this file runs there, too.
#pragma once

#ifdef WANMOE_EMULATE
#include "emulate.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace wanmoe {

// Read once: kept out of L1, which is for the scale, shift, gate and weight that the rows of a clip share.
__device__ __forceinline__ uint4 load_once(const void* p) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p));
  return v;
}

__device__ __forceinline__ float4 load_shared_by_rows(const float* p) {
  return __ldg(reinterpret_cast<const float4*>(p));
}

// A plain store: the matmul that follows finds in L2 what fits.
__device__ __forceinline__ void store(void* p, uint4 v) { *reinterpret_cast<uint4*>(p) = v; }

template <class T>
__device__ __forceinline__ T load_element(const T* p) {
  return __ldg(p);
}

template <class T>
__device__ __forceinline__ void store_element(T* p, T v) {
  *p = v;
}

__device__ __forceinline__ float2 unpack_bfloat16(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float2 unpack_float16(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

__device__ __forceinline__ uint32_t pack_float16(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ uint32_t as_bits(float v) { return __float_as_uint(v); }
__device__ __forceinline__ float as_float(uint32_t v) { return __uint_as_float(v); }

template <class Args>
int launch(void (*kernel)(Args), dim3 grid, int threads, void* stream, const Args& args) {
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace wanmoe

#endif
