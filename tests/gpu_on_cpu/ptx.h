// What each PTX instruction does, for the C++ that ptx.py writes: one function an instruction, by the PTX ISA's text.
//
// Types have PTX's own names. Registers hold bits: a value goes from one type to another of the same size unchanged.

#pragma once

#include <stdint.h>

#include "hostcuda.h"

// The addresses that a kernel may use as global memory, set before each launch.
extern "C" __attribute__((visibility("default"))) uint64_t ptx_memory[2];
uint64_t ptx_memory[2];

namespace ptx {

typedef bool pred;
typedef uint8_t b8, u8;
typedef int8_t s8;
typedef uint16_t b16, u16;
typedef int16_t s16;
typedef uint32_t b32, u32;
typedef int32_t s32;
typedef uint64_t b64, u64;
typedef int64_t s64;
typedef float f32;
typedef double f64;
struct f16 {
    uint16_t bits;
};
struct bf16 {
    uint16_t bits;
};

#define PTX_INLINE inline __attribute__((always_inline))

template <typename T>
struct Traits {
    static constexpr bool is_integer = true;
};
template <>
struct Traits<f16> {
    static constexpr bool is_integer = false;
};
template <>
struct Traits<bf16> {
    static constexpr bool is_integer = false;
};
template <>
struct Traits<f32> {
    static constexpr bool is_integer = false;
};
template <>
struct Traits<f64> {
    static constexpr bool is_integer = false;
};

template <typename T>
constexpr bool is_signed = T(-1) < T(0);
template <typename T>
constexpr unsigned width = 8 * sizeof(T);

// An operand as an instruction of another type reads or writes it: a wider integer register is cut off, a narrower value
// is extended by its own sign.
template <typename To, typename From>
PTX_INLINE To as(From value) {
    if constexpr (Traits<To>::is_integer && Traits<From>::is_integer) {
        return To(value);
    } else {
        static_assert(sizeof(To) == sizeof(From), "a register of another size");
        To result;
        __builtin_memcpy(&result, &value, sizeof result);
        return result;
    }
}

// The unsigned integer of the same size: its arithmetic wraps.
template <typename T>
struct Unsigned {
    typedef T type;
};
template <>
struct Unsigned<s8> {
    typedef u8 type;
};
template <>
struct Unsigned<s16> {
    typedef u16 type;
};
template <>
struct Unsigned<s32> {
    typedef u32 type;
};
template <>
struct Unsigned<s64> {
    typedef u64 type;
};
template <typename T>
using unsigned_of = typename Unsigned<T>::type;

template <typename T>
struct Wide {};
template <>
struct Wide<u16> {
    typedef u32 type;
};
template <>
struct Wide<s16> {
    typedef s32 type;
};
template <>
struct Wide<u32> {
    typedef u64 type;
};
template <>
struct Wide<s32> {
    typedef s64 type;
};
template <>
struct Wide<u64> {
    typedef unsigned __int128 type;
};
template <>
struct Wide<s64> {
    typedef __int128 type;
};
template <typename T>
using wide_of = typename Wide<T>::type;

PTX_INLINE bool is_nan(f32 x) { return (as<u32>(x) & 0x7fffffffu) > 0x7f800000u; }
PTX_INLINE bool is_nan(f64 x) { return (as<u64>(x) & ~(1ull << 63)) > 0x7ffull << 52; }

// .ftz: a subnormal number becomes a zero of its sign.
PTX_INLINE f32 ftz(f32 x) {
    const u32 bits = as<u32>(x);
    return bits & 0x7f800000u ? x : as<f32>(bits & 0x80000000u);
}

// .sat: into 0 to 1; NaN becomes 0.
template <typename T>
PTX_INLINE T sat(T x) {
    return x > T(0) ? (x < T(1) ? x : T(1)) : T(0);
}

template <typename T>
PTX_INLINE T add(T a, T b) {
    return T(unsigned_of<T>(a) + unsigned_of<T>(b));
}
PTX_INLINE f32 add(f32 a, f32 b) { return a + b; }
PTX_INLINE f64 add(f64 a, f64 b) { return a + b; }

template <typename T>
PTX_INLINE T sub(T a, T b) {
    return T(unsigned_of<T>(a) - unsigned_of<T>(b));
}
PTX_INLINE f32 sub(f32 a, f32 b) { return a - b; }
PTX_INLINE f64 sub(f64 a, f64 b) { return a - b; }

PTX_INLINE f32 mul(f32 a, f32 b) { return a * b; }
PTX_INLINE f64 mul(f64 a, f64 b) { return a * b; }
PTX_INLINE f32 fma(f32 a, f32 b, f32 c) { return __builtin_fmaf(a, b, c); }
PTX_INLINE f64 fma(f64 a, f64 b, f64 c) { return __builtin_fma(a, b, c); }

template <typename T>
PTX_INLINE T mul_lo(T a, T b) {
    return T(u64(a) * u64(b));
}
template <typename T>
PTX_INLINE T mul_hi(T a, T b) {
    return T(wide_of<T>(a) * b >> width<T>);
}
template <typename T>
PTX_INLINE wide_of<T> mul_wide(T a, T b) {
    return wide_of<T>(a) * b;
}
template <typename T>
PTX_INLINE T mad_lo(T a, T b, T c) {
    return add(mul_lo(a, b), c);
}
template <typename T>
PTX_INLINE T mad_hi(T a, T b, T c) {
    return add(mul_hi(a, b), c);
}
template <typename T>
PTX_INLINE wide_of<T> mad_wide(T a, T b, wide_of<T> c) {
    return add(mul_wide(a, b), c);
}

// Division by zero yields an unspecified value, on NVIDIA's machines all ones; the remainder is then the dividend.
template <typename T>
PTX_INLINE T div(T a, T b) {
    if (b == 0) return T(-1);
    if (is_signed<T> && b == T(-1)) return sub(T(0), a);
    return a / b;
}
PTX_INLINE f32 div(f32 a, f32 b) { return a / b; }
PTX_INLINE f64 div(f64 a, f64 b) { return a / b; }
template <typename T>
PTX_INLINE T rem(T a, T b) {
    if (b == 0) return a;
    if (is_signed<T> && b == T(-1)) return T(0);
    return a % b;
}

template <typename T>
PTX_INLINE T neg(T a) {
    return sub(T(0), a);
}
PTX_INLINE f32 neg(f32 a) { return as<f32>(as<u32>(a) ^ 0x80000000u); }
PTX_INLINE f64 neg(f64 a) { return as<f64>(as<u64>(a) ^ 1ull << 63); }
template <typename T>
PTX_INLINE T abs(T a) {
    return a < 0 ? neg(a) : a;
}
PTX_INLINE f32 abs(f32 a) { return as<f32>(as<u32>(a) & 0x7fffffffu); }
PTX_INLINE f64 abs(f64 a) { return as<f64>(as<u64>(a) & ~(1ull << 63)); }

// Of floating-point numbers: a NaN gives way to the other operand, and -0 is less than +0. Two NaNs make the canonical one.
template <typename T>
PTX_INLINE T min(T a, T b) {
    if constexpr (Traits<T>::is_integer) {
        return a < b ? a : b;
    } else {
        if (is_nan(a)) return is_nan(b) ? T(as<f32>(0x7fffffffu)) : b;
        if (is_nan(b)) return a;
        if (a == b) return __builtin_signbit(a) ? a : b;
        return a < b ? a : b;
    }
}
template <typename T>
PTX_INLINE T max(T a, T b) {
    if constexpr (Traits<T>::is_integer) {
        return a > b ? a : b;
    } else {
        if (is_nan(a)) return is_nan(b) ? T(as<f32>(0x7fffffffu)) : b;
        if (is_nan(b)) return a;
        if (a == b) return __builtin_signbit(a) ? b : a;
        return a > b ? a : b;
    }
}

// The second number with the sign of the first.
PTX_INLINE f32 copysign(f32 a, f32 b) { return __builtin_copysignf(b, a); }
PTX_INLINE f64 copysign(f64 a, f64 b) { return __builtin_copysign(b, a); }

PTX_INLINE f32 sqrt(f32 a) { return __builtin_sqrtf(a); }
PTX_INLINE f64 sqrt(f64 a) { return __builtin_sqrt(a); }
template <typename T>
PTX_INLINE T rcp(T a) {
    return T(1) / a;
}

// A shift by the width of the register or more: the amount is clamped to the width.
template <typename T>
PTX_INLINE T shl(T a, u32 n) {
    return n >= width<T> ? T(0) : T(unsigned_of<T>(a) << n);
}
template <typename T>
PTX_INLINE T shr(T a, u32 n) {
    return n >= width<T> ? T(is_signed<T> && a < 0 ? -1 : 0) : T(a >> n);
}

// Funnel shifts: the upper word of (b, a) shifted left, the lower word of (b, a) shifted right.
template <bool wraps>
PTX_INLINE b32 shf_l(b32 a, b32 b, u32 n) {
    n = wraps ? n & 31 : n < 32 ? n : 32;
    return b32(((u64(b) << 32 | a) << n) >> 32);
}
template <bool wraps>
PTX_INLINE b32 shf_r(b32 a, b32 b, u32 n) {
    n = wraps ? n & 31 : n < 32 ? n : 32;
    return b32((u64(b) << 32 | a) >> n);
}

template <typename T>
PTX_INLINE u32 popc(T a) {
    return u32(__builtin_popcountll(a));
}
template <typename T>
PTX_INLINE u32 clz(T a) {
    return a == 0 ? width<T> : u32(__builtin_clzll(a)) - (64 - width<T>);
}
template <typename T>
PTX_INLINE T brev(T a) {
    T result = 0;
    for (unsigned i = 0; i < width<T>; ++i) result |= T(a >> i & 1) << (width<T> - 1 - i);
    return result;
}

// Bit field extract: a field that reaches beyond the register is filled with the sign, which is the field's own top bit
// or the register's; of unsigned numbers with zeros.
template <typename T>
inline T bfe(T a, u32 position, u32 length) {
    position &= 0xff;
    length &= 0xff;
    const unsigned msb = width<T> - 1;
    const unsigned top = position + length - 1 < msb ? position + length - 1 : msb;
    const bool sign = is_signed<T> && length != 0 && (unsigned_of<T>(a) >> top & 1);
    unsigned_of<T> result = 0;
    for (unsigned i = 0; i <= msb; ++i) {
        const bool bit = i < length && position + i <= msb ? unsigned_of<T>(a) >> (position + i) & 1 : sign;
        result |= unsigned_of<T>(bit) << i;
    }
    return T(result);
}
template <typename T>
inline T bfi(T a, T b, u32 position, u32 length) {
    position &= 0xff;
    length &= 0xff;
    for (unsigned i = 0; i < length && position + i < width<T>; ++i) {
        const T bit = T(1) << (position + i);
        b = (a >> i & 1) ? T(b | bit) : T(b & ~bit);
    }
    return b;
}

// Each nibble of the selector picks one of eight bytes; with its top bit set, it replicates that byte's sign.
PTX_INLINE b32 prmt(b32 a, b32 b, b32 selector) {
    const u64 bytes = a | u64(b) << 32;
    b32 result = 0;
    for (unsigned i = 0; i < 4; ++i) {
        const u32 nibble = selector >> (4 * i) & 15, byte = u32(bytes >> (8 * (nibble & 7))) & 0xff;
        result |= (nibble & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << (8 * i);
    }
    return result;
}

// The dot product of two 16-bit and two 8-bit numbers, the low or the high ones of four, each signed or not.
template <typename A, typename B, unsigned first = 0>
PTX_INLINE s32 dp2a(A a, B b, s32 c) {
    const s64 low = s64(A(a << 16) >> 16) * (B(b << (24 - 8 * first)) >> 24);
    const s64 high = s64(a >> 16) * (B(b << (16 - 8 * first)) >> 24);
    return s32(u32(c) + u32(low) + u32(high));
}

// The dot product of four 8-bit numbers with four others, each signed or not.
template <typename A, typename B>
PTX_INLINE s32 dp4a(A a, B b, s32 c) {
    u32 sum = u32(c);
    for (int bits = 24; bits >= 0; bits -= 8) sum += u32(A(a << bits) >> 24) * u32(B(b << bits) >> 24);
    return s32(sum);
}

#define PTX_COMPARE(name, ordered, expression)                                              \
    template <typename T>                                                                   \
    PTX_INLINE bool name(T a, T b) {                                                        \
        if constexpr (!Traits<T>::is_integer) {                                             \
            if (is_nan(a) || is_nan(b)) return !ordered;                                    \
        }                                                                                   \
        return expression;                                                                  \
    }
PTX_COMPARE(eq, true, a == b)
PTX_COMPARE(ne, true, a != b)
PTX_COMPARE(lt, true, a < b)
PTX_COMPARE(le, true, a <= b)
PTX_COMPARE(gt, true, a > b)
PTX_COMPARE(ge, true, a >= b)
PTX_COMPARE(lo, true, a < b)
PTX_COMPARE(ls, true, a <= b)
PTX_COMPARE(hi, true, a > b)
PTX_COMPARE(hs, true, a >= b)
PTX_COMPARE(equ, false, a == b)
PTX_COMPARE(neu, false, a != b)
PTX_COMPARE(ltu, false, a < b)
PTX_COMPARE(leu, false, a <= b)
PTX_COMPARE(gtu, false, a > b)
PTX_COMPARE(geu, false, a >= b)
PTX_COMPARE(num, true, true)
PTX_COMPARE(nan, false, false)
#undef PTX_COMPARE

// How a floating-point number becomes an integer.
enum class To { nearest, zero, down, up };

PTX_INLINE f64 to_integral(f64 x, To mode) {
    switch (mode) {
        case To::nearest: return __builtin_nearbyint(x);
        case To::zero: return __builtin_trunc(x);
        case To::down: return __builtin_floor(x);
        default: return __builtin_ceil(x);
    }
}

// Out of range is clamped; NaN becomes 0.
template <typename T>
inline T float_to_integer(f64 x, To mode) {
    if (is_nan(x)) return 0;
    const f64 value = to_integral(x, mode), half = f64(1ull << (width<T> - 1));
    if (value < (is_signed<T> ? -half : 0.0)) return is_signed<T> ? T(1ull << (width<T> - 1)) : T(0);
    if (value >= (is_signed<T> ? half : 2 * half)) return T(is_signed<T> ? (1ull << (width<T> - 1)) - 1 : ~0ull);
    return T(value);
}

// An integer within another type's range: cvt.sat.
template <typename To, typename From>
PTX_INLINE To saturate(From x) {
    const __int128 value = x, low = is_signed<To> ? -(__int128(1) << (width<To> - 1)) : __int128(0);
    const __int128 high = (__int128(1) << (width<To> - (is_signed<To> ? 1 : 0))) - 1;
    return To(value < low ? low : value > high ? high : value);
}

// A float32 that rounds to fewer bits as the given number does: where something was cut off, its last bit is set.
inline f32 round_to_odd(f64 x) {
    const f32 nearest = f32(x);
    if (f64(nearest) == x || is_nan(x)) return nearest;
    const u32 bits = as<u32>(nearest);
    const bool away = abs(f64(nearest)) > abs(x);
    return as<f32>((away ? bits - 1 : bits) | 1);
}
inline f64 round_to_odd(s64 x) {
    const f64 nearest = f64(x);
    const __int128 difference = __int128(nearest) - x;
    if (difference == 0) return nearest;
    const bool away = x < 0 ? difference < 0 : difference > 0;
    return as<f64>((as<u64>(nearest) - (away ? 1 : 0)) | 1);
}
inline f64 round_to_odd(u64 x) {
    const f64 nearest = f64(x);
    const __int128 difference = __int128(nearest) - __int128(x);
    return difference == 0 ? nearest : as<f64>((as<u64>(nearest) - (difference > 0 ? 1 : 0)) | 1);
}

PTX_INLINE f32 widen(f16 x) { return half_bits_to_float(x.bits); }
PTX_INLINE f32 widen(bf16 x) { return as<f32>(u32(x.bits) << 16); }
template <typename T>
T narrow(f32 x);
template <>
inline f16 narrow<f16>(f32 x) {
    return f16{float_to_half_bits_rn(x)};
}
template <>
inline bf16 narrow<bf16>(f32 x) {
    return bf16{float_to_bfloat_bits_rn(x)};
}

template <unsigned bytes>
PTX_INLINE void check_alignment(const void* address) {
    if (__builtin_expect(uintptr_t(address) % bytes != 0, 0))
        hostcuda_fault(hostcuda::kMisaligned, address, "an access of %u bytes must have an address divisible by that", bytes);
}

// cvta.to.global of what is no address of the device: a pointer of the host, or of another device.
PTX_INLINE u64 global_address(u64 address) {
    if (__builtin_expect(address != 0 && (address < ptx_memory[0] || address >= ptx_memory[1]), 0))
        hostcuda_fault(
            hostcuda::kMemory, reinterpret_cast<void*>(address), "the pointer 0x%llx is not of this device's memory",
            (unsigned long long)address);
    return address;
}

PTX_INLINE unsigned char* shared_address(u32 offset) { return hostcuda_shared_memory() + offset; }
PTX_INLINE u64 generic_of_shared(u64 offset) { return u64(hostcuda_shared_memory()) + u32(offset); }
PTX_INLINE u64 shared_of_generic(u64 address) { return address - u64(hostcuda_shared_memory()); }

struct Ballot {
    bool condition;
    u32 result;

    static void combine(Ballot* const (&lanes)[hostcuda::kWarpSize]) {
        u32 votes = 0;
        for (unsigned lane = 0; lane < hostcuda::kWarpSize; ++lane)
            votes |= u32(lanes[lane] != nullptr && lanes[lane]->condition) << lane;
        for (Ballot* lane : lanes)
            if (lane != nullptr) lane->result = votes;
    }
};

inline u32 ballot(u32 mask, bool condition) {
    Ballot record = {condition, 0};
    hostcuda::warp_collective(mask, record, "vote.sync", "PTX", 1);
    return record.result;
}

struct ShuffleOutcome {
    b32 value;
    bool found;  // whether the source lane lies in range
};

// shfl.sync as the ISA writes it down: c holds the clamp in bits 0 to 4 and the mask of the segments in bits 8 to 12.
enum class Shuffle { up, down, bfly, idx };
inline ShuffleOutcome shuffle(Shuffle mode, b32 a, u32 b, u32 c, u32 mask) {
    const u32 lane = hostcuda::lane(), segments = c >> 8 & 31, clamp = c & 31, offset = b & 31;
    const s32 last = s32((lane & segments) | (clamp & ~segments)), first = s32(lane & segments);
    s32 source;
    bool found;
    switch (mode) {
        case Shuffle::up: source = s32(lane) - s32(offset), found = source >= last; break;
        case Shuffle::down: source = s32(lane + offset), found = source <= last; break;
        case Shuffle::bfly: source = s32(lane ^ offset), found = source <= last; break;
        default: source = first | s32(offset & ~segments), found = source <= last;
    }
    return {hostcuda::shuffle(mask, a, u32(found ? source : s32(lane)), "shfl.sync", "PTX", 2), found};
}

}  // namespace ptx
