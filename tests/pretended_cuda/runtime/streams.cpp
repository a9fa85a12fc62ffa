// Streams, events and captures: work is done at once, and what CUDA forbids within a capture is an error.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "shared.h"

using namespace pretended;

std::recursive_mutex pretended::lock;
thread_local int pretended::device = 0;
thread_local cudaStreamCaptureMode pretended::thread_mode = cudaStreamCaptureModeGlobal;
std::set<Capture*> pretended::captures;

namespace {

unsigned long long next_id = 1;

// The data of operators that no graph has any more. Python fetches them: what destroys a graph may hold its lock or
// not.
std::mutex lock_of_released;
std::vector<void*> released;

void release(void* data) {
    std::lock_guard<std::mutex> held(lock_of_released);
    released.push_back(data);
}

double now() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

bool is_legacy(Stream* stream) { return stream == legacy_stream(stream->device); }

// Something waits for a stream, or asks whether its work is done.
cudaError_t waits_for(Stream* stream, const char* what) {
    if (stream->capture) return invalidate(stream->capture, cudaErrorStreamCaptureUnsupported, what);
    return refused_in_captures(what);
}

cudaError_t waits_for(Event* event, const char* what) {
    if (event->is_captured()) return invalidate(event->capture, cudaErrorCapturedEvent, what);
    return refused_in_captures(what);
}

cudaError_t make(cudaStream_t* stream, unsigned flags, int priority) {
    Held held(lock);
    *stream = (cudaStream_t) new Stream{nullptr, flags, priority, device};
    return cudaSuccess;
}

cudaError_t do_now(const Node& node) {
    switch (node.kind) {
        case Node::COPY:
            memmove(node.to, node.from, node.bytes);
            break;
        case Node::SET:
            memset(node.to, node.value, node.bytes);
            break;
        case Node::HOST:
            node.call(node.data);
            break;
        case Node::OPERATOR:
            return node.again(node.data) ? fail(cudaErrorLaunchFailure, "an operator at a replay") : cudaSuccess;
        case Node::KERNEL:
            break;
    }
    return cudaSuccess;
}

}  // namespace

Stream* pretended::legacy_stream(int device) {
    static std::map<int, Stream*> streams;
    Held held(lock);
    auto& found = streams[device];
    if (!found) found = new Stream{nullptr, 0, 0, device};
    return found;
}

Stream* pretended::stream_at(cudaStream_t stream) {
    bool is_default = stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
    return is_default ? legacy_stream(device) : reinterpret_cast<Stream*>(stream);
}

bool pretended::is_of_captures_that_block(Stream* stream) {
    if (!is_legacy(stream)) return false;
    for (auto* capture : captures)
        for (auto& [of, clocks] : capture->known)
            if (!(of->flags & cudaStreamNonBlocking)) return true;
    return false;
}

cudaError_t pretended::invalidate(Capture* capture, cudaError_t error, const char* what) {
    capture->valid = false;
    return fail(error, what);
}

cudaError_t pretended::refused_in_captures(const char* what) {
    for (auto* capture : captures) {
        bool is_global = thread_mode == cudaStreamCaptureModeGlobal && capture->mode == cudaStreamCaptureModeGlobal;
        bool is_own = capture->thread == std::this_thread::get_id() && thread_mode != cudaStreamCaptureModeRelaxed &&
                      capture->mode != cudaStreamCaptureModeRelaxed;
        if (is_global || is_own) return invalidate(capture, cudaErrorStreamCaptureUnsupported, what);
    }
    return cudaSuccess;
}

void Capture::keep(void* at, size_t bytes) {
    if (bytes) undo.push_back(Undo{(char*)at, std::vector<char>((char*)at, (char*)at + bytes)});
}

void Capture::restore() {
    for (auto one = undo.rbegin(); one != undo.rend(); ++one)
        if (block_of(one->at)) memcpy(one->at, one->bytes.data(), one->bytes.size());
    undo.clear();
}

bool Event::is_captured() const { return capture && captures.count(capture) && capture->id == capture_id; }

cudaError_t pretended::work(Stream* stream, const Node& node, const char* what) {
    {
        Held held(lock);
        if (Capture* capture = stream->capture) {
            if (!capture->valid) return fail(cudaErrorStreamCaptureInvalidated, what);
            capture->nodes.push_back(node);
            capture->known[stream][stream] = ++capture->own[stream];
            counts[CAPTURED]++;
            if (node.kind != Node::COPY && node.kind != Node::SET) return cudaSuccess;
            capture->keep(node.to, node.bytes);
        } else if (is_of_captures_that_block(stream)) {
            for (auto* capture : captures) capture->valid = false;
            return fail(cudaErrorStreamCaptureImplicit, what);
        }
    }
    // Without the lock: a replay may wait for Python's, whose holder may wait for this one.
    return do_now(node);
}

cudaError_t pretended::launch(cudaStream_t stream, Count count) {
    Held held(lock);
    Stream* at = stream_at(stream);
    if (!at->capture) counts[count]++;
    return work(at, Node{}, "a launch");
}

extern "C" {

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return make(stream, 0, 0); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) { return make(stream, flags, 0); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
    return make(stream, flags, priority);
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }  // torch keeps its streams
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
    *priority = stream_at(stream)->priority;
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
    Held held(lock);
    counts[QUERIES]++;
    return waits_for(stream_at(stream), "cudaStreamQuery");
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    wait_is_counted(OF_STREAM);
    Held held(lock);
    return waits_for(stream_at(stream), "cudaStreamSynchronize");
}

cudaError_t cudaDeviceSynchronize() {
    wait_is_counted(OF_DEVICE);
    Held held(lock);
    if (captures.empty()) return cudaSuccess;
    return invalidate(*captures.begin(), cudaErrorStreamCaptureUnsupported, "cudaDeviceSynchronize");
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void* data, unsigned) {
    call(stream, cudaSuccess, data);
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void* data) {
    Node node;
    node.kind = Node::HOST, node.call = call, node.data = data;
    return work(stream_at(stream), node, "cudaLaunchHostFunc");
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t given, unsigned flags) {
    Held held(lock);
    Stream* at = stream_at(stream);
    auto* event = (Event*)given;
    if (!event->is_recorded) return cudaSuccess;
    if (!event->is_captured()) {
        if (at->capture && !(flags & cudaEventWaitExternal))
            return invalidate(at->capture, cudaErrorStreamCaptureIsolation, "a captured stream waits for work outside");
        return cudaSuccess;
    }
    Capture* capture = event->capture;
    if (is_legacy(at))
        return invalidate(capture, cudaErrorStreamCaptureImplicit, "the legacy stream waits for a capture");
    if (at->capture && at->capture != capture) {
        capture->valid = false;
        return invalidate(at->capture, cudaErrorStreamCaptureMerge, "cudaStreamWaitEvent");
    }
    at->capture = capture;
    auto& known = capture->known[at];
    for (auto& [of, clock] : event->clocks) known[of] = std::max(known[of], clock);
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = (cudaEvent_t) new Event;
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete (Event*)event;
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t given, cudaStream_t stream, unsigned flags) {
    Held held(lock);
    Stream* at = stream_at(stream);
    auto* event = (Event*)given;
    event->milliseconds = now();
    event->is_recorded = true;
    event->capture = nullptr;
    event->clocks.clear();
    if (!at->capture || (flags & cudaEventRecordExternal)) return cudaSuccess;
    if (!at->capture->valid) return fail(cudaErrorStreamCaptureInvalidated, "cudaEventRecord");
    event->capture = at->capture;
    event->capture_id = at->capture->id;
    event->clocks = at->capture->known[at];
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, 0);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    Held held(lock);
    counts[QUERIES]++;
    return waits_for((Event*)event, "cudaEventQuery");
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    wait_is_counted(OF_EVENT);
    Held held(lock);
    return waits_for((Event*)event, "cudaEventSynchronize");
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
    *milliseconds = float(((Event*)to)->milliseconds - ((Event*)from)->milliseconds);
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    std::swap(thread_mode, *mode);
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    Held held(lock);
    Stream* at = stream_at(stream);
    if (is_legacy(at)) return fail(cudaErrorStreamCaptureUnsupported, "a capture of the legacy stream");
    if (at->capture) return fail(cudaErrorIllegalState, "a capture within a capture");
    auto* capture = new Capture;
    capture->id = next_id++;
    capture->first = at;
    capture->mode = mode;
    capture->thread = std::this_thread::get_id();
    capture->known[at];
    captures.insert(capture);
    at->capture = capture;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    Held held(lock);
    *graph = nullptr;
    Stream* at = stream_at(stream);
    Capture* capture = at->capture;
    if (!capture || capture->first != at) return fail(cudaErrorStreamCaptureUnmatched, "cudaStreamEndCapture");
    if (capture->thread != std::this_thread::get_id() && capture->mode != cudaStreamCaptureModeRelaxed)
        return fail(cudaErrorStreamCaptureWrongThread, "cudaStreamEndCapture");
    bool is_joined = true, is_valid = capture->valid;
    for (auto& [of, clock] : capture->own) is_joined = is_joined && capture->known[at][of] >= clock;
    for (auto& [of, clocks] : capture->known) of->capture = nullptr;
    captures.erase(capture);
    capture->restore();
    if (is_valid && is_joined) *graph = (cudaGraph_t) new std::vector<Node>(std::move(capture->nodes));
    delete capture;
    if (!is_valid) return fail(cudaErrorStreamCaptureInvalidated, "cudaStreamEndCapture");
    return is_joined ? cudaSuccess : fail(cudaErrorStreamCaptureUnjoined, "cudaStreamEndCapture");
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    Held held(lock);
    Stream* at = stream_at(stream);
    if (is_of_captures_that_block(at)) {
        *status = cudaStreamCaptureStatusActive;
        return fail(cudaErrorStreamCaptureImplicit, "cudaStreamIsCapturing");
    }
    *status = cudaStreamCaptureStatusNone;
    if (at->capture) *status = at->capture->valid ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusInvalidated;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* number) {
    Held held(lock);
    if (auto error = cudaStreamIsCapturing(stream, status)) return error;
    Capture* capture = stream_at(stream)->capture;
    if (id) *id = capture ? capture->id : 0;
    if (graph) *graph = (cudaGraph_t)capture;
    if (dependencies) *dependencies = nullptr;
    if (edges) *edges = nullptr;
    if (number) *number = 0;
    return cudaSuccess;
}

// For the other libraries and for Python.

int pretended_is_capturing(void* stream) {
    Held held(lock);
    return stream_at((cudaStream_t)stream)->capture != nullptr;
}

int pretended_keep(void* stream, void* at, size_t bytes) {
    Held held(lock);
    if (auto* capture = stream_at((cudaStream_t)stream)->capture) capture->keep(at, bytes);
    return 0;
}

int pretended_record(void* stream, Operator again, void* data) {
    Held held(lock);
    Node node;
    node.kind = Node::OPERATOR, node.again = again, node.data = data;
    node.held = std::shared_ptr<void>(data, release);
    return work(stream_at((cudaStream_t)stream), node, "an operator");
}

// Fetches data that no graph has any more; gives their number.
int pretended_released(void** data, int most) {
    std::lock_guard<std::mutex> held(lock_of_released);
    int number = std::min(most, (int)released.size());
    for (int i = 0; i < number; i++) data[i] = released[released.size() - 1 - i];
    released.resize(released.size() - number);
    return number;
}

}  // extern "C"
