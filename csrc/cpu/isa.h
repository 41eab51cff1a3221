// SPDX-License-Identifier: Apache-2.0
// Run-time choice of the instruction set: one build serves every x86-64 and uses AVX2 where available.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define FPN_FAST_X86_DISPATCH 1
#endif

// Before an inner loop whose arrays do not overlap. Outputs never share memory with inputs.
#ifdef __clang__
#define FPN_FAST_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#else
#define FPN_FAST_IVDEP _Pragma("GCC ivdep")
#endif

// Before a loop over an array of packs. GCC does not unroll such a loop by itself, and then the packs stay in memory
// instead of registers.
#ifdef __clang__
#define FPN_FAST_UNROLL _Pragma("clang loop unroll(full)")
#else
#define FPN_FAST_UNROLL _Pragma("GCC unroll 8")
#endif

namespace fpn_fast {

#ifdef FPN_FAST_X86_DISPATCH
// `flatten` inlines all of `body`, so that it is compiled again for this target.
template <class Body>
__attribute__((target("avx2"), flatten, noinline)) void run_avx2(const Body& body) {
  body();
}

// Runs `body` compiled for the best instruction set of this machine. The results do not depend on it: the build sets
// -ffp-contract=off, so no target contracts a product and a sum.
template <class Body>
void run_with_best_isa(const Body& body) {
  static const bool has_avx2 = __builtin_cpu_supports("avx2");
  has_avx2 ? run_avx2(body) : body();
}
#else
template <class Body>
void run_with_best_isa(const Body& body) {
  body();
}
#endif

}  // namespace fpn_fast
