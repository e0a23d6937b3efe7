// The kernels of csrc/norms behind plain C functions, for ctypes. Built by test_emulated_norms.py with g++ alone.
#define WANMOE_EMULATE
#include <string>

#include "norms/adaln.cuh"
#include "norms/gated_residual.cuh"
#include "norms/rms_norm_rope.cuh"

// The structs of norms.h cross as they are: the test has the same ones and compares their sizes.
template <class Args>
static const char* guarded(const Args& args) {
  static thread_local std::string message;
  emulate::streamed = emulate::shared = emulate::scalar = emulate::written = 0;
  try {
    wanmoe::run(args, nullptr);
    return nullptr;
  } catch (const std::runtime_error& error) {
    message = error.what();
    return message.c_str();
  }
}

#define EXPOSE(Args)                                                                  \
  extern "C" const char* run_##Args(const wanmoe::Args* args) { return guarded(*args); } \
  extern "C" int64_t size_##Args() { return sizeof(wanmoe::Args); }

EXPOSE(AdalnForward)
EXPOSE(AdalnBackward)
EXPOSE(AdalnParamGrads)
EXPOSE(GatedSum)
EXPOSE(GateGrad)
EXPOSE(RmsRopeForward)
EXPOSE(RmsRopeBackward)
EXPOSE(RmsRopeWeightGrad)

extern "C" void moved(int64_t* out) {
  out[0] = emulate::streamed;
  out[1] = emulate::shared;
  out[2] = emulate::scalar;
  out[3] = emulate::written;
}
