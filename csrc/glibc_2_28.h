// SPDX-License-Identifier: Apache-2.0
// setup.py includes this first in every source: a library that a newer glibc compiles then loads under glibc 2.28 too.
#pragma once

#if defined(__linux__) && defined(__x86_64__)
// The linker would take the versions of glibc 2.29 and 2.34; these, as old as x86-64 Linux, compute the same.
__asm__(".symver log, log@GLIBC_2.2.5");
__asm__(".symver dlsym, dlsym@GLIBC_2.2.5");
extern "C" {
// glibc has it since 2.32; libstdc++ counts references without atomics where it is true. False is always right.
__attribute__((weak, visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif
