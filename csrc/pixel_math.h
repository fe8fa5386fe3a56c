// The mathematics of one pixel, for host and device. V is a number on a GPU thread (one pixel) and a vector of numbers
// on the CPU (as many pixels); S is its scalar type. V brings log2 and exp2_of(x, rate) = 2^(x rate). Derivations:
// selfreg_fast/reference.py.
//
// With m = max_c z_c, y_c = z_c - m and Z = sum_c exp(y_c), every loss is written with y <= 0 and log Z >= 0, so that
// no large terms cancel whatever the logits' offset.
#pragma once

#ifdef __CUDACC__
#define SELFREG_INLINE __host__ __device__ __forceinline__
#else
#define SELFREG_INLINE inline __attribute__((always_inline))
#endif

namespace selfreg {

// exp(y * scale) = exp2_of(y, scale * log2(e)). (z - m) * rate, never z * rate - m * rate: that loses the
// digits of a large offset.
constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.6931471805599453094;

// A teacher's target row is q_c = factor * u_c with u_c = exp(y_c / tau) and, for the raw power sigma(t)^(1/tau),
// factor = Z^(-1/tau). Dividing exponents, not powers of a rounded softmax: it neither underflows nor rounds first.
template <class V, class S>
SELFREG_INLINE V raw_target_factor(V Z, S tau) {
  return exp2_of(log2(Z) * S(-1), S(1) / tau);
}

// u^K = exp(y) for u = exp(y / K): saves the teacher's second exponential where tau is a small integer.
template <int K, class V>
SELFREG_INLINE V power(V u) {
  V square = u * u;
  return K == 1 ? u : K == 2 ? square : K == 3 ? square * u : square * square;
}

// -tau^2 sum_c q_c log softmax(scale * s)_c, where P = sum_c q_c, dot = sum_c q_c y_c and Z the student's normaliser:
// raw power: the logarithm is of sigma(s)^(1/tau):   tau (P log Z - dot)       z_scale = tau
// renormalised: of softmax(s / tau):                 tau^2 P log Z - tau dot   z_scale = tau^2
template <class V, class S>
SELFREG_INLINE V soft_loss(V P, V dot, V log_z, S z_scale, S tau) {
  return P * log_z * z_scale - dot * tau;
}

// F.cross_entropy with class weights w and label smoothing eps at label k: the target is hot = (1 - eps) w_k at k, plus
// smooth * w_c = (eps / C) w_c everywhere. y = z_k - m, all_w = sum_c w_c, all_dot = sum_c w_c y_c.
template <class V, class S>
SELFREG_INLINE V label_loss(V hot, V y, V log_z, S smooth, S all_w, V all_dot) {
  return hot * (log_z - y) + (log_z * all_w - all_dot) * smooth;
}

}  // namespace selfreg
