// cuBLAS as far as torch asks for more than a launch; ../libraries.py makes the rest.
#include <cstdlib>

#include "handles.h"

extern "C" {

int cublasCreate_v2(Handle** made) { return make_handle(made); }
int cublasSetStream_v2(Handle* handle, void* stream) {
    handle->stream = stream;
    return 0;
}
int cublasGetStream_v2(Handle* handle, void** stream) {
    *stream = handle->stream;
    return 0;
}
int cublasGetMathMode(Handle*, int* mode) {
    *mode = 0;
    return 0;
}
int cublasGetPointerMode_v2(Handle*, int* mode) {
    *mode = 0;
    return 0;
}

}  // extern "C"
