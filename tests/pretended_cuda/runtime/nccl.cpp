// NCCL for the ranks of one machine: collectives through shared memory. Within a capture they are recorded.
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>

#include "sums.h"

using namespace pretended;

extern "C" {
int pretended_launch(void* stream, int count, const char* name);
int pretended_is_capturing(void* stream);
int pretended_record(void* stream, int (*again)(void*), void* data);
}

namespace {

const int NCCL = 8;             // among the counts of shared.h
const size_t SLOT = 32u << 20;  // bytes of each rank
const size_t HEADER = 4096;
const int YIELDS = 1000;  // before a waiting rank sleeps

struct Shared {
    std::atomic<int> arrived, phase;
};

struct Group {
    int rank, size;
    ncclUniqueId id;
    Shared* shared = nullptr;
    char* slots = nullptr;
    int splits = 0;

    char* slot(int of) { return slots + SLOT * of; }

    void barrier() {
        if (size == 1) return;
        int phase = shared->phase.load();
        if (shared->arrived.fetch_add(1) + 1 == size) {
            shared->arrived = 0;
            shared->phase.fetch_add(1);
            return;
        }
        for (int turn = 0; shared->phase.load() == phase; turn++)
            turn < YIELDS ? (void)sched_yield() : (void)usleep(50);
    }
};

Group* group_of(ncclComm_t communicator) { return (Group*)communicator; }

ncclResult_t join(ncclComm_t* made, const ncclUniqueId& id, int rank, int size) {
    auto* group = new Group{rank, size, id};
    *made = (ncclComm_t)group;
    if (size == 1) return ncclSuccess;
    std::string name = "/pretended-nccl-";
    for (int i = 0; i < 16; i++) {
        char digits[3];
        snprintf(digits, sizeof digits, "%02x", (unsigned char)id.internal[i]);
        name += digits;
    }
    int file = shm_open(name.c_str(), O_CREAT | O_RDWR, 0600);
    size_t bytes = HEADER + SLOT * size;
    if (file < 0 || ftruncate(file, bytes)) return ncclSystemError;
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (at == MAP_FAILED) return ncclSystemError;
    group->shared = (Shared*)at;
    group->slots = (char*)at + HEADER;
    group->barrier();
    if (rank == 0) shm_unlink(name.c_str());
    group->barrier();
    return ncclSuccess;
}

ncclResult_t not_there(const char* what) {
    fprintf(stderr, "pretended NCCL: %s is not there\n", what);
    return ncclInvalidUsage;
}

// A collective comes to a stream: it becomes a node of the stream's capture, or it is done.
ncclResult_t collective(void* stream, std::function<void()> act) {
    if (pretended_launch(stream, NCCL, nullptr)) return ncclUnhandledCudaError;
    if (!pretended_is_capturing(stream)) {
        act();
        return ncclSuccess;
    }
    auto again = [](void* data) {
        (*(std::function<void()>*)data)();
        return 0;
    };
    return pretended_record(stream, again, new std::function<void()>(act)) ? ncclUnhandledCudaError : ncclSuccess;
}

void for_slots(size_t bytes, const std::function<void(size_t start, size_t number)>& act) {
    for (size_t start = 0; start < bytes; start += SLOT) act(start, std::min(SLOT, bytes - start));
}

// The reduction over all ranks of `bytes` at `from`, which those that keep it write to `to`.
void reduce(Group* group, const char* from, char* to, size_t bytes, ncclDataType_t type, ncclRedOp_t operation,
            bool keeps) {
    if (group->size == 1) return (void)memmove(to, from, bytes);
    std::string sum;
    for_slots(bytes, [&](size_t start, size_t number) {
        memcpy(group->slot(group->rank), from + start, number);
        group->barrier();
        if (keeps) {
            sum.assign(group->slot(0), number);
            of_type(type, [&](auto element) {
                using T = decltype(element);
                size_t elements = number / sizeof(T);
                for (int rank = 1; rank < group->size; rank++)
                    fold<T>(sum.data(), group->slot(rank), elements, operation);
                if (operation == ncclAvg) divide<T>(sum.data(), elements, group->size);
            });
        }
        group->barrier();
        if (keeps) memcpy(to + start, sum.data(), number);
    });
}

bool is_reducible(ncclDataType_t type, ncclRedOp_t operation) {
    return operation <= ncclAvg && of_type(type, [](auto) {});
}

}  // namespace

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    memset(id, 0, sizeof *id);
    int file = open("/dev/urandom", O_RDONLY);
    ssize_t found = read(file, id->internal, 16);
    close(file);
    return found == 16 ? ncclSuccess : ncclSystemError;
}
ncclResult_t ncclCommInitRank(ncclComm_t* made, int size, ncclUniqueId id, int rank) {
    return join(made, id, rank, size);
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t* made, int size, ncclUniqueId id, int rank, ncclConfig_t*) {
    return join(made, id, rank, size);
}
ncclResult_t ncclCommInitRankScalable(ncclComm_t* made, int size, int rank, int, ncclUniqueId* ids, ncclConfig_t*) {
    return join(made, ids[0], rank, size);
}
ncclResult_t ncclCommInitAll(ncclComm_t*, int, const int*) { return not_there("ncclCommInitAll"); }

ncclResult_t ncclCommSplit(ncclComm_t of, int color, int key, ncclComm_t* made, ncclConfig_t*) {
    struct Wish {
        int color, key;
    };
    Group* group = group_of(of);
    int rank = 0, size = 1;
    if (group->size > 1) {
        *(Wish*)group->slot(group->rank) = {color, key};
        group->barrier();
        size = 0;
        for (int other = 0; other < group->size; other++) {
            auto wish = *(Wish*)group->slot(other);
            if (wish.color != color) continue;
            size++;
            if (wish.key < key || (wish.key == key && other < group->rank)) rank++;
        }
        group->barrier();
    }
    ncclUniqueId id = group->id;  // the same for all ranks of the new group, and no other's
    id.internal[0] ^= ++group->splits;
    id.internal[1] ^= (color + 1) * 7;
    id.internal[2] ^= 0x5a;
    *made = nullptr;
    return color < 0 ? ncclSuccess : join(made, id, rank, size);
}
ncclResult_t ncclCommShrink(ncclComm_t, int*, int, ncclComm_t*, ncclConfig_t*, int) {
    return not_there("ncclCommShrink");
}

ncclResult_t ncclCommDestroy(ncclComm_t) { return ncclSuccess; }
ncclResult_t ncclCommAbort(ncclComm_t) { return ncclSuccess; }
ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclSuccess; }
ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* error) {
    *error = ncclSuccess;
    return ncclSuccess;
}
ncclResult_t ncclCommCount(const ncclComm_t of, int* number) {
    *number = group_of(of)->size;
    return ncclSuccess;
}
ncclResult_t ncclCommUserRank(const ncclComm_t of, int* rank) {
    *rank = group_of(of)->rank;
    return ncclSuccess;
}
ncclResult_t ncclCommCuDevice(const ncclComm_t, int* device) {
    *device = 0;
    return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t) { return "an error of the pretended NCCL"; }
const char* ncclGetLastError(ncclComm_t) { return "an error of the pretended NCCL"; }

// Each call is done when it comes, so that a group is its calls in their order.
ncclResult_t ncclGroupStart() { return ncclSuccess; }
ncclResult_t ncclGroupEnd() { return ncclSuccess; }
ncclResult_t ncclGroupSimulateEnd(ncclSimInfo_t*) { return not_there("ncclGroupSimulateEnd"); }

ncclResult_t ncclCommRegister(const ncclComm_t, void*, size_t, void** handle) {
    *handle = nullptr;
    return ncclSuccess;
}
ncclResult_t ncclCommDeregister(const ncclComm_t, void*) { return ncclSuccess; }
ncclResult_t ncclMemAlloc(void** at, size_t bytes) {
    *at = calloc(1, bytes);
    return ncclSuccess;
}
ncclResult_t ncclMemFree(void* at) {
    free(at);
    return ncclSuccess;
}

ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t*, void*, ncclDataType_t, ncclScalarResidence_t, ncclComm_t) {
    return not_there("ncclRedOpCreatePreMulSum");
}
ncclResult_t ncclRedOpDestroy(ncclRedOp_t, ncclComm_t) { return ncclSuccess; }

ncclResult_t ncclAllReduce(const void* from, void* to, size_t number, ncclDataType_t type, ncclRedOp_t operation,
                           ncclComm_t of, cudaStream_t stream) {
    if (!is_reducible(type, operation)) return not_there("ncclAllReduce of this type");
    return collective(stream, [=] {
        reduce(group_of(of), (const char*)from, (char*)to, number * width_of(type), type, operation, true);
    });
}

ncclResult_t ncclReduce(const void* from, void* to, size_t number, ncclDataType_t type, ncclRedOp_t operation, int root,
                        ncclComm_t of, cudaStream_t stream) {
    if (!is_reducible(type, operation)) return not_there("ncclReduce of this type");
    return collective(stream, [=] {
        Group* group = group_of(of);
        reduce(group, (const char*)from, (char*)to, number * width_of(type), type, operation, group->rank == root);
    });
}

ncclResult_t ncclReduceScatter(const void* from, void* to, size_t number, ncclDataType_t type, ncclRedOp_t operation,
                               ncclComm_t of, cudaStream_t stream) {
    if (!is_reducible(type, operation)) return not_there("ncclReduceScatter of this type");
    return collective(stream, [=] {
        Group* group = group_of(of);
        size_t bytes = number * width_of(type);
        std::string own(bytes, 0);  // `to` may lie within `from`
        for (int rank = 0; rank < group->size; rank++)
            reduce(group, (const char*)from + rank * bytes, own.data(), bytes, type, operation, rank == group->rank);
        memcpy(to, own.data(), bytes);
    });
}

ncclResult_t ncclBroadcast(const void* from, void* to, size_t number, ncclDataType_t type, int root, ncclComm_t of,
                           cudaStream_t stream) {
    return collective(stream, [=] {
        Group* group = group_of(of);
        if (group->size == 1) return (void)memmove(to, from, number * width_of(type));
        for_slots(number * width_of(type), [&](size_t start, size_t bytes) {
            if (group->rank == root) memcpy(group->slot(root), (const char*)from + start, bytes);
            group->barrier();
            memcpy((char*)to + start, group->slot(root), bytes);
            group->barrier();
        });
    });
}
ncclResult_t ncclBcast(void* at, size_t number, ncclDataType_t type, int root, ncclComm_t of, cudaStream_t stream) {
    return ncclBroadcast(at, at, number, type, root, of, stream);
}

ncclResult_t ncclAllGather(const void* from, void* to, size_t number, ncclDataType_t type, ncclComm_t of,
                           cudaStream_t stream) {
    return collective(stream, [=] {
        Group* group = group_of(of);
        size_t all = number * width_of(type);
        if (group->size == 1) return (void)memmove(to, from, all);
        for_slots(all, [&](size_t start, size_t bytes) {
            memcpy(group->slot(group->rank), (const char*)from + start, bytes);
            group->barrier();
            for (int rank = 0; rank < group->size; rank++)
                memcpy((char*)to + rank * all + start, group->slot(rank), bytes);
            group->barrier();
        });
    });
}

ncclResult_t ncclAlltoAll(const void* from, void* to, size_t number, ncclDataType_t type, ncclComm_t of,
                          cudaStream_t stream) {
    return collective(stream, [=] {
        Group* group = group_of(of);
        size_t all = number * width_of(type);
        if (group->size == 1) return (void)memmove(to, from, all);
        for (int target = 0; target < group->size; target++)
            for_slots(all, [&](size_t start, size_t bytes) {
                memcpy(group->slot(group->rank), (const char*)from + target * all + start, bytes);
                group->barrier();
                for (int rank = 0; rank < group->size && group->rank == target; rank++)
                    memcpy((char*)to + rank * all + start, group->slot(rank), bytes);
                group->barrier();
            });
    });
}

ncclResult_t ncclSend(const void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t) {
    return not_there("ncclSend");
}
ncclResult_t ncclRecv(void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t) { return not_there("ncclRecv"); }

}  // extern "C"
