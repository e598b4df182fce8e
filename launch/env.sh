# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Sourced before a run, with `tpu` or `gpu`: XLA flags, each with its reason and
# its source. What the caller has set comes behind and wins.
#
# [maxtext]  AI-Hypercomputer/maxtext, src/maxtext/configs/README.md
# [jax]      docs.jax.dev/en/latest/gpu_performance_tips.html
# [toolbox]  NVIDIA/JAX-Toolbox, docs/GPU_performance.md
# [scale]    docs/scale.md: by what `precompile` found
#
# None of them was timed with this project. A flag that the installed XLA does
# not know ends the run at once: remove it here.

tpu_flags=(
  # All-gathers of weights (mesh axis fsdp) run beside the products of the layer
  # before, in pieces, on the same core: three switches and their base [maxtext]
  --xla_enable_async_all_gather=true
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
  --xla_tpu_overlap_compute_collective_tc=true
  # Weights are gathered whole, never by a product in as many parts as there are
  # shards, each of which reads and writes all of the result in HBM [scale]
  --xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000
  # Between slices: gradients' all-reduces of mesh axis data overlap, also those
  # whose sizes differ; costs memory [maxtext]
  --xla_tpu_enable_data_parallel_all_reduce_opt=true
  --xla_tpu_data_parallel_opt_different_sized_ops=true
)

gpu_flags=(
  # Starts transfers early and waits for them late; off by default [jax]
  --xla_gpu_enable_latency_hiding_scheduler=true
  # Moves collectives of the loop over layers into the iteration before, or
  # after: a layer's weights arrive while the last one computes [toolbox]
  --xla_gpu_enable_pipelined_all_gather=true
  --xla_gpu_enable_pipelined_reduce_scatter=true
  --xla_gpu_enable_pipelined_all_reduce=true
  # Lets Triton try every product that it can compute; off by default [jax]
  --xla_gpu_triton_gemm_any=true
)
# Not set, for nothing says that the default is wrong for us: command buffers
# (CUDA graphs, on; --xla_gpu_enable_command_buffer= switches them off, which
# is the thing to try when a step hangs in NCCL), NCCL_PROTO (said to help
# within one host alone [jax]), thresholds for combining collectives (a layer's
# bytes are the measure; see precompile).

case ${1-} in
  tpu)
    # libtpu reads flags of TPUs from here, and not from XLA_FLAGS.
    export LIBTPU_INIT_ARGS="${tpu_flags[*]} ${LIBTPU_INIT_ARGS-}"
    # Without the CPU in its place if the TPU does not start.
    export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu}
    ;;
  gpu)
    export XLA_FLAGS="${gpu_flags[*]} ${XLA_FLAGS-}"
    # 0.75 by default; NCCL and CUDA need the rest [toolbox]
    export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
    # Kernels start in order, for overlap with collectives; slower on Blackwell,
    # so on Hopper (9.0) alone [toolbox]
    if [[ $(nvidia-smi --query-gpu=compute_cap --format=csv,noheader \
      2> /dev/null | head -n 1) == 9.0 ]]; then
      export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    fi
    ;;
  *)
    echo "launch/env.sh: found '${1-}', expected tpu or gpu" >&2
    return 2
    ;;
esac
