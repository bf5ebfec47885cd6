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

// -- context switch ---------------------------------------------------------------------------------------------------

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

// -- floating-point mode: CuPy compiles with -ftz=true, which concerns float32 only ----------------------------------

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

// -- state of the launch; there is one at a time ----------------------------------------------------------------------

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
};

struct Fault {
    int kind;
    unsigned block, thread;
    int is_write;  // 1 write, 0 read, -1 unknown
    uint64_t address;
    char message[512];
};

struct Fiber {
    Context context;
    unsigned char* stack;
};

enum State : uint8_t { kFresh, kReady, kRunning, kAtBarrier, kInWarp, kExited };

struct Copy {
    void* target;
    unsigned bytes;
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
    // Asynchronous copies that have not arrived.
    std::vector<Copy> copies;
};

const Launch* launch;
Fault* fault;
Context scheduler;
volatile bool in_fiber;  // set and cleared by fibers themselves, so that a signal never finds it set mid-switch
pthread_t launch_thread;

Thread threads[kMaxThreads];
unsigned current, num_exited, num_at_barrier;
unsigned ready_in_warp[kMaxWarps];  // fresh or ready threads

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

// -- faults -----------------------------------------------------------------------------------------------------------

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
        report(kMemory, "memory fault");
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

// -- fibers -----------------------------------------------------------------------------------------------------------

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

void pause(Fiber* fiber) {
    in_fiber = false;
    switch_context(&fiber->context, &scheduler);
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
    threads[t].state = kReady;
    ++ready_in_warp[t / kWarpSize];
}

// -- scheduler --------------------------------------------------------------------------------------------------------

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

bool same_place(const Thread& a, const Thread& b) { return a.line == b.line && strcmp(a.file, b.file) == 0; }

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
    return true;
}

bool run_block() {
    const unsigned block = launch->block;
    num_exited = num_at_barrier = 0;
    for (unsigned t = 0; t < block; ++t) {
        threads[t].state = kFresh;
        threads[t].fiber = nullptr;
        threads[t].copies.clear();
    }
    for (unsigned warp = 0; warp < num_warps(); ++warp)
        ready_in_warp[warp] = block - warp * kWarpSize < kWarpSize ? block - warp * kWarpSize : kWarpSize;

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

}  // namespace

// -- called by kernels ------------------------------------------------------------------------------------------------

unsigned char* hostcuda_shared_memory() { return launch->shared; }

void hostcuda_block_barrier(const char* file, int line) {
    ++num_at_barrier;
    wait(kAtBarrier, "__syncthreads", file, line);
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
    void* records[kWarpSize] = {};
    bool complete = true;
    for (unsigned i = 0; i < kWarpSize && complete; ++i) {
        if (!(mask >> i & 1u)) continue;
        const Thread& other = threads[first + i];
        records[i] = other.record;
        complete = i == lane || (other.state == kInWarp && other.mask == mask && other.combine == combine &&
                                 same_place(other, self));
    }
    if (complete) {
        combine(records);
        for (unsigned i = 0; i < kWarpSize; ++i)
            if (mask >> i & 1u) make_ready(first + i);
    }
    wait(complete ? kReady : kInWarp, name, file, line);
}

// A copy may arrive at once or as late as its wait: the forward schedule delays them all, which shows a missing wait or
// barrier before the data is read; the reverse schedule delays none, which shows a missing barrier before the old data
// is overwritten; a random one tosses a coin.
void hostcuda_copy_async(void* shared, const void* global, unsigned bytes) {
    for (const void* address : {static_cast<const void*>(shared), global})
        if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
            hostcuda_fault(
                kMisaligned, address, "misaligned cp.async: %u bytes need addresses divisible by %u", bytes, bytes);
    const unsigned char* const begin = launch->shared;
    const unsigned char* const target = static_cast<unsigned char*>(shared);
    if (target < begin || target + bytes > begin + launch->shared_bytes)
        hostcuda_fault(kMemory, shared, "cp.async to outside shared memory");
    Copy copy = {shared, bytes, {}};
    memcpy(copy.data, global, bytes);
    if (launch->schedule == kForward || (launch->schedule == kRandom && random_below(2)))
        threads[current].copies.push_back(copy);
    else
        memcpy(shared, copy.data, bytes);
}

void hostcuda_copy_async_wait() {
    for (const Copy& copy : threads[current].copies) memcpy(copy.target, copy.data, copy.bytes);
    threads[current].copies.clear();
}

// -- called by Python -------------------------------------------------------------------------------------------------

// Runs a launch; `result->kind` says how it ended. Returns nonzero if the harness itself has no memory.
extern "C" int hostcuda_launch(const Launch* what, Fault* result, uint16_t shared_poison) {
    if (stacks == nullptr) {
        void* const memory =
            mmap(nullptr, kMaxThreads * kStackSlot, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) return 1;
        stacks = static_cast<unsigned char*>(memory);
    }
    launch = what;
    fault = result;
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

// -- undefined behaviour: what -fsanitize calls, so that neither libubsan nor a dead process is needed ----------------

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
