/* A CUDA runtime that holds one H100 and runs nothing. What torch's libraries want of a runtime and
   is not here returns 0 (see build.py). Device memory is host memory, kernels do nothing. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "driver_types.h"

typedef int Error;

/* ------------------------------------------------------------------------------- the device */
static __thread int current = 0;
Error cudaGetDeviceCount(int *count) {
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  *count = !visible || *visible;
  return *count ? 0 : cudaErrorNoDevice;
}
Error cudaGetDevice(int *device) { *device = current; return 0; }
Error cudaSetDevice(int device) { current = device; return 0; }
Error cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
Error cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
const char *cudaGetErrorString(Error error) { return "stub"; }
const char *cudaGetErrorName(Error error) { return "stub"; }
Error cudaDeviceGetPCIBusId(char *id, int length, int device) {
  strncpy(id, "0000:00:00.0", length);
  return 0;
}
Error cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return 0; }
Error cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H100 (stub)");
  p->major = 9;
  p->totalGlobalMem = 80L << 30;
  p->multiProcessorCount = 132;
  p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->regsPerMultiprocessor = p->regsPerBlock = 65536;
  p->l2CacheSize = 50 << 20;
  p->textureAlignment = 512;
  p->memoryBusWidth = 5120;
  return 0;
}
Error cudaDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxGridDimX: case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ:
      *value = 65535; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    default: *value = 1;
  }
  return 0;
}
Error cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *function) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->binaryVersion = a->ptxVersion = 90;
  return 0;
}
Error cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function,
                                                             int size, size_t shared, unsigned f) {
  *blocks = 2;
  return 0;
}
/* Driver functions that the stub of the driver lacks do what cuInit does there: nothing. */
Error cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                       unsigned long long flags, int *status) {
  void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_GLOBAL);
  *function = driver ? dlsym(driver, name) : NULL;
  if (driver && !*function) *function = dlsym(driver, "cuInit");
  if (status) *status = 0;
  return 0;
}

/* ------------------------------------------------------------------------ streams and events */
static void *handle(void) {
  static long last = 0x1000;
  return (void *)__atomic_add_fetch(&last, 16, __ATOMIC_RELAXED);
}
Error cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return 0;
}
Error cudaStreamCreate(void **stream) { *stream = handle(); return 0; }
Error cudaStreamCreateWithFlags(void **stream, unsigned flags) { *stream = handle(); return 0; }
Error cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
  *stream = handle();
  return 0;
}
Error cudaStreamGetPriority(void *stream, int *priority) { *priority = 0; return 0; }
Error cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
Error cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id, void *graph,
                               void *dependencies, void *edges, size_t *count) {
  if (status) *status = 0;
  if (id) *id = 0;
  if (count) *count = 0;
  return 0;
}
Error cudaEventCreate(void **event) { *event = handle(); return 0; }
Error cudaEventCreateWithFlags(void **event, unsigned flags) { *event = handle(); return 0; }
Error cudaEventElapsedTime(float *ms, void *start, void *stop) { *ms = 1; return 0; }

/* ------------------------------------------------------------------------------------ memory */
static void *aligned(size_t bytes) { return aligned_alloc(512, (bytes + 511) / 512 * 512); }

Error cudaMemGetInfo(size_t *unused, size_t *total) {
  *unused = 78L << 30;
  *total = 80L << 30;
  return 0;
}
Error cudaMalloc(void **memory, size_t bytes) {
  *memory = aligned(bytes);
  return *memory ? 0 : cudaErrorMemoryAllocation;
}
Error cudaFree(void *memory) { free(memory); return 0; }

/* Page-locked memory is known again, so that `is_pinned` tells it from the rest. */
enum { MOST_PINNED = 4096 };
static struct { char *start; size_t bytes; } pinned[MOST_PINNED];
static int pinned_count = 0;

Error cudaHostAlloc(void **memory, size_t bytes, unsigned flags) {
  int place = __atomic_fetch_add(&pinned_count, 1, __ATOMIC_RELAXED);
  if (place >= MOST_PINNED || !(*memory = aligned(bytes))) return cudaErrorMemoryAllocation;
  pinned[place].bytes = bytes;
  pinned[place].start = *memory;
  return 0;
}
Error cudaFreeHost(void *memory) {
  for (int i = 0; i < pinned_count; i++)
    if (pinned[i].start == memory) pinned[i].bytes = 0;
  free(memory);
  return 0;
}
Error cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *memory) {
  memset(a, 0, sizeof *a);
  a->type = cudaMemoryTypeUnregistered;
  for (int i = 0; i < pinned_count; i++)
    if ((uintptr_t)memory - (uintptr_t)pinned[i].start < pinned[i].bytes)
      a->type = cudaMemoryTypeHost;
  return 0;
}
Error cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
  memcpy(to, from, bytes);
  return 0;
}
Error cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
  memcpy(to, from, bytes);
  return 0;
}
Error cudaMemset(void *to, int value, size_t bytes) { memset(to, value, bytes); return 0; }
Error cudaMemsetAsync(void *to, int value, size_t bytes, void *stream) {
  memset(to, value, bytes);
  return 0;
}
