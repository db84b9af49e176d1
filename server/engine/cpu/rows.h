// The inner loops of lora.cpp, compiled once per processor type: the two products for a few rows of one adapter, the
// product of a few rows with a model's weights, and a weighted sum.
//
// GCC's vector types let the same code serve every vector width. If the processor multiplies pairs of bf16
// (MTA_BF16_PAIRS), the longer product and the rounding use such instructions, a third as many.

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef bf16 halves __attribute__((vector_size(2 * LANES)));

MTA_INLINE floats load(const bf16* from) {
  halves raw;
  std::memcpy(&raw, from, sizeof raw);
  return (floats)(__builtin_convertvector(raw, words) << 16);
}

MTA_INLINE floats load(const int8_t* from) {
#if defined(MTA_AVX512)
  return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(MTA_AVX2)
  floats out;
  for (int half = 0; half < 2; ++half) {
    const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(from + 8 * half)));
    const __m256 numbers = _mm256_cvtepi32_ps(wide);
    std::memcpy((char*)&out + 32 * half, &numbers, sizeof numbers);
  }
  return out;
#else
  floats out;
  for (int lane = 0; lane < LANES; ++lane) out[lane] = from[lane];
  return out;
#endif
}

MTA_INLINE void store(bf16* to, floats value) {  // rounds to nearest, ties to even; NaN stays NaN
#ifdef MTA_BF16_PAIRS
  const __m256bh raw = _mm512_cvtneps_pbh((__m512)value);
#else
  const words bits = (words)value, nan = (words)(value != value);
  const words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const halves raw = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), halves);
#endif
  std::memcpy(to, &raw, sizeof raw);
}

// low[i][r] = x[i] · a[r] for M rows and R ranks.
template <int M, int R>
MTA_INLINE void dots(const bf16* const* x, const bf16* a, int64_t h_in, float* low, int64_t low_stride) {
#ifdef MTA_BF16_PAIRS
  __m512 total[M][R];
  for (int i = 0; i < M; ++i)
    for (int r = 0; r < R; ++r) total[i][r] = _mm512_setzero_ps();
  for (int64_t h = 0; h < h_in; h += 2 * LANES) {
    const int64_t left_over = h_in - h;
    const __mmask32 mask = left_over >= 2 * LANES ? ~__mmask32(0) : (__mmask32(1) << left_over) - 1;
    __m512bh right[R];
    for (int r = 0; r < R; ++r) right[r] = (__m512bh)_mm512_maskz_loadu_epi16(mask, a + r * h_in + h);
    for (int i = 0; i < M; ++i) {
      const __m512bh left = (__m512bh)_mm512_maskz_loadu_epi16(mask, x[i] + h);
      for (int r = 0; r < R; ++r) total[i][r] = _mm512_dpbf16_ps(total[i][r], left, right[r]);
    }
  }
  for (int i = 0; i < M; ++i)
    for (int r = 0; r < R; ++r) low[i * low_stride + r] = _mm512_reduce_add_ps(total[i][r]);
#else
  floats total[M][R] = {};
  int64_t h = 0;
  for (; h + LANES <= h_in; h += LANES) {
    floats right[R];
    for (int r = 0; r < R; ++r) right[r] = load(a + r * h_in + h);
    for (int i = 0; i < M; ++i) {
      const floats left = load(x[i] + h);
      for (int r = 0; r < R; ++r) total[i][r] += left * right[r];
    }
  }
  for (int i = 0; i < M; ++i)
    for (int r = 0; r < R; ++r) {
      float rest = 0;
      for (int lane = 0; lane < LANES; ++lane) rest += total[i][r][lane];
      for (int64_t k = h; k < h_in; ++k) rest += widen(x[i][k]) * widen(a[r * h_in + k]);
      low[i * low_stride + r] = rest;
    }
#endif
}

template <int M>
MTA_INLINE void all_dots(const bf16* const* x, const bf16* a, int64_t rank, int64_t h_in, float* low, int64_t stride) {
  int64_t r = 0;
  for (; r + 4 <= rank; r += 4) dots<M, 4>(x, a + r * h_in, h_in, low + r, stride);
  for (; r < rank; ++r) dots<M, 1>(x, a + r * h_in, h_in, low + r, stride);
}

// y[i] += low[i] Bᵀ for M rows.
template <int M>
MTA_INLINE void spread(
    const float* low, int64_t stride, const bf16* b, int64_t rank, int64_t h_out, bf16* const* y, int64_t first) {
  int64_t o = 0;
  for (; o + 2 * LANES <= h_out; o += 2 * LANES) {
    floats total[M][2];
    for (int i = 0; i < M; ++i)
      for (int half = 0; half < 2; ++half) total[i][half] = load(y[i] + first + o + half * LANES);
    for (int64_t r = 0; r < rank; ++r) {
      const floats one = load(b + r * h_out + o), other = load(b + r * h_out + o + LANES);
      for (int i = 0; i < M; ++i) {
        total[i][0] += low[i * stride + r] * one;
        total[i][1] += low[i * stride + r] * other;
      }
    }
    for (int i = 0; i < M; ++i)
      for (int half = 0; half < 2; ++half) store(y[i] + first + o + half * LANES, total[i][half]);
  }
  for (; o < h_out; ++o)
    for (int i = 0; i < M; ++i) {
      float total = widen(y[i][first + o]);
      for (int64_t r = 0; r < rank; ++r) total += low[i * stride + r] * widen(b[r * h_out + o]);
      y[i][first + o] = narrow(total);
    }
}

// low[i] = x[i] Aᵀ for up to TILE rows.
void shrink(int rows, const bf16* const* x, const bf16* a, int64_t rank, int64_t h_in, float* low, int64_t stride) {
  for (; rows >= 4; rows -= 4, x += 4, low += 4 * stride) all_dots<4>(x, a, rank, h_in, low, stride);
  switch (rows) {
    case 3: return all_dots<3>(x, a, rank, h_in, low, stride);
    case 2: return all_dots<2>(x, a, rank, h_in, low, stride);
    case 1: return all_dots<1>(x, a, rank, h_in, low, stride);
  }
}

// y[i][first...] += low[i] Bᵀ for up to TILE rows.
void expand(
    int rows, const float* low, int64_t stride, const bf16* b, int64_t rank, int64_t h_out, bf16* const* y, int64_t first) {
  if (rows == 8) return spread<8>(low, stride, b, rank, h_out, y, first);
  if (rows >= 4) spread<4>(low, stride, b, rank, h_out, y, first);
  low += (rows & 4) * stride, y += rows & 4;
  switch (rows & 3) {
    case 3: return spread<3>(low, stride, b, rank, h_out, y, first);
    case 2: return spread<2>(low, stride, b, rank, h_out, y, first);
    case 1: return spread<1>(low, stride, b, rank, h_out, y, first);
  }
}

// sums[i][o] = x[i] · w[o] for M rows and V · LANES outputs. w is packed: [h_out / LANES, h_in / 2, LANES, 2].
template <int M, int V>
MTA_INLINE void dense(const bf16* const* x, const bf16* w, int64_t h_in, float* sums) {
  floats total[M][V] = {};
  for (int64_t h = 0; h < h_in; h += 2) {
    words pairs[V];
    for (int v = 0; v < V; ++v) std::memcpy(&pairs[v], w + (v * h_in + h) * LANES, sizeof pairs[v]);
    for (int i = 0; i < M; ++i) {
#ifdef MTA_BF16_PAIRS
      int32_t pair;
      std::memcpy(&pair, x[i] + h, sizeof pair);
      const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
      for (int v = 0; v < V; ++v)
        total[i][v] = (floats)_mm512_dpbf16_ps((__m512)total[i][v], left, (__m512bh)pairs[v]);
#else
      const float even = widen(x[i][h]), odd = widen(x[i][h + 1]);
      for (int v = 0; v < V; ++v)
        total[i][v] += even * (floats)(pairs[v] << 16) + odd * (floats)(pairs[v] & 0xffff0000);
#endif
    }
  }
  for (int i = 0; i < M; ++i) std::memcpy(sums + i * DENSE_BLOCK, total[i], sizeof total[i]);
}

template <int V>
MTA_INLINE void few_dense(int rows, const bf16* const* x, const bf16* w, int64_t h_in, float* sums) {
  for (; rows >= 4; rows -= 4, x += 4, sums += 4 * DENSE_BLOCK) dense<4, V>(x, w, h_in, sums);
  switch (rows) {
    case 3: return dense<3, V>(x, w, h_in, sums);
    case 2: return dense<2, V>(x, w, h_in, sums);
    case 1: return dense<1, V>(x, w, h_in, sums);
  }
}

// sums[i] = x[i] Wᵀ for some rows and up to DENSE_BLOCK outputs, a multiple of LANES.
void dense_block(int rows, const bf16* const* x, const bf16* w, int64_t h_in, int64_t width, float* sums) {
  switch (width / LANES) {
    case 4: return few_dense<4>(rows, x, w, h_in, sums);
    case 3: return few_dense<3>(rows, x, w, h_in, sums);
    case 2: return few_dense<2>(rows, x, w, h_in, sums);
    case 1: return few_dense<1>(rows, x, w, h_in, sums);
  }
}

// y[o] = sums[o] + bias[o] for `width` outputs, a multiple of LANES; `bias` may be null.
void round_block(const float* sums, const bf16* bias, int64_t width, bf16* y) {
  for (int64_t o = 0; o < width; o += LANES) {
    floats total;
    std::memcpy(&total, sums + o, sizeof total);
    store(y + o, bias ? total + load(bias + o) : total);
  }
}

// sums[k] += Σ weight[i] · rows[i][k] for k from `begin` to `end`.
template <typename Number>
MTA_INLINE void add_rows(
    int count, const Number* const* rows, const float* weight, int64_t begin, int64_t end, float* sums) {
  int64_t k = begin;
  for (; k + LANES <= end; k += LANES) {
    floats total;
    std::memcpy(&total, sums + k, sizeof total);
    for (int i = 0; i < count; ++i) total += weight[i] * load(rows[i] + k);
    std::memcpy(sums + k, &total, sizeof total);
  }
  for (; k < end; ++k)
    for (int i = 0; i < count; ++i) sums[k] += weight[i] * widen(rows[i][k]);
}

// sums[o] += low Bᵀ for `width` outputs from b on.
void add_low(const float* low, const bf16* b, int64_t rank, int64_t h_out, int64_t width, float* sums) {
  for (int64_t r = 0; r < rank; r += STREAMS) {
    const bf16* rows[STREAMS];
    const int some = std::min<int64_t>(STREAMS, rank - r);
    for (int i = 0; i < some; ++i) rows[i] = b + (r + i) * h_out;
    add_rows(some, rows, low + r, 0, width, sums);
  }
}

// out[r][o] = Σ weight[i] · rows[i][o · rank + r] for outputs o from `first` to `last`; `sums` is a buffer for them.
void sum_transposed(
    const Terms& terms, int64_t rank, int64_t h_out, int64_t first, int64_t last, float* sums, bf16* out) {
  const int64_t begin = first * rank, end = last * rank;
  std::memset(sums, 0, (end - begin) * sizeof *sums);
  const int count = terms.rows.size(), packed = terms.packed.size();
  for (int i = 0; i < count; i += STREAMS)
    add_rows(std::min(STREAMS, count - i), &terms.rows[i], &terms.weights[i], begin, end, sums - begin);
  for (int i = 0; i < packed; i += STREAMS) {
    const int streams = std::min(STREAMS, packed - i);
    for (int64_t start = begin; start < end; start += PACK_BLOCK) {
      float weight[STREAMS];
      for (int j = 0; j < streams; ++j)
        weight[j] = terms.packed_weights[i + j] * terms.scales[i + j][start / PACK_BLOCK];
      add_rows(streams, &terms.packed[i], weight, start, std::min(start + PACK_BLOCK, end), sums - begin);
    }
  }
  for (int64_t r = 0; r < rank; ++r) {
    int64_t o = first;
    for (; o + LANES <= last; o += LANES) {
      floats turned;
      for (int lane = 0; lane < LANES; ++lane) turned[lane] = sums[(o - first + lane) * rank + r];
      store(out + r * h_out + o, turned);
    }
    for (; o < last; ++o) out[r * h_out + o] = narrow(sums[(o - first) * rank + r]);
  }
}
