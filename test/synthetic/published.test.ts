/**
 * Published ONNX decoders, cut and distributed over three shards: each gives the tokens of its published graph, which
 * ONNX Runtime runs whole, cache and attention included. Every service is the real one, on a connection of its own to a
 * real nats-server. (All forms, in one process: packages/testkit/test/published.test.ts.)
 */
import { type ExportForm, type ExportOptions, writeExport } from '@lamina/testkit';
import { describe, it } from 'vitest';
import { useTestBench } from './in-process-cluster.ts';
import { expectAnswersOfUncut } from './uncut-comparison.ts';

interface Published {
  readonly name: string;
  readonly form: ExportForm;
  readonly options: Partial<ExportOptions>;
}

const MODELS: readonly Published[] = [
  {
    name: 'GroupQueryAttention packed, window, sinks, q4',
    form: { operator: 'gqa', packed: true, localWindow: 24, sinks: 'head' },
    options: { precision: 'q4', externalData: true },
  },
  { name: 'GroupQueryAttention, soft-cap', form: { operator: 'gqa', softcap: 5 }, options: {} },
  {
    // Of the prompts, one is long and one outgrows the short tables with its answer.
    name: 'GroupQueryAttention, tables chosen by length',
    form: { operator: 'gqa', longAbove: { tokens: 48, by: 'length' } },
    options: {},
  },
  { name: 'MultiHeadAttention', form: { operator: 'mha' }, options: { numKvHeads: 4 } },
  { name: 'written out', form: { operator: 'eager', scaling: 'sdpa', mask: 'where' }, options: { tied: true } },
  { name: 'written out, ALiBi', form: { operator: 'eager', scaling: 'mul', mask: 'add', alibi: true }, options: {} },
  { name: 'Attention, packed past', form: { operator: 'gpt2', fused: true }, options: {} },
  { name: 'ai.onnx Attention', form: { operator: 'onnx', rank: 4, mask: 'float' }, options: {} },
];

const bench = useTestBench('published');

describe('published decoders over three shards', () => {
  it.each(MODELS)(
    '$name',
    ({ name, form, options }) =>
      expectAnswersOfUncut(bench, name, async (dir) => {
        await writeExport(dir, form, options);
      }),
    60_000,
  );
});
