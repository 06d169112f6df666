/**
 * Owns the `lamina model` commands: their arguments and options. Loads nothing but the parser until one of them runs.
 */
import { processEnvironment } from '@lamina/runtime/config';
import type { Command } from 'commander';
import { integer, real } from '../arguments.ts';
import { finish } from '../report.ts';
import type { CheckFlags } from './check.ts';
import type { InspectFlags } from './inspect.ts';
import type { PullFlags } from './pull.ts';
import type { SynthFlags } from './synth.ts';

const MODEL_HELP = 'directory, or owner/name[@revision][:folder] of the hub (default: LAMINA_MODEL, else lamina-tiny)';
const WEIGHTS_HELP =
  'of safetensors, how they are stored: checkpoint, f32, f16, int8 or int4; of an ONNX decoder, its variant: fp32, q4, ... (default: LAMINA_WEIGHTS, LAMINA_ONNX_VARIANT)';

export function addModelCommands(model: Command): void {
  model.description('pull, look at, make and check models');

  model
    .command('pull')
    .description('download what is needed of a model into the cache; continues where it was broken off')
    .argument('<repo>', 'owner/name[@revision][:folder][:folder] of the hub')
    .option('--weights <variant>', 'safetensors, or an ONNX variant: fp32, fp16, q4, q4f16, int8, ...')
    .option('--folder <path>', 'the model of one folder, as repo:path (onnxruntime-genai)')
    .action((repo: string, flags: PullFlags) =>
      finish(async () => (await import('./pull.ts')).runPull(repo, flags, processEnvironment())),
    );

  model
    .command('inspect')
    .description('show how a model is cut: stages, cut edges, KV per token, the interconnect that it needs')
    .argument('[model]', MODEL_HELP)
    .option('--json', 'print it as JSON')
    .option('--weights <name>', WEIGHTS_HELP)
    .option('--batch <n>', 'B: requests that decode together', integer(1, 1_000_000), 32)
    .option('--context <tokens>', 'tokens of each request (default: 1024, or all that the model has)', integer(1, 1e9))
    .option('--mtime-ms <ms>', 'MTIME: dense stages of one step, as measured (default: estimated)', real(1e-6, 1e9))
    .option('--atime-ms <ms>', 'ATIME: attention of one step, as measured (default: estimated)', real(1e-6, 1e9))
    .option('--alpha <fraction>', 'share of the compute time that transfers may add (default: 0.2)', real(1e-6, 1e6))
    .action((name: string | undefined, flags: InspectFlags) =>
      finish(async () => (await import('./inspect.ts')).runInspect(name, flags, processEnvironment())),
    );

  model
    .command('synth')
    .description('write a model of a published shape with random weights: for benchmarks')
    .argument('<shape>', 'smollm2-135m, llama-3-8b, ...; a wrong name lists them all')
    .argument('[dir]', 'new directory (default: in the cache)')
    .option('--weights <type>', 'element type of the checkpoint: bf16 or f16', 'bf16')
    .option('--seed <n>', 'the same seed gives the same bytes', integer(1, 2 ** 31 - 1), 1)
    .action((shape: string, dir: string | undefined, flags: SynthFlags) =>
      finish(async () => (await import('./synth.ts')).runSynth(shape, dir, flags, processEnvironment())),
    );

  model
    .command('check')
    .description('compare a cluster with the uncut graph, token by token; exit 1 if they differ')
    .argument('[model]', MODEL_HELP)
    .option('--weights <name>', WEIGHTS_HELP)
    .option('--attention-shards <n>', 'attention shards to start', integer(1, 256), 2)
    .option('--max-tokens <n>', 'tokens to compare per prompt', integer(1, 100_000), 32)
    .option('--verbose', 'show the logs of all processes on stderr')
    .action((name: string | undefined, flags: CheckFlags) =>
      finish(async () => (await import('./check.ts')).runCheck(name, flags, processEnvironment())),
    );
}
