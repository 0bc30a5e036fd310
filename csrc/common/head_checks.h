// The torch side of heads.h.
#pragma once

#include "common/checks.h"
#include "common/heads.h"

namespace gm {

inline Heads heads_of(const Layout& layout, const char* name, const Tensor& x) {
  layout.check_device(name, x);
  const DType dtype = float_dtype(layout.op, name, x.scalar_type());
  GM_CHECK(x.dim() == 4, layout.op, ": ", name, " must have shape [B, H, T, D], got ",
           shape_text(x));
  GM_CHECK(x.numel() == 0 || x.size(3) == 1 || x.stride(3) == 1, layout.op, ": ", name,
           " must be contiguous along its last dimension; call .contiguous()");
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), dtype};
}

}  // namespace gm
