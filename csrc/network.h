// Sorting networks, and the part of one that a few outputs need.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

namespace feddistill {

struct Comparator {
    int low, high;  // wires; afterwards low holds the smaller value
    bool needs_low = true, needs_high = true;
};

// Batcher's merge exchange for any number of wires (Knuth, The Art of Computer Programming 3, 5.2.2, Algorithm M).
template <class Emit>
constexpr void merge_exchange(int wires, Emit emit) {
    int top = 1;
    while (2 * top < wires) top *= 2;
    for (int p = top; p > 0; p /= 2) {
        for (int q = top, r = 0, d = p;; d = q - p, q /= 2, r = p) {
            for (int i = 0; i + d < wires; ++i)
                if ((i & p) == r) emit(Comparator{i, i + d});
            if (q == p) break;
        }
    }
}

constexpr int comparators(int wires) {
    int count = 0;
    merge_exchange(wires, [&](Comparator) { ++count; });
    return count;
}

// Walk back from the wanted wires and mark what reaches them.
template <class Steps, class Wanted>
constexpr void prune(Steps& steps, Wanted& wanted) {
    for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
        step->needs_low = wanted[step->low];
        step->needs_high = wanted[step->high];
        if (step->needs_low || step->needs_high) wanted[step->low] = wanted[step->high] = true;
    }
}

// The network of C wires for outputs [first, last).
template <int C>
constexpr auto network(int first, int last) {
    std::array<Comparator, comparators(C)> steps{};
    int at = 0;
    merge_exchange(C, [&](Comparator step) { steps[at++] = step; });
    std::array<bool, C> wanted{};
    for (int i = first; i < last; ++i) wanted[i] = true;
    prune(steps, wanted);
    return steps;
}

inline std::vector<Comparator> network(int wires, int first, int last) {
    std::vector<Comparator> steps;
    merge_exchange(wires, [&](Comparator step) { steps.push_back(step); });
    std::vector<char> wanted(wires, 0);
    for (int i = first; i < last; ++i) wanted[i] = 1;
    prune(steps, wanted);
    std::erase_if(steps, [](const Comparator& s) { return !s.needs_low && !s.needs_high; });
    return steps;
}

}  // namespace feddistill
