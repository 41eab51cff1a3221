// SPDX-License-Identifier: Apache-2.0
// Loops that memory bandwidth limits: whole cache lines at once where the machine has vectors of 64 bytes. A store of a
// whole line need not read it first.
#pragma once

#include "parallel.h"

namespace fpn_fast {

#ifdef FPN_FAST_X86_DISPATCH
#ifdef __clang__
#define FPN_FAST_WHOLE_LINES "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#else
// GCC would use vectors of 32 bytes.
#define FPN_FAST_WHOLE_LINES "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512"
#endif

template <class Body>
__attribute__((target(FPN_FAST_WHOLE_LINES), flatten, noinline)) void run_avx512(const Body& body) {
  body();
}
template <class Body>
__attribute__((target("avx2,fma"), flatten, noinline)) void run_avx2_fma(const Body& body) {
  body();
}

#undef FPN_FAST_WHOLE_LINES

// As run_with_best_isa; std::fma is an instruction, where the machine has it.
template <class Body>
void run_with_widest_isa(const Body& body) {
  static const bool has_fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool has_avx512 = has_fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  has_avx512 ? run_avx512(body) : has_fma ? run_avx2_fma(body) : body();
}
#else
template <class Body>
void run_with_widest_isa(const Body& body) {
  body();
}
#endif

// As parallel_rows.
template <class Body>
void parallel_maps(int64_t rows, int64_t elements_per_row, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements_per_row));
  torch::stable::parallel_for(0, rows, grain,
                              [&](int64_t begin, int64_t end) { run_with_widest_isa([&] { body(begin, end); }); });
}

}  // namespace fpn_fast
