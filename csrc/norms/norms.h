// The memory-bound ops of a transformer block: what the binding and the kernels share. No CUDA and no torch in here.
//
// Letters: B clips, L tokens, D width, N heads. A "row" is one token's D numbers; rows are contiguous.
#pragma once

#include <cstdint>

namespace wanmoe {

enum class Dtype : int { float32, float16, bfloat16 };

// A contiguous tensor of one of the three dtypes; data is null where an optional one is absent.
struct Array {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
};

// float32 [B, D] or [D], the numbers of a clip contiguous; clip_stride is 0 where all clips share them.
struct Vector {
  const float* data = nullptr;
  int64_t clip_stride = 0;
};

struct Shape {
  int64_t clips = 0;
  int64_t tokens = 0;
  int width = 0;
};

constexpr int kUnit = 8;         // numbers that a thread moves at once: 16 bytes of a 16-bit dtype
constexpr int kUnits = 4;        // units of a row that a thread keeps in registers
constexpr int kMaxThreads = 512; // hence D <= 16384
constexpr int kMaxWidth = kUnit * kUnits * kMaxThreads;
constexpr int kChunkRows = 64;   // rows behind one partial sum over tokens: the same on every GPU, so sums are, too

inline int64_t chunks(const Shape& shape) { return (shape.tokens + kChunkRows - 1) / kChunkRows; }

// x_new = x + h * gate, rounded (only if h is given: otherwise x_new is x); y = norm(x_new) * (offset + scale) + shift.
struct AdalnForward {
  Shape shape;
  Array x, h;
  Vector gate, scale, shift;
  Array x_new, y;
  float *mean = nullptr, *rstd = nullptr; // [B * L]
  float offset = 1, eps = 0;
};

// dx = dx_new + gradient through the norm; dh = dx * gate (only if dh is given).
struct AdalnBackward {
  Shape shape;
  Array dy, dx_new, x;
  Vector gate, scale;
  const float *mean = nullptr, *rstd = nullptr;
  Array dx, dh;
  float offset = 1;
};

// Partial sums over tokens, each [B, chunks, D]: dscale of dy * norm(x), dshift of dy.
struct AdalnParamGrads {
  Shape shape;
  Array dy, x;
  const float *mean = nullptr, *rstd = nullptr;
  float *dscale = nullptr, *dshift = nullptr;
};

// y = x + h * gate; without x: y = h * gate, which is the gradient of h.
struct GatedSum {
  Shape shape;
  Array x, h;
  Vector gate;
  Array y;
};

// Partial sums over tokens of dy * h, [B, chunks, D].
struct GateGrad {
  Shape shape;
  Array dy, h;
  float* dgate = nullptr;
};

// y = rotate(norm(x) * weight), rounded after each of the three; cos and sin are [L, head / 2] or null.
struct RmsRopeForward {
  Shape shape;
  int head = 0;
  Array x;
  const float *weight = nullptr, *cos = nullptr, *sin = nullptr;
  Array y;
  float* rstd = nullptr;
  float eps = 0;
};

struct RmsRopeBackward {
  Shape shape;
  int head = 0;
  Array dy, x;
  const float *weight = nullptr, *cos = nullptr, *sin = nullptr, *rstd = nullptr;
  Array dx;
};

// Partial sums over tokens of the weight's gradient, [B, chunks, D].
struct RmsRopeWeightGrad {
  Shape shape;
  int head = 0;
  Array dy, x;
  const float *cos = nullptr, *sin = nullptr, *rstd = nullptr;
  float* dweight = nullptr;
};

// Each queues its kernel on `stream` (a cudaStream_t) of the current device and returns a cudaError_t.
int run(const AdalnForward&, void* stream);
int run(const AdalnBackward&, void* stream);
int run(const AdalnParamGrads&, void* stream);
int run(const GatedSum&, void* stream);
int run(const GateGrad&, void* stream);
int run(const RmsRopeForward&, void* stream);
int run(const RmsRopeBackward&, void* stream);
int run(const RmsRopeWeightGrad&, void* stream);

}  // namespace wanmoe
