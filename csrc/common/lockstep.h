// N vectors in lockstep: an operation is done on all of them before the next one, so that steps
// that do not wait for each other stand side by side and fill a window of 64 operations. math.h and
// philox.h take a Lockstep where they take a vector.
#pragma once

#include "common/simd.h"

namespace gm {
namespace GM_ISA {

template <class V, int N>
struct Lockstep {
  V part[N];

  // (vi)x of a vu, and the like.
  template <class W>
  explicit operator Lockstep<W, N>() const {
    Lockstep<W, N> to;
    for (int i = 0; i < N; ++i) to.part[i] = (W)part[i];
    return to;
  }
};

template <int N>
struct traits<Lockstep<vf, N>> {
  using I = Lockstep<vi, N>;
};

// Operands: another Lockstep, or one scalar for all.
template <class V, int N>
static inline const V& part_of(const Lockstep<V, N>& x, int i) {
  return x.part[i];
}
template <class Scalar>
static inline Scalar part_of(Scalar x, int) {
  return x;
}

template <class V, int N, class Operation, class... Operands>
static inline auto each(Operation operation, const Lockstep<V, N>& a, const Operands&... others) {
  Lockstep<decltype(operation(a.part[0], part_of(others, 0)...)), N> to;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) to.part[i] = operation(a.part[i], part_of(others, i)...);
  return to;
}

template <class V, int N, class B>
static inline auto operator+(const Lockstep<V, N>& a, const B& b) {
  return each([](V x, auto y) { return x + y; }, a, b);
}
template <class V, int N, class B>
static inline auto operator-(const Lockstep<V, N>& a, const B& b) {
  return each([](V x, auto y) { return x - y; }, a, b);
}
template <class V, int N>
static inline auto operator-(float a, const Lockstep<V, N>& b) {
  return each([](V x, float y) { return y - x; }, b, a);
}
template <class V, int N, class B>
static inline auto operator*(const Lockstep<V, N>& a, const B& b) {
  return each([](V x, auto y) { return x * y; }, a, b);
}
template <class V, int N, class B>
static inline auto operator&(const Lockstep<V, N>& a, const B& b) {
  return each([](V x, auto y) { return x & y; }, a, b);
}
template <class V, int N, class B>
static inline auto operator|(const Lockstep<V, N>& a, const B& b) {
  return each([](V x, auto y) { return x | y; }, a, b);
}
template <class V, int N, class B>
static inline auto operator^(const Lockstep<V, N>& a, const B& b) {
  return each([](V x, auto y) { return x ^ y; }, a, b);
}
template <class V, int N>
static inline auto operator<<(const Lockstep<V, N>& a, int b) {
  return each([](V x, int y) { return x << y; }, a, b);
}
template <class V, int N>
static inline auto operator>>(const Lockstep<V, N>& a, int b) {
  return each([](V x, int y) { return x >> y; }, a, b);
}
template <class V, int N>
static inline auto operator~(const Lockstep<V, N>& a) {
  return each([](V x) { return ~x; }, a);
}

template <int N>
static inline auto bits(const Lockstep<vf, N>& x) {
  return each([](vf part) { return bits(part); }, x);
}
template <int N>
static inline auto from_bits(const Lockstep<vi, N>& x) {
  return each([](vi part) { return from_bits(part); }, x);
}
template <class V, int N>
static inline auto to_float(const Lockstep<V, N>& x) {
  return each([](V part) { return to_float(part); }, x);
}
template <int N>
static inline auto sqrt_ieee(const Lockstep<vf, N>& x) {
  return each([](vf part) { return sqrt_ieee(part); }, x);
}
template <int N>
static inline auto fma(const Lockstep<vf, N>& a, const Lockstep<vf, N>& b,
                       const Lockstep<vf, N>& c) {
  return each([](vf x, vf y, vf z) { return fma(x, y, z); }, a, b, c);
}

template <int N>
static inline void mulhilo(const Lockstep<vu64, N>& a, uint32_t m, Lockstep<vu64, N>& hi,
                           Lockstep<vu64, N>& lo) {
  for (int i = 0; i < N; ++i) mulhilo(a.part[i], m, hi.part[i], lo.part[i]);
}

}  // namespace GM_ISA
}  // namespace gm
