// What the parts of the pretended CUDA runtime share; ../__init__.py says what it is for.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace pretended {

// Of everything below. Recursive: calls of the runtime use each other.
extern std::recursive_mutex lock;
using Held = std::lock_guard<std::recursive_mutex>;

extern thread_local int device;
extern thread_local cudaStreamCaptureMode thread_mode;

// In the order of NAMES in ../start/pretended_operators/runtime.py.
enum Count {
    KERNELS,
    GRAPH_LAUNCHES,
    WAITS,
    COPIES,
    MEMSETS,
    ALLOCATIONS,
    BLAS,
    DNN,
    NCCL,
    TRITON,
    QUERIES,
    CAPTURED,
    WITHOUT_NUMBERS,
    COUNTS
};
extern long counts[COUNTS];

int gpus();
size_t capacity();  // bytes of one GPU
cudaError_t fail(cudaError_t error, const std::string& what);
bool computes_numbers();
// A kernel of which no operator took the place: an error where numbers count, for it would compute nothing.
cudaError_t without_numbers(const std::string& kernel);

// What an operator of Python does again at each replay; other than 0 where it failed.
using Operator = int (*)(void*);

struct Node {
    enum Kind { KERNEL, COPY, SET, HOST, OPERATOR } kind = KERNEL;
    void* to = nullptr;
    const void* from = nullptr;
    size_t bytes = 0;
    int value = 0;
    cudaHostFn_t call = nullptr;
    Operator again = nullptr;
    void* data = nullptr;
    std::shared_ptr<void> held = nullptr;  // the data of an operator, as long as a graph may ask for it
};

struct Stream;

// Work on a stream counts up the stream's clock; an event carries the clocks of what lies before it. At the end of a
// capture its first stream must know the last work of all others, or they are not joined.
using Clocks = std::map<Stream*, long>;

struct Undo {
    char* at;
    std::vector<char> bytes;
};

struct Capture {
    bool valid = true;
    unsigned long long id;
    Stream* first;
    cudaStreamCaptureMode mode;
    std::thread::id thread;
    std::vector<Node> nodes;
    std::map<Stream*, Clocks> known;
    Clocks own;
    // A capture computes nothing. Here its work is done at once, so that what follows sees real values (an index out
    // of bounds would end it), and undone at its end.
    std::vector<Undo> undo;
    void keep(void* at, size_t bytes);
    void restore();
};

struct Stream {
    Capture* capture = nullptr;
    unsigned flags = 0;
    int priority = 0;
    int device = 0;
};

struct Event {
    Capture* capture = nullptr;
    unsigned long long capture_id = 0;  // the capture itself may be gone, and another at its place
    Clocks clocks;
    double milliseconds = 0;
    bool is_recorded = false;
    bool is_captured() const;
};

struct Block {
    enum Kind { HOST, DEVICE, REGISTERED } kind;
    size_t bytes;
    size_t mapped;
    int device;
};

extern std::set<Capture*> captures;

Stream* legacy_stream(int device);
Stream* stream_at(cudaStream_t stream);
bool is_of_captures_that_block(Stream* stream);
// Calls that CUDA forbids while a capture runs that this thread's mode looks at.
cudaError_t refused_in_captures(const char* what);
// Work comes to a stream: it becomes a node of the stream's capture, or it is done.
cudaError_t work(Stream* stream, const Node& node, const char* what);
cudaError_t launch(cudaStream_t stream, Count count);
// Something waits: it is counted, and Python hears of it where it listens. Without the lock, which Python's may wait
// for.
enum Wait { OF_DEVICE, OF_STREAM, OF_EVENT, OF_COPY };
void wait_is_counted(Wait kind);
cudaError_t invalidate(Capture* capture, cudaError_t error, const char* what);

const std::pair<char* const, Block>* block_of(const void* at);
size_t used_bytes(int device);
int attribute(int which);

}  // namespace pretended
