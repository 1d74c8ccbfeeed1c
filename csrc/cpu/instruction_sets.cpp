#include "instruction_sets.h"

namespace feddistill {
namespace {

struct Known {
    Level level;
    const char* name;
};

const std::vector<Known>& known() {
    static const std::vector<Known> found = [] {
        std::vector<Known> list;
#ifdef FEDDISTILL_X86_LEVELS
        __builtin_cpu_init();
        if (__builtin_cpu_supports("x86-64-v4")) list.push_back({Level::x86_64_v4, "x86-64-v4"});
        if (__builtin_cpu_supports("x86-64-v3")) list.push_back({Level::x86_64_v3, "x86-64-v3"});
#endif
        list.push_back({Level::generic, "generic"});
        return list;
    }();
    return found;
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Known& each : known()) names.emplace_back(each.name);
    return names;
}

Level level(int set) { return known().at(set).level; }

}  // namespace feddistill
