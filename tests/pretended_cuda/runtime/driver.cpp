// The driver, as far as torch and Triton ask for it; libcuda.so.1 is an empty library that needs this one.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "shared.h"

using namespace pretended;

namespace {

const CUcontext CONTEXT = (CUcontext)1;

CUresult not_supported() { return CUDA_ERROR_NOT_SUPPORTED; }

void* entry(const char* name) {
    static void* self = dlopen("libcudart.so.13", RTLD_NOW | RTLD_NOLOAD);
    void* second = dlsym(self, (std::string(name) + "_v2").c_str());
    return second ? second : dlsym(self, name);
}

void* handle() { return calloc(1, sizeof(void*)); }  // of modules and functions: an address of its own

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* found, int number) {
    *found = number;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* number) {
    *number = gpus();
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
    *value = attribute((int)which);
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char* name, int size, CUdevice) {
    snprintf(name, size, "Pretended H200");
    return CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice) {
    *bytes = capacity();
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
    *context = CONTEXT;
    return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxPushCurrent_v2(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxPopCurrent_v2(CUcontext* context) {
    if (context) *context = CONTEXT;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* found) {
    *found = device;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t* value, CUlimit) {
    *value = 1 << 20;
    return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
    *context = CONTEXT;
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char** text) {
    *text = "an error of the pretended CUDA driver";
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void*) {
    *module = (CUmodule)handle();
    return CUDA_SUCCESS;
}
CUresult cuModuleLoad(CUmodule* module, const char*) {
    *module = (CUmodule)handle();
    return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) {
    free(module);
    return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char*) {
    *function = (CUfunction)handle();
    return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
    *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

// Kernels of Triton: who lets them run where numbers count has asked for it (PRETENDED_CUDA_TRITON).
CUresult cuLaunchKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                        CUstream stream, void**, void**) {
    return (CUresult)launch((cudaStream_t)stream, TRITON);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* configuration, CUfunction, void**, void**) {
    return (CUresult)launch((cudaStream_t)configuration->hStream, TRITON);
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {  // the values of both kinds are the same
    return (CUresult)cudaStreamIsCapturing((cudaStream_t)stream, (cudaStreamCaptureStatus*)status);
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* number, CUfunction, int, size_t) {
    *number = 2;
    return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* number, CUfunction, const CUlaunchConfig*) {
    *number = 1;
    return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr at) {
    Held held(lock);
    if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
        *(CUdeviceptr*)value = at;
    else
        *(cuuint64_t*)value = 0;
    return block_of((void*)at) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    *found = entry(name);
    if (!*found) *found = (void*)not_supported;
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

CUresult cuGetProcAddress_v2(const char* name, void** found, int, cuuint64_t, CUdriverProcAddressQueryResult* result) {
    *found = entry(name);
    if (!*found) *found = (void*)not_supported;
    if (result) *result = CU_GET_PROC_ADDRESS_SUCCESS;
    return CUDA_SUCCESS;
}

}  // extern "C"
