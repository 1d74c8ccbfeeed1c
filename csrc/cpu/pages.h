// Memory that was just allocated and never touched.
#pragma once
#include <cstdint>

namespace feddistill {

// Ask for huge pages where bytes at p are many: the kernel takes longer to fault in 4 KiB pages, one by one, than a
// loss takes to fill them.
void fresh(void* p, std::int64_t bytes);

}  // namespace feddistill
