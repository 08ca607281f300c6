// Stands in for csrc/variants/avx512.cpp: the same lanes and kernels, over the instructions of ./immintrin.h.
#include "variants/kernels.h"
#include "variants/lanes_avx512.h"

namespace yuanmoe {
const Kernels kAvx512 = kernels<Avx512Lanes>();
}
