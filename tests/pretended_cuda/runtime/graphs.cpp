// Launches of kernels, which compute nothing, and graphs, which do their nodes again in the order of the capture.
#include <cxxabi.h>

#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "shared.h"

using namespace pretended;

namespace {

struct Configuration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

std::unordered_map<const void*, const char*>& names() {  // of kernels, registered before main
    static std::unordered_map<const void*, const char*> found;
    return found;
}

std::string name_of(const void* kernel) {
    Held held(lock);
    auto found = names().find(kernel);
    if (found == names().end()) return "a kernel without a name";
    int status = 0;
    char* readable = abi::__cxa_demangle(found->second, nullptr, nullptr, &status);
    std::string name = status == 0 ? readable : found->second;
    free(readable);
    return name;
}

cudaError_t launch_kernel(const void* kernel, cudaStream_t stream) {
    if (computes_numbers())
        if (auto error = without_numbers(name_of(kernel))) return error;
    return launch(stream, KERNELS);
}

}  // namespace

extern "C" {

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
    configurations.push_back({grid, block, shared, stream});
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    if (configurations.empty()) return fail(cudaErrorMissingConfiguration, "__cudaPopCallConfiguration");
    auto found = configurations.back();
    configurations.pop_back();
    *grid = found.grid, *block = found.block, *shared = found.shared, *(cudaStream_t*)stream = found.stream;
    return cudaSuccess;
}

void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    Held held(lock);
    names()[kernel] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 1; }

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
    return launch_kernel(kernel, stream);
}
cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
    return launch_kernel(kernel, stream);
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
    return launch_kernel(kernel, stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
    return launch_kernel(kernel, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* configuration, const void* kernel, void**) {
    return launch_kernel(kernel, configuration->stream);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    found->numRegs = 32;
    found->binaryVersion = found->ptxVersion = 90;
    found->maxDynamicSharedSizeBytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* number, const void*, int, size_t) {
    *number = 2;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* number, const void*, int, size_t, unsigned) {
    *number = 2;
    return cudaSuccess;
}

using Graph = std::vector<Node>;

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
    *made = (cudaGraphExec_t) new Graph(*(Graph*)graph);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    Stream* at;
    {
        Held held(lock);
        counts[GRAPH_LAUNCHES]++;
        at = stream_at(stream);
    }
    for (auto& node : *(Graph*)graph)
        if (auto error = work(at, node, "cudaGraphLaunch")) return error;
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete (Graph*)graph;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
    delete (Graph*)graph;
    return cudaSuccess;
}
cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) { return cudaSuccess; }
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* number) {
    *number = ((Graph*)graph)->size();
    return cudaSuccess;
}
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* number) {
    *number = 0;
    return cudaSuccess;
}

// What a graph keeps alive (torch 2.15: events of collectives) is never destroyed: a process has few of them.
cudaError_t cudaUserObjectCreate(cudaUserObject_t* made, void* kept, cudaHostFn_t, unsigned, unsigned) {
    *made = (cudaUserObject_t)kept;
    return cudaSuccess;
}
cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) { return cudaSuccess; }
cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) { return cudaSuccess; }

// For the other libraries and for Python.

// A launch by a library; where numbers count the name is that of a call that computes nothing.
int pretended_launch(void* stream, int count, const char* name) {
    if (name && computes_numbers())
        if (auto error = without_numbers(name)) return error;
    return launch((cudaStream_t)stream, (Count)count);
}

}  // extern "C"
