// Memory for large results.
#pragma once
#include <cstdint>

namespace feddistill {

// Ask for huge pages where bytes at p are many: the kernel takes longer to fault in 4 KiB pages, one by one, than a
// loss takes to fill them.
void fresh(void* p, std::int64_t bytes);

// Memory that is likely to be mapped already.  A freed block is kept for the next request of about its size, and the
// system may reclaim its pages at any time: each training step writes its gradient where the last one's was, and no
// page is faulted in.
class Pages {
public:
    // Whether the system can do that.
    static bool possible();

    // Give what is kept back to the system at once.
    static void drop();

    // nullptr where there is no memory.
    explicit Pages(std::int64_t bytes);
    ~Pages();
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;

    void* at() const { return at_; }
    std::int64_t bytes() const { return bytes_; }

private:
    void* at_ = nullptr;
    std::int64_t bytes_, room_;
};

}  // namespace feddistill
