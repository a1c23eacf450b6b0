// What the cores' multiply-add units reach when nothing else is in the way: chains of register-only
// products, as many at a time as hide their latency. Compiled on the spot by machine.py.
//
// densecl_fma_<set>(steps) runs steps x 16 independent vector instructions and returns the number
// of floating point operations, or 0 where the processor lacks the set.
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#else
#define __builtin_cpu_supports(set) 0
#endif

namespace {
constexpr int chains = 16;  // 4 cycles of latency x 2 units, with room
volatile float sink;
}  // namespace

// Generic vectors: SSE2 on x86-64 (product and sum apart), NEON on arm64.
extern "C" double densecl_fma_serial(int64_t steps) {
  typedef float vec __attribute__((vector_size(16)));
  vec sums[8] = {};
  const vec x = {1e-9f, 1e-9f, 1e-9f, 1e-9f}, y = {0.5f, 0.5f, 0.5f, 0.5f};
  for (int64_t i = 0; i < 2 * steps; ++i) {
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c) sums[c] = sums[c] * y + x;
  }
  vec total = {};
  for (const vec& sum : sums) total += sum;
  sink = total[0];
  return 2.0 * 4 * chains * static_cast<double>(steps);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static void run_avx2(int64_t steps) {
  __m256 sums[12];
  for (__m256& sum : sums) sum = _mm256_setzero_ps();
  const __m256 x = _mm256_set1_ps(1e-9f), y = _mm256_set1_ps(0.5f);
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < 12; ++c) sums[c] = _mm256_fmadd_ps(sums[c], y, x);
  }
  __m256 total = sums[0];
  for (const __m256& sum : sums) total = _mm256_add_ps(total, sum);
  sink = _mm256_cvtss_f32(total);
}

__attribute__((target("avx512f"))) static void run_avx512(int64_t steps) {
  __m512 sums[chains];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  const __m512 x = _mm512_set1_ps(1e-9f), y = _mm512_set1_ps(0.5f);
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 16
    for (int c = 0; c < chains; ++c) sums[c] = _mm512_fmadd_ps(sums[c], y, x);
  }
  __m512 total = sums[0];
  for (const __m512& sum : sums) total = _mm512_add_ps(total, sum);
  sink = _mm512_cvtss_f32(total);
}

__attribute__((target("avx512f,avx512bf16"))) static void run_avx512bf16(int64_t steps) {
  __m512 sums[chains];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  const __m512bh x = (__m512bh)_mm512_set1_epi16(0x3a00), y = (__m512bh)_mm512_set1_epi16(0x3f00);
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 16
    for (int c = 0; c < chains; ++c) sums[c] = _mm512_dpbf16_ps(sums[c], x, y);
  }
  __m512 total = sums[0];
  for (const __m512& sum : sums) total = _mm512_add_ps(total, sum);
  sink = _mm512_cvtss_f32(total);
}
#endif

extern "C" double densecl_fma_avx2(int64_t steps) {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0.0;
#if defined(__x86_64__)
  run_avx2(steps);
#endif
  return 2.0 * 8 * 12 * static_cast<double>(steps);
}

extern "C" double densecl_fma_avx512(int64_t steps) {
  if (!__builtin_cpu_supports("avx512f")) return 0.0;
#if defined(__x86_64__)
  run_avx512(steps);
#endif
  return 2.0 * 16 * chains * static_cast<double>(steps);
}

extern "C" double densecl_fma_avx512bf16(int64_t steps) {
  if (!__builtin_cpu_supports("avx512bf16")) return 0.0;
#if defined(__x86_64__)
  run_avx512bf16(steps);
#endif
  return 2.0 * 32 * chains * static_cast<double>(steps);
}
