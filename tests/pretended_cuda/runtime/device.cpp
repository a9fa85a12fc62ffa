// What the pretended GPU is (the figures of an H200), what errors say, and the counts of calls.
#include <execinfo.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "shared.h"

using namespace pretended;

long pretended::counts[COUNTS];

namespace {

thread_local cudaError_t last = cudaSuccess;
std::set<std::string> without;  // names of kernels that computed nothing where numbers count
thread_local std::string last_without;
std::atomic<void (*)(int)> listener{nullptr};
thread_local int allowed = 0;

const char* setting(const char* name, const char* otherwise) {
    const char* found = getenv(name);
    return found && *found ? found : otherwise;
}

}  // namespace

int pretended::gpus() {
    static int number = atoi(setting("PRETENDED_CUDA_GPUS", "1"));
    return number;
}

size_t pretended::capacity() {
    static size_t bytes = size_t(atof(setting("PRETENDED_CUDA_GIB", "139.8")) * (1ull << 30));
    return bytes;
}

bool pretended::computes_numbers() {
    static bool numbers = atoi(setting("PRETENDED_CUDA_NUMBERS", "1")) != 0;
    return numbers;
}

cudaError_t pretended::fail(cudaError_t error, const std::string& what) {
    last = error;
    static bool prints = atoi(setting("PRETENDED_CUDA_TRACE", "0")) != 0;
    if (prints) {
        fprintf(stderr, "pretended CUDA: %s gives error %d\n", what.c_str(), error);
        void* frames[16];
        backtrace_symbols_fd(frames, backtrace(frames, 16), 2);
    }
    return error;
}

cudaError_t pretended::without_numbers(const std::string& kernel) {
    if (allowed) return cudaSuccess;
    static bool is_strict = atoi(setting("PRETENDED_CUDA_STRICT", "1")) != 0;
    Held held(lock);
    counts[WITHOUT_NUMBERS]++;
    if (without.insert(kernel).second) fprintf(stderr, "pretended CUDA: no numbers of %.300s\n", kernel.c_str());
    if (!is_strict) return cudaSuccess;
    last_without = "the pretended CUDA runtime cannot compute " + kernel.substr(0, 300);
    return fail(cudaErrorNotSupported, last_without);
}

void pretended::wait_is_counted(Wait kind) {
    {
        Held held(lock);
        counts[WAITS]++;
    }
    if (listener) listener(kind);
}

int pretended::attribute(int which) {
    switch (which) {
        case cudaDevAttrComputeCapabilityMajor:
            return 9;
        case cudaDevAttrComputeCapabilityMinor:
            return 0;
        case cudaDevAttrMultiProcessorCount:
            return 132;
        case cudaDevAttrMaxThreadsPerBlock:
            return 1024;
        case cudaDevAttrMaxThreadsPerMultiProcessor:
            return 2048;
        case cudaDevAttrMaxSharedMemoryPerBlock:
            return 49152;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            return 232448;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
            return 233472;
        case cudaDevAttrMaxRegistersPerBlock:
        case cudaDevAttrMaxRegistersPerMultiprocessor:
            return 65536;
        case cudaDevAttrWarpSize:
            return 32;
        case cudaDevAttrMaxGridDimX:
            return 2147483647;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ:
            return 65535;
        case cudaDevAttrMaxBlockDimX:
        case cudaDevAttrMaxBlockDimY:
            return 1024;
        case cudaDevAttrMaxBlockDimZ:
            return 64;
        case cudaDevAttrClockRate:
            return 1980000;
        case cudaDevAttrMemoryClockRate:
            return 3201000;
        case cudaDevAttrGlobalMemoryBusWidth:
            return 6144;
        case cudaDevAttrL2CacheSize:
            return 62914560;
        case cudaDevAttrTextureAlignment:
            return 512;
        case cudaDevAttrAsyncEngineCount:
            return 3;
        case cudaDevAttrUnifiedAddressing:
        case cudaDevAttrConcurrentKernels:
        case cudaDevAttrCooperativeLaunch:
        case cudaDevAttrManagedMemory:
        case cudaDevAttrConcurrentManagedAccess:
        case cudaDevAttrCanMapHostMemory:
        case cudaDevAttrMemoryPoolsSupported:
            return 1;
    }
    return 0;
}

extern "C" {

cudaError_t cudaGetDeviceCount(int* number) {
    *number = gpus();
    return gpus() ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaSetDevice(int given) {
    if (given < 0 || given >= gpus()) return fail(cudaErrorInvalidDevice, "cudaSetDevice");
    device = given;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* found) {
    *found = device;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDA_VERSION;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDA_VERSION;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
    *value = attribute(which);
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* of, int) {
    memset(of, 0, sizeof *of);
    snprintf(of->name, sizeof of->name, "Pretended H200");
    of->totalGlobalMem = capacity();
    of->major = attribute(cudaDevAttrComputeCapabilityMajor);
    of->minor = attribute(cudaDevAttrComputeCapabilityMinor);
    of->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
    of->warpSize = attribute(cudaDevAttrWarpSize);
    of->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
    of->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    of->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    of->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    of->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    of->regsPerBlock = of->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerBlock);
    of->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
    of->textureAlignment = attribute(cudaDevAttrTextureAlignment);
    of->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
    of->asyncEngineCount = attribute(cudaDevAttrAsyncEngineCount);
    of->concurrentKernels = of->unifiedAddressing = of->cooperativeLaunch = of->managedMemory = 1;
    for (int axis = 0; axis < 3; axis++) {
        of->maxGridSize[axis] = attribute(cudaDevAttrMaxGridDimX + axis);
        of->maxThreadsDim[axis] = attribute(cudaDevAttrMaxBlockDimX + axis);
    }
    return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
    *can = 1;
    return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char* name, int size, int of) {
    snprintf(name, size, "0000:%02x:00.0", of);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

cudaError_t cudaGetLastError() {
    auto error = last;
    last = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError() { return last; }

#define NAME(error) \
    case error:     \
        return #error
const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        NAME(cudaSuccess);
        NAME(cudaErrorInvalidValue);
        NAME(cudaErrorMemoryAllocation);
        NAME(cudaErrorNoDevice);
        NAME(cudaErrorInvalidDevice);
        NAME(cudaErrorLaunchFailure);
        NAME(cudaErrorIllegalState);
        NAME(cudaErrorNotSupported);
        NAME(cudaErrorStreamCaptureUnsupported);
        NAME(cudaErrorStreamCaptureInvalidated);
        NAME(cudaErrorStreamCaptureMerge);
        NAME(cudaErrorStreamCaptureUnmatched);
        NAME(cudaErrorStreamCaptureUnjoined);
        NAME(cudaErrorStreamCaptureIsolation);
        NAME(cudaErrorStreamCaptureImplicit);
        NAME(cudaErrorCapturedEvent);
        NAME(cudaErrorStreamCaptureWrongThread);
        default:
            return "an error of the pretended CUDA runtime";
    }
}

// As CUDA says it: torch and its callers look for some of these words.
const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorMemoryAllocation:
            return "out of memory";
        case cudaErrorStreamCaptureUnsupported:
            return "operation not permitted when stream is capturing";
        case cudaErrorStreamCaptureInvalidated:
            return "operation failed due to a previous error during capture";
        case cudaErrorStreamCaptureUnjoined:
            return "capturing stream has unjoined work";
        case cudaErrorStreamCaptureIsolation:
            return "dependency created on uncaptured work in another stream";
        case cudaErrorStreamCaptureImplicit:
            return "operation would make the legacy stream depend on a capturing blocking stream";
        case cudaErrorCapturedEvent:
            return "operation not permitted on an event last recorded in a capturing stream";
        case cudaErrorNotSupported:
            return last_without.empty() ? "operation not supported" : last_without.c_str();
        default:
            return cudaGetErrorName(error);
    }
}

// For Python.

// Between +1 and -1 kernels of this thread may compute nothing.
void pretended_allow(int change) { allowed += change; }

void pretended_listen_to_waits(void (*call)(int)) { listener = call; }

long pretended_count(int which) { return which >= 0 && which < COUNTS ? counts[which] : -1; }

}  // extern "C"
