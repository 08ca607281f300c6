// Stands in for csrc/avx512.cpp: the same lanes and kernels, over the instructions of ./immintrin.h.
#include "kernels.h"
#include "lanes_avx512.h"

namespace yuanmoe {
const Kernels kAvx512 = kernels<Avx512Lanes>();
}
