// One table of function pointers a family and instruction set; the widest that the CPU runs is
// chosen at load, and set_isa() forces another for tests and benchmarks. v4_bf16 is v4 and
// AVX512-BF16: only sources *_avx512bf16.cpp are compiled for it, everything else runs v4's.
#pragma once

#include <atomic>

namespace gm {

enum class Isa : int { portable, v3, v4, v4_bf16 };

// The best that this CPU runs, and the one in use.
Isa best_isa();
extern std::atomic<Isa> active_isa;

#if defined(GM_X86)
#define GM_KERNEL_TABLE(Table, name)                      \
  namespace portable {                                    \
  extern const Table name;                                \
  }                                                       \
  namespace v3 {                                          \
  extern const Table name;                                \
  }                                                       \
  namespace v4 {                                          \
  extern const Table name;                                \
  }                                                       \
  inline const Table& select_##name() {                   \
    switch (active_isa.load(std::memory_order_relaxed)) { \
      case Isa::v4:                                       \
      case Isa::v4_bf16:                                  \
        return v4::name;                                  \
      case Isa::v3:                                       \
        return v3::name;                                  \
      default:                                            \
        return portable::name;                            \
    }                                                     \
  }
#else
#define GM_KERNEL_TABLE(Table, name) \
  namespace portable {               \
  extern const Table name;           \
  }                                  \
  inline const Table& select_##name() { return portable::name; }
#endif

}  // namespace gm
