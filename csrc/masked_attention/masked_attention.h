// masked_attention.h: out[b, h, i] = z[h] * sum over j of P[i, j] v[b, g, j]     P[i, j] = exp(s[i, j] - lse[i])
//
// s[i, j] = q[b, h, i] . k[b, g, j] / sqrt(head_dim) for keys first[b, i] <= j <= i, lse the logarithm of the sum of
// their exponentials, g = h groups / heads. Scores are never stored: blocks of them are made, used and made again in
// the backward pass (Dao et al. 2022). With O = out / z and dO = z * dout:
//   delta[i] = dO[i] . O[i] = dout[i] . out[i]               dS[i, j] = P[i, j] (dO[i] . v[j] - delta[i])
//   dq[i] = sum over j dS[i, j] k[j] / sqrt(head_dim)        dk[j] = sum over i, h dS[i, j] q[i] / sqrt(head_dim)
//   dv[j] = sum over i, h P[i, j] dO[i]                      dz[h] = sum over b, i of delta[b, h, i] / z[h]
// Only out is kept for the backward pass, no unmasked copy. A head whose mask is exactly 0 is skipped: its output
// and all its gradients are 0, dz included (a hard concrete sample has no slope there). Sums have a fixed order.
#pragma once

#include <string>

#include "../number.h"

namespace megashear {

struct AttentionSizes {
  int64_t batch, heads, groups, tokens, head_dim;
};

// A tensor [batch, heads, tokens, head_dim]; strides in elements, that of the last dimension is 1.
struct AttentionTensor {
  void* data;
  int64_t batch, head, token;
};

// All tensors are of `dtype`, on the CPU fp32 or bf16; mask and dmask: fp32 [heads]; first: int32 [batch, tokens]; lse: fp32
// [batch, heads, tokens], natural logarithm. A null mask means ones, without a dmask; a null first for
// zeros. In the backward pass scratch is fp32 [masked_attention_scratch(sizes)]; on the CPU null where there is no mask.
struct AttentionForward {
  AttentionSizes sizes;
  Dtype dtype;
  AttentionTensor q, k, v, out;
  const float* mask;
  const int32_t* first;
  float* lse;
};

struct AttentionBackward {
  AttentionForward forward;
  AttentionTensor dout, dq, dk, dv;
  float *dmask, *scratch;
};

// Whether heads of this size can be computed.
bool masked_attention_takes(int64_t head_dim);

int64_t masked_attention_scratch(const AttentionSizes& sizes);

// The instruction sets that this processor has and that `dtype` can use, best first, separated by spaces. On the CPU:
// avx512_bf16, avx512, avx2, portable; avx512_bf16 multiplies bf16 and adds in fp32, the others widen to fp32 when they
// read. On CUDA: wgmma and tensor_cores, which multiply bf16 or fp16 and add in fp32, by four warps together or by each
// one, and plain, which widens to fp32.
std::string masked_attention_tiles(Dtype dtype);

// `tiles` is one of these names, or empty for the best; another name counts as portable, and on CUDA as the best that
// serves the head size (wgmma from 33 to 128, tensor_cores up to 128). On the CPU and on CUDA by the file that is
// linked; `executor` is the number of threads or the stream.
void masked_attention_forward(const AttentionForward& pass, const char* tiles, intptr_t executor);
void masked_attention_backward(const AttentionBackward& pass, const char* tiles, intptr_t executor);

}  // namespace megashear
