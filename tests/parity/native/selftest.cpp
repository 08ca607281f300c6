// Every variant against sums in double precision and against each other, on buffers of exactly the promised size, so
// that the sanitizers see any step outside them.
#include "selftest.h"

int main() {
    selftest::check_single();
    selftest::check_attention();
    selftest::check_products();
    std::puts("ok");
}
