#include "densecl/isa.h"

#include <cstdlib>
#include <cstring>

namespace densecl {

const char* name(Isa isa) {
  switch (isa) {
    case Isa::serial:
      return "serial";
    case Isa::neon:
      return "neon";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512bf16:
      return "avx512bf16";
    case Isa::count:
      break;
  }
  return "unknown";
}

bool available(Isa isa) {
  if (isa == Isa::serial) return true;
#if defined(__aarch64__)
  if (isa == Isa::neon) return true;  // every arm64 has it
#endif
#if defined(__x86_64__)
  if (isa == Isa::avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  }
  if (isa == Isa::avx512) {
    return available(Isa::avx2) && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
  if (isa == Isa::avx512bf16) {
    return available(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return false;
}

// Intel's cores with AVX-512 BF16 start a vdpbf16ps every second cycle on one port: half the
// multiply-adds of float32 FMA (Emerald Rapids: 164 against 333 GFLOP/s on two cores).
bool pays(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512bf16) return !__builtin_cpu_is("intel");
#endif
  (void)isa;
  return true;
}

Status selected_isa(Isa* isa) {
  const char* forced = std::getenv("DENSECL_CPU_ISA");
  if (forced == nullptr || *forced == '\0') {
    static const Isa best = [] {
      int candidate = static_cast<int>(Isa::count) - 1;
      while (!available(static_cast<Isa>(candidate)) || !pays(static_cast<Isa>(candidate))) {
        --candidate;
      }
      return static_cast<Isa>(candidate);
    }();
    *isa = best;
    return Status::ok;
  }
  for (int candidate = 0; candidate < static_cast<int>(Isa::count); ++candidate) {
    if (std::strcmp(forced, name(static_cast<Isa>(candidate))) != 0) continue;
    *isa = static_cast<Isa>(candidate);
    return available(*isa) ? Status::ok : Status::isa_unavailable;
  }
  return Status::isa_unknown;
}

const char* message(Status status) {
  switch (status) {
    case Status::ok:
      return "ok";
    case Status::isa_unknown:
      return "DENSECL_CPU_ISA names no instruction set, expected serial, neon, avx2, avx512 "
             "or avx512bf16";
    case Status::isa_unavailable:
      return "DENSECL_CPU_ISA names an instruction set that this machine lacks";
    case Status::match_out_of_range:
      return "match must lie in [-1, key positions)";
    case Status::launch_failed:
      break;
  }
  return status >= Status::launch_failed ? "the CUDA launch failed" : "unknown status";
}

}  // namespace densecl
