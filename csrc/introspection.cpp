// SPDX-License-Identifier: Apache-2.0
// fpn_fast._introspection: how the library was built, and what its kernels take of a GPU. A pybind11 module, tied to
// the Python it was built with; nothing that computes depends on it.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cuda/kernel_attributes.h"

namespace py = pybind11;

namespace {

std::map<std::string, std::string> build_facts() {
  return {
      {"compiler", __VERSION__},       {"torch", FPN_FAST_BUILD_TORCH},   {"cuda", FPN_FAST_BUILD_CUDA},
      {"archs", FPN_FAST_BUILD_ARCHS}, {"python", FPN_FAST_BUILD_PYTHON},
  };
}

py::list kernel_attributes(const std::string& library) {
  // The library is loaded already where torch has CUDA: this finds that copy.
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw py::import_error(dlerror());
  const auto attributes =
      reinterpret_cast<decltype(&fpn_fast_kernel_attributes)>(dlsym(handle, "fpn_fast_kernel_attributes"));
  if (attributes == nullptr) throw py::import_error(library + " has no kernel table");
  py::list kernels;
  for (int index = 0;; ++index) {
    KernelAttributes found;
    const int status = attributes(index, &found);
    if (status < 0) return kernels;
    if (status > 0) throw std::runtime_error("the CUDA runtime gives error " + std::to_string(status));
    py::dict kernel;
    kernel["name"] = found.name;
    kernel["threads"] = found.threads;
    kernel["registers"] = found.registers;
    kernel["shared_bytes"] = found.shared_bytes;
    kernel["local_bytes"] = found.local_bytes;
    kernel["occupancy"] = found.occupancy;
    kernels.append(kernel);
  }
}

}  // namespace

PYBIND11_MODULE(_introspection, module) {
  module.def("build_facts", &build_facts, "Compiler, torch, CUDA, GPU architectures and Python of the build.");
  module.def("kernel_attributes", &kernel_attributes, py::arg("library"),
             "Name, threads, registers, shared_bytes, local_bytes and occupancy (0 to 1) of each kernel in the CUDA "
             "library at path `library`, on the current GPU. RuntimeError without a GPU.");
}
