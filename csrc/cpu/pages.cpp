#include "pages.h"

#ifdef __linux__
#include <sys/mman.h>

#include <array>
#include <mutex>
#include <utility>
#endif

namespace feddistill {
namespace {

constexpr std::int64_t kPage = std::int64_t{1} << 21;  // a huge one

std::int64_t whole_pages(std::int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

}  // namespace

void fresh([[maybe_unused]] void* p, [[maybe_unused]] std::int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const auto begin = whole_pages(reinterpret_cast<std::intptr_t>(p));
    const auto end = (reinterpret_cast<std::intptr_t>(p) + bytes) / kPage * kPage;
    // A hint: where it is refused, the pages are small, and all else is the same.
    if (begin < end) static_cast<void>(madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE));
#endif
}

#if defined(MADV_FREE) && defined(MADV_HUGEPAGE)

namespace {

struct Block {
    void* at = nullptr;
    std::int64_t room = 0;
};

// The blocks that were freed last.  A thread that finds the lock taken allocates from the system instead of waiting,
// and so the child of a fork cannot deadlock.
struct Kept {
    std::mutex mutex;
    std::array<Block, 2> blocks;
};

Kept& kept() {
    static Kept* const all = new Kept;  // never destroyed: results may outlive everything
    return *all;
}

// A kept block of `room` bytes or at most a quarter more, or an empty one.
Block take(std::int64_t room) {
    const std::unique_lock lock(kept().mutex, std::try_to_lock);
    if (!lock) return {};
    for (Block& block : kept().blocks)
        if (block.at && room <= block.room && block.room <= room + room / 4) return std::exchange(block, {});
    return {};
}

// The block that there is no place for.
Block give(Block block) {
    if (madvise(block.at, block.room, MADV_FREE) != 0) return block;
    const std::unique_lock lock(kept().mutex, std::try_to_lock);
    if (!lock) return block;
    for (Block& place : kept().blocks) std::swap(place, block);  // the newest first
    return block;
}

}  // namespace

bool Pages::possible() { return true; }

void Pages::drop() {
    const std::lock_guard lock(kept().mutex);
    for (Block& block : kept().blocks)
        if (const Block over = std::exchange(block, {}); over.at) munmap(over.at, over.room);
}

Pages::Pages(std::int64_t bytes) : bytes_(bytes), room_(whole_pages(bytes)) {
    if (const Block block = take(room_); block.at) {
        at_ = block.at, room_ = block.room;
        return;
    }
    // With a page to spare, so that what is kept of it begins at one.
    void* const found = mmap(nullptr, room_ + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) return;
    const auto start = reinterpret_cast<std::intptr_t>(found), begin = whole_pages(start);
    at_ = reinterpret_cast<void*>(begin);
    if (begin > start) munmap(found, begin - start);
    munmap(reinterpret_cast<void*>(begin + room_), start + kPage - begin);
    fresh(at_, room_);
}

Pages::~Pages() {
    if (!at_) return;
    if (const Block over = give({at_, room_}); over.at) munmap(over.at, over.room);
}

#else

bool Pages::possible() { return false; }
void Pages::drop() {}
Pages::Pages(std::int64_t bytes) : bytes_(bytes), room_(0) {}
Pages::~Pages() = default;

#endif

}  // namespace feddistill
