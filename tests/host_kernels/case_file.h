// SPDX-License-Identifier: Apache-2.0
// The file that a test gives to a program: numbers, then tensors with their whole storage. The program writes every
// storage back, including inputs and the borders around views, so that a test sees each stray write. All numbers are
// 64-bit. run.py writes the same format.
//
// With HOST_CUDA_SPREAD=axis in the environment, the elements of every map lie so far apart along that axis that the
// last is more than 2^31 elements from the first. The operating system backs only the pages that are touched.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "../../csrc/common/feature_map.h"
#include "../../csrc/common/scalar.h"
#include "../../csrc/cuda/scratch.h"

namespace host_cuda {

// A storage of exact size, aligned like cudaMalloc's. A sanitizer reports an access to the byte after it.
class Storage {
 public:
  static constexpr std::align_val_t kAlignment{256};

  explicit Storage(size_t bytes) : Storage(static_cast<char*>(::operator new(bytes, kAlignment)), bytes, true) {}
  // Memory that is never freed.
  static Storage kept(char* data, size_t bytes) { return Storage(data, bytes, false); }
  char* data() const { return data_.get(); }
  size_t bytes() const { return bytes_; }

 private:
  struct Free {
    bool owned;
    void operator()(char* data) const {
      if (owned) ::operator delete(data, kAlignment);
    }
  };
  Storage(char* data, size_t bytes, bool owned) : bytes_(bytes), data_(data, Free{owned}) {}
  size_t bytes_;
  std::unique_ptr<char, Free> data_;
};

struct HostTensor {
  Storage storage;
  int64_t offset;
  std::vector<int64_t> sizes, strides;

  template <class T>
  T* data() const {
    return reinterpret_cast<T*>(storage.data()) + offset;
  }
  template <class T>
  fpn_fast::FeatureMap<T> map() const {
    return {data<T>(),  sizes[0],   sizes[1],  static_cast<int>(sizes[2]), static_cast<int>(sizes[3]), strides[0],
            strides[1], strides[2], strides[3]};
  }
};

// The original storage of a map, and a copy that is spread along one axis.
class Spread {
 public:
  Spread(HostTensor& tensor, int64_t element_bytes, size_t axis)
      : near_(std::move(tensor.storage)), offset_(tensor.offset), strides_(tensor.strides), bytes_(element_bytes) {
    int64_t extent = 1;
    for (size_t dim = 0; dim < 4; ++dim) extent += (tensor.sizes[dim] - 1) * tensor.strides[dim];
    constexpr int64_t kFar = int64_t{1} << 31, kAligned = 64;
    const int64_t steps = tensor.sizes[axis] - 1;
    const int64_t stride = std::max(kFar / steps + kAligned, extent) / kAligned * kAligned + kAligned;
    // Offsets and strides stay multiples of 16 bytes if they were.
    tensor.offset = tensor.offset % kAligned;
    tensor.strides[axis] = stride;
    const size_t bytes = (tensor.offset + steps * stride + extent) * bytes_;
    void* far = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (far == MAP_FAILED) fail("no address space for maps that are spread");
    far_ = static_cast<char*>(far);
    tensor.storage = Storage::kept(far_, bytes);
    copy(tensor, [this](char* one, char* other) { std::memcpy(other, one, bytes_); });
  }

  // Copies the map, as the kernel left it, back to its original storage.
  const Storage& gathered(const HostTensor& tensor) const {
    copy(tensor, [this](char* one, char* other) { std::memcpy(one, other, bytes_); });
    return near_;
  }

 private:
  template <class Move>
  void copy(const HostTensor& tensor, const Move& move) const {
    const auto& n = tensor.sizes;
    for (int64_t i = 0, all = n[0] * n[1] * n[2] * n[3]; i < all; ++i) {
      const int64_t at[4] = {i / (n[1] * n[2] * n[3]), i / (n[2] * n[3]) % n[1], i / n[3] % n[2], i % n[3]};
      int64_t one = offset_, other = tensor.offset;
      for (size_t dim = 0; dim < 4; ++dim) one += at[dim] * strides_[dim], other += at[dim] * tensor.strides[dim];
      move(near_.data() + one * bytes_, far_ + other * bytes_);
    }
  }

  Storage near_;
  int64_t offset_;
  std::vector<int64_t> strides_;
  int64_t bytes_;
  char* far_;
};

class CaseFile {
 public:
  std::vector<int64_t> numbers;
  std::vector<HostTensor> tensors;

  explicit CaseFile(const char* path) : path_(path) {
    const File file(std::fopen(path, "rb"));
    numbers = read_list(file.get());
    for (int64_t count = read_number(file.get()); count > 0; --count) {
      const int64_t offset = read_number(file.get());
      std::vector<int64_t> sizes = read_list(file.get()), strides = read_list(file.get());
      const int64_t element_bytes = read_number(file.get());
      Storage storage(read_number(file.get()));
      read(file.get(), storage.data(), storage.bytes());
      tensors.push_back({std::move(storage), offset, std::move(sizes), std::move(strides)});
      HostTensor& tensor = tensors.back();
      const char* axis = std::getenv("HOST_CUDA_SPREAD");
      spread_.emplace_back();
      if (axis == nullptr || tensor.sizes.size() != 4) continue;
      const auto has_elements = [](int64_t size) { return size > 0; };
      if (!std::all_of(tensor.sizes.begin(), tensor.sizes.end(), has_elements)) continue;
      if (tensor.sizes[std::atoi(axis)] > 1) spread_.back().emplace(tensor, element_bytes, std::atoi(axis));
    }
  }

  void write() const {
    const File file(std::fopen(path_.c_str(), "wb"));
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Storage& storage = spread_[i] ? spread_[i]->gathered(tensors[i]) : tensors[i].storage;
      const size_t written = std::fwrite(storage.data(), 1, storage.bytes(), file.get());
      if (written != storage.bytes()) fail("cannot write the case file");
    }
  }

 private:
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  using File = std::unique_ptr<std::FILE, Close>;

  static void read(std::FILE* file, void* data, size_t bytes) {
    if (file == nullptr || std::fread(data, 1, bytes, file) != bytes) fail("cannot read the case file");
  }
  static int64_t read_number(std::FILE* file) {
    int64_t number;
    read(file, &number, sizeof number);
    return number;
  }
  static std::vector<int64_t> read_list(std::FILE* file) {
    std::vector<int64_t> list(read_number(file));
    read(file, list.data(), list.size() * sizeof(int64_t));
    return list;
  }

  std::string path_;
  std::vector<std::optional<Spread>> spread_;
};

// run.py has the same numbers.
template <class T>
constexpr int64_t kTypeNumber = std::is_same_v<T, double>           ? 0
                                : std::is_same_v<T, float>          ? 1
                                : std::is_same_v<T, fpn_fast::Half> ? 2
                                                                    : 3;

template <class... Types>
struct TypeList {};
using AllTypes = TypeList<double, float, fpn_fast::Half, fpn_fast::BFloat16>;
using WideTypes = TypeList<double, float>;

// Calls `body.template operator()<T>()` for the type T of `Types` with that number.
template <class... Types, class Body>
void dispatch(TypeList<Types...>, int64_t type, const Body& body) {
  if (!((kTypeNumber<Types> == type && (body.template operator()<Types>(), true)) || ...)) fail("unknown type");
}

// A whole program, `PROGRAM KERNEL CASE_FILE`: `run` gets the kernel's name and the case for the type of the case.
template <class Types, class Run>
int main_of_types(int count, char** arguments, const Run& run) {
  if (count != 3) fail("usage: PROGRAM KERNEL CASE_FILE");
  const CaseFile file(arguments[2]);
  const std::string kernel = arguments[1];
  dispatch(Types(), file.numbers.at(0), [&]<class T>() { run.template operator()<T>(kernel, file); });
  file.write();
  return 0;
}

// The same; with a sanitizer, which takes the compiler long, float alone.
template <class Types = AllTypes, class Run>
int main_of(int count, char** arguments, const Run& run) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  return main_of_types<TypeList<float>>(count, arguments, run);
#else
  return main_of_types<Types>(count, arguments, run);
#endif
}

// The `launch` that the .cuh files call.
template <Blocks kOrder>
constexpr auto kLaunchBlocks = [](auto kernel, const auto& config, const auto& argument) {
  if (config.blocks == 0) return;
  launch(
      {static_cast<unsigned>(config.blocks)}, {static_cast<unsigned>(config.threads)}, [&] { kernel(argument); },
      kOrder);
};
inline constexpr auto kLaunch = kLaunchBlocks<Blocks::kOneByOne>;

// Calls `run(make_plan(scratch))` with the scratch memory that the plan takes. All of its bytes are `fill`, so that a
// test sees what no kernel wrote.
template <class MakePlan, class Run>
void run_planned(int fill, const MakePlan& make_plan, const Run& run) {
  fpn_fast::Scratch counting;
  make_plan(counting);
  const Storage memory(counting.bytes());
  std::memset(memory.data(), fill, memory.bytes());
  fpn_fast::Scratch scratch(memory.data());
  run(make_plan(scratch));
}

using Tensors = std::span<const HostTensor>;

template <class T>
std::vector<fpn_fast::FeatureMap<T>> maps_of(Tensors tensors) {
  std::vector<fpn_fast::FeatureMap<T>> maps;
  for (const auto& tensor : tensors) maps.push_back(tensor.map<T>());
  return maps;
}

// Boxes of float64 corners [..., 4].
template <class Box>
std::vector<Box> boxes_of(const HostTensor& corners) {
  using acc_t = decltype(Box::x1);
  std::vector<Box> boxes;
  const double *box = corners.data<const double>(), *end = box + corners.sizes[0] * corners.sizes[1] * 4;
  for (; box < end; box += 4) {
    boxes.push_back({static_cast<acc_t>(box[0]), static_cast<acc_t>(box[1]), static_cast<acc_t>(box[2]),
                     static_cast<acc_t>(box[3])});
  }
  return boxes;
}

}  // namespace host_cuda
