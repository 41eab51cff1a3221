// SPDX-License-Identifier: Apache-2.0
// Runs the focal loss: sigmoid_focal_loss_main sums|gradient CASE_FILE. Numbers: type, the bits of alpha in float64,
// and whether 16-byte accesses are allowed. Tensors: logits [M, C], labels, weights, the gradient [M, C] and parts.
#include <bit>

#include "../../csrc/cuda/sigmoid_focal_loss.cuh"
#include "case_file.h"

namespace fpn_fast {
namespace {

template <class T>
void run(bool with_gradient, const host_cuda::CaseFile& file) {
  using acc_t = acc_type<T>;
  const auto& logits = file.tensors.at(0);
  FocalLoss<T> loss{};
  loss.logits = logits.data<const T>(), loss.labels = file.tensors.at(1).data<const int64_t>();
  loss.weights = file.tensors.at(2).data<const acc_t>(), loss.parts = file.tensors.at(4).data<acc_t>();
  loss.classes = static_cast<int>(logits.sizes[1]), loss.elements = logits.sizes[0] * logits.sizes[1];
  loss.alpha = static_cast<acc_t>(std::bit_cast<double>(file.numbers.at(1)));
  if (with_gradient) loss.gradient = file.tensors.at(3).data<T>();
  loss.aligned = file.numbers.at(2);
  focal_loss_in_launch(loss, host_cuda::kLaunch);
}

}  // namespace
}  // namespace fpn_fast

int main(int count, char** arguments) {
  return host_cuda::main_of(count, arguments, []<class T>(const auto& kernel, const auto& file) {
    fpn_fast::run<T>(kernel == "gradient", file);
  });
}
