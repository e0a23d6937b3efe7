// Stands in for the CUDA part of torch's C shim where the binding is linked to the host emulation: CPU tensors pass for
// CUDA ones, there is no stream and no device to guard. Everything else of the shim is torch's own.
#include <cstdint>

extern "C" {

int32_t aoti_torch_device_type_cuda() { return 0; }  // the CPU's number

int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}

int32_t aoti_torch_delete_device_guard(void*) { return 0; }

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

void torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char** message) { *message = nullptr; }

void torch_c10_cuda_free_error_msg(char*) {}
}
