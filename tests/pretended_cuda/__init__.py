"""A CUDA runtime without a GPU, so that a machine without one runs a CUDA build of torch as it is.

    python -m tests.pretended_cuda COMMAND...

The linker loads libraries of ours before those of CUDA: device memory is the host's, kernels do nothing, and the rules
of streams, events and captures hold (error 900 where a capture waits, work that is not joined, isolation, copies of
pageable memory). torch's allocator, its CUDAGraph and autograd's streams are the real ones, so are DeepSpeed, Inductor
and Triton's compiler. On top, torch's operators for CUDA are computed by their kernels for CPUs in the same memory
(``start/pretended_operators``); within a capture they are recorded, and each replay computes them again.

It needs a CUDA 13 build of torch with the packages that pip brings with it, and g++. The libraries are built at the
first use, into the environment (``ENVIRONMENT/pretended_cuda``). Variables choose what there is:

    PRETENDED_CUDA_GPUS     number of GPUs (1)
    PRETENDED_CUDA_GIB      memory of each (139.8), which the host need not have: pages are mapped as they are written
    PRETENDED_CUDA_NUMBERS  1: operators compute (the default); 0: kernels do nothing, nor do copies from GPU to GPU,
                            and are counted as on a GPU
    PRETENDED_CUDA_TRITON   1: compiled layers are Inductor's, whose Triton kernels compute nothing; 0: as eager ones
    PRETENDED_CUDA_STRICT   1: where operators compute, a kernel that none took the place of is an error; 0: a line
    PRETENDED_CUDA_FREED    1: a graph that reads memory which was freed after its capture is an error
    PRETENDED_CUDA_REPORT   1: at its end a process prints counts of calls, and its waits with the lines that waited
    PRETENDED_CUDA_TRACE    1: each error of the runtime, with its C++ stack

Limits:

- No time: what a GPU would take is not known. Only the host's time and counts of calls mean something.
- No races: all work is done when it is called, so that a stream which forgot to wait for another still reads what
  it should, and new memory holds zeros.
- Where operators compute, random numbers are the CPU's: torch.manual_seed sets them, and a graph draws from them at
  each replay. CUDA's generators advance and refuse as on a GPU, but a state that is set for one changes no number.
- Triton's kernels compute nothing. Where no operator computes, memory holds anything: a size that is read from a GPU,
  as that of ``nonzero``, may be any number.
- What cuDNN and cuBLAS choose is not what the real ones choose, and sums are added up in another order than a GPU's.
- The CTC loss is the CPU's kernel. Operators without a kernel for CPUs raise NotImplementedError, unless
  ``start/pretended_operators`` computes them.
- Products of matrices of more than 2**25 elements each, which measure a GPU's speed, are not computed.
- DeepSpeed's ops for GPUs (async_io, CPU Adam) are compiled by CUDA's toolkit, which CUDA_HOME names.
- NCCL is that of one machine, without send and receive. A rank that dies leaves the others waiting.
"""
