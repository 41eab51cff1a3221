// SPDX-License-Identifier: Apache-2.0
// How the library was built, as JSON from a C function: ctypes reads it in every Python, without a module of its own.

extern "C" __attribute__((visibility("default"))) const char* fpn_fast_build_facts() {
  return "{\"compiler\": \"" __VERSION__ "\", \"torch\": \"" FPN_FAST_BUILD_TORCH "\", \"cuda\": \"" FPN_FAST_BUILD_CUDA
         "\", \"archs\": \"" FPN_FAST_BUILD_ARCHS "\", \"python\": \"" FPN_FAST_BUILD_PYTHON "\"}";
}
