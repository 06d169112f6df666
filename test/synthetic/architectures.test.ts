/**
 * Architectures: a small random model of each, distributed over three shards, gives the tokens of its uncut graph, for
 * prompts of different lengths in one batch, beyond windows and original lengths. Every service is the real one, on a
 * connection of its own to a real nats-server. (That the uncut graph is right is packages/testkit/test/architectures.test.ts.)
 */
import { RANDOM_MODELS, writeRandomCheckpoint } from '@lamina/testkit';
import { describe, it } from 'vitest';
import { useTestBench } from './in-process-cluster.ts';
import { expectAnswersOfUncut } from './uncut-comparison.ts';

/** One model of each family, with what distinguishes it. */
const MODELS = [
  ...['llama, rope llama3', 'llama, rope yarn', 'mistral, window', 'qwen2, window in late layers', 'qwen3'],
  ...['smollm3, no_rope_layers, window in them', 'phi3, longrope, partial rotary', 'gemma2', 'gemma3_text', 'olmo2'],
  ...['gpt2'],
];

const bench = useTestBench('families');

describe('architectures over three shards', () => {
  it.each(MODELS)(
    '%s',
    (name) =>
      expectAnswersOfUncut(bench, name, async (dir) => {
        await writeRandomCheckpoint(dir, { contextLength: 128, ...RANDOM_MODELS[name] });
      }),
    60_000,
  );
});
