// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace fpn_fast {

// Parts of one allocation, handed out in a fixed order. Without memory it only counts the bytes.
class Scratch {
 public:
  explicit Scratch(char* memory = nullptr) : memory_(reinterpret_cast<uintptr_t>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(memory_ + bytes_);
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }

  int64_t bytes() const { return bytes_; }

 private:
  // A warp's access of 4 bytes per thread.
  static constexpr int64_t kAlignment = 128;

  uintptr_t memory_;
  int64_t bytes_ = 0;
};

}  // namespace fpn_fast
