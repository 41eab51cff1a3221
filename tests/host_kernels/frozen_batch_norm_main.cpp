// SPDX-License-Identifier: Apache-2.0
// Runs the frozen batch norm: frozen_batch_norm_main forward|backward|sums CASE_FILE. Numbers: the narrow type, whether
// maps are channels_last, which of the maps are wide, which vectors there are, their type, ReLU, the rule, 16-byte
// accesses, and the bits of eps in float64. Tensors: the vectors of both norms, x or grad, the residual or y, the
// outputs.
#include <bit>
#include <limits>

#include "../../csrc/cuda/frozen_batch_norm.cuh"
#include "case_file.h"

namespace fpn_fast {
namespace {

struct Numbers {
  bool last, wide_first, wide_second, has_norm, relu, vectorised;
  NormRule rule;
  VectorType type;
  double eps;
};

Norm norm_of(const host_cuda::CaseFile& file, size_t first, const Numbers& numbers) {
  const auto at = [&](size_t i) { return file.tensors.at(first + i).data<char>(); };
  Norm norm{};
  if (first > 0 && !numbers.has_norm) return norm;
  // A pointer is right for every type where the offset is 0.
  norm = {at(0), at(1), at(2), at(3), numbers.type, true};
  for (size_t i = 0; i < 4; ++i) norm.aligned &= reinterpret_cast<uintptr_t>(at(i)) % 16 == 0;
  return norm;
}

template <class T>
NormMaps maps_of(const host_cuda::CaseFile& file, const Numbers& numbers) {
  const auto& sizes = file.tensors.at(8).sizes;
  NormMaps maps{};
  maps.elements = sizes[0] * sizes[1] * sizes[2] * sizes[3], maps.channels = sizes[1], maps.plane = sizes[2] * sizes[3];
  maps.norm = norm_of(file, 0, numbers), maps.residual_norm = norm_of(file, 4, numbers);
  maps.eps = numbers.eps, maps.rule = numbers.rule;
  maps.vectorised = numbers.vectorised && (numbers.last ? maps.channels % kVec<T> == 0 : maps.plane >= kVec<T>);
  return maps;
}

// The kernels' flags are constants; wide maps of a wide type are the same kernels.
template <class T, class Body>
void with_flags(bool first, bool second, const Body& body) {
  if constexpr (std::is_same_v<T, acc_type<T>>) {
    body(std::false_type(), std::false_type());
  } else if (first) {
    second ? body(std::true_type(), std::true_type()) : body(std::true_type(), std::false_type());
  } else {
    second ? body(std::false_type(), std::true_type()) : body(std::false_type(), std::false_type());
  }
}

template <class T>
void run(const std::string& kernel, const host_cuda::CaseFile& file) {
  const auto& n = file.numbers;
  const Numbers numbers{n.at(1) != 0,
                        n.at(2) != 0,
                        n.at(3) != 0,
                        n.at(4) != 0,
                        n.at(6) != 0,
                        n.at(8) != 0,
                        static_cast<NormRule>(n.at(7)),
                        static_cast<VectorType>(n.at(5)),
                        std::bit_cast<double>(n.at(9))};
  // The map of another type than T may have an offset of its own.
  const auto pointer = [&](size_t i, bool wide) -> void* {
    const auto& tensor = file.tensors.at(i);
    if (tensor.sizes.empty() || tensor.sizes[0] == 0) return nullptr;
    return wide ? static_cast<void*>(tensor.data<acc_type<T>>()) : static_cast<void*>(tensor.data<T>());
  };
  if (kernel == "forward") {
    NormForward<T> pass{};
    pass.maps = maps_of<T>(file, numbers);
    pass.x = static_cast<const T*>(pointer(8, false)), pass.residual = pointer(9, numbers.wide_first);
    pass.y = pointer(10, numbers.wide_second);
    pass.floor = numbers.relu ? acc_type<T>(0) : -std::numeric_limits<acc_type<T>>::infinity();
    with_flags<T>(numbers.wide_first, numbers.wide_second, [&](auto first, auto second) {
      norm_in_launch<T, first(), second()>(pass, numbers.last, host_cuda::kLaunch);
    });
  } else if (kernel == "backward") {
    NormBackward<T> pass{};
    pass.maps = maps_of<T>(file, numbers);
    pass.grad = pointer(8, numbers.wide_second);
    if (numbers.relu) pass.y = pointer(9, numbers.wide_second);
    pass.grad_x = static_cast<T*>(pointer(10, false)), pass.grad_residual = pointer(11, numbers.wide_first);
    with_flags<T>(numbers.wide_first, numbers.wide_second, [&](auto first, auto second) {
      norm_backward_in_launch<T, first(), second()>(pass, numbers.last, host_cuda::kLaunch);
    });
  } else {
    const auto& sizes = file.tensors.at(8).sizes;
    NormSums<T> pass{};
    pass.positions = sizes[0] * sizes[2] * sizes[3], pass.channels = sizes[1], pass.plane = sizes[2] * sizes[3];
    pass.grad = pointer(8, numbers.wide_first), pass.x = pointer(10, numbers.wide_second);
    if (numbers.relu) pass.y = pointer(9, numbers.wide_first);
    pass.mean = file.tensors.at(0).data<const acc_type<T>>(), pass.parts = file.tensors.at(11).data<acc_type<T>>();
    pass.channels_last = numbers.last;
    with_flags<T>(numbers.wide_first, numbers.wide_second, [&](auto first, auto second) {
      norm_sums_in_launch<T, first(), second()>(pass, host_cuda::kLaunch);
    });
  }
}

}  // namespace
}  // namespace fpn_fast

int main(int count, char** arguments) {
  return host_cuda::main_of(count, arguments,
                            []<class T>(const auto& kernel, const auto& file) { fpn_fast::run<T>(kernel, file); });
}
