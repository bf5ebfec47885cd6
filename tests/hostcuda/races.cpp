// Finds data races of a kernel, whatever the order in which its threads happen to run.
//
// A kernel that is compiled with -fsanitize=thread calls a function at each access to memory. This is that function, and
// not the sanitizer's own, which knows nothing of CUDA: two accesses of a byte race if at least one of them writes and
// nothing orders them. Accesses of a block are ordered by a barrier of the block between them, those of a warp also by
// __syncwarp, but neither by a shuffle nor by a product of matrices, which order no memory; those of different blocks by
// nothing. An asynchronous copy writes at any time between its start and its wait.
//
// Of the reads of a byte two are kept, so a race of a write with a third may be missed; what is found is a race.

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <vector>

#include "hostcuda.h"

using namespace hostcuda;

extern "C" {

struct RacesRegion {
    uintptr_t address;
    size_t bytes;
    int is_shared;
};

struct RacesAccess {
    int exists, is_write;
    unsigned block, thread;
    unsigned barriers;  // of the block that the thread has passed
    unsigned meetings;  // by __syncwarp: a clock that each sets for all lanes that take part
};

struct RacesFound {
    uint64_t count;  // of racing accesses
    uintptr_t address;  // of the first
    RacesAccess before, after;
};
}

namespace {

constexpr unsigned kMaxThreads = 1024;

struct Byte {
    RacesAccess write, reads[2];
};

struct Region : RacesRegion {
    std::vector<Byte> cells;
};

struct Copy {
    uintptr_t target;
    unsigned bytes, group;
};

std::vector<Region> regions;
RacesFound* found;
unsigned block;
unsigned barriers[kMaxThreads], meetings[kMaxThreads], groups[kMaxThreads];
std::vector<Copy> copies[kMaxThreads];
CombineErased last_combine;

// Blocks run one after another; shared memory is another one in each.
void note_block() {
    if (blockIdx.x == block) return;
    block = blockIdx.x;
    memset(barriers, 0, sizeof barriers);
    memset(meetings, 0, sizeof meetings);
    memset(groups, 0, sizeof groups);
    for (std::vector<Copy>& pending : copies) pending.clear();
    for (Region& region : regions)
        if (region.is_shared) region.cells.assign(region.bytes, Byte());
}

bool is_ordered(const RacesAccess& before) {
    const unsigned thread = threadIdx.x;
    if (!before.exists) return true;
    if (before.block != block) return false;
    return before.thread == thread || before.barriers != barriers[thread] ||
           (before.thread / kWarpSize == thread / kWarpSize && before.meetings < meetings[thread]);
}

void check(const RacesAccess& before, const RacesAccess& now, uintptr_t address) {
    if (is_ordered(before)) return;
    if (found->count++ > 0) return;
    found->address = address;
    found->before = before;
    found->after = now;
}

void access(uintptr_t address, size_t bytes, bool is_write) {
    note_block();
    const unsigned thread = threadIdx.x;
    const RacesAccess now = {1, is_write, block, thread, barriers[thread], meetings[thread]};
    for (Region& region : regions) {
        if (address < region.address || address >= region.address + region.bytes) continue;
        for (size_t i = 0; i < bytes && address + i < region.address + region.bytes; ++i) {
            Byte& byte = region.cells[address + i - region.address];
            check(byte.write, now, address + i);
            if (!is_write) {
                for (RacesAccess& read : byte.reads) {
                    if (!is_ordered(read)) continue;
                    read = now;
                    break;
                }
                continue;
            }
            for (RacesAccess& read : byte.reads) {
                check(read, now, address + i);
                read.exists = 0;
            }
            byte.write = now;
        }
        return;
    }
}

void meet(void* const (&records)[kWarpSize]) {
    const unsigned first = threadIdx.x / kWarpSize * kWarpSize;
    unsigned latest = 0;
    for (unsigned i = 0; i < kWarpSize; ++i)
        if (records[i] != nullptr && meetings[first + i] > latest) latest = meetings[first + i];
    for (unsigned i = 0; i < kWarpSize; ++i)
        if (records[i] != nullptr) meetings[first + i] = latest + 1;
    last_combine(records);
}

uintptr_t number(const void* address) { return reinterpret_cast<uintptr_t>(address); }

}  // namespace

extern "C" {

void races_begin(const RacesRegion* given, size_t count, RacesFound* report) {
    regions.clear();
    for (size_t i = 0; i < count; ++i) {
        Region region;
        static_cast<RacesRegion&>(region) = given[i];
        region.cells.assign(region.bytes, Byte());
        regions.push_back(region);
    }
    found = report;
    block = ~0u;
}

void races_end() { regions.clear(); }

bool races_block_barrier(bool condition, const char* file, int line) {
    note_block();
    const bool voted = hostcuda_block_barrier(condition, file, line);
    ++barriers[threadIdx.x];
    return voted;
}

void races_warp_meet(
    unsigned mask, void* record, CombineErased combine, const char* name, const char* file, int line) {
    note_block();
    if (strcmp(name, "__syncwarp") != 0) return hostcuda_warp_meet(mask, record, combine, name, file, line);
    last_combine = combine;  // the last lane to come combines for all
    hostcuda_warp_meet(mask, record, meet, name, file, line);
}

void races_copy_async(void* shared, const void* global, unsigned bytes, bool exists) {
    if (exists) access(number(global), bytes, false);
    access(number(shared), bytes, true);
    copies[threadIdx.x].push_back(Copy{number(shared), bytes, groups[threadIdx.x]});
    hostcuda_copy_async(shared, global, bytes, exists);
}

void races_copy_async_commit() {
    note_block();
    ++groups[threadIdx.x];
    hostcuda_copy_async_commit();
}

void races_copy_async_wait(unsigned pending_groups) {
    note_block();
    std::vector<Copy>& pending = copies[threadIdx.x];
    size_t arrived = 0;
    for (; arrived < pending.size() && pending[arrived].group + pending_groups < groups[threadIdx.x]; ++arrived)
        access(pending[arrived].target, pending[arrived].bytes, true);
    pending.erase(pending.begin(), pending.begin() + long(arrived));
    hostcuda_copy_async_wait(pending_groups);
}

void races_copy_async_wait_all() {
    races_copy_async_commit();
    races_copy_async_wait(0);
}

void races_read_matrix_row(const void* shared_row, unsigned short (&row)[8]) {
    access(number(shared_row), sizeof row, false);
    hostcuda_read_matrix_row(shared_row, row);
}

// What the compiler calls.
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* address, unsigned long bytes) { access(number(address), bytes, false); }
void __tsan_write_range(void* address, unsigned long bytes) { access(number(address), bytes, true); }
#define RACES_ACCESSES(bytes) \
    void __tsan_read##bytes(void* address) { access(number(address), bytes, false); } \
    void __tsan_write##bytes(void* address) { access(number(address), bytes, true); } \
    void __tsan_unaligned_read##bytes(void* address) { access(number(address), bytes, false); } \
    void __tsan_unaligned_write##bytes(void* address) { access(number(address), bytes, true); }
RACES_ACCESSES(1)
RACES_ACCESSES(2)
RACES_ACCESSES(4)
RACES_ACCESSES(8)
RACES_ACCESSES(16)
}
