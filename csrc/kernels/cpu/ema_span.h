// The momentum update of one span of one pair of tensors.
#pragma once

#include "cpu/tile.h"
#include "densecl/ema.h"

namespace densecl {

struct EmaSpan {
  const EmaPair* pair;
  int64_t begin, end;
  float keep, take;  // momentum and 1 - momentum
};

using EmaFunction = void (*)(const EmaSpan&);

void ema_serial(const EmaSpan&);
void ema_neon(const EmaSpan&);
void ema_avx2(const EmaSpan&);

// Adds up target and source by their weights; without a weight of its own a target is not even
// looked at: 0 times an infinite or NaN one would be NaN.
template <class V>
void mix_strip(float* target, const float* source, int64_t count, float keep, float take) {
  if (keep == 0.0f) {
    for (int64_t i = 0; i < count; ++i) target[i] = source[i];
    return;
  }
  const typename V::reg kept = V::broadcast(keep), taken = V::broadcast(take);
  const auto mix = [&](const float* t, const float* s) {
    return V::fma(kept, V::load(t), V::mul(taken, V::load(s)));
  };
  // Hardware prefetching stops at each 4 KiB page. Into the second-level cache: the first has too
  // few lines under way to also hold what comes later.
  constexpr int64_t ahead = 512;
  constexpr int locality = 2;
  constexpr int64_t line = 16;  // elements of a cache line
  static_assert(line % V::width == 0);
  int64_t i = 0;
  for (; i + line <= count; i += line) {
    __builtin_prefetch(target + i + ahead, 0, locality);
    __builtin_prefetch(source + i + ahead, 0, locality);
    for (int64_t k = i; k < i + line; k += V::width)
      V::store(target + k, mix(target + k, source + k));
  }
  for (; i + V::width <= count; i += V::width) V::store(target + i, mix(target + i, source + i));
  if (i == count) return;
  // The tail goes through the same vector arithmetic, so an element's bits never depend on where
  // it stands.
  float t[V::width] = {}, s[V::width] = {};
  for (int64_t k = i; k < count; ++k) {
    t[k - i] = target[k];
    s[k - i] = source[k];
  }
  V::store(t, mix(t, s));
  for (int64_t k = i; k < count; ++k) target[k] = t[k - i];
}

template <class V>
void mix_span(const EmaSpan& span) {
  const EmaPair& pair = *span.pair;
  if (pair.target_dtype == DType::f32 && pair.source_dtype == DType::f32) {
    mix_strip<V>(static_cast<float*>(pair.target) + span.begin,
                 static_cast<const float*>(pair.source) + span.begin, span.end - span.begin,
                 span.keep, span.take);
    return;
  }
  constexpr int64_t strip = 1024;
  float target[strip], source[strip];
  for (int64_t i = span.begin; i < span.end; i += strip) {
    const int64_t count = span.end - i < strip ? span.end - i : strip;
    load_strip<V>(pair.target, pair.target_dtype, i, 1, count, target);
    load_strip<V>(pair.source, pair.source_dtype, i, 1, count, source);
    mix_strip<V>(target, source, count, span.keep, span.take);
    store_strip<V>(target, count, pair.target, pair.target_dtype, i, 1);
  }
}

}  // namespace densecl
