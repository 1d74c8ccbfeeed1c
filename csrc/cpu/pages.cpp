#include "pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace feddistill {

void fresh([[maybe_unused]] void* p, [[maybe_unused]] std::int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr std::uintptr_t kPage = std::uintptr_t{1} << 21;
    const auto begin = (reinterpret_cast<std::uintptr_t>(p) + kPage - 1) & ~(kPage - 1);
    const auto end = (reinterpret_cast<std::uintptr_t>(p) + static_cast<std::uintptr_t>(bytes)) & ~(kPage - 1);
    // A hint: where it is refused, the pages are small, and all else is the same.
    if (begin < end) static_cast<void>(madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE));
#endif
}

}  // namespace feddistill
