// Reductions of NCCL over two buffers, in the type of their elements.
#pragma once
// nccl.h includes these, which need headers that pip's packages lack; it uses nothing of them.
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
#define __CUDA_FP8_H__
#include <nccl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace pretended {

struct Bfloat {
    uint16_t bits;
    Bfloat(float value) {
        uint32_t wide;
        memcpy(&wide, &value, sizeof wide);
        bits = uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);  // to the nearest, ties to even
    }
    operator float() const {
        uint32_t wide = uint32_t(bits) << 16;
        float value;
        memcpy(&value, &wide, sizeof value);
        return value;
    }
};

inline size_t width_of(ncclDataType_t type) {
    switch (type) {
        case ncclInt8:
        case ncclUint8:
        case ncclFloat8e4m3:
        case ncclFloat8e5m2:
            return 1;
        case ncclFloat16:
        case ncclBfloat16:
            return 2;
        case ncclInt32:
        case ncclUint32:
        case ncclFloat32:
            return 4;
        default:
            return 8;
    }
}

template <class T>
void fold(void* into, const void* from, size_t number, ncclRedOp_t operation) {
    auto* a = (T*)into;
    auto* b = (const T*)from;
    for (size_t i = 0; i < number; i++) switch (operation) {
            case ncclProd:
                a[i] = T(a[i] * b[i]);
                break;
            case ncclMax:
                a[i] = std::max(a[i], b[i], [](T x, T y) { return x < y; });
                break;
            case ncclMin:
                a[i] = std::min(a[i], b[i], [](T x, T y) { return x < y; });
                break;
            default:
                a[i] = T(a[i] + b[i]);
        }
}

template <class T>
void divide(void* into, size_t number, int by) {
    for (size_t i = 0; i < number; i++) ((T*)into)[i] = T(((T*)into)[i] / T(float(by)));
}

// Calls `act` with a value of the elements' type; false where there are no reductions of it.
template <class Act>
bool of_type(ncclDataType_t type, Act act) {
    switch (type) {
        case ncclInt8:
            act(int8_t());
            return true;
        case ncclUint8:
            act(uint8_t());
            return true;
        case ncclInt32:
            act(int32_t());
            return true;
        case ncclUint32:
            act(uint32_t());
            return true;
        case ncclInt64:
            act(int64_t());
            return true;
        case ncclUint64:
            act(uint64_t());
            return true;
        case ncclFloat16:
            act(_Float16());
            return true;
        case ncclFloat32:
            act(float());
            return true;
        case ncclFloat64:
            act(double());
            return true;
        case ncclBfloat16:
            act(Bfloat(0));
            return true;
        default:
            return false;
    }
}

}  // namespace pretended
