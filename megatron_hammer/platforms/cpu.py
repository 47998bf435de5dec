"""The `cpu` platform: gloo between processes, one thread each unless OMP_NUM_THREADS says otherwise."""

# What the CPU cannot do, by Megatron's attribute name: (attribute, whether a value asks for it, why not).
UNSUPPORTED = (
    ("context_parallel_size", lambda value: value > 1, "context parallelism needs TransformerEngine's attention"),
    ("fp8", bool, "fp8 needs TransformerEngine and a GPU of the Hopper generation or later"),
    ("fp4", bool, "fp4 needs TransformerEngine and a GPU of the Blackwell generation or later"),
    ("fp16", bool, "fp16 with loss scaling needs a GPU; bf16 and fp32 run on the CPU"),
    ("use_torch_fsdp2", bool, "FSDP needs NCCL"),
    ("use_megatron_fsdp", bool, "FSDP needs NCCL"),
    ("moe_grouped_gemm", bool, "grouped GEMM is a CUDA kernel"),
    ("tp_comm_overlap", bool, "communication overlap needs TransformerEngine's user buffers"),
    ("async_save", bool, "asynchronous checkpointing copies from a GPU"),
    ("optimizer_cpu_offload", bool, "there is no GPU to offload from"),
    ("distributed_backend", lambda value: value == "nccl", "NCCL needs GPUs; processes talk over gloo"),
    ("ddp_average_in_collective", bool, "gloo has no averaging reduction"),
    ("overlap_moe_expert_parallel_comm", bool, "it overlaps work on CUDA streams"),
    ("cuda_graph_impl", lambda value: value not in (None, "none"), "there are no CUDA graphs"),
    ("optimizer_cuda_graph", bool, "there are no CUDA graphs"),
    ("fine_grained_activation_offloading", bool, "there is no GPU to offload from"),
    ("use_precision_aware_optimizer", bool, "it needs TransformerEngine's FusedAdam"),
    ("te_rng_tracker", bool, "it needs TransformerEngine"),
    ("nccl_ub", bool, "there is no NCCL"),
    ("record_memory_history", bool, "it records CUDA's allocator"),
    ("log_straggler", bool, "megatron times CUDA kernels for it, and reports nothing without them"),
)
