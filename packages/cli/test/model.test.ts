/** `lamina model`: what its commands compute and print. The hub has its own test, a whole check is in test/e2e. */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { PullMeter, readModel } from '@lamina/model';
import { writeExport, writeRandomCheckpoint } from '@lamina/testkit';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type CheckContext, describeCheck } from '../src/model/check.ts';
import { comparePrompt, type DistributedToken, LOGPROB_TOLERANCE } from '../src/model/compare.ts';
import { findWeights } from '../src/model/find-model.ts';
import { describeInspection } from '../src/model/inspect-text.ts';
import { inspectModel } from '../src/model/inspection.ts';
import { interconnectOf } from '../src/model/interconnect.ts';
import { showPull } from '../src/model/progress.ts';
import { bytesText, countText, durationText } from '../src/table.ts';

const ROOT = fileURLToPath(new URL('../../..', import.meta.url));
const TINY = join(ROOT, 'models', 'lamina-tiny');

let scratch: string;

beforeAll(() => {
  scratch = mkdtempSync(join(tmpdir(), 'lamina-model-'));
});

afterAll(() => rmSync(scratch, { recursive: true, force: true }));

function lamina(...args: string[]): { status: number | null; stdout: string; stderr: string } {
  return laminaWith({}, ...args);
}

function laminaWith(
  variables: Readonly<Record<string, string>>,
  ...args: string[]
): { status: number | null; stdout: string; stderr: string } {
  const environment = {
    ...variables,
    PATH: process.env.PATH,
    LAMINA_CACHE_DIR: scratch,
    HF_ENDPOINT: 'http://127.0.0.1:9',
  };
  return spawnSync(process.execPath, [join(ROOT, 'packages', 'cli', 'dist', 'main.js'), ...args], {
    encoding: 'utf8',
    env: environment,
  });
}

describe('the minimum interconnect bandwidth', () => {
  const attention = { numLayers: 80, numHeads: 64, numKvHeads: 8, headDim: 128, scale: 1 };
  const alpha = { value: 0.2, origin: 'assumed' } as const;

  it('is (2 + 2/G) e d B L / (alpha (MTIME + ATIME))', () => {
    const net = interconnectOf({
      attention,
      batch: 100,
      context: 8192,
      parameters: 0,
      weightBytes: 0,
      alpha,
      mtimeMs: 30,
      atimeMs: 50,
    });
    // G = 8, e = 2, d = 8192: 2.25 * 2 * 8192 * 100 * 80 bytes in 0.2 * 80 ms
    expect(net.bytesPerStep).toBe(294_912_000);
    expect(net.minBytesPerSecond).toBeCloseTo(294_912_000 / 0.016, -3);
    expect([net.mtimeMs.origin, net.atimeMs.origin, net.alpha.origin]).toEqual(['given', 'given', 'assumed']);
  });

  it('estimates times that are not given, and says so; a window bounds the attention', () => {
    const input = { attention, batch: 1, context: 1000, parameters: 1e9, weightBytes: 1e9, alpha };
    const all = interconnectOf(input);
    expect(all.mtimeMs).toEqual({ value: 100, origin: 'assumed' });
    expect(interconnectOf({ ...input, batch: 100 }).mtimeMs.value).toBeCloseTo(2000);
    const windowTokens = attention.numLayers === 80 ? Array.from({ length: 80 }, (_, layer) => (layer % 2) * 100) : [];
    expect(interconnectOf({ ...input, attention: { ...attention, windowTokens } }).atimeMs.value).toBeCloseTo(
      all.atimeMs.value * 0.55,
    );
  });
});

describe('lamina model inspect', () => {
  it('shows stages, cut edges and the KV of a token', async () => {
    const model = await inspectModel(TINY, {}, { batch: 32 });
    const { attention } = await readModel(TINY);
    expect(model.attention).toEqual(attention);
    expect(model.weights.stages).toHaveLength(attention.numLayers + 1);
    // Embedding and head are one tensor: the stages weigh more than the model.
    const { parameters, stages } = model.weights;
    expect(stages.reduce((sum, stage) => sum + stage.parameters, 0) - parameters).toBe(
      model.vocabSize * model.hiddenSize,
    );
    expect(model.cutEdges.map(({ name, bytesPerToken }) => [name, bytesPerToken])).toEqual([
      ['query', 256],
      ['key', 128],
      ['value', 128],
      ['attention', 256],
      ['hidden', 512],
    ]);
    expect(model.kvBytesPerToken).toEqual({ f16: 1536, f32: 3072 });
    const text = describeInspection(model);
    for (const part of [
      '7 stages, cut at 6 attention nodes',
      '1-5 ',
      'which is kept once: a tied embedding',
      'at least',
    ]) {
      expect(text).toContain(part);
    }
  });

  it('prints JSON, and refuses a format that there is not', () => {
    const printed = lamina('model', 'inspect', TINY, '--json', '--batch', '4', '--mtime-ms', '1.5');
    expect(JSON.parse(printed.stdout)).toMatchObject({
      modelId: 'lamina-tiny',
      numStages: 7,
      interconnect: { batch: { value: 4 }, mtimeMs: { value: 1.5, origin: 'given' } },
    });
    expect(printed.stderr).toBe('');
    expect(lamina('model', 'inspect', TINY, '--weights', 'int3').stderr).toContain('none of: checkpoint');
  });
});

describe('lamina model inspect, of a published ONNX decoder', () => {
  const hiddenSize = 64;
  const [layer, head] = [64 * (64 + 32 + 32) + 64, 64 * 264 + 64];
  const afterAttention = 64 * 64 + 64 + 3 * 64 * 96;
  let dir: string;

  beforeAll(async () => {
    dir = join(scratch, 'published');
    for (const precision of ['fp32', 'q4', 'fp16', 'int8', 'bnb4'] as const) {
      const options = { precision, externalData: precision === 'q4', contextLength: 512 };
      await writeExport(dir, { operator: 'gqa', localWindow: 24 }, options);
    }
  });

  it('shows the graph, its attention and what its stages weigh', async () => {
    const model = await inspectModel(dir, {}, { batch: 32 });
    expect(model).toMatchObject({
      architecture: 'llama',
      form: {
        kind: 'onnx',
        variant: 'fp32',
        graph: 'onnx/model.onnx',
        attentionOperators: ['com.microsoft.GroupQueryAttention'],
      },
      activations: 'float32',
      numStages: 4,
      attention: { numLayers: 3, numHeads: 4, numKvHeads: 2, headDim: 16, scale: 0.25, windowTokens: [24, 24, 24] },
      kvBytesPerToken: { f16: 384, f32: 768 },
    });
    const perStage = [264 * hiddenSize + layer, afterAttention + layer, afterAttention + layer, afterAttention + head];
    expect(model.weights.stages.map(({ parameters }) => parameters)).toEqual(perStage);
    const rotaryBytes = 512 * 16 * 4;
    expect(model.weights.stages.map(({ bytes }) => bytes)).toEqual(
      // And the two integers of the shape that is looked at.
      perStage.map((parameters, stage) => expect.closeTo(parameters * 4 + (stage === 0 ? rotaryBytes : 0), -2)),
    );
    expect(model.interconnect.mtimeMs.value).toBeGreaterThan(0);
    const text = describeInspection(model);
    expect(text).not.toContain('tied');
    for (const part of [
      'onnx/model.onnx (fp32)',
      'GroupQueryAttention',
      '3 of 3 layers see the last 24',
      'section 3.1',
    ]) {
      expect(text).toContain(part);
    }
  });

  it('counts parameters as before quantization, and bytes as they are in the file', async () => {
    const plain = (await inspectModel(dir, {}, { batch: 1 })).weights;
    const of = async (variant: string) => {
      const { weights, activations } = await inspectModel(dir, { variant }, { batch: 1 });
      const moreParameters = weights.parameters - plain.parameters;
      return { activations, moreParameters, ratio: weights.stages[1]!.bytes / plain.stages[1]!.bytes };
    };
    // Blocks of 32: half a byte and a 32nd of a float32 for each.
    expect(await of('q4')).toMatchObject({ activations: 'float32', moreParameters: 0, ratio: expect.closeTo(0.16, 1) });
    expect(await of('bnb4')).toMatchObject({
      activations: 'float32',
      moreParameters: 0,
      ratio: expect.closeTo(0.14, 1),
    });
    expect(await of('fp16')).toMatchObject({
      activations: 'float16',
      moreParameters: 0,
      ratio: expect.closeTo(0.5, 2),
    });
    // Rotary tables so small that each stage keeps its own are no parameters either.
    const short = join(scratch, 'short');
    await writeExport(short, { operator: 'gqa' }, { precision: 'fp16', contextLength: 128 });
    expect((await inspectModel(short, {}, { batch: 1 })).weights.parameters).toBe(plain.parameters);
    expect(await of('int8')).toMatchObject({ activations: 'int8', moreParameters: 0, ratio: expect.closeTo(0.25, 1) });
  });

  it('counts a tied embedding once', async () => {
    const tied = join(scratch, 'tied');
    await writeExport(tied, { operator: 'eager', scaling: 'sdpa', mask: 'where' }, { tied: true });
    const { weights, form } = await inspectModel(tied, {}, { batch: 1 });
    expect(form).toMatchObject({ attentionOperators: ['MatMul'] });
    const ofStages = weights.stages.reduce((sum, { parameters }) => sum + parameters, 0);
    expect(ofStages - weights.parameters).toBeGreaterThanOrEqual(264 * hiddenSize);
    expect(ofStages - weights.parameters).toBeLessThan(264 * hiddenSize + 100);
  });

  it('takes the variant of --weights, else of LAMINA_ONNX_VARIANT, and lists what there is', () => {
    const variantOf = (printed: { stdout: string }) => JSON.parse(printed.stdout).form.variant;
    expect(variantOf(lamina('model', 'inspect', dir, '--json', '--weights', 'q4'))).toBe('q4');
    const variables = { LAMINA_ONNX_VARIANT: 'int8' };
    expect(variantOf(laminaWith(variables, 'model', 'inspect', dir, '--json'))).toBe('int8');
    expect(variantOf(laminaWith(variables, 'model', 'inspect', dir, '--json', '--weights', 'fp16'))).toBe('fp16');
    // Before anything is started.
    for (const command of ['inspect', 'check']) {
      expect(lamina('model', command, dir, '--weights', 'q8')).toEqual(
        expect.objectContaining({
          status: 1,
          stdout: '',
          stderr: `lamina: ${dir}: has the variants bnb4, fp16, fp32, int8, q4, not q8; name one that it has [model_invalid]\n`,
        }),
      );
    }
    expect(laminaWith(variables, 'model', 'check', TINY).stderr).toMatch(
      /has no ONNX decoder, so none of the variant int8/,
    );
  });

  it('beside a checkpoint, a name is a format first', async () => {
    const both = join(scratch, 'both');
    await writeExport(both, { operator: 'gqa' }, { precision: 'int8' });
    await writeExport(both, { operator: 'gqa' }, { precision: 'q4' });
    await writeRandomCheckpoint(both);
    const found = async (given: string | undefined, variables = {}) => {
      const { dir: _, ...choice } = await findWeights(both, given, variables);
      return choice;
    };
    expect(await found('int8')).toEqual({ weights: 'int8' });
    expect(await found('q4')).toEqual({ variant: 'q4' });
    expect(await found(undefined)).toEqual({ weights: 'f32' });
    expect(await found(undefined, { LAMINA_ONNX_VARIANT: 'int8' })).toEqual({ weights: 'f32', variant: 'int8' });
    await expect(found('q8')).rejects.toThrow(/none of: checkpoint, .* nor of the ONNX variants int8, q4/);
  });
});

describe('lamina model synth', () => {
  it('names the shapes that there are', () => {
    const printed = lamina('model', 'synth', 'gpt-5');
    expect(printed).toMatchObject({ status: 1, stdout: '' });
    expect(printed.stderr).toMatch(/smollm2-135m.*llama-3-8b.*\[config_invalid\]/);
    expect(lamina('model', 'synth', 'smollm2-135m', join(scratch, 'x'), '--weights', 'int4').stderr).toContain(
      'bf16 or f16',
    );
    expect(existsSync(join(scratch, 'x'))).toBe(false);
  });
});

describe('lamina model pull', () => {
  it('fails in one line without a network, and for what is no repository', () => {
    expect(lamina('model', 'pull', 'a/b').stderr).toMatch(/^lamina: no connection to .*HF_ENDPOINT \[unavailable\]\n$/);
    expect(lamina('model', 'pull', 'b').stderr).toMatch(/names no repository.*\[config_invalid\]\n$/);
  });

  it('shows rate and time left, on a terminal in one line that is never too wide', () => {
    let nowMs = 0;
    const written: string[] = [];
    const screen = { isTTY: true, columns: 70, write: (text: string) => written.push(text) };
    const shown = showPull(screen, new PullMeter(() => nowMs));
    const progress = { repo: 'a/b', file: 'model-00001-of-00009.safetensors', totalBytes: 100e6, resumedBytes: 20e6 };
    shown.onProgress({ ...progress, doneBytes: 20e6 });
    nowMs = 4000;
    shown.onProgress({ ...progress, doneBytes: 100e6 });
    shown.done();
    expect(written[0]).toBe('a/b: continuing, 19.1 MiB are here already\n');
    const lines = written.slice(1, -1).map((text) => text.replace('\r\u001b[2K', ''));
    expect(lines.every((line) => line.length < 70)).toBe(true);
    expect(lines.at(-1)).toMatch(/100 % 95.4 MiB of 95.4 MiB {3}19.1 MiB\/s/);
    expect(written.at(-1)).toBe('\n');
  });

  it('has no rate from bytes that were there before, and none left over from a file that began anew', () => {
    let nowMs = 0;
    const meter = new PullMeter(() => nowMs);
    expect(meter.update({ doneBytes: 500, totalBytes: 1500 })).toEqual({ bytesPerSecond: 0, secondsLeft: null });
    nowMs = 1000;
    expect(meter.update({ doneBytes: 1000, totalBytes: 1500 })).toEqual({ bytesPerSecond: 500, secondsLeft: 1 });
    nowMs = 1500;
    expect(meter.update({ doneBytes: 0, totalBytes: 1500 }).secondsLeft).toBeNull();
  });
});

describe('lamina model check', () => {
  const logits = [Float32Array.of(0, 3, 1), Float32Array.of(2, 2 - 1e-5, 0)];
  const expected = { tokenIds: [1, 0], logits };
  const logprob = (row: number, token: number): number => {
    const values = logits[row]!;
    return values[token]! - Math.log(values.reduce((sum, value) => sum + Math.exp(value), 0));
  };
  const step = (row: number, token: number, error = 0): DistributedToken => {
    return { token, logprob: logprob(row, token) + error, top: [{ token, logprob: logprob(row, token) }] };
  };

  const tolerance = LOGPROB_TOLERANCE.float32;
  const context: CheckContext = {
    attentionShards: 2,
    form: { kind: 'checkpoint', weights: 'f32' },
    activations: 'float32',
  };

  it('is equal where every token is, and tells the worst difference', () => {
    const comparison = comparePrompt('x', 3, expected, [step(0, 1), step(1, 0, 5e-4)], tolerance);
    expect(comparison).toMatchObject({ comparedTokens: 2, difference: null });
    expect(comparison.worstLogprobDifference).toBeCloseTo(5e-4, 6);
    expect(describeCheck([comparison], context)).toMatch(/^equal: 2 tokens on 2 attention shards .*f32 weights/m);
  });

  it('tells a tie from a difference', () => {
    expect(comparePrompt('x', 3, expected, [step(0, 1), step(1, 1)], tolerance).difference).toEqual({
      index: 1,
      expected: 0,
      actual: 1,
      isTie: true,
    });
    const wrong = comparePrompt('x', 3, expected, [step(0, 2), step(1, 0)], tolerance);
    expect(wrong).toMatchObject({ comparedTokens: 0, difference: { index: 0, expected: 1, actual: 2, isTie: false } });
    expect(describeCheck([wrong], context)).toContain('DIFFERENT in 1 of 1 prompts');
  });

  it('is no match where the answer ends early or a log-probability is missing', () => {
    expect(comparePrompt('x', 3, expected, [step(0, 1)], tolerance).difference).toMatchObject({
      actual: null,
      isTie: false,
    });
    const missing = comparePrompt('x', 3, expected, [{ ...step(0, 1), logprob: Number.NaN }, step(1, 0)], tolerance);
    expect(missing.worstLogprobDifference).toBe(Number.POSITIVE_INFINITY);
    expect(describeCheck([missing], context)).toContain('DIFFERENT in 1 of 1 prompts: 2 tokens');
  });

  it('allows for what rounding explains, and for no more, though tokens are equal', () => {
    const shifted = [step(0, 1), step(1, 0, 0.05)];
    expect(describeCheck([comparePrompt('x', 3, expected, shifted, tolerance)], context)).toContain('DIFFERENT');
    const half = comparePrompt('x', 3, expected, shifted, LOGPROB_TOLERANCE.float16);
    expect(describeCheck([half], { ...context, activations: 'float16' })).toMatch(
      /^equal: .*\n.*half precision explains 0.1$/m,
    );
  });
});

it('figures are short', () => {
  expect([0, 1023, 1536, 150 * 1024, 3 * 1024 ** 3].map(bytesText)).toEqual([
    '0 B',
    '1023 B',
    '1.5 KiB',
    '150 KiB',
    '3.0 GiB',
  ]);
  expect([7, 1_312_384, 8e9].map(countText)).toEqual(['7', '1.31 M', '8.00 G']);
  expect([0.2, 75, 3725].map(durationText)).toEqual(['0:01', '1:15', '1:02:05']);
});
