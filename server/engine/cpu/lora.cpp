// One LoRA layer on a CPU: y += x Aᵀ Bᵀ in place, for the rows of a step that have an adapter.
//
// Rows are sorted by adapter, so that up to eight rows of one adapter read its weights once. A is [rank, h_in]. B is
// stored transposed, [rank, h_out], so that both products read contiguous memory. Sums are float32; y is rounded once.
//
// `linear` computes the layer as well: for a few rows at the speed of memory, and in one call instead of two.
//
// Also the weighted sum of a bank's rows, which gives such a transposed B.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using bf16 = uint16_t;
constexpr int LANES = 16;
constexpr int TILE = 8;                    // rows of one adapter computed together
constexpr int64_t DENSE_BLOCK = 64;        // outputs of a layer computed together,
constexpr int FEW = 32;                    // and rows
constexpr int64_t SUM_BLOCK = 2048;        // outputs summed before transposing, so that they stay in the cache
constexpr int64_t PACK_BLOCK = 1024;       // int8 numbers that share a scale
constexpr size_t MANY_ROWS = 16;           // rows whose sum justifies a second thread
constexpr int STREAMS = 8;                 // rows read at once: as many as the processor fetches in advance
constexpr int64_t MIN_PRODUCTS = 2000000;  // multiplications that justify waking another thread
constexpr int64_t MIN_DENSE = 100000;      // the same for a layer's own, where memory decides

#define MTA_INLINE static inline __attribute__((always_inline))

MTA_INLINE float widen(bf16 raw) {
  const uint32_t bits = uint32_t(raw) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

MTA_INLINE float widen(int8_t raw) { return raw; }

MTA_INLINE bf16 narrow(float value) {
  if (value != value) return 0x7fc0;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// What a sum adds up: rows as they are, and rows in int8 of which each block has a scale.
struct Terms {
  std::vector<const bf16*> rows;
  std::vector<float> weights;
  std::vector<const int8_t*> packed;
  std::vector<const float*> scales;
  std::vector<float> packed_weights;
};

namespace any_processor {
#include "rows.h"
}
#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define MTA_AVX2
namespace avx2 {
#include "rows.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define MTA_AVX512
namespace avx512 {
#include "rows.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16")
#define MTA_BF16_PAIRS
namespace avx512_bf16 {
#include "rows.h"
}
#undef MTA_BF16_PAIRS
#undef MTA_AVX512
#undef MTA_AVX2
#pragma GCC pop_options
#endif

struct Products {
  decltype(&any_processor::shrink) shrink;
  decltype(&any_processor::expand) expand;
  decltype(&any_processor::sum_transposed) sum_transposed;
  decltype(&any_processor::dense_block) dense_block;
  decltype(&any_processor::add_low) add_low;
  decltype(&any_processor::round_block) round_block;
};

Products of_this_processor() {
#define MTA_PRODUCTS(type) \
  {type::shrink, type::expand, type::sum_transposed, type::dense_block, type::add_low, type::round_block}
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("x86-64-v4")) return MTA_PRODUCTS(avx512_bf16);
  if (__builtin_cpu_supports("x86-64-v4")) return MTA_PRODUCTS(avx512);
  if (__builtin_cpu_supports("x86-64-v3")) return MTA_PRODUCTS(avx2);
#endif
  return MTA_PRODUCTS(any_processor);
}

const Products& products() {
  static const Products found = of_this_processor();
  return found;
}

// A and B over all slots of one layer, which may consist of several modules (q, k, v).
struct Layer {
  std::vector<const bf16*> a, b;
  std::vector<int64_t> h_out;
  int64_t h_in, slot_rank, width;

  Layer(at::TensorList a_stacks, at::TensorList b_stacks)
      : h_in(a_stacks[0].size(3)), slot_rank(a_stacks[0].size(2)), width(h_in * a_stacks.size()) {
    for (const at::Tensor& stack : a_stacks) {
      TORCH_CHECK(stack.is_contiguous() && stack.scalar_type() == at::kBFloat16, "A must be [S, 1, R, H_in] bf16");
      TORCH_CHECK(stack.size(2) == slot_rank && stack.size(3) == h_in, "all A of a layer must have the same shape");
      a.push_back(static_cast<const bf16*>(stack.const_data_ptr()));
    }
    for (const at::Tensor& stack : b_stacks) {
      TORCH_CHECK(stack.transpose(2, 3).is_contiguous() && stack.scalar_type() == at::kBFloat16,
                  "B must be [S, 1, H_out, R] bf16, transposed in memory");
      TORCH_CHECK(stack.size(3) == slot_rank, "A and B must have the same rank");
      b.push_back(static_cast<const bf16*>(stack.const_data_ptr()));
      h_out.push_back(stack.size(2));
      width += h_out.back();
    }
  }
};

// y[rows] += x[rows] Aᵀ Bᵀ.
//   y, x       [N, ΣH_out], [N, H_in] bf16
//   a, b       weights of one layer, see Layer
//   rows       [n] int32, indices of the rows that have an adapter, sorted so that equal slots are adjacent
//   slots      [n] int32, slot with the row's B
//   a_slots    [n] int32, slot with the row's A, which adapters may share
//   ranks      [n] int32, rank of the row's adapter, capped at R
//   needed     one more than the highest index in `rows`, found once a step for all layers
void lora_linear_(
    at::Tensor& y, const at::Tensor& x, at::TensorList a, at::TensorList b,
    const at::Tensor& rows, const at::Tensor& slots, const at::Tensor& a_slots, const at::Tensor& ranks, int64_t needed) {
  const Layer layer(a, b);
  TORCH_CHECK(y.scalar_type() == at::kBFloat16 && x.scalar_type() == at::kBFloat16, "x and y must be bf16");
  TORCH_CHECK(y.dim() == 2 && x.dim() == 2 && y.stride(1) == 1 && x.stride(1) == 1 && x.size(1) == layer.h_in,
              "x must be [N, H_in] and y [N, H_out], dense in each row");
  TORCH_CHECK(needed <= std::min(x.size(0), y.size(0)), "the step has adapters up to row ", needed - 1, ", x has ",
              x.size(0), " rows and y ", y.size(0));
  TORCH_CHECK(layer.width <= y.size(1) + layer.h_in * int64_t(a.size()), "B has more outputs than y");
  const auto row = rows.const_data_ptr<int32_t>(), slot = slots.const_data_ptr<int32_t>();
  const auto a_slot = a_slots.const_data_ptr<int32_t>(), rank = ranks.const_data_ptr<int32_t>();
  const auto inputs = static_cast<const bf16*>(x.const_data_ptr());
  const auto outputs = static_cast<bf16*>(y.mutable_data_ptr());
  const int64_t x_stride = x.stride(0), y_stride = y.stride(0);

  const auto add_rows = [&](int64_t begin, int64_t end) {
    std::vector<float> low(TILE * layer.slot_rank);
    const bf16* from[TILE];
    bf16* to[TILE];
    for (int64_t at = begin, next; at < end; at = next) {
      for (next = at + 1; next < end && next < at + TILE && slot[next] == slot[at]; ++next) {}
      const int tile = next - at;
      for (int i = 0; i < tile; ++i) from[i] = inputs + row[at + i] * x_stride, to[i] = outputs + row[at + i] * y_stride;
      const int64_t used = std::min<int64_t>(rank[at], layer.slot_rank);
      int64_t first = 0;
      for (size_t module = 0; module < layer.a.size(); first += layer.h_out[module++]) {
        const bf16* own_a = layer.a[module] + a_slot[at] * layer.slot_rank * layer.h_in;
        const bf16* own_b = layer.b[module] + slot[at] * layer.slot_rank * layer.h_out[module];
        products().shrink(tile, from, own_a, used, layer.h_in, low.data(), layer.slot_rank);
        products().expand(tile, low.data(), layer.slot_rank, own_b, used, layer.h_out[module], to, first);
      }
    }
  };
  at::parallel_for(0, rows.size(0), std::max<int64_t>(1, MIN_PRODUCTS / (layer.slot_rank * layer.width)), add_rows);
}

// x Wᵀ + bias, plus x Aᵀ Bᵀ for the rows that have an adapter: [N, H_out]. Each sum is rounded once.
//   x          [N, H_in] bf16
//   w          [H_out / LANES, H_in / 2, LANES, 2] bf16, packed
//   bias       [H_out] bf16
//   the others as for lora_linear_, with at most FEW rows; all are empty for the layer alone
at::Tensor linear(
    const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias, at::TensorList a, at::TensorList b,
    const at::Tensor& rows, const at::Tensor& slots, const at::Tensor& a_slots, const at::Tensor& ranks, int64_t needed) {
  TORCH_CHECK(w.dim() == 4 && w.is_contiguous() && w.scalar_type() == at::kBFloat16, "w must be packed bf16");
  const int64_t n = x.size(0), h_in = 2 * w.size(1), h_out = LANES * w.size(0), adapted = rows.size(0);
  TORCH_CHECK(x.dim() == 2 && x.stride(1) == 1 && x.size(1) == h_in && x.scalar_type() == at::kBFloat16,
              "x must be [N, H_in] bf16, dense in each row");
  TORCH_CHECK(!bias || (bias->is_contiguous() && bias->size(0) == h_out && bias->scalar_type() == at::kBFloat16),
              "bias must be [H_out] bf16");
  TORCH_CHECK(needed <= n, "the step has adapters up to row ", needed - 1, ", x has ", n, " rows");
  TORCH_CHECK(!adapted || n <= FEW, "at most ", FEW, " rows may have adapters, got ", n);
  std::optional<Layer> layer;
  if (adapted) layer.emplace(a, b);
  TORCH_CHECK(!adapted || (layer->h_in == h_in && layer->width == h_out + int64_t(a.size()) * h_in), "A and B must fit w");
  at::Tensor y = at::empty({n, h_out}, x.options());
  const auto inputs = static_cast<const bf16*>(x.const_data_ptr()), weights = static_cast<const bf16*>(w.const_data_ptr());
  const auto shift = bias ? static_cast<const bf16*>(bias->const_data_ptr()) : nullptr;
  const auto outputs = static_cast<bf16*>(y.mutable_data_ptr());
  const auto row = rows.const_data_ptr<int32_t>(), slot = slots.const_data_ptr<int32_t>();
  const auto a_slot = a_slots.const_data_ptr<int32_t>(), rank = ranks.const_data_ptr<int32_t>();
  std::vector<const bf16*> from(n);
  for (int64_t i = 0; i < n; ++i) from[i] = inputs + i * x.stride(0);

  const int64_t modules = adapted ? layer->a.size() : 0, slot_rank = adapted ? layer->slot_rank : 0;
  std::vector<float> low(adapted * modules * slot_rank);
  const auto low_of = [&](int64_t at, int64_t module) { return low.data() + (at * modules + module) * slot_rank; };
  const auto used = [&](int64_t at) { return std::min<int64_t>(rank[at], slot_rank); };
  const auto shrink = [&](int64_t at, int64_t end) {
    for (; at < end; ++at)
      for (int64_t module = 0; module < modules; ++module)
        products().shrink(1, &from[row[at]], layer->a[module] + a_slot[at] * slot_rank * h_in, used(at), h_in,
                          low_of(at, module), slot_rank);
  };
  if (adapted) at::parallel_for(0, adapted, std::max<int64_t>(1, MIN_DENSE / (modules * slot_rank * h_in)), shrink);

  const int64_t chunks = (n + FEW - 1) / FEW, blocks = (h_out + DENSE_BLOCK - 1) / DENSE_BLOCK;
  const auto compute = [&](int64_t task, int64_t end) {
    float sums[FEW * DENSE_BLOCK];
    for (; task < end; ++task) {
      const int64_t i = task % chunks * FEW, o = task / chunks * DENSE_BLOCK;
      const int64_t some = std::min<int64_t>(FEW, n - i), width = std::min(DENSE_BLOCK, h_out - o);
      products().dense_block(some, &from[i], weights + o * h_in, h_in, width, sums);
      for (int64_t module = 0, first = 0; module < modules; first += layer->h_out[module++]) {
        const int64_t wide = layer->h_out[module], start = std::max(o, first), stop = std::min(o + width, first + wide);
        for (int64_t at = 0; at < adapted && start < stop; ++at)
          products().add_low(low_of(at, module), layer->b[module] + slot[at] * slot_rank * wide + start - first,
                             used(at), wide, stop - start, sums + row[at] * DENSE_BLOCK + start - o);
      }
      const bf16* const shifts = shift ? shift + o : nullptr;
      for (int64_t k = 0; k < some; ++k)
        products().round_block(sums + k * DENSE_BLOCK, shifts, width, outputs + (i + k) * h_out + o);
    }
  };
  const int64_t of_task = std::clamp<int64_t>(n, 1, FEW) * DENSE_BLOCK * h_in;
  at::parallel_for(0, blocks * chunks, std::max<int64_t>(1, MIN_DENSE / of_task), compute);
  return y;
}

// Σ weights[i] · rows[chosen[i]] as [R, H_out], where each row is a contiguous B [H_out, R]; many rows use two threads.
//   rows       [N, H_out · R] bf16
//   packed     [M, H_out · R] int8, read instead of the first M rows
//   scales     [M, blocks] float32, what a block of PACK_BLOCK numbers of `packed` is multiplied by
at::Tensor weighted_sum_transposed(
    const at::Tensor& rows, at::IntArrayRef chosen, at::ArrayRef<double> weights, int64_t rank,
    const std::optional<at::Tensor>& packed, const std::optional<at::Tensor>& scales) {
  TORCH_CHECK(rows.dim() == 2 && rows.is_contiguous() && rows.scalar_type() == at::kBFloat16, "rows must be [N, D] bf16");
  TORCH_CHECK(!chosen.empty() && chosen.size() == weights.size(), "each chosen row must have one weight");
  TORCH_CHECK(rank > 0 && rows.size(1) % rank == 0, "a row must be [H_out, R]");
  const int64_t h_out = rows.size(1) / rank, width = rows.size(1), blocks = (width + PACK_BLOCK - 1) / PACK_BLOCK;
  TORCH_CHECK(!packed || (scales && packed->is_contiguous() && packed->scalar_type() == at::kChar &&
                          packed->size(1) == width && packed->size(0) <= rows.size(0)),
              "packed must be [M, D] int8, with scales");
  TORCH_CHECK(!packed || (scales->is_contiguous() && scales->scalar_type() == at::kFloat &&
                          scales->size(0) == packed->size(0) && scales->size(1) == blocks),
              "scales must be [M, ", blocks, "] float32");
  Terms terms;
  for (size_t i = 0; i < chosen.size(); ++i) {
    const int64_t row = chosen[i];
    TORCH_CHECK(0 <= row && row < rows.size(0), "no such row: ", row);
    if (packed && row < packed->size(0)) {
      terms.packed.push_back(packed->const_data_ptr<int8_t>() + row * width);
      terms.scales.push_back(scales->const_data_ptr<float>() + row * blocks);
      terms.packed_weights.push_back(weights[i]);
    } else {
      terms.rows.push_back(static_cast<const bf16*>(rows.const_data_ptr()) + row * width);
      terms.weights.push_back(weights[i]);
    }
  }
  at::Tensor sum = at::empty({rank, h_out}, rows.options());
  bf16* const out = static_cast<bf16*>(sum.mutable_data_ptr());
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    std::vector<float> sums(SUM_BLOCK * rank);
    for (int64_t first; (first = next.fetch_add(SUM_BLOCK)) < h_out;)
      products().sum_transposed(terms, rank, h_out, first, std::min(first + SUM_BLOCK, h_out), sums.data(), out);
  };
  if (chosen.size() < MANY_ROWS) {
    work();
  } else {  // a thread of OpenMP's would make those of the model sleep at every barrier
    std::thread helper(work);
    work();
    helper.join();
  }
  return sum;
}

}  // namespace

TORCH_LIBRARY(mta_cpu, library) {
  library.def(
      "lora_linear_(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, Tensor rows, Tensor slots, Tensor a_slots, "
      "Tensor ranks, int needed) -> ()");
  library.def(
      "linear(Tensor x, Tensor w, Tensor? bias, Tensor[] a, Tensor[] b, Tensor rows, Tensor slots, Tensor a_slots, "
      "Tensor ranks, int needed) -> Tensor");
  library.def(
      "weighted_sum_transposed(Tensor rows, int[] chosen, float[] weights, int rank, Tensor? packed=None, "
      "Tensor? scales=None) -> Tensor");
}
TORCH_LIBRARY_IMPL(mta_cpu, CPU, library) {
  library.impl("lora_linear_", &lora_linear_);
  library.impl("linear", &linear);
  library.impl("weighted_sum_transposed", &weighted_sum_transposed);
}
