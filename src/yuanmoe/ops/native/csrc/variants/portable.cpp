// The variant for every CPU.
#include "kernels.h"
#include "lanes_portable.h"

namespace yuanmoe {
const Kernels kPortable = kernels<PortableLanes>();
}
