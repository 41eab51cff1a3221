// SPDX-License-Identifier: Apache-2.0
// What a test hands to a program and gets back: numbers, then tensors with their whole storage. The program rewrites
// the file with every storage in order, inputs and the borders around views included, so that a test sees each stray
// write. All numbers are 64-bit; run.py writes the same format.
#pragma once

#include <array>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "../../csrc/common/feature_map.h"
#include "../../csrc/common/scalar.h"

namespace host_cuda {

// A storage as cudaMalloc gives it, of its own exact size: the byte after it is out of bounds for a sanitizer.
class Storage {
 public:
  static constexpr std::align_val_t kAlignment{256};

  explicit Storage(size_t bytes) : bytes_(bytes), data_(static_cast<char*>(::operator new(bytes, kAlignment))) {}
  char* data() const { return data_.get(); }
  size_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(char* data) const { ::operator delete(data, kAlignment); }
  };
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
      Storage storage(read_number(file.get()));
      read(file.get(), storage.data(), storage.bytes());
      tensors.push_back({std::move(storage), offset, std::move(sizes), std::move(strides)});
    }
  }

  void write() const {
    const File file(std::fopen(path_.c_str(), "wb"));
    for (const HostTensor& tensor : tensors) {
      const size_t written = std::fwrite(tensor.storage.data(), 1, tensor.storage.bytes(), file.get());
      if (written != tensor.storage.bytes()) fail("cannot write the case file");
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
};

// Calls `body.template operator()<scalar_t>()` for the type that run.py numbers so.
template <class Body>
void dispatch_floating(int64_t type, const Body& body) {
  switch (type) {
    case 0:
      return body.template operator()<double>();
    case 1:
      return body.template operator()<float>();
    case 2:
      return body.template operator()<fpn_fast::Half>();
    case 3:
      return body.template operator()<fpn_fast::BFloat16>();
    default:
      fail("unknown type");
  }
}

}  // namespace host_cuda
