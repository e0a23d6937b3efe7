// The one file that nvcc compiles: every kernel, and the functions of norms.h that queue them.
#include "adaln.cuh"
#include "gated_residual.cuh"
#include "rms_norm_rope.cuh"
