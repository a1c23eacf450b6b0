#if defined(__aarch64__)
#include "cpu/info_nce_sweep.h"
#include "cpu/vec_neon.h"

namespace densecl {
Sweep sweep_neon() { return {sweep<neon::Vec>, neon::Vec::tile_vectors * neon::Vec::width}; }
}  // namespace densecl
#endif
