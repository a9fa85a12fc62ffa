// Memory of the device and pinned memory: both are the host's, mapped and not reserved.
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "shared.h"

using namespace pretended;

namespace {

const size_t PAGE = 4096;
const size_t GRANULARITY = 2u << 20;  // of cudaMalloc
const size_t CONTEXT = 512u << 20;    // bytes that a real context takes
const size_t LARGE_MEMSET = 8u << 20;

std::map<char*, Block> blocks;
std::map<int, size_t> used;

size_t up(size_t bytes, size_t step) { return (bytes + step - 1) / step * step; }

cudaError_t allocate(void** at, size_t bytes, Block::Kind kind, const char* what) {
    Held held(lock);
    counts[ALLOCATIONS]++;
    *at = nullptr;
    if (bytes == 0) return cudaSuccess;
    size_t step = kind == Block::DEVICE ? GRANULARITY : PAGE, mapped = up(bytes, step);
    if (kind == Block::DEVICE && used[device] + mapped + CONTEXT > capacity())
        return fail(cudaErrorMemoryAllocation, what);
    char* start =
        (char*)mmap(nullptr, mapped + step, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return fail(cudaErrorMemoryAllocation, what);
    char* aligned = (char*)up((uintptr_t)start, step);
    if (aligned > start) munmap(start, aligned - start);
    if (start + step > aligned) munmap(aligned + mapped, start + step - aligned);
    blocks[aligned] = Block{kind, bytes, mapped, device};
    if (kind == Block::DEVICE) used[device] += mapped;
    *at = aligned;
    return cudaSuccess;
}

cudaError_t release(void* at, const char* what) {
    Held held(lock);
    if (!at) return cudaSuccess;
    auto found = blocks.find((char*)at);
    if (found == blocks.end()) return fail(cudaErrorInvalidValue, what);
    if (found->second.kind == Block::DEVICE) used[found->second.device] -= found->second.mapped;
    munmap(at, found->second.mapped);
    blocks.erase(found);
    return cudaSuccess;
}

bool on_gpu(const void* at) {
    auto* block = block_of(at);
    return block && block->second.kind == Block::DEVICE;
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t stream, const char* what) {
    Held held(lock);
    counts[COPIES]++;
    Stream* at = stream_at(stream);
    if (at->capture && bytes && (!block_of(to) || !block_of(from)))
        return invalidate(at->capture, cudaErrorStreamCaptureUnsupported, "a copy of pageable memory in a capture");
    Node node;
    node.kind = Node::COPY, node.to = to, node.from = from, node.bytes = bytes;
    // Where nothing computes, a GPU's memory holds nothing worth the host's pages.
    if (!computes_numbers() && on_gpu(to) && on_gpu(from)) node.bytes = 0;
    return work(at, node, what);
}

// Pages that are zero already stay unmapped, so that the zeros of a large model cost the host nothing.
bool unmapped_zeros(void* at, size_t bytes) {
    auto* block = block_of(at);
    if (bytes < LARGE_MEMSET || !block || block->second.kind != Block::DEVICE) return false;
    char *start = (char*)at, *end = start + bytes;
    char *first = (char*)up((uintptr_t)start, PAGE), *last = (char*)((uintptr_t)end / PAGE * PAGE);
    madvise(first, last - first, MADV_DONTNEED);
    memset(start, 0, first - start);
    memset(last, 0, end - last);
    return true;
}

}  // namespace

const std::pair<char* const, Block>* pretended::block_of(const void* at) {
    auto found = blocks.upper_bound((char*)at);
    if (found == blocks.begin()) return nullptr;
    --found;
    return (char*)at < found->first + found->second.bytes ? &*found : nullptr;
}

size_t pretended::used_bytes(int device) { return used[device]; }

extern "C" {

cudaError_t cudaMalloc(void** at, size_t bytes) {
    Held held(lock);
    if (auto error = refused_in_captures("cudaMalloc")) return error;
    return allocate(at, bytes, Block::DEVICE, "cudaMalloc");
}

cudaError_t cudaFree(void* at) {
    Held held(lock);
    if (at)
        if (auto error = refused_in_captures("cudaFree")) return error;
    return release(at, "cudaFree");
}

cudaError_t cudaMallocAsync(void** at, size_t bytes, cudaStream_t) {
    return allocate(at, bytes, Block::DEVICE, "cudaMallocAsync");
}
cudaError_t cudaFreeAsync(void* at, cudaStream_t) { return release(at, "cudaFreeAsync"); }

cudaError_t cudaHostAlloc(void** at, size_t bytes, unsigned) {
    Held held(lock);
    if (auto error = refused_in_captures("cudaHostAlloc")) return error;
    return allocate(at, bytes, Block::HOST, "cudaHostAlloc");
}

cudaError_t cudaFreeHost(void* at) {
    Held held(lock);
    if (auto error = refused_in_captures("cudaFreeHost")) return error;
    return release(at, "cudaFreeHost");
}

cudaError_t cudaHostRegister(void* at, size_t bytes, unsigned) {
    Held held(lock);
    blocks[(char*)at] = Block{Block::REGISTERED, bytes, 0, device};
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* at) {
    Held held(lock);
    blocks.erase((char*)at);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* unused, size_t* total) {
    Held held(lock);
    *total = capacity();
    *unused = capacity() - std::min(capacity(), used[device] + CONTEXT);
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* at) {
    Held held(lock);
    memset(found, 0, sizeof *found);
    auto* block = block_of(at);
    found->type = cudaMemoryTypeUnregistered;
    found->device = -2;
    if (!block) return cudaSuccess;
    bool is_device = block->second.kind == Block::DEVICE;
    found->type = is_device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
    found->device = block->second.device;
    found->hostPointer = is_device ? nullptr : (void*)at;
    found->devicePointer = (void*)at;
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    wait_is_counted(OF_COPY);
    Held held(lock);
    if (auto error = refused_in_captures("cudaMemcpy")) return error;
    counts[COPIES]++;
    memmove(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    return copy(to, from, bytes, stream, "cudaMemcpyAsync");
}

cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
    return copy(to, from, bytes, stream, "cudaMemcpyPeerAsync");
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t stream) {
    for (size_t row = 0; row < height; row++) {
        char* target = (char*)to + row * to_pitch;
        if (auto error = copy(target, (const char*)from + row * from_pitch, width, stream, "cudaMemcpy2DAsync"))
            return error;
    }
    return cudaSuccess;
}

cudaError_t cudaMemset(void* at, int value, size_t bytes) {
    Held held(lock);
    counts[MEMSETS]++;
    Node node;
    node.kind = Node::SET, node.to = at, node.bytes = bytes, node.value = value;
    return work(legacy_stream(device), node, "cudaMemset");
}

cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t stream) {
    Held held(lock);
    counts[MEMSETS]++;
    Stream* on = stream_at(stream);
    if (value == 0 && !on->capture && unmapped_zeros(at, bytes)) return cudaSuccess;
    Node node;
    node.kind = Node::SET, node.to = at, node.bytes = bytes, node.value = value;
    return work(on, node, "cudaMemsetAsync");
}

// Variables of kernels, which compute nothing.
cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
cudaError_t cudaGetSymbolAddress(void** at, const void*) {
    static char space[1 << 20];
    *at = space;
    return cudaSuccess;
}

cudaError_t cudaIpcCloseMemHandle(void*) { return cudaSuccess; }
cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t*, cudaEvent_t) { return cudaErrorNotSupported; }
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t*, void*) { return cudaErrorNotSupported; }
cudaError_t cudaIpcOpenEventHandle(cudaEvent_t*, cudaIpcEventHandle_t) { return cudaErrorNotSupported; }
cudaError_t cudaIpcOpenMemHandle(void**, cudaIpcMemHandle_t, unsigned) { return cudaErrorNotSupported; }

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
    *pool = (cudaMemPool_t)1;
    return cudaSuccess;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
    *(uint64_t*)value = 0;
    return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) { return cudaSuccess; }
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }

size_t pretended_used_bytes(int device) {
    Held held(lock);
    return used_bytes(device);
}

}  // extern "C"
