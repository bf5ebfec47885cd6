// What conv1d_depthwise and conv_transpose1d_depthwise share: how a block's threads are dealt to rows, 16-byte accesses
// to rows of any alignment, and the layout of a row's window in shared memory.
//
// A row is one output channel of one sample. A block takes block_rows neighbouring rows, and of each one tile of outputs;
// row_threads threads work on a row, so that rows shorter than a block leave few threads idle.
//
// Macros read: those of common.cuh.

constexpr int kVec = sizeof(acc_t) < 16 ? 16 / int(sizeof(acc_t)) : 1;  // accumulators of a 16-byte access
constexpr int kStorageVec = 16 / int(sizeof(storage_t));               // elements of a 16-byte access
static_assert(kStorageVec % kVec == 0, "a vector of elements is a whole number of vectors of accumulators");

struct alignas(16) Vector {
    acc_t element[kVec];
};
struct alignas(16) StorageVector {
    storage_t element[kStorageVec];
};

// Elements from the last 16-byte boundary to a pointer.
__device__ __forceinline__ int elements_past_boundary(const storage_t* pointer) {
    return int((unsigned long long)pointer / sizeof(storage_t) % kStorageVec);
}

// value / divisor for 0 <= value < 2^31: the host's magic number spares the division (Divisor in families/depthwise.py).
// With 64-bit indices it divides.
__device__ __forceinline__ index_t divide(index_t value, index_t divisor, index_t magic, index_t shift) {
#if INDEX_BITS == 32
    return divisor == 1 ? value : index_t(multiply_high(unsigned(value), unsigned(magic)) >> shift);
#else
    return value / divisor;
#endif
}
