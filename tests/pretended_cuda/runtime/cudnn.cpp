// cuDNN as far as torch asks for more than a launch; ../libraries.py makes the rest.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "handles.h"

extern "C" {

int cudnnCreate(Handle** made) { return make_handle(made); }
int cudnnSetStream(Handle* handle, void* stream) {
    handle->stream = stream;
    return 0;
}
int cudnnGetStream(Handle* handle, void** stream) {
    *stream = handle->stream;
    return 0;
}
size_t cudnnGetVersion() { return PRETENDED_CUDNN_VERSION; }
size_t cudnnGetCudartVersion() { return 13000; }
void cudnnGetLastErrorString(char* text, size_t size) { snprintf(text, size, "an error of the pretended cuDNN"); }
int cudnnGetProperty(int, int* value) {
    *value = PRETENDED_CUDNN_VERSION / 10000;
    return 0;
}

int cudnnBackendCreateDescriptor(int, void** made) { return make_handle((Handle**)made); }
int cudnnBackendExecute(Handle* handle) { return pretended_launch(handle->stream, DNN, "cudnnBackendExecute"); }
int cudnnBackendGetAttribute(void*, int, int type, int64_t wanted, int64_t* found, void* values) {
    const int DESCRIPTOR = 15;  // CUDNN_TYPE_BACKEND_DESCRIPTOR: the caller's, already made
    if (found) *found = 1;
    if (wanted > 0 && values && type != DESCRIPTOR) memset(values, 0, sizeof(int64_t));
    return 0;
}

// One algorithm, the first, which takes no memory.
#define ALGORITHM(name)                                                            \
    int name(void*, void*, void*, void*, void*, int, int* number, void* results) { \
        const size_t RESULT = 48;                                                  \
        memset(results, 0, RESULT);                                                \
        *number = 1;                                                               \
        return 0;                                                                  \
    }
ALGORITHM(cudnnGetConvolutionForwardAlgorithm_v7)
ALGORITHM(cudnnGetConvolutionBackwardDataAlgorithm_v7)
ALGORITHM(cudnnGetConvolutionBackwardFilterAlgorithm_v7)

}  // extern "C"
