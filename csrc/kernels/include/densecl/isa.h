// CPU instruction sets: which are built, which this machine has, which one runs.
#pragma once

#include "densecl/types.h"

namespace densecl {

// On a machine that has several, each holds all of those before it.
enum class Isa : int32_t { serial, neon, avx2, avx512, avx512bf16, count };

const char* name(Isa isa);

bool available(Isa isa);  // built into this library and present on this machine

// Whether this machine is faster with it than with the set before.
bool pays(Isa isa);

// The best available set that pays, or the one that the environment variable DENSECL_CPU_ISA names.
// The variable is read at every call, so a test can change it; reading it costs well below a
// microsecond.
Status selected_isa(Isa* isa);

}  // namespace densecl
