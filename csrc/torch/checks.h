// SPDX-License-Identifier: Apache-2.0
// Checks and accessors that several ops share. Python raises better messages for the same mistakes; these checks keep
// the kernels safe when an op is called directly.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "../common/boxes.h"
#include "tensors.h"

namespace fpn_fast {

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// The type of boxes, scores and sums for inputs of type `type`.
inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool is_box_type(ScalarType type) { return type == ScalarType::Float || type == ScalarType::Double; }

// Calls `body(TypeTag<acc_t>{})`. `type` must be a box type.
template <class Body>
void dispatch_boxes(ScalarType type, const Body& body) {
  type == ScalarType::Double ? body(TypeTag<double>{}) : body(TypeTag<float>{});
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text;
  for (const int64_t size : tensor.sizes()) text += (text.empty() ? "[" : ", ") + std::to_string(size);
  return (text.empty() ? "[" : text) + (tensor.is_contiguous() ? "]" : "] (not contiguous)");
}

// Whether `tensor` is contiguous, has these sizes (-1 is any) and this type, and is on the device of `like`.
inline bool matches(const Tensor& tensor, std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& like) {
  if (tensor.dim() != static_cast<int64_t>(sizes.size()) || tensor.scalar_type() != type) return false;
  int64_t axis = 0;
  for (const int64_t size : sizes) {
    if (tensor.size(axis++) != size && size >= 0) return false;
  }
  return tensor.is_contiguous() && on_device_of(tensor, like);
}

inline void check_counts(const std::optional<Tensor>& counts, const char* name, const Tensor& boxes, const char* op) {
  STD_TORCH_CHECK(!counts.has_value() || matches(*counts, {boxes.size(0)}, ScalarType::Long, boxes), op,
                  " takes contiguous int64 ", name, " [N] on the boxes' device, N is ", boxes.size(0), ", got ",
                  shape_of(*counts));
}

inline void check_image_sizes(const Tensor& image_sizes, const Tensor& like, const char* op) {
  STD_TORCH_CHECK(matches(image_sizes, {like.size(0), 2}, accumulate_type(like.scalar_type()), like), op,
                  " takes contiguous image_sizes [N, 2] on the inputs' device, float64 for float64 inputs and float32 "
                  "otherwise, N is ",
                  like.size(0), ", got ", shape_of(image_sizes));
}

}  // namespace fpn_fast
