// The torch side of slots: reads a split's arguments, and says which results may be streamed.
#pragma once

#include "common/checks.h"
#include "common/slots.h"

namespace gm {

// order [2, units] int32 (source, target) or none: then the part is a run that starts at `begin`.
inline void read_order(const Layout& layout, const MaybeTensor& order, int64_t begin, int64_t part,
                       bool inverse, Slots& s) {
  GM_CHECK(begin >= 0 && part >= 0 && begin + part <= layout.columns, layout.op, ": the part of ",
           part, " columns from ", begin, " does not fit a row of ", layout.columns);
  s.begin = begin;
  s.part = part;
  s.units = layout.columns;
  if (!order) return;
  layout.check_device("order", *order);
  GM_CHECK(order->scalar_type() == ScalarType::Int && order->dim() == 2 && order->size(0) == 2 &&
               order->is_contiguous() && order->size(1) > 0 && layout.columns % order->size(1) == 0,
           layout.op, ": order must be a contiguous int32 [2, units], units a divisor of ",
           layout.columns);
  s.units = order->size(1);
  s.inner = layout.columns / s.units;
  GM_CHECK(s.inner > 0 && part % s.inner == 0, layout.op, ": the part must hold whole units");
  const int32_t* table = (const int32_t*)order->data_ptr();
  if (!layout.is_cuda) {  // the CUDA kernels clamp each index as they read it
    uint32_t top = 0;
    for (int64_t k = 0; k < 2 * s.units; ++k) top = (uint32_t)table[k] > top ? table[k] : top;
    GM_CHECK(top < s.units, layout.op, ": order must hold units from 0 to ", s.units - 1);
  }
  s.from = table + (inverse ? s.units : 0);
  s.to = table + (inverse ? 0 : s.units);
}

// Rows of y written slot by slot: stores past the caches need every run to start on a line.
inline Result slots_result(const Slots& s, const char* op, const Tensor& y, int64_t columns) {
  Result r = result(op, y, columns);
  r.streaming = r.streaming && (s.from ? s.inner % 16 == 0 : (s.part | s.begin) % 16 == 0);
  return r;
}

}  // namespace gm
