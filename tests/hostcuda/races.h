// Stands in front of a kernel whose accesses are watched: what orders the accesses of threads goes through races.cpp.
#define hostcuda_block_barrier races_block_barrier
#define hostcuda_warp_meet races_warp_meet
#define hostcuda_copy_async races_copy_async
#define hostcuda_copy_async_commit races_copy_async_commit
#define hostcuda_copy_async_wait races_copy_async_wait
#define hostcuda_copy_async_wait_all races_copy_async_wait_all
#define hostcuda_read_matrix_row races_read_matrix_row
