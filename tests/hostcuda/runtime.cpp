// Runs the blocks of a launch one after another, each CUDA thread of a block on a fiber.
//
// Schedule: warps run depth first, so that of two unsynchronised accesses in different warps the forward schedule
// executes one first and the reverse schedule the other. A fiber runs until its thread waits or returns; a fiber whose
// thread has returned goes on with the next thread of its warp without a switch, so kernels without barriers cost one
// function call a thread.
//
// Memory faults, undefined behaviour and misuse of barriers leave the fiber for good and end the launch: kernels own
// nothing, so abandoned stacks need no clean-up, and the process goes on.

#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <vector>

#include "hostcuda.h"

#ifndef sigev_notify_thread_id  // glibc keeps the member but does not name it
#define sigev_notify_thread_id _sigev_un._tid
#endif

using namespace hostcuda;

Index threadIdx, blockIdx, blockDim, gridDim;

namespace {

#if defined(__x86_64__) && !defined(HOSTCUDA_UCONTEXT)

typedef void* Context;  // the stack pointer; what must survive a call lies on the stack

extern "C" void hostcuda_switch(Context* from, Context to);
asm(R"(
.text
.globl hostcuda_switch
.hidden hostcuda_switch
.type hostcuda_switch, @function
hostcuda_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size hostcuda_switch, . - hostcuda_switch
)");

void switch_context(Context* from, Context* to) { hostcuda_switch(from, *to); }

void make_context(Context* context, unsigned char* stack, size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // where a caller's return address would be: a function starts 8 bytes off 16-byte alignment
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    *context = top;
}

#elif defined(__aarch64__) && !defined(HOSTCUDA_UCONTEXT)

typedef void* Context;

extern "C" void hostcuda_switch(Context* from, Context to);
asm(R"(
.text
.globl hostcuda_switch
.hidden hostcuda_switch
.type hostcuda_switch, %function
hostcuda_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size hostcuda_switch, . - hostcuda_switch
)");

void switch_context(Context* from, Context* to) { hostcuda_switch(from, *to); }

void make_context(Context* context, unsigned char* stack, size_t bytes, void (*entry)()) {
    void** frame = reinterpret_cast<void**>(stack + bytes - 160);
    memset(frame, 0, 160);
    frame[11] = reinterpret_cast<void*>(entry);  // x30
    *context = frame;
}

#else

typedef ucontext_t Context;

void switch_context(Context* from, Context* to) { swapcontext(from, to); }

void make_context(Context* context, unsigned char* stack, size_t bytes, void (*entry)()) {
    getcontext(context);
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = bytes;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
}

#endif

#if defined(__x86_64__)

typedef unsigned FloatMode;
FloatMode float_mode() { return __builtin_ia32_stmxcsr(); }
void set_float_mode(FloatMode mode) { __builtin_ia32_ldmxcsr(mode); }
FloatMode flushing(FloatMode mode) { return mode | 0x8040u; }   // FTZ and DAZ
FloatMode keeping(FloatMode mode) { return mode & ~0x8040u; }

#elif defined(__aarch64__)

typedef uint64_t FloatMode;
FloatMode float_mode() {
    FloatMode mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
void set_float_mode(FloatMode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
FloatMode flushing(FloatMode mode) { return mode | 1ull << 24; }  // FZ
FloatMode keeping(FloatMode mode) { return mode & ~(1ull << 24); }

#else
#error "hostcuda knows the floating-point control of x86-64 and aarch64 only"
#endif

constexpr unsigned kMaxThreads = 1024, kMaxWarps = kMaxThreads / kWarpSize;
constexpr size_t kStackBytes = 256 * 1024, kStackGuard = 64 * 1024, kStackSlot = kStackBytes + kStackGuard;

enum Schedule { kForward, kReverse, kRandom };

struct Launch {
    void (*entry)(void* const* slots);
    void* const* slots;  // one per kernel argument: the pointer itself, or the address of a value
    unsigned grid, block;
    const unsigned* block_order;  // the order in which blocks run, or null for 0, 1, ...
    unsigned char* shared;        // dynamic shared memory
    size_t shared_bytes;
    int schedule;
    int flush_subnormals;
    uint64_t seed;
    double seconds;  // the processor time a launch may take
    // How tensor cores add: products of so many bytes of an operand at a time, with so many bits behind the point.
    unsigned block_bytes, fraction_bits;
};

struct Fault {
    int kind;
    unsigned block, thread;
    int is_write;  // 1 write, 0 read, -1 unknown
    uint64_t address;
    char message[512];
};

// What the warps of a launch have executed.
struct Counts {
    uint64_t products;    // mma.sync
    uint64_t loads;       // matrices of ldmatrix
    uint64_t wavefronts;  // of those loads: one a matrix where no two of its rows meet in a bank
    uint64_t sectors;     // of 32 bytes that the loads of load_or_zero read
};

struct Fiber {
    Context context;
    unsigned char* stack;
};

enum State : uint8_t { kFresh, kReady, kRunning, kAtBarrier, kInWarp, kExited };

struct Copy {
    void* target;
    unsigned bytes, group;
    unsigned char data[16];
};

struct Thread {
    State state;
    Fiber* fiber;
    // Where it waits.
    const char* name;
    const char* file;
    int line;
    unsigned mask;
    void* record;
    CombineErased combine;
    // Asynchronous copies that have not arrived, in order, and the number of groups closed.
    std::vector<Copy> copies;
    unsigned groups;
};

const Launch* launch;
Fault* fault;
Counts* counts;
uint16_t shared_poison;  // what shared memory holds before it is written
Context scheduler;
volatile bool in_fiber;  // set and cleared by fibers themselves, so that a signal never finds it set mid-switch
pthread_t launch_thread;

Thread threads[kMaxThreads];
unsigned current, num_exited, num_at_barrier;
bool vote, voted;  // of the threads at a barrier, and of those at the last one
unsigned ready_in_warp[kMaxWarps];  // fresh or ready threads
unsigned meeting_in_warp[kMaxWarps];  // threads that wait for others of their warp

unsigned char* stacks;  // kMaxThreads slots, each a guard and a stack
Fiber fibers[kMaxThreads];
Fiber* free_fibers[kMaxThreads];
unsigned num_fibers, num_free;

// A pass visits the lanes of one warp.
struct Pass {
    unsigned warp, position;
    uint8_t lanes[kWarpSize];
} pass;

uint64_t random_state;

unsigned random_below(unsigned bound) {  // splitmix64
    uint64_t z = (random_state += 0x9e3779b97f4a7c15ull);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return unsigned((z ^ z >> 31) % bound);
}

void set_fault(FaultKind kind, const void* address, int is_write, const char* format, va_list values) {
    fault->kind = kind;
    fault->block = blockIdx.x;
    fault->thread = threadIdx.x;
    fault->is_write = is_write;
    fault->address = reinterpret_cast<uint64_t>(address);
    vsnprintf(fault->message, sizeof fault->message, format, values);
}

__attribute__((format(printf, 2, 3))) void report(FaultKind kind, const char* format, ...) {
    va_list values;
    va_start(values, format);
    set_fault(kind, nullptr, -1, format, values);
    va_end(values);
}

[[noreturn]] void leave_fiber() {
    in_fiber = false;
    Context abandoned;
    switch_context(&abandoned, &scheduler);
    __builtin_unreachable();
}

}  // namespace

void hostcuda_fault(int kind, const void* address, const char* format, ...) {
    va_list values;
    va_start(values, format);
    set_fault(FaultKind(kind), address, -1, format, values);
    va_end(values);
    leave_fiber();
}

namespace {

const int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGVTALRM};
constexpr int kNumSignals = sizeof kSignals / sizeof kSignals[0];
struct sigaction previous_actions[kNumSignals];

int access_is_write(const ucontext_t* context) {
#if defined(__x86_64__)
    return context->uc_mcontext.gregs[REG_ERR] >> 1 & 1;
#elif defined(__aarch64__)
    const unsigned char* record = reinterpret_cast<const unsigned char*>(context->uc_mcontext.__reserved);
    for (;;) {
        uint32_t header[2];  // magic, size
        memcpy(header, record, sizeof header);
        if (header[0] == 0 || header[1] == 0) return -1;
        if (header[0] == 0x45535201u) {  // esr_context
            uint64_t esr;
            memcpy(&esr, record + 8, sizeof esr);
            return int(esr >> 6 & 1);
        }
        record += header[1];
    }
#else
    return -1;
#endif
}

void on_signal(int number, siginfo_t* info, void* context) {
    if (!in_fiber || !pthread_equal(pthread_self(), launch_thread)) {
        // Not a kernel's: a late tick of the clock, or a crash that its owner must see when the instruction repeats.
        for (int i = 0; i < kNumSignals; ++i)
            if (kSignals[i] == number && number != SIGVTALRM) sigaction(number, &previous_actions[i], nullptr);
        return;
    }
    const unsigned char* address = static_cast<const unsigned char*>(info->si_addr);
    if (number == SIGVTALRM) {
        report(kTimeLimit, "still running after %g s of processor time", launch->seconds);
    } else if (number == SIGFPE || number == SIGILL) {
        report(kUndefined, "signal %d (%s)", number, number == SIGFPE ? "integer division" : "illegal instruction");
    } else if (address >= stacks && address < stacks + kMaxThreads * kStackSlot) {
        report(kStackOverflow, "stack overflow: a thread has %zu KiB for its local variables", kStackBytes / 1024);
    } else {
        report(kMemory, "%s", "");  // the address says it all
        fault->is_write = access_is_write(static_cast<const ucontext_t*>(context));
        fault->address = reinterpret_cast<uint64_t>(address);
    }
    leave_fiber();
}

// Installed for the duration of a launch only, so that Python's own handlers stay in charge otherwise.
class SignalScope {
  public:
    explicit SignalScope(double seconds) {
        static unsigned char alternate[128 * 1024];
        stack_t stack = {};
        stack.ss_sp = alternate;
        stack.ss_size = sizeof alternate;
        sigaltstack(&stack, &previous_stack_);
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler may leave by a switch: nothing to unmask
        for (int i = 0; i < kNumSignals; ++i) sigaction(kSignals[i], &action, &previous_actions[i]);
        struct sigevent event = {};
        event.sigev_notify = SIGEV_THREAD_ID;
        event.sigev_signo = SIGVTALRM;
        event.sigev_notify_thread_id = pid_t(syscall(SYS_gettid));
        has_timer_ = timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer_) == 0;
        if (has_timer_) {
            struct itimerspec limit = {};
            limit.it_value.tv_sec = time_t(seconds);
            limit.it_value.tv_nsec = long((seconds - double(time_t(seconds))) * 1e9);
            limit.it_interval.tv_nsec = 10 * 1000 * 1000;  // again, should it first strike outside a fiber
            timer_settime(timer_, 0, &limit, nullptr);
        }
    }
    ~SignalScope() {
        if (has_timer_) timer_delete(timer_);
        for (int i = 0; i < kNumSignals; ++i) sigaction(kSignals[i], &previous_actions[i], nullptr);
        sigaltstack(&previous_stack_, nullptr);
    }

  private:
    stack_t previous_stack_;
    timer_t timer_;
    bool has_timer_;
};

void begin(unsigned t) {
    --ready_in_warp[t / kWarpSize];
    threads[t].state = kRunning;
    current = t;
    threadIdx.x = t;
}

// The next lane of the pass that can run, or -1; the caller that begins it advances the position.
int next_in_pass() {
    for (; pass.position < kWarpSize; ++pass.position) {
        const unsigned t = pass.warp * kWarpSize + pass.lanes[pass.position];
        if (t < launch->block && (threads[t].state == kFresh || threads[t].state == kReady)) return int(t);
    }
    return -1;
}

// Leaves the fiber for that of the pass's next lane; without a next lane, or where it has no fiber, for the scheduler.
void pause(Fiber* fiber) {
    const int next = next_in_pass();
    const bool has_fiber = next >= 0 && threads[next].state == kReady;
    in_fiber = false;
    if (has_fiber) {
        ++pass.position;
        begin(unsigned(next));
    }
    switch_context(&fiber->context, has_fiber ? &threads[next].fiber->context : &scheduler);
    in_fiber = true;
}

void fiber_main() {
    in_fiber = true;
    for (;;) {
        launch->entry(launch->slots);
        Fiber* const fiber = threads[current].fiber;
        threads[current].state = kExited;
        threads[current].fiber = nullptr;
        ++num_exited;
        const int next = next_in_pass();
        if (next >= 0 && threads[next].state == kFresh) {
            ++pass.position;
            threads[next].fiber = fiber;
            begin(unsigned(next));
            continue;
        }
        free_fibers[num_free++] = fiber;
        pause(fiber);
    }
}

// Returns whether the fiber exists.
bool take_fiber(unsigned t) {
    if (num_free == 0) {
        Fiber* const fiber = &fibers[num_fibers];
        unsigned char* const slot = stacks + num_fibers * kStackSlot;
        if (mprotect(slot + kStackGuard, kStackBytes, PROT_READ | PROT_WRITE) != 0) {
            report(kStackOverflow, "no memory for the stacks of the block's threads");
            return false;
        }
        ++num_fibers;
        fiber->stack = slot + kStackGuard;
        make_context(&fiber->context, fiber->stack, kStackBytes, fiber_main);
        free_fibers[num_free++] = fiber;
    }
    threads[t].fiber = free_fibers[--num_free];
    return true;
}

// Fibers that a fault left behind in the middle of a kernel start afresh.
void reset_fibers() {
    num_free = 0;
    for (unsigned i = num_fibers; i-- > 0;) {
        make_context(&fibers[i].context, fibers[i].stack, kStackBytes, fiber_main);
        free_fibers[num_free++] = &fibers[i];
    }
}

void resume(unsigned t) {
    begin(t);
    switch_context(&scheduler, &threads[t].fiber->context);
}

void wait(State state, const char* name, const char* file, int line) {
    Thread& thread = threads[current];
    thread.state = state;
    thread.name = name;
    thread.file = file;
    thread.line = line;
    pause(thread.fiber);
}

void make_ready(unsigned t) {
    if (threads[t].state == kInWarp) --meeting_in_warp[t / kWarpSize];
    threads[t].state = kReady;
    ++ready_in_warp[t / kWarpSize];
}

unsigned num_warps() { return (launch->block + kWarpSize - 1) / kWarpSize; }

// The warp of the next pass, or -1 if no thread can run.
int choose_warp() {
    const unsigned warps = num_warps(), first = launch->schedule == kRandom ? random_below(warps) : 0;
    for (unsigned i = 0; i < warps; ++i) {
        const unsigned warp = launch->schedule == kReverse ? warps - 1 - i : (first + i) % warps;
        if (ready_in_warp[warp] > 0) return int(warp);
    }
    return -1;
}

void start_pass(unsigned warp) {
    pass.warp = warp;
    pass.position = 0;
    for (unsigned i = 0; i < kWarpSize; ++i)
        pass.lanes[i] = uint8_t(launch->schedule == kReverse ? kWarpSize - 1 - i : i);
    if (launch->schedule != kRandom) return;
    for (unsigned i = kWarpSize - 1; i > 0; --i) {
        const unsigned j = random_below(i + 1);
        const uint8_t lane = pass.lanes[i];
        pass.lanes[i] = pass.lanes[j];
        pass.lanes[j] = lane;
    }
}

bool same_place(const Thread& a, const Thread& b) {
    return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

// No thread can run and some wait: release the barrier if all of them are at the same one, else report.
bool release_barrier() {
    const unsigned block = launch->block;
    unsigned waiting = 0;  // the first thread that waits at the block's barrier, or in a warp if none does
    while (waiting < block && threads[waiting].state != kAtBarrier) ++waiting;
    if (waiting == block)
        for (waiting = 0; threads[waiting].state != kInWarp;) ++waiting;
    const Thread& first = threads[waiting];
    threadIdx.x = waiting;

    const bool at_barrier = first.state == kAtBarrier;
    const unsigned begin = at_barrier ? 0 : waiting / kWarpSize * kWarpSize;
    for (unsigned t = begin; t < block; ++t) {
        const Thread& other = threads[t];
        if (!at_barrier && (t >= begin + kWarpSize || !(first.mask >> (t - begin) & 1u))) continue;
        const char* const awaited = at_barrier ? "" : ", which the mask names,";
        if (other.state == kExited) {
            report(
                kDivergence, "divergent %s: thread %u waits at %s:%d, but thread %u%s has returned without reaching it",
                first.name, waiting, first.file, first.line, t, awaited);
            return false;
        }
        if (other.state != first.state || !same_place(first, other)) {
            report(
                kDivergence, "divergent %s: thread %u waits at %s:%d, but thread %u%s waits in %s at %s:%d", first.name,
                waiting, first.file, first.line, t, awaited, other.name, other.file, other.line);
            return false;
        }
        if (!at_barrier && other.mask != first.mask) {
            report(
                kDivergence, "wrong mask: in %s at %s:%d thread %u gives the mask 0x%08x and thread %u gives 0x%08x",
                first.name, first.file, first.line, waiting, first.mask, t, other.mask);
            return false;
        }
    }
    for (unsigned t = 0; t < block; ++t) make_ready(t);
    num_at_barrier = 0;
    voted = vote;
    vote = false;
    return true;
}

bool run_block() {
    const unsigned block = launch->block;
    num_exited = num_at_barrier = 0;
    vote = false;
    for (unsigned t = 0; t < block; ++t) {
        threads[t].state = kFresh;
        threads[t].fiber = nullptr;
        threads[t].copies.clear();
        threads[t].groups = 0;
    }
    for (unsigned warp = 0; warp < num_warps(); ++warp)
        ready_in_warp[warp] = block - warp * kWarpSize < kWarpSize ? block - warp * kWarpSize : kWarpSize;
    memset(meeting_in_warp, 0, sizeof meeting_in_warp);

    while (num_exited < block) {
        const int warp = choose_warp();
        if (warp < 0) {
            if (!release_barrier()) return false;
            continue;
        }
        start_pass(unsigned(warp));
        for (int t = next_in_pass(); t >= 0; t = next_in_pass()) {
            ++pass.position;
            if (threads[t].state == kFresh && !take_fiber(unsigned(t))) return false;
            resume(unsigned(t));
            if (fault->kind != kNoFault) return false;
        }
    }
    return true;
}

void poison(unsigned char* memory, size_t bytes, uint16_t pattern) {
    for (size_t i = 0; i + 2 <= bytes; i += 2) memcpy(memory + i, &pattern, 2);
    if (bytes % 2) memcpy(memory + bytes - 1, &pattern, 1);
}

bool is_in_shared_memory(const void* address, size_t bytes) {
    const unsigned char* const first = static_cast<const unsigned char*>(address);
    return first >= launch->shared && first + bytes <= launch->shared + launch->shared_bytes;
}

}  // namespace

unsigned char* hostcuda_shared_memory() { return launch->shared; }

bool hostcuda_block_barrier(bool condition, const char* file, int line) {
    ++num_at_barrier;
    vote = vote || condition;
    wait(kAtBarrier, "__syncthreads", file, line);
    return voted;
}

void hostcuda_warp_meet(
    unsigned mask, void* record, CombineErased combine, const char* name, const char* file, int line) {
    const unsigned lane = current % kWarpSize, first = current - lane;
    if (!(mask >> lane & 1u))
        hostcuda_fault(
            kDivergence, nullptr, "wrong mask: thread %u calls %s at %s:%d with the mask 0x%08x, which lacks its own lane",
            current, name, file, line, mask);
    const unsigned lanes = launch->block - first;
    if (lanes < kWarpSize && mask >> lanes)
        hostcuda_fault(
            kDivergence, nullptr, "wrong mask: %s at %s:%d has the mask 0x%08x, but the block's last warp has %u lanes",
            name, file, line, mask, lanes);

    Thread& self = threads[current];
    self.mask = mask;
    self.record = record;
    self.combine = combine;
    self.file = file;
    self.line = line;
    unsigned& meeting = meeting_in_warp[first / kWarpSize];
    bool complete = meeting + 1 >= unsigned(__builtin_popcount(mask));  // else it is early for a closer look
    for (unsigned i = 0; i < kWarpSize && complete; ++i) {
        const Thread& other = threads[first + i];
        complete = !(mask >> i & 1u) || i == lane ||
                   (other.state == kInWarp && other.mask == mask && other.combine == combine && same_place(other, self));
    }
    if (complete) {
        void* records[kWarpSize];
        for (unsigned i = 0; i < kWarpSize; ++i) records[i] = mask >> i & 1u ? threads[first + i].record : nullptr;
        combine(records);
        for (unsigned i = 0; i < kWarpSize; ++i)
            if (mask >> i & 1u) make_ready(first + i);
    } else {
        ++meeting;
    }
    wait(complete ? kReady : kInWarp, name, file, line);
}

// A copy may arrive at once or as late as its wait: the forward schedule delays them all, which shows a missing wait or
// barrier before the data is read; the reverse schedule delays none, which shows a missing barrier before the old data
// is overwritten; a random one tosses a coin, and poisons the target of a copy that is late.
void hostcuda_copy_async(void* shared, const void* global, unsigned bytes, bool exists) {
    for (const void* address : {static_cast<const void*>(shared), global})
        if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
            hostcuda_fault(
                kMisaligned, address, "misaligned cp.async: %u bytes need addresses divisible by %u", bytes, bytes);
    if (!is_in_shared_memory(shared, bytes)) hostcuda_fault(kMemory, shared, "cp.async to outside shared memory");
    Copy copy = {shared, bytes, threads[current].groups, {}};
    if (exists) memcpy(copy.data, global, bytes);
    const bool is_late = launch->schedule == kForward || (launch->schedule == kRandom && random_below(2));
    if (is_late) threads[current].copies.push_back(copy);
    if (!is_late)
        memcpy(shared, copy.data, bytes);
    else if (launch->schedule == kRandom)
        poison(static_cast<unsigned char*>(shared), bytes, shared_poison);
}

void hostcuda_copy_async_commit() { ++threads[current].groups; }

void hostcuda_copy_async_wait(unsigned pending_groups) {
    std::vector<Copy>& copies = threads[current].copies;
    size_t arrived = 0;
    for (; arrived < copies.size() && copies[arrived].group + pending_groups < threads[current].groups; ++arrived)
        memcpy(copies[arrived].target, copies[arrived].data, copies[arrived].bytes);
    copies.erase(copies.begin(), copies.begin() + long(arrived));
}

void hostcuda_copy_async_wait_all() {
    hostcuda_copy_async_commit();
    hostcuda_copy_async_wait(0);
}

void hostcuda_read_matrix_row(const void* shared_row, unsigned short (&row)[8]) {
    if (reinterpret_cast<uintptr_t>(shared_row) % sizeof row != 0)
        hostcuda_fault(
            kMisaligned, shared_row, "misaligned ldmatrix: a row needs an address divisible by %zu", sizeof row);
    if (!is_in_shared_memory(shared_row, sizeof row))
        hostcuda_fault(kMemory, shared_row, "ldmatrix of a row outside shared memory");
    memcpy(row, shared_row, sizeof row);
}

// The rows of a matrix are read together. Each takes four of the 32 banks, so that the banks make eight columns of 16
// bytes; different rows in one column take turns.
void hostcuda_count_matrix_load(const void* const* rows, unsigned num_matrices) {
    for (unsigned matrix = 0; matrix < num_matrices; ++matrix) {
        uintptr_t found[8][8];
        unsigned in_column[8] = {}, most = 0;
        for (unsigned i = 0; i < 8; ++i) {
            const uintptr_t row = reinterpret_cast<uintptr_t>(rows[8 * matrix + i]) / 16;
            unsigned& turns = in_column[row % 8];
            unsigned j = 0;
            while (j < turns && found[row % 8][j] != row) ++j;
            if (j < turns) continue;
            found[row % 8][turns++] = row;
            most = turns > most ? turns : most;
        }
        ++counts->loads;
        counts->wavefronts += most;
    }
}

void hostcuda_count_global_load(const void* const* addresses, unsigned bytes) {
    uintptr_t sectors[2 * kWarpSize];
    unsigned count = 0;
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
        if (addresses[lane] == nullptr) continue;
        const uintptr_t first = reinterpret_cast<uintptr_t>(addresses[lane]), last = first + bytes - 1;
        for (uintptr_t sector = first / 32; sector <= last / 32; ++sector) {
            unsigned i = 0;
            while (i < count && sectors[i] != sector) ++i;
            if (i == count) sectors[count++] = sector;
        }
    }
    counts->sectors += count;
}

namespace {

// Eight columns of the result at a time.
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));

// What an operand's numbers are made of: a number is magnitude * 2**(exponent - fraction bits), negative if sign is -1.
struct Format {
    unsigned exponent_bits, fraction_bits, ignored_bits;
    unsigned depth;  // products of one element of d
    bool is_packed;  // two to a register
};
constexpr Format kFormats[] = {{5, 10, 0, 16, true}, {8, 7, 0, 16, true}, {5, 10, 0, 8, true}, {8, 10, 13, 8, false}};

constexpr int kNoExponent = -512;  // of a zero: below that of every product
constexpr int kLeastExponent = -126;  // of float32

// Eight numbers.
struct Numbers {
    Words magnitude;
    Ints exponent, sign;
    Ints is_special;  // -1 for an infinity or a NaN, of which what is above means nothing
};

template <int kind>
inline __attribute__((always_inline)) Numbers decode(const uint32_t* from) {
    constexpr Format format = kFormats[kind];
    constexpr int32_t top = (1 << format.exponent_bits) - 1, bias = top / 2;
    Words bits;
    memcpy(&bits, from, sizeof bits);
    bits >>= format.ignored_bits;
    const Words fraction = bits & ((1u << format.fraction_bits) - 1);
    const Ints exponent = Ints(bits >> format.fraction_bits) & top;
    const Ints is_special = exponent == top, is_normal = exponent > 0;
    const Words magnitude = fraction | (Words(is_normal) & 1u << format.fraction_bits);
    return Numbers{
        magnitude, magnitude == 0 ? kNoExponent + Ints{} : exponent - bias + 1 + is_normal,
        -Ints(bits >> (format.fraction_bits + format.exponent_bits)), is_special};
}

inline __attribute__((always_inline)) bool any(const Ints& condition) {
    int32_t found = 0;
    for (unsigned i = 0; i < 8; ++i) found |= condition[i];
    return found != 0;
}

// A number of an operand as a float32, whose NaN keeps the top of its payload.
template <int kind>
float widen(uint32_t bits) {
    if (kind == kTf32K8) return uint_as_float((bits & 0x7fffe000u) > 0x7f800000u ? bits : bits & 0xffffe000u);
    return kind == kBf16K16 ? uint_as_float(bits << 16) : half_bits_to_float((unsigned short)bits);
}

bool is_nan(float x) { return (float_as_uint(x) & 0x7fffffffu) > 0x7f800000u; }
bool is_special(float x) { return (float_as_uint(x) & 0x7f800000u) == 0x7f800000u; }

// A sum in which an infinity or a NaN takes part. A GPU makes every NaN 0x7fffffff; here the first one among the terms
// keeps its payload, by which poison is recognised.
template <int kind>
float add_special(const uint32_t* a, const uint32_t* b, unsigned b_step, unsigned terms, float c) {
    if (is_nan(c)) return c;
    for (unsigned k = 0; k < terms; ++k)
        for (const uint32_t bits : {a[k], b[b_step * k]})
            if (is_nan(widen<kind>(bits))) return widen<kind>(bits);
    const float no_number = uint_as_float(0x7fffffffu);
    uint32_t infinity = is_special(c) ? float_as_uint(c) : 0;
    for (unsigned k = 0; k < terms; ++k) {
        const uint32_t x = float_as_uint(widen<kind>(a[k])), y = float_as_uint(widen<kind>(b[b_step * k]));
        if (!is_special(uint_as_float(x)) && !is_special(uint_as_float(y))) continue;
        if ((x & 0x7fffffffu) == 0 || (y & 0x7fffffffu) == 0) return no_number;
        const uint32_t product = ((x ^ y) & 0x80000000u) | 0x7f800000u;
        if (infinity != 0 && infinity != product) return no_number;
        infinity = product;
    }
    return uint_as_float(infinity);
}

// sum * 2**exponent, rounded toward zero; what needs an exponent above float32's becomes an infinity.
inline float round_toward_zero(int64_t sum, int exponent) {
    if (sum == 0) return 0.0f;  // the sign of the hardware's zero is not published
    const uint32_t sign = sum < 0 ? 0x80000000u : 0;
    const uint64_t magnitude = uint64_t(sum < 0 ? -sum : sum);
    const int top = 63 - __builtin_clzll(magnitude), result = exponent + top;
    if (result > 127) return uint_as_float(sign | 0x7f800000u);
    // The bit of weight 2**-149 or, in a normal number, the last of 24 comes to bit 0.
    const int shift = result < kLeastExponent ? exponent + 149 : 23 - top;
    const uint32_t bits = uint32_t(shift >= 0 ? magnitude << shift : magnitude >> -shift);
    return uint_as_float(result < kLeastExponent ? sign | bits : (sign | uint32_t(result + 126) << 23) + bits);
}

// d = a*b + d, from matrices of bits. The published rule, found by experiment on the hardware: of each block of products
// and the accumulator the terms are exact; each is shifted to the largest exponent among them, where that of a product is
// the sum of its operands' (its significand may reach 4), and cut off `fraction_bits` behind the point; the sum is exact,
// and rounded toward zero. Subnormals are numbers like any other; the least exponent is float32's.
template <int kind>
#if defined(__x86_64__) && !defined(__clang__)
__attribute__((target_clones("avx2", "default")))
#endif
void multiply(const uint32_t (&a)[16][16], const uint32_t (&b)[16][8], float (&d)[16][8]) {
    constexpr unsigned depth = kFormats[kind].depth;
    constexpr unsigned element_bytes = kFormats[kind].is_packed ? 2 : 4;
    const unsigned block = launch->block_bytes / element_bytes < depth ? launch->block_bytes / element_bytes : depth;
    const int fraction_bits = int(launch->fraction_bits);
    const unsigned up = fraction_bits - 2 * kFormats[kind].fraction_bits, acc_up = fraction_bits - 23;

    Numbers columns[depth];  // of each row of b
    Ints specials = {};
    for (unsigned k = 0; k < depth; ++k) {
        columns[k] = decode<kind>(b[k]);
        specials |= columns[k].is_special;
    }
    const bool b_special = any(specials);
    for (unsigned i = 0; i < 16; ++i) {
        uint32_t magnitudes[depth];
        int32_t exponents[depth], signs[depth];
        bool row_special = b_special;
        for (unsigned k = 0; k < depth; k += 8) {
            const Numbers row = decode<kind>(&a[i][k]);
            memcpy(&magnitudes[k], &row.magnitude, sizeof row.magnitude);
            memcpy(&exponents[k], &row.exponent, sizeof row.exponent);
            memcpy(&signs[k], &row.sign, sizeof row.sign);
            row_special |= any(row.is_special);
        }
        for (unsigned first = 0; first < depth; first += block) {
            Ints acc_exponent;
            float acc[8];
            bool special = row_special;
            for (unsigned j = 0; j < 8; ++j) {
                acc[j] = d[i][j];
                const int exponent = int(float_as_uint(acc[j]) >> 23 & 255);
                special |= exponent == 255;
                acc_exponent[j] = exponent == 0 ? kLeastExponent : exponent - 127;
            }
            Ints largest = acc_exponent;
            for (unsigned k = first; k < first + block; ++k) {
                const Ints exponent = columns[k].exponent + exponents[k];
                largest = exponent > largest ? exponent : largest;
            }
            Ints sum = {};  // of 16 magnitudes below 2**27 - 2**16: no overflow
            for (unsigned k = first; k < first + block; ++k) {
                Ints shift = largest - columns[k].exponent - exponents[k];
                shift = shift > 31 ? 31 : shift;
                const Ints magnitude = Ints((columns[k].magnitude * magnitudes[k] << up) >> Words(shift));
                const Ints sign = columns[k].sign ^ signs[k];
                sum += (magnitude ^ sign) - sign;
            }
            for (unsigned j = 0; j < 8; ++j) {
                const uint32_t bits = float_as_uint(acc[j]);
                const int shift = largest[j] - acc_exponent[j];
                const uint32_t magnitude = (bits & 0x7fffffu) | (bits & 0x7f800000u ? 0x800000u : 0u);
                const int64_t term = (magnitude << acc_up) >> (shift > 31 ? 31 : shift);
                d[i][j] = round_toward_zero(sum[j] + (bits >> 31 ? -term : term), largest[j] - fraction_bits);
            }
            if (!special) continue;
            for (unsigned j = 0; j < 8; ++j) {
                bool found = is_special(acc[j]);
                for (unsigned k = first; k < first + block; ++k)
                    found |= is_special(widen<kind>(a[i][k])) || is_special(widen<kind>(b[k][j]));
                if (found) d[i][j] = add_special<kind>(&a[i][first], &b[first][j], 8, block, acc[j]);
            }
        }
    }
}

// Between the lanes' registers and the matrices, by the tables of fragments in the PTX ISA.
template <int kind>
void multiply_fragments(MatrixProduct* const (&lanes)[kWarpSize]) {
    constexpr unsigned depth = kFormats[kind].depth;
    constexpr bool is_packed = kFormats[kind].is_packed;
    constexpr unsigned half = is_packed ? 8 : 4;  // columns of a that a register of each lane spans
    uint32_t a[16][16], b[16][8];
    float d[16][8];
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
        const MatrixProduct& own = *lanes[lane];
        const unsigned g = lane / 4, t = lane % 4;
        for (unsigned r = 0; r < 4; ++r) d[g + 8 * (r / 2)][2 * t + r % 2] = own.d[r];
        for (unsigned k = 0, r = 0; k < depth; k += half)
            for (unsigned row = g; row < 16; row += 8, ++r)
                if (is_packed) {
                    a[row][k + 2 * t] = own.a[r] & 0xffffu;
                    a[row][k + 2 * t + 1] = own.a[r] >> 16;
                } else {
                    a[row][k + t] = own.a[r];
                }
        for (unsigned k = 0, r = 0; k < depth; k += half, ++r)
            if (is_packed) {
                b[k + 2 * t][g] = own.b[r] & 0xffffu;
                b[k + 2 * t + 1][g] = own.b[r] >> 16;
            } else {
                b[k + t][g] = own.b[r];
            }
    }
    multiply<kind>(a, b, d);
    for (unsigned lane = 0; lane < kWarpSize; ++lane)
        for (unsigned r = 0; r < 4; ++r) lanes[lane]->d[r] = d[lane / 4 + 8 * (r / 2)][2 * (lane % 4) + r % 2];
}

}  // namespace

void hostcuda_multiply_matrices(int kind, MatrixProduct* const (&lanes)[kWarpSize]) {
    ++counts->products;
    switch (kind) {
        case kF16K16: return multiply_fragments<kF16K16>(lanes);
        case kBf16K16: return multiply_fragments<kBf16K16>(lanes);
        case kF16K8: return multiply_fragments<kF16K8>(lanes);
        default: return multiply_fragments<kTf32K8>(lanes);
    }
}

// Runs a launch; `result->kind` says how it ended. Returns nonzero if the harness itself has no memory.
extern "C" int hostcuda_launch(const Launch* what, Fault* result, Counts* executed, uint16_t poison_pattern) {
    if (stacks == nullptr) {
        void* const memory =
            mmap(nullptr, kMaxThreads * kStackSlot, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) return 1;
        stacks = static_cast<unsigned char*>(memory);
    }
    launch = what;
    fault = result;
    counts = executed;
    shared_poison = poison_pattern;
    memset(counts, 0, sizeof *counts);
    memset(fault, 0, sizeof *fault);
    launch_thread = pthread_self();
    random_state = what->seed;
    gridDim = Index{what->grid, 1, 1};
    blockDim = Index{what->block, 1, 1};
    threadIdx = blockIdx = Index{0, 0, 0};

    const SignalScope signals(what->seconds);
    const FloatMode mode = float_mode();
    set_float_mode(what->flush_subnormals ? flushing(mode) : keeping(mode));
    reset_fibers();  // after the mode is set: a ucontext has its own
    for (unsigned i = 0; i < what->grid; ++i) {
        blockIdx.x = what->block_order ? what->block_order[i] : i;
        poison(what->shared, what->shared_bytes, shared_poison);
        if (!run_block()) break;
    }
    set_float_mode(mode);
    return 0;
}

namespace {

struct SourceLocation {
    const char* file;
    uint32_t line, column;
};

struct TypeDescriptor {
    uint16_t kind, info;  // kind 0: an integer of 1 << (info >> 1) bits, signed if info is odd
    char name[1];
};

struct Operation {  // overflow, shift
    SourceLocation location;
    const TypeDescriptor* type;
};

struct Subscript {
    SourceLocation location;
    const TypeDescriptor* array;
    const TypeDescriptor* index;
};

struct TypeMismatch {
    SourceLocation location;
    const TypeDescriptor* type;
    unsigned char log_alignment, access;
};

// An integer operand as the sanitizer passes it: in the handle itself (all of ours have at most 64 bits).
long long integer(const TypeDescriptor* type, uintptr_t handle) {
    const unsigned unused = 64 - (1u << (type->info >> 1));
    return type->info & 1 ? (long long)(handle << unused) >> unused : (long long)(handle << unused >> unused);
}

[[noreturn]] void overflow(const Operation* data, uintptr_t a, const char* sign, uintptr_t b) {
    hostcuda_fault(
        kUndefined, nullptr, "signed integer overflow: %lld %s %lld does not fit %s at %s:%u", integer(data->type, a),
        sign, integer(data->type, b), data->type->name, data->location.file, data->location.line);
}

}  // namespace

extern "C" {

void __ubsan_handle_add_overflow_abort(const Operation* data, uintptr_t a, uintptr_t b) { overflow(data, a, "+", b); }
void __ubsan_handle_sub_overflow_abort(const Operation* data, uintptr_t a, uintptr_t b) { overflow(data, a, "-", b); }
void __ubsan_handle_mul_overflow_abort(const Operation* data, uintptr_t a, uintptr_t b) { overflow(data, a, "*", b); }
void __ubsan_handle_negate_overflow_abort(const Operation* data, uintptr_t a) { overflow(data, 0, "-", a); }

void __ubsan_handle_divrem_overflow_abort(const Operation* data, uintptr_t a, uintptr_t b) {
    if (integer(data->type, b) != 0) overflow(data, a, "/", b);
    hostcuda_fault(
        kUndefined, nullptr, "integer division by zero: %lld / 0 at %s:%u", integer(data->type, a), data->location.file,
        data->location.line);
}

void __ubsan_handle_shift_out_of_bounds_abort(const Subscript* data, uintptr_t a, uintptr_t b) {
    hostcuda_fault(
        kUndefined, nullptr, "shift out of range: %lld by %lld bits in %s at %s:%u", integer(data->array, a),
        integer(data->index, b), data->array->name, data->location.file, data->location.line);
}

void __ubsan_handle_out_of_bounds_abort(const Subscript* data, uintptr_t index) {
    hostcuda_fault(
        kUndefined, nullptr, "index %lld out of bounds of %s at %s:%u", integer(data->index, index), data->array->name,
        data->location.file, data->location.line);
}

void __ubsan_handle_type_mismatch_v1_abort(const TypeMismatch* data, uintptr_t pointer) {
    static const char* const kAccesses[] = {"load", "store", "reference", "member access", "member call"};
    const char* const access = data->access < 5 ? kAccesses[data->access] : "access";
    const unsigned alignment = 1u << data->log_alignment;
    if (pointer % alignment == 0 || pointer == 0)
        hostcuda_fault(
            kUndefined, nullptr, "%s of %s through a null pointer at %s:%u", access, data->type->name,
            data->location.file, data->location.line);
    hostcuda_fault(
        kMisaligned, reinterpret_cast<const void*>(pointer), "misaligned %s: %s needs an address divisible by %u at %s:%u",
        access, data->type->name, alignment, data->location.file, data->location.line);
}

}  // extern "C"
