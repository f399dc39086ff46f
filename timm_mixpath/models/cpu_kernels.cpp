// A faster weight gradient of large depthwise convolutions on a CPU, behind aten::convolution_backward.
//
// torch leaves it to oneDNN, which takes five to fifty times as long for it as for the convolution itself from kernels
// of 5x5 on. It is a loop over the output with the channels innermost, which channels-last tensors have side by side.
// Everything else, and this while it is switched off, goes to the function that torch itself would call.

#include <ATen/ATen.h>
#include <ATen/CompositeExplicitAutogradFunctions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

std::atomic<bool> enabled{false};
std::atomic<int64_t> num_calls{0};

// N channels that are worked on at once, which the compiler turns into what the processor has.
template <typename T, int N> struct Lanes {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
};
template <typename T> struct Lanes<T, 1> {
  typedef T type;
};

template <typename V, typename T> inline V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <typename V, typename T> inline void store(T* to, V value) { std::memcpy(to, &value, sizeof(V)); }

// A convolution without dilation; tensors are batch x height x width x channels.
struct Shape {
  int64_t batch, chs, in_h, in_w, out_h, out_w, stride_h, stride_w, pad_h, pad_w;

  // Output columns whose K input columns all exist: from the first to one behind the last.
  std::pair<int64_t, int64_t> whole_columns(int64_t kernel) const {
    const int64_t first = std::min((pad_w + stride_w - 1) / stride_w, out_w);
    const int64_t room = in_w - kernel + pad_w;
    const int64_t last = room < 0 ? 0 : std::min(room / stride_w + 1, out_w);
    return {first, std::max(first, last)};
  }
};

// Calls row(output row, kernel row, input row) for all that exist.
template <typename F> inline void for_rows(const Shape& s, int kernel, F row) {
  for (int64_t out = 0; out < s.out_h; ++out)
    for (int i = 0; i < kernel; ++i) {
      const int64_t in = out * s.stride_h + i - s.pad_h;
      if (in >= 0 && in < s.in_h) row(out, i, in);
    }
}

// sums[i, j] += grad[oh, ow] * x[oh * stride + i - pad, ow * stride + j - pad] over one image, for N channels.
template <typename T, int K, int N> void add_weight_grad(const T* x, const T* grad, T* sums, const Shape& s) {
  using V = typename Lanes<T, N>::type;
  const auto [first, last] = s.whole_columns(K);
  for_rows(s, K, [&, first = first, last = last](int64_t out, int i, int64_t in) {
    const T* x_row = x + in * s.in_w * s.chs;
    const T* grad_row = grad + out * s.out_w * s.chs;
    T* row_sums = sums + i * K * N;
    V sum[K];
    for (int j = 0; j < K; ++j) sum[j] = load<V>(row_sums + j * N);
    const auto border = [&](int64_t begin, int64_t end) {
      for (int64_t ow = begin; ow < end; ++ow) {
        const V g = load<V>(grad_row + ow * s.chs);
        for (int j = 0; j < K; ++j) {
          const int64_t iw = ow * s.stride_w + j - s.pad_w;
          if (iw >= 0 && iw < s.in_w) sum[j] += g * load<V>(x_row + iw * s.chs);
        }
      }
    };
    border(0, first);
    for (int64_t ow = first; ow < last; ++ow) {
      const V g = load<V>(grad_row + ow * s.chs);
      const T* at = x_row + (ow * s.stride_w - s.pad_w) * s.chs;
#pragma GCC unroll 16
      for (int j = 0; j < K; ++j) sum[j] += g * load<V>(at + j * s.chs);
    }
    border(last, s.out_w);
    for (int j = 0; j < K; ++j) store(row_sums + j * N, sum[j]);
  });
}

// Calls work(integral_constant of the number of channels, first channel) for all channels, those in full vectors in
// parallel. A channel is worked on by one thread in one order, so the result is the same for any number of threads.
template <typename T, typename F> void for_channels(int64_t chs, F work) {
  constexpr int N = 64 / sizeof(T);
  at::parallel_for(0, chs / N, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) work(std::integral_constant<int, N>(), b * N);
  });
  int64_t c = chs / N * N;
  if (chs - c >= N / 2) {
    work(std::integral_constant<int, N / 2>(), c);
    c += N / 2;
  }
  for (; c < chs; ++c) work(std::integral_constant<int, 1>(), c);
}

template <typename T, int K> void weight_grad(const at::Tensor& grad, const at::Tensor& x, at::Tensor& out, const Shape& s) {
  const T *grad_at = grad.const_data_ptr<T>(), *x_at = x.const_data_ptr<T>();
  T* out_at = out.mutable_data_ptr<T>();
  for_channels<T>(s.chs, [&](auto lanes, int64_t c) {
    constexpr int N = decltype(lanes)::value;
    T total[K * K * N] = {}, sums[K * K * N];
    for (int64_t n = 0; n < s.batch; ++n) {  // image by image, or float32 loses digits in a long sum
      std::fill(sums, sums + K * K * N, T(0));
      add_weight_grad<T, K, N>(x_at + n * s.in_h * s.in_w * s.chs + c, grad_at + n * s.out_h * s.out_w * s.chs + c, sums, s);
      for (int k = 0; k < K * K * N; ++k) total[k] += sums[k];
    }
    for (int lane = 0; lane < N; ++lane)
      for (int k = 0; k < K * K; ++k) out_at[(c + lane) * K * K + k] = total[k * N + lane];
  });
}

// Calls run(T(), integral_constant of the kernel size).
template <typename F> void dispatch(at::ScalarType dtype, int64_t kernel, F run) {
  const auto with_kernel = [&](auto scalar) {
    switch (kernel) {
      case 5: return run(scalar, std::integral_constant<int, 5>());
      case 7: return run(scalar, std::integral_constant<int, 7>());
      case 9: return run(scalar, std::integral_constant<int, 9>());
      case 11: return run(scalar, std::integral_constant<int, 11>());
    }
    TORCH_CHECK(false, "depthwise kernel of ", kernel, " pixels");
  };
  if (dtype == at::kFloat) return with_kernel(float());
  with_kernel(double());
}

using Sizes = c10::IntArrayRef;

bool takes(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, Sizes dilation, bool transposed, int64_t groups) {
  if (!enabled || transposed || x.dim() != 4 || x.numel() == 0) return false;
  const int64_t kernel = weight.size(2);
  return groups == x.size(1) && weight.size(0) == groups && weight.size(1) == 1 && kernel == weight.size(3) &&
         kernel >= 5 && kernel <= 11 && kernel % 2 == 1 && dilation[0] == 1 && dilation[dilation.size() - 1] == 1 &&
         (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble) && x.scalar_type() == weight.scalar_type() &&
         x.scalar_type() == grad.scalar_type() && x.layout() == at::kStrided && grad.layout() == at::kStrided &&
         x.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, at::OptionalIntArrayRef bias_sizes,
    Sizes stride, Sizes padding, Sizes dilation, bool transposed, Sizes output_padding, int64_t groups,
    std::array<bool, 3> mask) {
  const auto redispatch = [&](std::array<bool, 3> wanted) {
    return at::compositeexplicitautograd::convolution_backward(grad, x, weight, bias_sizes, stride, padding, dilation,
                                                               transposed, output_padding, groups, wanted);
  };
  if (!mask[1] || !takes(grad, x, weight, dilation, transposed, groups)) return redispatch(mask);
  ++num_calls;
  const auto last = [](Sizes sizes) { return sizes[sizes.size() - 1]; };
  const Shape s{x.size(0),    x.size(1), x.size(2),  x.size(3), grad.size(2),
                grad.size(3), stride[0], last(stride), padding[0], last(padding)};
  const auto dense_x = x.contiguous(at::MemoryFormat::ChannelsLast);
  const auto dense_grad = grad.contiguous(at::MemoryFormat::ChannelsLast);
  auto dw = at::empty(weight.sizes(), weight.options(), at::MemoryFormat::Contiguous);
  dispatch(x.scalar_type(), weight.size(2), [&](auto scalar, auto kernel) {
    weight_grad<decltype(scalar), decltype(kernel)::value>(dense_grad, dense_x, dw, s);
  });
  if (!mask[0] && !mask[2]) return {at::Tensor(), dw, at::Tensor()};
  auto [dx, unused, db] = redispatch({mask[0], false, mask[2]});
  return {dx, dw, db};
}

bool enable(bool on) { return enabled.exchange(on); }
int64_t calls() { return num_calls; }

}  // namespace

TORCH_LIBRARY(timm_mixpath, m) {
  m.def("enable_cpu_kernels(bool on) -> bool", &enable);
  m.def("cpu_kernel_calls() -> int", &calls);
}

TORCH_LIBRARY_IMPL(aten, CPU, m) { m.impl("convolution_backward", &convolution_backward); }
