// The kernels as torch ops `wanmoe_cuda::*` that write into tensors which the caller made.
//
// Only torch's stable ABI (>= 2.10) and its C shim: one library serves several versions of torch and of Python. The ops
// are called from kernels/norms, inside opaque ops: they have no autograd and no fake of their own.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "norms.h"

// Read by kernels/cuda_library.py, which refuses a library of other sources than the checkout's.
extern "C" __attribute__((visibility("default"), used)) const char wanmoe_sources[] = "wanmoe-sources:" WANMOE_SOURCES;

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// Checks that all tensors of a call are contiguous ones of x's shape and device, and hands out what the kernels take.
class Call {
 public:
  explicit Call(const Tensor& x) : device_(x.get_device_index()), guard_((check_cuda(x), device_)) {
    STD_TORCH_CHECK(x.dim() == 3, "x has ", x.dim(), " axes; expected [B, L, D]");
    shape.clips = x.size(0);
    shape.tokens = x.size(1);
    STD_TORCH_CHECK(x.size(2) >= 1 && x.size(2) <= wanmoe::kMaxWidth, "D is ", x.size(2), "; the kernels take 1 to ",
                    wanmoe::kMaxWidth);
    shape.width = static_cast<int>(x.size(2));
    STD_TORCH_CHECK(shape.clips * shape.tokens <= INT32_MAX && shape.clips <= 65535 && wanmoe::chunks(shape) <= 65535,
                    shape.clips, " clips of ", shape.tokens, " tokens; the kernels take 65535 clips, ",
                    65535 * wanmoe::kChunkRows, " tokens a clip and 2^31 - 1 tokens at most");
  }

  wanmoe::Shape shape;

  bool empty() const { return shape.clips * shape.tokens == 0; }

  wanmoe::Array array(const char* name, const Tensor& t) const {
    check_same_device(name, t);
    STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == shape.clips && t.size(1) == shape.tokens && t.size(2) == shape.width,
                    name, " has another shape than x [", shape.clips, ", ", shape.tokens, ", ", shape.width, "]");
    STD_TORCH_CHECK(t.is_contiguous(), name, " is not contiguous");
    switch (t.scalar_type()) {
      case ScalarType::Float:
        return {t.data_ptr(), wanmoe::Dtype::float32};
      case ScalarType::Half:
        return {t.data_ptr(), wanmoe::Dtype::float16};
      case ScalarType::BFloat16:
        return {t.data_ptr(), wanmoe::Dtype::bfloat16};
      default:
        STD_TORCH_CHECK(false, name, " is neither float32, float16 nor bfloat16");
    }
  }

  wanmoe::Array array(const char* name, const Maybe& t) const { return t ? array(name, *t) : wanmoe::Array(); }

  // [B, 1, D] or [1, 1, D], float32; a clip's numbers contiguous, clips at any stride.
  wanmoe::Vector vector(const char* name, const Tensor& t) const {
    check_float(name, t);
    STD_TORCH_CHECK(t.dim() == 3 && (t.size(0) == shape.clips || t.size(0) == 1) && t.size(1) == 1 &&
                        t.size(2) == shape.width && (t.stride(2) == 1 || shape.width == 1),
                    name, " is not a [", shape.clips, ", 1, ", shape.width, "] or [1, 1, ", shape.width,
                    "] with its last axis contiguous");
    return {static_cast<const float*>(t.data_ptr()), t.size(0) == 1 ? 0 : t.stride(0)};
  }

  wanmoe::Vector vector(const char* name, const Maybe& t) const { return t ? vector(name, *t) : wanmoe::Vector(); }

  // A contiguous float32 tensor of `count` numbers.
  float* numbers(const char* name, const Tensor& t, int64_t count) const {
    check_float(name, t);
    STD_TORCH_CHECK(t.numel() == count && t.is_contiguous(), name, " has ", t.numel(), " numbers; expected ", count,
                    ", contiguous");
    return static_cast<float*>(t.data_ptr());
  }

  float* rows(const char* name, const Tensor& t) const { return numbers(name, t, shape.clips * shape.tokens); }

  float* sums(const char* name, const Tensor& t) const {
    return numbers(name, t, shape.clips * wanmoe::chunks(shape) * shape.width);
  }

  const float* angles(const char* name, const Maybe& t, int head) const {
    return t ? numbers(name, *t, shape.tokens * (head / 2)) : nullptr;
  }

  int head(int64_t num_heads) const {
    STD_TORCH_CHECK(num_heads >= 1 && shape.width % (2 * num_heads) == 0, "D = ", shape.width, " does not split into ",
                    num_heads, " heads of an even width");
    return static_cast<int>(shape.width / num_heads);
  }

  template <class Args>
  void run(const Args& args) const {
    if (empty()) return;
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    STD_CUDA_CHECK(static_cast<cudaError_t>(wanmoe::run(args, stream)));
  }

 private:
  static void check_cuda(const Tensor& x) { STD_TORCH_CHECK(x.is_cuda(), "x is not on a CUDA device"); }

  void check_same_device(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device_, name, " is not on the device of x, cuda:", device_);
  }

  void check_float(const char* name, const Tensor& t) const {
    check_same_device(name, t);
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " is not float32");
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

void adaln_forward(Tensor x, Maybe h, Maybe gate, Tensor scale, Tensor shift, Maybe x_new, Tensor y, Tensor mean,
                   Tensor rstd, double offset, double eps) {
  const Call call(x);
  STD_TORCH_CHECK(h.has_value() == x_new.has_value(), "x_new is given with h, and only then");
  wanmoe::AdalnForward a;
  a.shape = call.shape;
  a.x = call.array("x", x);
  a.h = call.array("h", h);
  a.gate = call.vector("gate", gate);
  a.scale = call.vector("scale", scale);
  a.shift = call.vector("shift", shift);
  a.x_new = call.array("x_new", x_new);
  a.y = call.array("y", y);
  a.mean = call.rows("mean", mean);
  a.rstd = call.rows("rstd", rstd);
  a.offset = static_cast<float>(offset);
  a.eps = static_cast<float>(eps);
  call.run(a);
}

void adaln_backward(Tensor dy, Maybe dx_new, Tensor x, Maybe gate, Tensor scale, Tensor mean, Tensor rstd, Tensor dx,
                    Maybe dh, double offset) {
  const Call call(x);
  STD_TORCH_CHECK(gate.has_value() || !dh.has_value(), "without a gate dh is dx: pass no dh");
  wanmoe::AdalnBackward a;
  a.shape = call.shape;
  a.dy = call.array("dy", dy);
  a.dx_new = call.array("dx_new", dx_new);
  a.x = call.array("x", x);
  a.gate = call.vector("gate", gate);
  a.scale = call.vector("scale", scale);
  a.mean = call.rows("mean", mean);
  a.rstd = call.rows("rstd", rstd);
  a.dx = call.array("dx", dx);
  a.dh = call.array("dh", dh);
  a.offset = static_cast<float>(offset);
  call.run(a);
}

void adaln_param_grads(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor dscale, Tensor dshift) {
  const Call call(x);
  wanmoe::AdalnParamGrads a;
  a.shape = call.shape;
  a.dy = call.array("dy", dy);
  a.x = call.array("x", x);
  a.mean = call.rows("mean", mean);
  a.rstd = call.rows("rstd", rstd);
  a.dscale = call.sums("dscale", dscale);
  a.dshift = call.sums("dshift", dshift);
  call.run(a);
}

void gated_sum(Maybe x, Tensor h, Maybe gate, Tensor y) {
  const Call call(h);
  wanmoe::GatedSum a;
  a.shape = call.shape;
  a.x = call.array("x", x);
  a.h = call.array("h", h);
  a.gate = call.vector("gate", gate);
  a.y = call.array("y", y);
  call.run(a);
}

void gate_grad(Tensor dy, Tensor h, Tensor dgate) {
  const Call call(h);
  wanmoe::GateGrad a;
  a.shape = call.shape;
  a.dy = call.array("dy", dy);
  a.h = call.array("h", h);
  a.dgate = call.sums("dgate", dgate);
  call.run(a);
}

void rms_norm_rope_forward(Tensor x, Tensor weight, Maybe cos, Maybe sin, Tensor y, Tensor rstd, int64_t num_heads,
                           double eps) {
  const Call call(x);
  wanmoe::RmsRopeForward a;
  a.shape = call.shape;
  a.head = call.head(num_heads);
  a.x = call.array("x", x);
  a.weight = call.numbers("weight", weight, a.shape.width);
  a.cos = call.angles("cos", cos, a.head);
  a.sin = call.angles("sin", sin, a.head);
  a.y = call.array("y", y);
  a.rstd = call.rows("rstd", rstd);
  a.eps = static_cast<float>(eps);
  call.run(a);
}

void rms_norm_rope_backward(Tensor dy, Tensor x, Tensor weight, Maybe cos, Maybe sin, Tensor rstd, Tensor dx,
                            int64_t num_heads) {
  const Call call(x);
  wanmoe::RmsRopeBackward a;
  a.shape = call.shape;
  a.head = call.head(num_heads);
  a.dy = call.array("dy", dy);
  a.x = call.array("x", x);
  a.weight = call.numbers("weight", weight, a.shape.width);
  a.cos = call.angles("cos", cos, a.head);
  a.sin = call.angles("sin", sin, a.head);
  a.rstd = call.rows("rstd", rstd);
  a.dx = call.array("dx", dx);
  call.run(a);
}

void rms_norm_rope_weight_grad(Tensor dy, Tensor x, Maybe cos, Maybe sin, Tensor rstd, Tensor dweight,
                               int64_t num_heads) {
  const Call call(x);
  wanmoe::RmsRopeWeightGrad a;
  a.shape = call.shape;
  a.head = call.head(num_heads);
  a.dy = call.array("dy", dy);
  a.x = call.array("x", x);
  a.cos = call.angles("cos", cos, a.head);
  a.sin = call.angles("sin", sin, a.head);
  a.rstd = call.rows("rstd", rstd);
  a.dweight = call.sums("dweight", dweight);
  call.run(a);
}

}  // namespace

STABLE_TORCH_LIBRARY(wanmoe_cuda, m) {
  m.def("adaln_forward(Tensor x, Tensor? h, Tensor? gate, Tensor scale, Tensor shift, Tensor(a!)? x_new, "
        "Tensor(b!) y, Tensor(c!) mean, Tensor(d!) rstd, float offset, float eps) -> ()");
  m.def("adaln_backward(Tensor dy, Tensor? dx_new, Tensor x, Tensor? gate, Tensor scale, Tensor mean, Tensor rstd, "
        "Tensor(a!) dx, Tensor(b!)? dh, float offset) -> ()");
  m.def("adaln_param_grads(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor(a!) dscale, Tensor(b!) dshift) -> ()");
  m.def("gated_sum(Tensor? x, Tensor h, Tensor? gate, Tensor(a!) y) -> ()");
  m.def("gate_grad(Tensor dy, Tensor h, Tensor(a!) dgate) -> ()");
  m.def("rms_norm_rope_forward(Tensor x, Tensor weight, Tensor? cos, Tensor? sin, Tensor(a!) y, Tensor(b!) rstd, "
        "int num_heads, float eps) -> ()");
  m.def("rms_norm_rope_backward(Tensor dy, Tensor x, Tensor weight, Tensor? cos, Tensor? sin, Tensor rstd, "
        "Tensor(a!) dx, int num_heads) -> ()");
  m.def("rms_norm_rope_weight_grad(Tensor dy, Tensor x, Tensor? cos, Tensor? sin, Tensor rstd, Tensor(a!) dweight, "
        "int num_heads) -> ()");
}

// The tests link the host emulation of the kernels to this binding, for tensors on the CPU.
#ifndef WANMOE_DISPATCH_KEY
#define WANMOE_DISPATCH_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(wanmoe_cuda, WANMOE_DISPATCH_KEY, m) {
  m.impl("adaln_forward", TORCH_BOX(&adaln_forward));
  m.impl("adaln_backward", TORCH_BOX(&adaln_backward));
  m.impl("adaln_param_grads", TORCH_BOX(&adaln_param_grads));
  m.impl("gated_sum", TORCH_BOX(&gated_sum));
  m.impl("gate_grad", TORCH_BOX(&gate_grad));
  m.impl("rms_norm_rope_forward", TORCH_BOX(&rms_norm_rope_forward));
  m.impl("rms_norm_rope_backward", TORCH_BOX(&rms_norm_rope_backward));
  m.impl("rms_norm_rope_weight_grad", TORCH_BOX(&rms_norm_rope_weight_grad));
}
