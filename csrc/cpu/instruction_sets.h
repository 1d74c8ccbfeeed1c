// Files named *_isa.cpp are compiled once for each level, into a namespace of that level's name; one level is
// chosen by cpuid when a kernel is called.
#pragma once
#include <string>
#include <vector>

#ifdef FEDDISTILL_X86_LEVELS
#define FEDDISTILL_DECLARE(...)                 \
    namespace x86_64_v4 { __VA_ARGS__ }         \
    namespace x86_64_v3 { __VA_ARGS__ }         \
    namespace generic { __VA_ARGS__ }
#define FEDDISTILL_CHOOSE(set, name)                                            \
    (::feddistill::level(set) == ::feddistill::Level::x86_64_v4   ? &x86_64_v4::name \
     : ::feddistill::level(set) == ::feddistill::Level::x86_64_v3 ? &x86_64_v3::name \
                                                                  : &generic::name)
#else
#define FEDDISTILL_DECLARE(...) \
    namespace generic { __VA_ARGS__ }
#define FEDDISTILL_CHOOSE(set, name) (static_cast<void>(::feddistill::level(set)), &generic::name)
#endif

namespace feddistill {

enum class Level { x86_64_v4, x86_64_v3, generic };

// What this machine has, best first; their number is what functions take as `set`.
std::vector<std::string> instruction_sets();
Level level(int set);  // throws std::out_of_range

}  // namespace feddistill
