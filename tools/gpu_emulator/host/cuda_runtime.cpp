// SPDX-License-Identifier: Apache-2.0
// Stands in for the CUDA runtime, for fpn_fast's compiled library alone. Preloaded (LD_PRELOAD), it hands every launch
// of the library's kernels, and every storage that they may touch, to functions that stand_in.py sets, and registers
// the library's ops for tensors of the CPU. What other libraries ask of the runtime goes on to the real one.
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

struct Dimensions {
  unsigned x, y, z;
};

struct Hooks {
  // Whether the kernel, or the fill, ended well.
  int (*launch)(const char* kernel, const Dimensions* grid, const Dimensions* block, size_t shared,
                const void* argument);
  int (*fill)(void* memory, int value, size_t bytes);
  // Of a tensor that the library was given, or made.
  void (*storage)(void* address, int64_t bytes, int made);
};

constexpr int kLaunchFailure = 719;

Hooks hooks{};
int error = 0;
std::unordered_map<const void*, std::string> kernels;  // by the host's function
struct {
  Dimensions grid, block;
  size_t shared;
  void* stream;
} configuration;
// Handles of the tensors that the library made, so that their memory is not given out again while it is watched.
std::vector<void*> made;

bool is_ours(const void* address) {
  Dl_info info{};
  return dladdr(address, &info) != 0 && std::strstr(info.dli_fname, "_C_cuda") != nullptr;
}
#define CALLED_BY_OURS is_ours(__builtin_return_address(0))

template <class Function>
Function* real(const char* name, Function* = nullptr) {
  for (const char* library : {"libcudart.so.13", "libcudart.so.12", "libtorch_cpu.so", "libtorch_cuda.so"}) {
    void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    void* function = handle == nullptr ? nullptr : dlsym(handle, name);
    if (function != nullptr) return reinterpret_cast<Function*>(function);
  }
  return nullptr;
}
#define REAL(name) real(#name, &name)

int error_unless(int well) {
  if (!well) error = kLaunchFailure;
  return error;
}

}  // namespace

extern "C" {

void gpu_emulator_hooks(const Hooks* given) { hooks = *given; }

void gpu_emulator_release() {
  for (void* tensor : made) real<int(void*)>("aoti_torch_delete_tensor_object")(tensor);
  made.clear();
}

// Kernels.

static void* our_binary = nullptr;
void** __cudaRegisterFatBinary(void* binary) {
  return is_ours(binary) ? &our_binary : REAL(__cudaRegisterFatBinary)(binary);
}
void __cudaRegisterFatBinaryEnd(void** handle) {
  if (handle != &our_binary) REAL(__cudaRegisterFatBinaryEnd)(handle);
}
void __cudaUnregisterFatBinary(void** handle) {
  if (handle != &our_binary) REAL(__cudaUnregisterFatBinary)(handle);
}
void __cudaRegisterFunction(void** handle, const void* function, char* device, const char* name, int limit, void* a,
                            void* b, void* c, void* d, int* e) {
  if (handle != &our_binary) return REAL(__cudaRegisterFunction)(handle, function, device, name, limit, a, b, c, d, e);
  kernels[function] = name;
}
void __cudaRegisterVar(void** handle, char* host, char* device, const char* name, int a, size_t b, int c, int d) {
  if (handle != &our_binary) REAL(__cudaRegisterVar)(handle, host, device, name, a, b, c, d);
}
int __cudaGetKernel(const void** kernel, const void* function) {
  if (kernels.count(function) == 0) return REAL(__cudaGetKernel)(kernel, function);
  *kernel = function;
  return 0;
}

// Launches.

unsigned __cudaPushCallConfiguration(Dimensions grid, Dimensions block, size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(Dimensions* grid, Dimensions* block, size_t* shared, void** stream) {
  *grid = configuration.grid, *block = configuration.block;
  *shared = configuration.shared, *stream = configuration.stream;
  return 0;
}
// nvcc's launch before CUDA 13.
int cudaLaunchKernel(const void* kernel, Dimensions grid, Dimensions block, void** arguments, size_t shared,
                     void* stream) {
  const auto found = kernels.find(kernel);
  if (found == kernels.end()) return REAL(cudaLaunchKernel)(kernel, grid, block, arguments, shared, stream);
  return error_unless(hooks.launch(found->second.c_str(), &grid, &block, shared, arguments[0]));
}
int __cudaLaunchKernel(const void* kernel, Dimensions grid, Dimensions block, void** arguments, size_t shared,
                       void* stream) {
  if (kernels.count(kernel) == 0) return REAL(__cudaLaunchKernel)(kernel, grid, block, arguments, shared, stream);
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
int cudaMemsetAsync(void* memory, int value, size_t bytes, void* stream) {
  if (!CALLED_BY_OURS) return REAL(cudaMemsetAsync)(memory, value, bytes, stream);
  return error_unless(hooks.fill(memory, value, bytes));
}
int cudaGetLastError() { return CALLED_BY_OURS ? std::exchange(error, 0) : REAL(cudaGetLastError)(); }

// What the library asks of torch.

int aoti_torch_library_init_impl(const char* space, const char* key, const char* file, uint32_t line, void** library) {
  return REAL(aoti_torch_library_init_impl)(space, CALLED_BY_OURS ? "CPU" : key, file, line, library);
}
int aoti_torch_create_device_guard(int32_t index, void** guard) {
  if (!CALLED_BY_OURS) return REAL(aoti_torch_create_device_guard)(index, guard);
  *guard = nullptr;
  return 0;
}
int aoti_torch_get_current_cuda_stream(int32_t index, void** stream) {
  if (!CALLED_BY_OURS) return REAL(aoti_torch_get_current_cuda_stream)(index, stream);
  *stream = nullptr;
  return 0;
}

// torch's own would ask the real runtime about a GPU, even where nothing failed.
int torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  static char text[] = "the kernel failed";
  *message = error == 0 ? nullptr : text;
  return 0;
}
void torch_c10_cuda_free_error_msg(char*) {}

static void tell(void* tensor, char* data, int made) {
  int64_t bytes = 0, offset = 0;
  int32_t type = 0;
  real<int(void*, int64_t*)>("aoti_torch_get_storage_size")(tensor, &bytes);
  real<int(void*, int64_t*)>("aoti_torch_get_storage_offset")(tensor, &offset);
  real<int(void*, int32_t*)>("aoti_torch_get_dtype")(tensor, &type);
  offset *= real<size_t(int32_t)>("aoti_torch_dtype_element_size")(type);
  if (hooks.storage != nullptr) hooks.storage(data - offset, bytes, made);
}
int aoti_torch_get_data_ptr(void* tensor, void** data) {
  const int failed = REAL(aoti_torch_get_data_ptr)(tensor, data);
  if (!failed && CALLED_BY_OURS) tell(tensor, static_cast<char*>(*data), false);
  return failed;
}
int aoti_torch_empty_strided(int64_t dimensions, const int64_t* sizes, const int64_t* strides, int32_t type,
                             int32_t device, int32_t index, void** tensor) {
  const int failed = REAL(aoti_torch_empty_strided)(dimensions, sizes, strides, type, device, index, tensor);
  if (failed || !CALLED_BY_OURS) return failed;
  void *data = nullptr, *copy = nullptr;
  REAL(aoti_torch_get_data_ptr)(*tensor, &data);
  real<int(void*, void**)>("aoti_torch_new_tensor_handle")(*tensor, &copy);
  made.push_back(copy);
  tell(*tensor, static_cast<char*>(data), true);
  return 0;
}
}
