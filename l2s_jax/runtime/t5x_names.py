# SPDX-License-Identifier: Apache-2.0
"""T5X's macros and flags, with the corresponding names of l2s_jax.

Error messages for unknown names use them. `docs/t5x.md` repeats them, with the
names that are the same in both.
"""

# Macros of T5X's run files and models that l2s_jax does not read.
MACROS = {
  'ACTIVATION_DTYPE': 'DTYPE',
  'BEAM_SIZE': 'Decoding.num_beams',
  'DECODE_FN': 'Decoding',
  'EVALUATOR_NUM_EXAMPLES': 'train.num_eval_examples',
  'EVALUATOR_USE_MEMORY_CACHE': 'not needed',
  'EVAL_STEPS': 'train.num_eval_examples, of examples, not of batches',
  'INITIAL_CHECKPOINT_PATH': 'SLM_PATH, for weights; convert --from=t5x '
  '--to=run for a checkpoint of LLM-to-SLM with its optimizer state',
  'JSON_WRITE_N_RESULTS': 'not needed: all predictions are written',
  'LOSS_NORMALIZING_FACTOR': 'not needed: the loss is a mean over target '
  'tokens',
  'MIXTURE_OR_TASK_MODULE': 'a line `import my_tasks` in a gin file',
  'MODEL_NAME': 'export: DESTINATION',
  'MODEL_OUTPUT_DIR': 'export: DESTINATION',
  'OUTPUT_FEATURES': 'not needed: a run has its tokenizers',
  'RANDOM_SEED': 'SEED',
  'SHUFFLE_TRAIN_EXAMPLES': 'not needed: training shuffles, by SEED',
  'TRAIN_STEPS_RELATIVE': 'TRAIN_STEPS, which counts earlier starts',
  'USE_CACHED_TASKS': 'USE_CACHED_TASKS of gin_configs/tasks/seqio.gin',
  'USE_HARDWARE_RNG': 'not needed',
}

FLAGS = {
  'alsologtostderr': '--verbose',
  'coordinator_address': 'the variable L2S_COORDINATOR_ADDRESS',
  'gin_bindings': '--gin.NAME=VALUE',
  'initialization_timeout': 'not needed: the processes wait for each other',
  'multiprocess_gpu': 'the variable L2S_COORDINATOR_ADDRESS, or '
  'L2S_DISTRIBUTED=auto',
  'process_count': 'the variable L2S_NUM_PROCESSES',
  'process_index': 'the variable L2S_PROCESS_ID',
  'run_mode': 'the verb, the first argument',
  'seqio_additional_cache_dirs': '--gin.TASK_CACHE_DIRS',
  'shard_id': '--shard',
}


def answer(name: str, names: dict[str, str]) -> str:
  """Returns ` T5X's NAME is ... here.`, or nothing where T5X has no such name.

  Args:
    name: as the user wrote it.
    names: `MACROS` or `FLAGS`.
  """
  if name not in names:
    return ''
  here = '' if names[name].startswith('not needed') else ' here'
  return f" T5X's {name} is{here} {names[name]}."
