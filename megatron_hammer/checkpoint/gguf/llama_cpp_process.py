"""llama.cpp with one model, in a process of its own: `python -P ... <file> <socket> <context tokens> <threads>`.

Says "ready" on stdout once the model is loaded, serves llama.cpp's HTTP interface on a Unix socket (it knows one by the
ending .sock), and ends when its stdin is closed, for example because its parent has died. Imports nothing of this
package, so it starts quickly. llama.cpp aborts on files that it cannot read, and here that ends only this process.
`llama_cpp.py` is the other side.
"""

import os
import sys


def main() -> None:
    """Serve the file on the socket: print `ready` once it listens, end when standard input does.

    Arguments: the GGUF file, the socket's path, tokens of context, threads.
    """
    file_path, socket_path, num_context_tokens, num_threads = sys.argv[1:5]
    # The parent waits for one line on stdout, so what llama.cpp prints must not get there.
    to_parent = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # llama.cpp prints to both streams
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = file_path
    parameters.hostnames = [socket_path]
    parameters.n_ctx = int(num_context_tokens)
    parameters.n_parallel = 1
    parameters.n_threads_http = 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = int(num_threads)
    parameters.n_gpu_layers = 0
    parameters.fit_params = False  # true would let llama.cpp choose unset parameters by the free device memory
    parameters.warmup = False
    parameters.check_tensors = True  # invalid data of a tensor is an error while loading, not a wrong token later
    # By default keys and values are kept in f16, which alone moves logits by more than f32 weights do.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)
    print("ready", file=to_parent, flush=True)
    # Returns when the parent closes the pipe or dies, so no server is left behind.
    sys.stdin.read()
    del server


if __name__ == "__main__":
    main()
